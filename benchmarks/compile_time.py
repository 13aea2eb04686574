"""How long the U-Net of Stable Diffusion XL compiles, with and without loops over its blocks.

    python -m benchmarks.compile_time

Traces, lowers and compiles for this machine's CPU; nothing runs. Prints seconds of all threads'
processor time, which other programs hardly change.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from latent_diffusion.nets.attention import SpatialTransformer
from latent_diffusion.nets.unet import UNet
from latent_diffusion.types import Conditioning

FIELDS: dict[str, Any] = {
    "channel_mult": (1, 2, 4),
    "attention_resolutions": (4, 2),
    "num_head_channels": 64,
    "transformer_depth": (1, 2, 10),
    "vector_projection": True,
}


def shape(*sides: int) -> jax.ShapeDtypeStruct:
    """The shape of a float32 array."""
    return jax.ShapeDtypeStruct(sides, jnp.float32)


def unet(scan: bool) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A forward pass for one picture of 1024², and its inputs."""
    module = UNet(**FIELDS, scan=scan)
    told = Conditioning(context=shape(1, 77, 2048), vector=shape(1, 2816))
    inputs = (shape(1, 128, 128, 4), shape(1), told)
    return module.apply, (jax.eval_shape(module.init, jax.random.key(0), *inputs), *inputs)


def transformer(scan: bool) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """One of its transformers with ten blocks."""
    module = SpatialTransformer(20, 64, 10, scan=scan)
    inputs = (shape(1, 32, 32, 1280), shape(1, 77, 2048))
    return module.apply, (jax.eval_shape(module.init, jax.random.key(0), *inputs), *inputs)


def gradient(scan: bool) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The gradient of that transformer's parameters."""
    apply, inputs = transformer(scan)
    return jax.grad(lambda *given: jnp.sum(apply(*given))), inputs


def seconds(function: Callable[..., Any], inputs: tuple[Any, ...]) -> tuple[float, float]:
    """Processor time of tracing with lowering, and of compiling."""
    start = time.process_time()
    lowered = jax.jit(function).lower(*inputs)
    middle = time.process_time()
    lowered.compile()
    return middle - start, time.process_time() - middle


def main() -> None:
    """Print a row of a Markdown table for each."""
    for make in (transformer, gradient, unet):
        for scan in (True, False):
            traced, compiled = seconds(*make(scan))
            print(f"| {make.__name__} | {scan} | {traced:.1f} | {compiled:.1f} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
