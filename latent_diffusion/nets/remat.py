"""Which activations a backward pass recomputes: less memory for more time."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from latent_diffusion.core.types import lookup

# "full" stores only the inputs of blocks; "dots_saveable" also stores matrix products.
REMAT: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "full": None,
    "dots_saveable": jax.checkpoint_policies.dots_saveable,
    "dots_with_no_batch_dims_saveable": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def rematerialised(module: nn.Module, block: Any, **options: Any) -> Any:
    """The module class `block`, whose activations are recomputed as the field `module.remat` says.

    remat: a name of REMAT, or a boolean for "full" and "none". While a module creates its
    parameters nothing is recomputed, so that an array's equations don't lie in those of a whole
    block. options: arguments of `nn.remat`.
    """
    remat: Any = module.remat  # type: ignore[attr-defined]
    remat = {False: "none", True: "full"}.get(remat, remat)
    policy = lookup(REMAT, remat, f"{type(module).__name__.lower()}.remat")
    if remat == "none" or module.is_initializing():
        return block
    return nn.remat(block, policy=policy, **options)
