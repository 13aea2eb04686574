"""The shapes of a module's parameters, which the tensors of a file must have."""

import functools
from typing import Any

import flax.linen as nn
import jax

from latent_diffusion.core.types import Params


def parameter_shapes(module: nn.Module, *inputs: Any) -> Params:
    """The tree of parameter shapes of a module.

    inputs: trees of `array`s for the module's `__call__`. They must be hashable, so that a batch is
    a FrozenDict.
    """
    return jax.tree.map(lambda leaf: leaf, _init_shapes(module, *inputs)).get("params", {})


def array(*shape: int | None, dtype: str = "float32") -> Any:
    """A ShapeDtypeStruct; None where a size is None or 0."""
    return jax.ShapeDtypeStruct(shape, dtype) if all(shape) else None


@functools.lru_cache(maxsize=128)
def _init_shapes(module: nn.Module, *inputs: Any) -> Params:
    return jax.eval_shape(module.init, jax.random.key(0), *inputs)
