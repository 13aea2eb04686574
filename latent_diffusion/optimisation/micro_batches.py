"""Micro-batches: a batch is computed part by part, with less memory and the same results.

Part j of n has the examples j, j + n, j + 2n … Devices hold contiguous blocks of a batch, so each
device has a share of every part, and nothing moves between devices.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from latent_diffusion.core.types import PyTree


def value_and_grad_in_parts(loss_fn: Callable[..., Any], count: int) -> Callable[..., Any]:
    """`jax.value_and_grad(loss_fn, has_aux=True)` in `count` parts of the batch.

    loss_fn(params, *examples) -> (mean loss, aux): the leaves of `examples` and of aux have a
    leading axis B. Only one part's activations are in memory at a time.
    """
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    if count == 1:
        return value_and_grad

    def run(params: PyTree, *examples: PyTree) -> Any:
        def add(total: PyTree, part: PyTree) -> tuple[PyTree, PyTree]:
            (loss, aux), grads = value_and_grad(params, *part)
            return jax.tree.map(jnp.add, total, (loss, grads)), aux

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        total, aux = _scan(add, zero, _split(examples, count))
        loss, grads = jax.tree.map(lambda x: x / count, total)
        return (loss, _join(aux)), grads

    return run


def in_parts(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """`function(params, *examples)` in `count` parts of the batch, for differentiation.

    All leaves of `examples` and of the result have a leading axis B. The loop saves no activations:
    the backward pass computes each part again.
    """
    if count == 1:
        return function

    def run(params: PyTree, *examples: PyTree) -> PyTree:
        part = jax.checkpoint(lambda examples: function(params, *examples), prevent_cse=False)
        _, out = _scan(lambda _, examples: (None, part(examples)), None, _split(examples, count))
        return _join(out)

    return run


def _scan(step: Callable[..., Any], start: PyTree, parts: PyTree) -> Any:
    """`jax.lax.scan`; on CPUs it is unrolled, since gradients of convolutions are 30 times slower
    in a loop there. Elsewhere the loop bounds the memory.
    """
    written_out = functools.partial(jax.lax.scan, step, unroll=True)
    loop = functools.partial(jax.lax.scan, step)
    return jax.lax.platform_dependent(start, parts, cpu=written_out, default=loop)


def _split(tree: PyTree, count: int) -> PyTree:
    """[B ...] leaves as [count B/count ...]."""

    def split(x: jax.Array) -> jax.Array:
        if x.shape[0] % count:
            raise ValueError(f"{x.shape[0]} examples a device don't divide into {count} parts")
        return jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0)

    return jax.tree.map(split, tree)


def _join(tree: PyTree) -> PyTree:
    """Undo `_split`."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), tree)
