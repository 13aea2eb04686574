"""Weights in eight bits: integers, and a scale for each output channel.

A kernel [... out] takes a quarter of the memory that it has in float32. Layers read it in the
floating-point type in which they compute; nothing is trained in eight bits.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from latent_diffusion.core.types import Array, Params

COMPUTE = "bfloat16"  # the dtype of activations, and of parameters that are no kernels
_LARGEST = 127  # the largest integer; -128 isn't used, so that integers are symmetric around 0


class EightBits(flax.struct.PyTreeNode):
    """A kernel [... out] as values int8 [... out] times scale float32 [out].

    dtype: type of the weights that a layer reads. NumPy functions accept the kernel as an array.
    """

    values: Any
    scale: Any
    dtype: Any = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """The kernel's shape."""
        return tuple(self.values.shape)

    def weights(self) -> Array:
        """The rounded weights."""
        return (self.values * self.scale).astype(self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.weights(), dtype)


def in_eight_bits(path: str, array: Any, dtype: Any = COMPUTE) -> Any:
    """A parameter for inference: a kernel in eight bits, all other floats in `dtype`.

    An output's scale makes its largest weight 127: errors are at most 1/254 of that weight.
    """
    if not np.issubdtype(array.dtype, np.floating):
        return jnp.asarray(array)
    if not path.endswith("kernel") or array.ndim < 2:
        return jnp.asarray(array, dtype)
    scale = abs(array).max(axis=tuple(range(array.ndim - 1))) / _LARGEST
    values = jnp.rint(array / jnp.where(scale == 0, 1, scale)).astype(jnp.int8)
    return EightBits(values, jnp.asarray(scale, jnp.float32), np.dtype(dtype))


def layer_params(params: Params, now: Array | None = None) -> Params:
    """The parameters as layers read them.

    now: an array that a loop computes anew in each step. With it, the weights are converted in each
    step, layer by layer, and aren't all in memory for the whole loop.
    """
    if not any(map(_is_kernel, jax.tree.leaves(params, is_leaf=_is_kernel))):
        return params
    if now is not None:
        params, _ = jax.lax.optimization_barrier((params, now))
    return jax.tree.map(lambda x: x.weights() if _is_kernel(x) else x, params, is_leaf=_is_kernel)


def _is_kernel(leaf: Any) -> bool:
    return isinstance(leaf, EightBits)
