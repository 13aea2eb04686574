"""Data whose optimal denoiser and probability flow have closed forms, to check samplers.

Each element of a latent is drawn independently from a mixture of Gaussians of equal width.
"""

import flax.struct
import jax
import jax.numpy as jnp

from latent_diffusion.core.types import Array, Float
from latent_diffusion.process.diffusion import Denoiser, Prediction
from latent_diffusion.process.schedules import NoiseSchedule, Timestep


@flax.struct.dataclass
class Mixture:
    """p(z_0) = Σ_k weights_k N(means_k, std²); a single mean makes it Gaussian."""

    means: Float[Array, " K"]
    std: Float[Array, ""]
    weights: Float[Array, " K"]

    def moments(self) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Mean and standard deviation."""
        mean = jnp.sum(self.weights * self.means)
        spread = jnp.sum(self.weights * (self.means - mean) ** 2)
        return mean, jnp.sqrt(self.std**2 + spread)

    def denoiser(self, schedule: NoiseSchedule) -> Denoiser:
        """E[z_0 | z_t] and E[eps | z_t]."""

        def denoise(z_t: Array, t: Array) -> Prediction:
            alpha, sigma = schedule.alpha_t(t), schedule.sigma_t(t)
            variance = (alpha * self.std) ** 2 + sigma**2
            away = z_t[..., None] - alpha * self.means
            share = jax.nn.softmax(jnp.log(self.weights) - 0.5 * away**2 / variance)
            z_0 = self.means + alpha * self.std**2 / variance * away
            eps = sigma / variance * away
            return Prediction(jnp.sum(share * z_0, -1), jnp.sum(share * eps, -1))

        return denoise

    def flow(
        self,
        schedule: NoiseSchedule,
        z: Float[Array, "B *latent"],
        start: Timestep,
        end: Timestep,
    ) -> Float[Array, "B *latent"]:
        """The latents to which the probability flow takes z from timestep `start` to `end`.

        In one dimension the flow keeps quantiles, so it is inverted by bisection; exact to float32
        for one Gaussian.
        """
        alpha_s, sigma_s = schedule.alpha_t(start), schedule.sigma_t(start)
        alpha_e, sigma_e = schedule.alpha_t(end), schedule.sigma_t(end)
        width_s = jnp.hypot(alpha_s * self.std, sigma_s)
        width_e = jnp.hypot(alpha_e * self.std, sigma_e)
        if self.means.shape[0] == 1:
            mean = self.means[0]
            return alpha_e * mean + width_e / width_s * (z - alpha_s * mean)

        def log_odds(x: Array, alpha: Array, width: Array) -> Array:
            u = (x[..., None] - alpha * self.means) / width
            below = jax.nn.logsumexp(jax.scipy.stats.norm.logcdf(u), -1, b=self.weights)
            return below - jax.nn.logsumexp(jax.scipy.stats.norm.logcdf(-u), -1, b=self.weights)

        wanted = log_odds(z, alpha_s, width_s)
        reach = jnp.max(jnp.abs(self.means)) + 10 * width_e

        def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = bounds
            middle = 0.5 * (low + high)
            above = log_odds(middle, alpha_e, width_e) > wanted
            return jnp.where(above, low, middle), jnp.where(above, middle, high)

        low, high = jax.lax.fori_loop(0, 40, halve, (z * 0 - reach, z * 0 + reach))
        return 0.5 * (low + high)
