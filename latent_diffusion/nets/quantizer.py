"""Vector quantisation: latents are entries of a learned codebook (van den Oord et al. 2017)."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from latent_diffusion.core.rng import pmean
from latent_diffusion.core.types import Array, Float, Int, Key, Keys, Params


@flax.struct.dataclass
class Quantized:
    """The result of a quantiser.

    codes: [B h w c] quantised latents, through which gradients reach the encoder.
    indices: [B h w] int32, the codes' rows in the codebook.
    loss: the loss of codebook and encoder, a mean over all elements.
    perplexity: exp(−Σ p log p) of the batch's code frequencies p; num_codes if all are equal.
    usage: number of different codes in the batch.
    """

    codes: jax.Array
    indices: jax.Array
    loss: jax.Array
    perplexity: jax.Array
    usage: jax.Array


class VectorQuantizer(nn.Module):
    """Replaces each latent vector by the nearest of `num_codes` codes; gradients pass unchanged.

    beta: weight of one of two squared errors. In the paper (eq. 3) it is the commitment
        mean((sg[e] − z)²); in the original code, and so in every released model, it is the codebook
        term mean((e − sg[z])²): `legacy=True`.
    l2_normalize: project codes and latents to the unit sphere (Yu et al. 2022, §3.2).
    ema_decay: 0 trains the parameter `embedding` by gradients. Else (0.99) a code is the moving
        average of its latents (van den Oord et al. 2017, app. A.1), and the loss is beta times the
        commitment. With `train=True` the new codes, their sums and uses are in the collection
        `codebook`; `with_moved_codes` puts the codes into the parameters after an update.
    restart_below: with `ema_decay`, a latent of the batch replaces a code whose moving average of
        uses per batch falls below this. 0: never; 0.1: after about 230 unused batches at 0.99.
    axis_name: the mapped axis over which statistics and metrics are averaged under pmap.
    """

    num_codes: int
    dim: int
    beta: float = 0.25
    legacy: bool = True
    l2_normalize: bool = False
    ema_decay: float = 0.0
    restart_below: float = 0.0
    axis_name: str | None = None

    def setup(self) -> None:
        """Codes start from U(−1/num_codes, 1/num_codes), with a count of 1 use each."""
        shape, bound = (self.num_codes, self.dim), 1.0 / self.num_codes

        def draw(key: Key[Array, ""], shape: tuple[int, ...]) -> Array:
            return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

        self.embedding = self.param("embedding", draw, shape)
        if self.restart_below and not self.ema_decay:
            raise ValueError("restart_below counts uses and needs ema_decay, e.g. 0.99")
        if self.ema_decay and self.is_mutable_collection("codebook"):
            self.uses = self.variable("codebook", "uses", jnp.ones, shape[:1])
            self.total = self.variable("codebook", "total", lambda: self.embedding)
            self.moved = self.variable("codebook", "embedding", lambda: self.embedding)

    def __call__(
        self, z: Float[Array, "B h w c"], train: bool = False, key: Key[Array, ""] | None = None
    ) -> Quantized:
        """Quantise z. `train` moves averaged codes; restarts need the same key on all devices."""
        if z.shape[-1] != self.dim:
            raise ValueError(f"the codebook has codes of width {self.dim}, got {z.shape[-1]}")
        z = self._on_sphere(z.astype(jnp.float32))
        indices = self.nearest(z)
        e = self.lookup(indices)
        commitment = jnp.mean(jnp.square(jax.lax.stop_gradient(e) - z))
        if self.ema_decay:
            loss = self.beta * commitment
        else:
            codebook = jnp.mean(jnp.square(e - jax.lax.stop_gradient(z)))
            loss = commitment + self.beta * codebook
            if not self.legacy:
                loss = self.beta * commitment + codebook
        if train and self.ema_decay and not self.is_initializing():
            self._move_codes(z.reshape(-1, self.dim), indices.ravel(), key)
        # z + (e − z) is e up to rounding, but has the derivative of z.
        return _quantized(
            z + jax.lax.stop_gradient(e - z), indices, loss, self.num_codes, self.axis_name
        )

    def nearest(self, z: Float[Array, "... c"]) -> Int[Array, "..."]:
        """Indices of the codes at the smallest Euclidean distance; among ties the first."""
        codes = self._codes()
        # |z|² is the same for all codes. Full precision: rounded products choose other codes.
        product = jnp.matmul(self._on_sphere(z), codes.T, precision=jax.lax.Precision.HIGHEST)
        distances = jnp.sum(jnp.square(codes), -1) - 2.0 * product
        return jnp.argmin(distances, -1).astype(jnp.int32)

    def lookup(self, indices: Int[Array, "..."]) -> Float[Array, "... c"]:
        """Codes at `indices`."""
        return self._codes()[indices]

    def _codes(self) -> Float[Array, "n c"]:
        return self._on_sphere(self.embedding)

    def _on_sphere(self, x: Array) -> Array:
        if not self.l2_normalize:
            return x
        return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), -1, keepdims=True), 1e-12))

    def _move_codes(
        self, z: Float[Array, "N c"], indices: Int[Array, " N"], key: Key[Array, ""] | None
    ) -> None:
        """One step of the moving averages, over the vectors of all devices."""
        z = jax.lax.stop_gradient(z)
        count = jnp.zeros(self.num_codes).at[indices].add(1.0)
        total = jnp.zeros((self.num_codes, self.dim)).at[indices].add(z)
        if self.axis_name is not None:
            count, total = jax.lax.psum((count, total), self.axis_name)
        uses = self.ema_decay * self.uses.value + (1.0 - self.ema_decay) * count
        total = self.ema_decay * self.total.value + (1.0 - self.ema_decay) * total
        if self.restart_below:
            if key is None:
                raise ValueError("restart_below draws latents at random and needs a key")
            dead = uses < self.restart_below
            uses = jnp.where(dead, 1.0, uses)
            total = jnp.where(dead[:, None], self._draw_latents(key, z), total)
        # Laplace smoothing keeps the quotient finite for codes that are hardly ever used.
        smoothed = (uses + 1e-5) / (uses.sum() + 1e-5 * self.num_codes) * uses.sum()
        self.uses.value, self.total.value = uses, total
        self.moved.value = total / smoothed[:, None]

    def _draw_latents(self, key: Key[Array, ""], z: Float[Array, "N c"]) -> Float[Array, "n c"]:
        """A vector of the global batch for every code, the same on every number of devices."""
        if self.axis_name is None:
            return z[jax.random.randint(key, (self.num_codes,), 0, len(z))]
        devices, device = jax.lax.psum(1, self.axis_name), jax.lax.axis_index(self.axis_name)
        place = jax.random.randint(key, (self.num_codes,), 0, devices * len(z))
        is_local = (place // len(z) == device)[:, None]
        return jax.lax.psum(jnp.where(is_local, z[place % len(z)], 0.0), self.axis_name)


def with_moved_codes(params: Params, codebook: Params) -> Params:
    """`params` of a quantiser, or of a module around it, with the codes in `codebook`."""
    if "embedding" in codebook:
        return {**params, "embedding": codebook["embedding"]}
    return {**params, **{k: with_moved_codes(params[k], v) for k, v in codebook.items()}}


class GumbelQuantizer(nn.Module):
    """Draws codes from predicted probabilities by Gumbel-softmax (Jang et al. 2017).

    kl_weight: weight of KL(predicted probabilities ‖ uniform), the mean over positions.
    straight_through: in training, codes are single entries with the gradient of the softmax;
        False: mixtures of entries.
    """

    num_codes: int
    dim: int
    kl_weight: float = 5e-4
    straight_through: bool = True
    axis_name: str | None = None

    def setup(self) -> None:
        """A 1x1 convolution to logits, and a codebook from N(0, 1)."""
        self.proj = nn.Dense(self.num_codes)
        self.embedding = self.param(
            "embedding", nn.initializers.normal(1.0), (self.num_codes, self.dim)
        )

    def __call__(
        self,
        z: Float[Array, "B h w k"],
        keys: Keys | None = None,
        temperature: float | Float[Array, ""] = 1.0,
    ) -> Quantized:
        """Quantise features z of any width. keys: per example; None takes the likeliest codes."""
        logits = self.proj(z.astype(jnp.float32))
        q = jax.nn.softmax(logits)
        kl = jnp.mean(jnp.sum(q * jnp.log(q * self.num_codes + 1e-10), -1))
        if keys is not None:
            noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
            logits = (logits + noise) / temperature
        soft, indices = jax.nn.softmax(logits), jnp.argmax(logits, -1).astype(jnp.int32)
        weights = soft
        if keys is None or self.straight_through:
            hard = jax.nn.one_hot(indices, self.num_codes)
            weights = soft + jax.lax.stop_gradient(hard - soft)
        codes = weights @ self.embedding
        return _quantized(codes, indices, self.kl_weight * kl, self.num_codes, self.axis_name)

    def lookup(self, indices: Int[Array, "..."]) -> Float[Array, "... c"]:
        """Codes at `indices`."""
        return self.embedding[indices]


def _quantized(
    codes: Array, indices: Array, loss: Array, num_codes: int, axis_name: str | None
) -> Quantized:
    p = jnp.zeros(num_codes).at[indices.ravel()].add(1.0) / indices.size
    p = pmean(p, axis_name)
    perplexity = jnp.exp(-jnp.sum(p * jnp.log(p + 1e-10)))
    return Quantized(codes, indices, loss, perplexity, jnp.sum(p > 0).astype(jnp.float32))


def to_used(
    indices: Int[Array, "..."], used: Int[Array, " n"], unknown: int | None = None
) -> Int[Array, "..."]:
    """Replace codebook indices by their positions in `used`, which ascends without repetition.

    unknown: the position that stands for indices outside `used`; None is n.
    """
    position = jnp.clip(jnp.searchsorted(used, indices), 0, len(used) - 1)
    is_used = used[position] == indices
    return jnp.where(is_used, position, len(used) if unknown is None else unknown).astype(jnp.int32)


def to_all(indices: Int[Array, "..."], used: Int[Array, " n"]) -> Int[Array, "..."]:
    """The inverse of `to_used`; numbers from n on, which stand for unused codes, become used[0]."""
    return used[jnp.where(indices < len(used), indices, 0)]
