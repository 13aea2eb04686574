"""What computing keys, values and timestep embeddings once per sampling call gains.

    python benchmarks/prepared_sampling.py

Runs twenty guided DDIM steps of a small U-Net with a context of 77×768 both ways, alternately, and
prints the median seconds of each and their ratio.
"""

import statistics
import time

import jax
import jax.numpy as jnp

from latent_diffusion.conditioners import make_conditioner
from latent_diffusion.denoiser import Denoiser
from latent_diffusion.guidance import classifier_free
from latent_diffusion.models.unet import UNet
from latent_diffusion.rng import example_keys, normal_per_example
from latent_diffusion.samplers import SAMPLERS
from latent_diffusion.schedules import make_schedule, spacing
from latent_diffusion.types import Conditioning

SHAPE, STEPS, RUNS, SCALE = (8, 8, 4), 20, 9, 5.0


def main() -> None:
    """Time both."""
    unet = UNet(4, 64, (1, 2), 1, (1, 2), num_heads=4)
    null, cond = (
        Conditioning(context=jax.random.normal(jax.random.key(i), (1, 77, 768))) for i in (0, 1)
    )
    init = jax.jit(unet.init)(jax.random.key(2), jnp.zeros((1, *SHAPE)), jnp.zeros(1), cond)
    params = {"unet": init["params"]}
    denoiser = Denoiser(params, make_schedule(), unet, make_conditioner({}), "eps")
    timesteps = spacing("trailing", denoiser.schedule, STEPS)
    keys = example_keys(jax.random.key(3), 1)

    @jax.jit
    def once(denoiser):
        return denoiser.sample(keys, cond, null, timesteps, SHAPE, guidance_scale=SCALE)

    @jax.jit
    def every_step(denoiser):
        schedule = denoiser.schedule
        guided = classifier_free(denoiser.denoise, schedule, "eps", cond, null, SCALE)
        z_T = normal_per_example(jax.vmap(jax.random.split)(keys)[:, 0], SHAPE)
        return SAMPLERS["ddim"](guided, z_T, timesteps, schedule)

    seconds: dict[str, list[float]] = {"once": [], "every step": []}
    for run in range(RUNS + 1):
        for name, sample in (("once", once), ("every step", every_step)):
            start = time.perf_counter()
            sample(denoiser).block_until_ready()
            if run:  # the first compiles
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(", ".join(f"{name}: {value:.3f} s" for name, value in medians.items()))
    print(f"ratio {medians['every step'] / medians['once']:.2f}")


if __name__ == "__main__":
    main()
