"""Low-rank adaptation (Hu et al. 2022): train W + (α/r)·A·B for frozen W, with narrow A and B.

A tree of factors stands beside a tree of parameters: {"down": A [in r], "up": B [r out]} under the
path of every adapted kernel [in out].
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from latent_diffusion.types import Config, Params


def init(rng: jax.Array, params: Params, config: Config) -> Params:
    """Factors for every kernel whose path matches `targets`; A is random and B zero, so W stays.

    config: `rank` and `targets` (regular expressions). Raises ValueError where no kernel matches,
    and where a kernel that is no matrix matches.
    """
    flat = flatten_dict(params, sep="/")
    targets = [path for path in flat if any(re.search(t, path) for t in config["targets"])]
    targets = [path for path in targets if path.endswith("kernel")]
    if not targets:
        raise ValueError(f"lora.targets={tuple(config['targets'])} match no kernel")
    factors = {}
    for path, key in zip(targets, jax.random.split(rng, len(targets)), strict=True):
        if flat[path].ndim != 2:
            raise ValueError(f"lora.targets match {path}, of shape {flat[path].shape}: no matrix")
        rows, columns = flat[path].shape
        factors[path] = {
            "down": jax.random.normal(key, (rows, config["rank"])) * rows**-0.5,
            "up": jnp.zeros((config["rank"], columns)),
        }
    return unflatten_dict(factors, sep="/")


def merge(params: Params, factors: Params, alpha: float | int) -> Params:
    """The parameters with (α/r)·A·B added to the adapted kernels."""
    flat = flatten_dict(params, sep="/")
    for path, pair in flatten_factors(factors).items():
        flat[path] = flat[path] + alpha / pair["down"].shape[1] * (pair["down"] @ pair["up"])
    return unflatten_dict(flat, sep="/")


def flatten_factors(factors: Params) -> dict[str, dict[str, Any]]:
    """The factors {"down", "up"} by the path of their kernel."""
    by_kernel: dict[str, dict[str, Any]] = {}
    for path, leaf in flatten_dict(factors, sep="/").items():
        kernel, _, name = path.rpartition("/")
        by_kernel.setdefault(kernel, {})[name] = leaf
    return by_kernel
