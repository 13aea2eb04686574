"""The posterior of a KL autoencoder: a Gaussian with diagonal covariance (Kingma and Welling)."""

import math

import flax.struct
import jax
import jax.numpy as jnp

from latent_diffusion.core.rng import normal_per_example
from latent_diffusion.core.types import Array, Float, Keys


@flax.struct.dataclass
class DiagonalGaussian:
    """q(z|x) = N(mean, diag exp(logvar)), one per example; both fields [B h w c]."""

    mean: jax.Array
    logvar: jax.Array

    @classmethod
    def from_moments(cls, moments: Float[Array, "B h w c2"]) -> "DiagonalGaussian":
        """Split an encoder's output: half of its channels is the mean, half the log-variance.

        Both have at least float32; the log-variance is clamped to [−30, 20].
        """
        dtype = jnp.promote_types(moments.dtype, jnp.float32)
        mean, logvar = jnp.split(moments.astype(dtype), 2, axis=-1)
        return cls(mean, jnp.clip(logvar, -30.0, 20.0))

    @property
    def std(self) -> Float[Array, "B h w c"]:
        """Standard deviation."""
        return jnp.exp(0.5 * self.logvar)

    @property
    def var(self) -> Float[Array, "B h w c"]:
        """Variance."""
        return jnp.exp(self.logvar)

    def sample(self, keys: Keys) -> Float[Array, "B h w c"]:
        """mean + std · eps, with eps of example b drawn from keys[b]."""
        return self.mean + self.std * normal_per_example(keys, self.mean.shape[1:])

    def mode(self) -> Float[Array, "B h w c"]:
        """The mean."""
        return self.mean

    def kl(self, other: "DiagonalGaussian | None" = None) -> Float[Array, " B"]:
        """KL(self ‖ other) in nats, summed over h, w, c; `other` None is the standard normal."""
        mean, logvar = (0.0, 0.0) if other is None else (other.mean, other.logvar)
        log_ratio = self.logvar - logvar  # its exp doesn't overflow where a quotient of exps would
        square = jnp.square(self.mean - mean) * jnp.exp(-logvar)
        terms = square + jnp.exp(log_ratio) - 1.0 - log_ratio
        return 0.5 * jnp.sum(terms, axis=(1, 2, 3))

    def nll(self, x: Float[Array, "B h w c"]) -> Float[Array, " B"]:
        """−log density of x in nats, summed over h, w, c."""
        terms = math.log(2.0 * math.pi) + self.logvar + jnp.square(x - self.mean) / self.var
        return 0.5 * jnp.sum(terms, axis=(1, 2, 3))
