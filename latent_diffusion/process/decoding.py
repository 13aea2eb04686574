"""Drawing codes from logits: what a prior does in place of a sampler.

Noise is given as Gumbel variables, the largest of logits + temperature · Gumbel being a draw from
softmax(logits / temperature); so temperature 0 takes the likeliest, and a test can give its noise.
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
    """The logits, −∞ for codes that can't be drawn.

    top_k: how many of the likeliest can; None is all. top_p: then, the likeliest that together have
    this probability at the temperature (Holtzman et al. 2020), at least one; None is all.
    """
    if top_k is None and top_p is None:
        return logits
    ordered = -jnp.sort(-logits, axis=-1)
    kept = jnp.ones(ordered.shape, bool)
    if top_k is not None:
        kept = jnp.broadcast_to(jnp.arange(logits.shape[-1]) < top_k, ordered.shape)
    if top_p is not None:
        tempered = ordered / jnp.maximum(temperature, 1e-6)
        share = jax.nn.softmax(jnp.where(kept, tempered, -jnp.inf))
        kept &= jnp.cumsum(share, -1) - share < top_p
    least = jnp.min(jnp.where(kept, ordered, jnp.inf), -1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)


def drawn(
    logits: Float[Array, "... K"], gumbel: Float[Array, "... K"], temperature: Number
) -> Int[Array, "..."]:
    """A code for each row of logits."""
    return jnp.argmax(logits + temperature * gumbel, -1).astype(jnp.int32)


def masked_share(progress: Number) -> Number:
    """The share of codes that stays masked once `progress` ∈ [0, 1] of the steps are done: cosine.

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
    """Which codes are masked again: the `count` of the unknown ones that are least certain.

    log_probs: of the codes that were drawn. temperature: of the noise in their order (Chang et al.
    2022, appendix). At least one stays masked, and at least one does not.
    """
    confidence = jnp.where(unknown, log_probs + temperature * gumbel, jnp.inf)
    count = jnp.maximum(1, jnp.minimum(jnp.sum(unknown, 1) - 1, count))
    cut_off = jnp.take_along_axis(jnp.sort(confidence, 1), count[:, None], 1)
    return confidence < cut_off


def local_place(place: Int[Array, ""] | int, size: int, window: int) -> Int[Array, ""]:
    """Where a code of a row of `size` lies in the window in which it is drawn.

    As in taming-transformers' scripts: codes before are seen, half a window of them, except near
    the start and the end, where the window stops (Esser et al. 2021, section 3.3).
    """
    half, left = window // 2, size - place
    return jnp.where(place <= half, place, jnp.where(left < half, window - left, half))
