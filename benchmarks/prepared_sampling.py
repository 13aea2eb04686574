"""The gain of computing keys, values and timestep embeddings once per sampling call.

    python -m benchmarks.prepared_sampling

Runs guided DDIM steps of a small U-Net with a context of 77×768 both ways, alternately, with
guidance at every step and in an interval, and prints the median seconds of each and their ratio.
It counts the processor's seconds, which other work on the machine hardly changes.
"""

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from latent_diffusion.core.rng import example_keys, init_key, normal_per_example, sampling_keys
from latent_diffusion.core.types import Conditioning
from latent_diffusion.models import sampling
from latent_diffusion.models.denoiser import Denoiser
from latent_diffusion.nets.conditioners import make_conditioner
from latent_diffusion.nets.unet import UNet
from latent_diffusion.process.guidance import classifier_free
from latent_diffusion.process.plan import plan
from latent_diffusion.process.samplers import SAMPLERS
from latent_diffusion.process.schedules import make_schedule

SHAPE, STEPS, RUNS, SCALE = (8, 8, 4), 20, 9, 5.0
INTERVALS = {"at every step": None, "in an interval": (200, 800)}


def median_seconds(calls: dict[str, Callable[[], jax.Array]], runs: int = RUNS) -> dict[str, float]:
    """Processor seconds of each call, taken in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for run in range(runs + 1):
        for name, call in calls.items():
            start = time.process_time()
            call().block_until_ready()
            if run:  # the first compiles
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    """Time both ways and print the medians."""
    unet = UNet(4, 64, (1, 2), 1, (1, 2), num_heads=4)
    null, cond = (
        Conditioning(context=jax.random.normal(jax.random.key(i), (1, 77, 768))) for i in (0, 1)
    )
    key = init_key(2)
    init = jax.jit(unet.init)(key, jnp.zeros((1, *SHAPE)), jnp.zeros(1), cond)
    denoiser = Denoiser(
        {"unet": init["params"]}, make_schedule(), unet, make_conditioner({}), "eps"
    )
    keys = sampling_keys(example_keys(jax.random.key(3), 1))

    def planned(interval):
        own = {"num_steps": STEPS, "guidance_scale": SCALE, "guidance_interval": interval}
        return plan(denoiser.schedule, denoiser.prediction, {}, own)

    def once(denoiser, interval):
        timesteps, options = planned(interval)
        return sampling.sample(denoiser, keys, cond, null, timesteps, SHAPE, options)

    def every_step(denoiser, interval):
        schedule, network, (timesteps, _) = denoiser.schedule, denoiser.denoise, planned(interval)
        guided = classifier_free(network, schedule, "eps", cond, null, SCALE, interval=interval)
        z_T = normal_per_example(keys.start, SHAPE)
        return SAMPLERS["ddim"](guided, z_T, timesteps, schedule)

    for name, interval in INTERVALS.items():
        ways = {way.__name__: jax.jit(way, static_argnums=1) for way in (once, every_step)}
        medians = median_seconds(
            {way: lambda f=f, i=interval: f(denoiser, i) for way, f in ways.items()}
        )
        print(
            f"guidance {name}: once {medians['once']:.3f} s, "
            f"every step {medians['every_step']:.3f} s, "
            f"ratio {medians['every_step'] / medians['once']:.2f}"
        )


if __name__ == "__main__":
    main()
