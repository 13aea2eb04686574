"""Low-rank adaptation (Hu et al. 2022): train W + (α/r)·A·B for frozen W, with narrow A and B.

A tree has the factors of every adapted kernel [… in out] under the kernel's path: {"down":
A [… in r], "up": B [r out], or [1 1 r out] for a convolution}. The kind "dora" (Liu et al. 2024)
also trains the norm of each output's weights: {"magnitude": [out]}.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from latent_diffusion.core.types import Config, Number, Params
from latent_diffusion.optimisation.deltas import Array, delta, norms

KINDS = ("lora", "dora")


def init(rng: jax.Array, params: Params, config: Config) -> Params:
    """Factors for every kernel whose path matches `targets`; A is random, B zero, so W + A·B is W.

    config: `rank`, `kind`, and `targets` (regular expressions). Raises ValueError if no kernel
    matches.
    """
    if config["kind"] not in KINDS:
        raise ValueError(f"lora.kind={config['kind']!r}; known: {', '.join(KINDS)}")
    flat = flatten_dict(params, sep="/")
    kernels = [path for path in flat if path.endswith("kernel")]
    targets = [path for path in kernels if any(re.search(t, path) for t in config["targets"])]
    if not targets:
        raise ValueError(f"lora.targets={tuple(config['targets'])} match no kernel")
    factors = {}
    for path, key in zip(targets, jax.random.split(rng, len(targets)), strict=True):
        *rows, columns = flat[path].shape
        fan_in = flat[path].size // columns
        ones = [1] * (len(rows) - 1)
        factors[path] = {
            "down": jax.random.normal(key, (*rows, config["rank"])) * fan_in**-0.5,
            "up": jnp.zeros((*ones, config["rank"], columns)),
        }
        if config["kind"] == "dora":
            factors[path]["magnitude"] = magnitude(flat[path])
    return unflatten_dict(factors, sep="/")


def merge(params: Params, factors: Params, alpha: float | int) -> Params:
    """The parameters with (α/r)·A·B added to the adapted kernels."""
    flat = flatten_dict(params, sep="/")
    for path, kernel_factors in flatten_factors(factors).items():
        flat[path] = adapted(flat[path], kernel_factors, alpha)
    return unflatten_dict(flat, sep="/")


def adapted(kernel: Array, factors: dict[str, Any], alpha: Number) -> Array:
    """A kernel [… in out] with its change added."""
    rank = factors["down"].shape[-1]
    by_name = {"lora_down": _rows(factors["down"]), "lora_up": _rows(factors["up"])}
    by_name |= {"magnitude": factors["magnitude"]} if "magnitude" in factors else {}
    return kernel + delta(_rows(kernel), {**by_name, "scale": alpha / rank}).T.reshape(kernel.shape)


def magnitude(kernel: Array) -> Array:
    """The norms [out] of a kernel; a DoRA with this magnitude changes nothing at first."""
    return norms(_rows(kernel))


def _rows(kernel: Array) -> Array:
    """The kernel as a matrix [out fan-in]."""
    return kernel.reshape(-1, kernel.shape[-1]).T


def flatten_factors(factors: Params) -> dict[str, dict[str, Any]]:
    """The factors by the path of the adapted kernel."""
    by_kernel: dict[str, dict[str, Any]] = {}
    for path, leaf in flatten_dict(factors, sep="/").items():
        kernel, _, name = path.rpartition("/")
        by_kernel.setdefault(kernel, {})[name] = leaf
    return by_kernel
