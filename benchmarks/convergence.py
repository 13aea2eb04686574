"""Plot the convergence of the deterministic samplers.

    python -m benchmarks.convergence --plot=convergence.png

The data are a mixture of two Gaussians, whose denoiser and probability flow have closed forms, so
that the samplers alone cause the error. Needs matplotlib (the extra "demo").
"""

from pathlib import Path

import jax
import jax.numpy as jnp
from absl import app, flags

from benchmarks.exact import Mixture
from latent_diffusion.process.samplers import SAMPLERS
from latent_diffusion.process.samplers.table import run
from latent_diffusion.process.schedules import make_schedule
from latent_diffusion.process.spacings import spacing

DETERMINISTIC = (
    "ddim",
    "plms",
    "heun",
    "dpm2",
    "lms",
    "ipndm",
    "dpm_solver_2m",
    "dpm_solver_3m",
    "dpm_solver_pp_2m",
    "dpm_solver_pp_singlestep",
    "unipc",
    "deis",
)
PLOT = flags.DEFINE_string("plot", "convergence.png", "The picture to write.")


def errors(name: str, num_steps: tuple[int, ...]) -> list[tuple[int, float]]:
    """(network evaluations, root mean square distance from the exact flow), by number of steps."""
    schedule = make_schedule("linear", beta_start=0.0015, beta_end=0.0195)
    mixture = Mixture(jnp.array([-1.0, 1.0]), jnp.array(0.5), jnp.array([0.3, 0.7]))
    quantiles = (jnp.arange(256) + 0.5) / 256
    z_T = jax.scipy.stats.norm.ppf(quantiles).reshape(256, 1, 1, 1)
    exact = jax.jit(lambda z: mixture.flow(schedule, z, 999, 0))(z_T)
    points = []
    for count in num_steps:
        timesteps = spacing("exponential", schedule, count, last=0)
        table = SAMPLERS[name].table(schedule, timesteps)
        z = jax.jit(lambda z, table=table: run(table, mixture.denoiser(schedule), z))(z_T)
        points.append((len(table.t), float(jnp.sqrt(jnp.mean((z - exact) ** 2)))))
    return points


def draw(path: Path, num_steps: tuple[int, ...] = (8, 16, 32, 64, 128)) -> None:
    """Write the picture: error against network evaluations, both logarithmic."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 5), layout="constrained")
    for i, name in enumerate(DETERMINISTIC):
        axes.loglog(*zip(*errors(name, num_steps), strict=True), label=name, marker="ox^sD"[i % 5])
    axes.set(xlabel="network evaluations", ylabel="distance from the exact flow (rms)")
    axes.legend(fontsize="small", ncols=2)
    axes.grid(which="both", alpha=0.2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: list[str]) -> None:
    """Draw the picture that the flag names."""
    draw(Path(PLOT.value))


if __name__ == "__main__":
    app.run(main)
