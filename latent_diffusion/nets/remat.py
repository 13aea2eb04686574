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


def rematerialised(block: Any, remat: str, field: str, **options: Any) -> Any:
    """The module class `block`, whose activations are recomputed by `remat`, a name of REMAT.

    field: the config field, for the error message. options: arguments of `nn.remat`.
    """
    policy = lookup(REMAT, remat, field)
    return block if remat == "none" else nn.remat(block, policy=policy, **options)
