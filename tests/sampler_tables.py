"""Tables of samplers in one form, so that one compiled loop serves all of them."""

import jax.numpy as jnp
import numpy as np

from latent_diffusion.process.samplers.table import Table

ROWS = 130


def filled(table, rows=ROWS, columns=5):
    """The same table with every coefficient there is, and idle rows at its end."""
    count = len(table.t)

    def fill(values, idle=0.0):
        values = np.full(count, idle) if values is None else values
        return jnp.asarray(np.pad(values, (0, rows - count), constant_values=idle), jnp.float32)

    def fill_all(values):
        values = np.zeros((count, 0)) if values is None else values
        pad = ((0, rows - count), (0, columns - values.shape[1]))
        return jnp.asarray(np.pad(values, pad), jnp.float32)

    return Table(
        t=fill(table.t),
        scale=fill(np.zeros(count) if table.scale is None else table.scale, idle=1.0),
        z_0=fill_all(table.z_0),
        eps=fill_all(table.eps),
        noise=fill(table.noise),
        restart=fill(table.restart, idle=1.0),
        keep=fill(table.keep),
        correction=fill_all(table.correction),
        dropout=fill(table.dropout),
    )
