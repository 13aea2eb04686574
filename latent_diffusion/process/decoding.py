"""Drawing codes from logits, which takes the place of a sampler for a prior.

Noise is an argument, as Gumbel variables: the largest of logits + temperature · Gumbel is a draw
from softmax(logits / temperature). So temperature 0 takes the likeliest code.
"""

import jax
import jax.numpy as jnp

from latent_diffusion.core.types import Array, Bool, Float, Int, Number


def guided(
    conditional: Float[Array, "B n K"], unconditional: Float[Array, "B n K"], scale: Number
) -> Float[Array, "B n K"]:
    """Classifier-free guidance on logits: scale 1 is conditional, 0 unconditional."""
    return unconditional + scale * (conditional - unconditional)


def filtered(
    logits: Float[Array, "... K"], temperature: Number, top_k: Number, top_p: Number
) -> Float[Array, "... K"]:
    """The logits, −∞ for codes that are excluded from the draw.

    top_k: the number of likeliest codes that stay; None is all. top_p: of these, the likeliest that
    together have this probability at the temperature stay (Holtzman et al. 2020), at least one;
    None is all.
    """
    if top_k is None and top_p is None:
        return logits
    ordered = -jnp.sort(-logits, axis=-1)
    allowed = jnp.ones(ordered.shape, bool)
    if top_k is not None:
        allowed = jnp.broadcast_to(jnp.arange(logits.shape[-1]) < top_k, ordered.shape)
    if top_p is not None:
        tempered = ordered / jnp.maximum(temperature, 1e-6)
        share = jax.nn.softmax(jnp.where(allowed, tempered, -jnp.inf))
        allowed &= jnp.cumsum(share, -1) - share < top_p
    least = jnp.min(jnp.where(allowed, ordered, jnp.inf), -1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)


def drawn(
    logits: Float[Array, "... K"], gumbel: Float[Array, "... K"], temperature: Number
) -> Int[Array, "..."]:
    """A code for each row of logits."""
    return jnp.argmax(logits + temperature * gumbel, -1).astype(jnp.int32)


def masked_share(progress: Number) -> Number:
    """The cosine share of codes that are still masked after a share `progress` of the steps.

    Chang et al. 2022, section 3.3.
    """
    return jnp.cos(jnp.pi / 2 * progress)


def remasked(
    log_probs: Float[Array, "B L"],
    gumbel: Float[Array, "B L"],
    unknown: Bool[Array, "B L"],
    count: Int[Array, " B"],
    temperature: Number,
) -> Bool[Array, "B L"]:
    """Which codes are masked again: the `count` least certain of those that were masked.

    log_probs: log-probabilities of the drawn codes. unknown: which codes were masked. temperature:
    factor of the noise in the order of certainty (Chang et al. 2022, appendix). At least one code
    is masked again, and at least one isn't.
    """
    confidence = jnp.where(unknown, log_probs + temperature * gumbel, jnp.inf)
    count = jnp.maximum(1, jnp.minimum(jnp.sum(unknown, 1) - 1, count))
    cut_off = jnp.take_along_axis(jnp.sort(confidence, 1), count[:, None], 1)
    return confidence < cut_off


def local_place(place: Int[Array, ""] | int, size: int, window: int) -> Int[Array, ""]:
    """The position of code `place`, in a row of `size`, within the window in which it is drawn.

    As in taming-transformers' scripts, half a window lies before the code, except near the start
    and the end of the row, where the window stops (Esser et al. 2021, section 3.3).
    """
    half, left = window // 2, size - place
    return jnp.where(place <= half, place, jnp.where(left < half, window - left, half))
