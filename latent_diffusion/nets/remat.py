"""Choices of the activations that a backward pass recomputes: less memory for more time."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from latent_diffusion.core.types import lookup

# "full" stores the inputs of blocks alone, "dots_saveable" matrix products, too.
REMAT: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "full": None,
    "dots_saveable": jax.checkpoint_policies.dots_saveable,
    "dots_with_no_batch_dims_saveable": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def rematerialised(block: Any, remat: str, field: str, **options: Any) -> Any:
    """The module class `block`, with its activations recomputed as `remat`, a name of REMAT, says.

    field: the config's field, for the message. options: of `nn.remat`.
    """
    policy = lookup(REMAT, remat, field)
    return block if remat == "none" else nn.remat(block, policy=policy, **options)
