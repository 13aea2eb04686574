"""The adversarial half of perceptual compression (Esser et al. 2021, eq. 6–7).

Each loss takes the discriminator's logits, of any shape, and returns one number.
"""

import jax
import jax.numpy as jnp

from latent_diffusion.core.types import Array, Float, Int


def hinge_d_loss(
    logits_real: Float[Array, "..."], logits_fake: Float[Array, "..."]
) -> Float[Array, ""]:
    """Half the sum of mean relu(1 − D(x)) and mean relu(1 + D(x_rec)) (Lim and Ye, 2017)."""
    return 0.5 * (
        jnp.mean(jax.nn.relu(1.0 - logits_real)) + jnp.mean(jax.nn.relu(1.0 + logits_fake))
    )


def vanilla_d_loss(
    logits_real: Float[Array, "..."], logits_fake: Float[Array, "..."]
) -> Float[Array, ""]:
    """Half the sum of the two cross-entropies, real = 1 and fake = 0 (Goodfellow et al. 2014)."""
    return 0.5 * (jnp.mean(jax.nn.softplus(-logits_real)) + jnp.mean(jax.nn.softplus(logits_fake)))


D_LOSSES = {"hinge": hinge_d_loss, "vanilla": vanilla_d_loss}


def generator_loss(logits_fake: Float[Array, "..."]) -> Float[Array, ""]:
    """−mean D(x_rec), the loss of the autoencoder for both losses of the discriminator."""
    return -jnp.mean(logits_fake)


def adaptive_weight(
    rec_grad: Float[Array, "..."], adv_grad: Float[Array, "..."], maximum: float = 1e4
) -> Float[Array, ""]:
    """Weight that gives the adversarial loss as long a gradient as the reconstruction has.

    clip(|rec_grad| / (|adv_grad| + 1e-4), 0, maximum), a constant for differentiation (Esser et
    al. 2021, eq. 7). The arguments are the two losses' gradients at the decoder's last kernel.
    On several devices, average the gradients first: the norm of local gradients is not the norm
    of their mean.
    """
    weight = jnp.linalg.norm(rec_grad.ravel()) / (jnp.linalg.norm(adv_grad.ravel()) + 1e-4)
    return jax.lax.stop_gradient(jnp.clip(weight, 0.0, maximum))


def gate(step: int | Int[Array, ""], start: int, ramp_steps: int = 0) -> Float[Array, ""]:
    """0 before step `start`, 1 from there on, or rising linearly to 1 over `ramp_steps` steps.

    With a ramp, step `start` is already the first of `ramp_steps` equal increments.
    """
    steps_in = jnp.asarray(step, jnp.float32) - start + 1.0
    return jnp.clip(steps_in / max(ramp_steps, 1), 0.0, 1.0)
