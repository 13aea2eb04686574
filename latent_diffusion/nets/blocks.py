"""Runs similar blocks one after the other, or as a loop, which is compiled once for all blocks."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def through(
    module: nn.Module,
    make: Callable[..., nn.Module],
    names: Sequence[str],
    h: Any,
    *shared: Any,
    scan: bool,
    own: Sequence[tuple[Any, ...]] = (),
) -> Any:
    """Pass h through the blocks `names`, in a compact module; h may be a tree, as is the result.

    make: `make(name=name)` is a block, which is called with h, `shared` and its entry of `own`.
    scan: run as a loop. Parameters keep the names of their blocks; the loop reads stacked copies.
    """
    own = own or [()] * len(names)
    # Parameters, and values for `layers.precomputed`, are made under the blocks' names.
    made_here = map(module.is_mutable_collection, ("of_context", "of_timestep"))
    if not scan or len(names) < 2 or module.is_initializing() or any(made_here):
        for name, extra in zip(names, own, strict=True):
            h = make(name=name)(h, *shared, *extra)
        return h
    block = make(parent=None)
    kinds = {kind: tree for kind, tree in module.variables.items() if names[0] in tree}
    of_blocks = [
        ({kind: tree[name] for kind, tree in kinds.items()}, extra)
        for name, extra in zip(names, own, strict=True)
    ]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *of_blocks)

    def step(h: Any, of_block: tuple[Any, tuple[Any, ...]]) -> tuple[Any, None]:
        variables, extra = of_block
        return block.apply(variables, h, *shared, *extra), None

    return jax.lax.scan(step, h, stacked)[0]
