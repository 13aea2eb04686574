"""One of two processes with three devices each: it loads its rows of a batch, and sees all."""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from latent_diffusion.runtime import parallel

RULES = ((".*", "fsdp(min_mb=0)"),)


def init(rng):
    return {"w": jax.random.normal(rng, (6, 2))}, {}


def step(state, constants, batch, rng, *, axis_name=None):
    return {"x": batch["x"], "w": jnp.tile(state["w"], (2, 1))}


def main(process, coordinator):
    """Print the number of rows, the block and the number of blocks, on four meshes."""
    jax.config.update("jax_platforms", "cpu")
    jax.distributed.initialize(coordinator, 2, int(process))
    for sizes in ({"data": 6}, {"data": 3, "tensor": 2}, {"tensor": 6}, {"data": 2, "fsdp": 3}):
        layout, rng = {"mesh": parallel.make_mesh(sizes), "rules": RULES}, jax.random.key(0)
        batch = parallel.process_rows({"x": np.arange(12)}, "mesh", layout["mesh"])
        state, _ = parallel.compile_init(init, rng, "mesh", **layout)(rng)
        assert state["w"].addressable_shards[0].data.shape[0] == 6 // layout["mesh"].shape["fsdp"]
        everything = parallel.compile_eval(step, "mesh", **layout)(state, {}, batch, rng)
        assert everything["x"].tolist() == list(range(12))
        np.testing.assert_array_equal(everything["w"][:6], init(rng)[0]["w"])
        print(len(batch["x"]), *parallel.process_shard("mesh", layout["mesh"]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
