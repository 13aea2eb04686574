"""How long networks compile with and without loops over their blocks.

    python -m benchmarks.compile_time [NAME …] [--topology=v5e:2x2]

They are the U-Net of Stable Diffusion XL, DiT-XL/2 and the MMDiT of Stable Diffusion 3 medium. The
command traces, lowers and compiles for this machine's CPU, or for a chip of a topology; nothing
runs. It prints seconds of all threads' processor time, which other programs hardly change.
"""

import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import app, flags

from latent_diffusion.core.types import Conditioning
from latent_diffusion.nets.attention import SpatialTransformer
from latent_diffusion.nets.dit import DiT
from latent_diffusion.nets.dot_product_attention import Machine, this_machine, traced_for
from latent_diffusion.nets.mmdit import MMDiT
from latent_diffusion.nets.unet import UNet
from latent_diffusion.runtime.parallel.chips import topology_devices

SDXL: dict[str, Any] = {
    "channel_mult": (1, 2, 4),
    "attention_resolutions": (4, 2),
    "num_head_channels": 64,
    "transformer_depth": (1, 2, 10),
    "vector_projection": True,
}
Case = tuple[nn.Module, tuple[Any, ...]]


def shape(*sides: int) -> jax.ShapeDtypeStruct:
    """The shape of a float32 array."""
    return jax.ShapeDtypeStruct(sides, jnp.float32)


def transformer(scan: bool) -> Case:
    """One of SDXL's transformers with ten blocks, and its inputs."""
    module = SpatialTransformer(20, 64, 10, scan=scan)
    return module, (shape(1, 32, 32, 1280), shape(1, 77, 2048))


def unet(scan: bool) -> Case:
    """SDXL's network, and its inputs for one picture of 1024²."""
    told = Conditioning(context=shape(1, 77, 2048), vector=shape(1, 2816))
    return UNet(**SDXL, scan=scan), (shape(1, 128, 128, 4), shape(1), told)


def dit(scan: bool) -> Case:
    """DiT-XL/2, and its inputs for one picture of 256²."""
    module = DiT(learned_variance=True, scan=scan)
    return module, (shape(1, 32, 32, 4), shape(1), Conditioning(vector=shape(1, 1152)))


def mmdit(scan: bool) -> Case:
    """Stable Diffusion 3 medium, and its inputs for one picture of 1024²."""
    told = Conditioning(context=shape(1, 333, 4096), vector=shape(1, 2048))
    return MMDiT(scan=scan), (shape(1, 128, 128, 16), shape(1), told)


# name -> (network, whether its gradient is compiled instead of its forward pass)
CASES: dict[str, tuple[Callable[[bool], Case], bool]] = {
    "transformer": (transformer, False),
    "transformer_gradient": (transformer, True),
    "unet": (unet, False),
    "unet_gradient": (unet, True),
    "dit": (dit, False),
    "dit_gradient": (dit, True),
    "mmdit": (mmdit, False),
    "mmdit_gradient": (mmdit, True),
}


def seconds(
    module: Any, inputs: tuple[Any, ...], gradient: bool, topology: str | None
) -> tuple[float, float]:
    """Processor time of tracing with lowering, and of compiling."""
    params = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    place, machine = None, this_machine()
    if topology is not None:
        chip = topology_devices(topology)[0]
        place, machine = jax.sharding.SingleDeviceSharding(chip), Machine(chip.platform)

    def loss(*given: Any) -> jax.Array:
        return jnp.sum(module.apply(*given))

    program = jax.jit(jax.grad(loss) if gradient else module.apply, in_shardings=place)
    start = time.process_time()
    with traced_for(machine):
        lowered = program.lower(params, *inputs)
    middle = time.process_time()
    lowered.compile()
    return middle - start, time.process_time() - middle


def main(argv: list[str]) -> None:
    """Print a row of a Markdown table for each."""
    for name in argv[1:] or CASES:
        make, gradient = CASES[name]
        for scan in (True, False):
            traced, compiled = seconds(*make(scan), gradient, TOPOLOGY.value)
            print(f"| {name} | {scan} | {traced:.1f} | {compiled:.1f} |", flush=True)


if __name__ == "__main__":
    TOPOLOGY = flags.DEFINE_string("topology", None, "A chip to compile for: v5e:2x2, v5p:2x2x1 …")
    app.run(main)
