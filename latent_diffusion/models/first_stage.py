"""The frozen first stage: pixels → moments → latents → pixels, and the latents' scale.

The denoiser sees latents of about unit variance (paper App. G). `scale_factor` and `shift` are
applied in this module and nowhere else.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from latent_diffusion.core.rng import example_keys, pmean
from latent_diffusion.core.types import (
    Array,
    Batch,
    Config,
    Float,
    Int,
    Keys,
    Params,
    lookup,
    module_fields,
)
from latent_diffusion.nets.autoencoder import Autoencoder, Identity
from latent_diffusion.nets.tiny_autoencoder import TinyAutoencoder
from latent_diffusion.process.tiling import tile_of_latent, tiled


class FirstStage(flax.struct.PyTreeNode):
    """An autoencoder that no longer learns, with the scale of its latents.

    scale_factor, shift: [] (one scalar, as in the paper) or [c] (per channel). tile: side and
    overlap of the tiles through which pictures are encoded and decoded, in the latent; None: as a
    whole (see `process.tiling`).
    """

    params: Params
    scale_factor: Any
    shift: Any
    module: nn.Module = flax.struct.field(pytree_node=False)
    tile: tuple[int, int] | None = flax.struct.field(pytree_node=False, default=None)

    def in_tiles(self, size: int | None, overlap: int | None) -> "FirstStage":
        """The first stage with tiles of `size` and `overlap` pixels; None as size: without tiles.

        Raises ValueError for numbers that f doesn't divide, and for an overlap without a size.
        """
        return self.replace(tile=tile_of_latent(size, overlap, self.module.downsampling))

    def moments(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w m"]:
        """The encoder's output, which can be cached: sampling and scaling come after it."""
        if self.tile is not None:
            side, overlap = (self.module.downsampling * n for n in self.tile)
            return tiled(lambda x: self._apply("encode", x), x, side, overlap)
        return self._apply("encode", x)

    def latents(
        self, moments: Float[Array, "B h w m"], keys: Keys | None = None
    ) -> Float[Array, "B h w c"]:
        """Scaled latents: samples of the posterior, or its modes without `keys` [B]."""
        z = self._apply("latents", moments, keys)
        return (z - self.shift) * self.scale_factor

    def encode(self, batch: Batch, keys: Keys | None = None) -> Float[Array, "B h w c"]:
        """Scaled latents of a batch, from its cached `moments` if it has them, else its `image`."""
        moments = batch["moments"] if "moments" in batch else self.moments(batch["image"])
        return self.latents(moments, keys)

    def decode(self, z: Float[Array, "B h w c"]) -> Float[Array, "B H W C"]:
        """Pixels from scaled latents."""
        if self.tile is not None:
            return tiled(self.replace(tile=None).decode, z, *self.tile)
        return self._apply("decode", z / self.scale_factor + self.shift)

    def indices(self, batch: Batch) -> Int[Array, "B h w"]:
        """Codebook indices: a batch's cached `codes` if it has them, else those of `image`."""
        if "codes" in batch:
            return batch["codes"]
        return self._apply("encode_to_indices", batch["image"])

    def decode_indices(self, indices: Int[Array, "B h w"]) -> Float[Array, "B H W C"]:
        """Pixels from codebook indices."""
        return self._apply("decode_indices", indices)

    def nearest(self, z: Float[Array, "B h w c"]) -> Float[Array, "B h w c"]:
        """Scaled latents replaced by the nearest codes; ValueError without such codes.

        A codebook on the unit sphere replaces the direction of a latent, whose length stays.
        """
        if getattr(self.module, "regularization", "none") != "vq":
            raise ValueError("quantize_x0 needs a first stage whose latents are codes (vq)")
        z = z / self.scale_factor + self.shift
        codes: Any = self._apply(lambda module, z: module.quantize(z).codes, z)
        if self.module.codebook_l2:
            codes = codes * jnp.linalg.norm(z, axis=-1, keepdims=True)
        return (codes - self.shift) * self.scale_factor

    def _apply(self, method: Any, *args: Any) -> Any:
        return self.module.apply({"params": self.params}, *args, method=method)


def own_fields(config: Config) -> dict[str, Any]:
    """The fields of an autoencoder of this kind.

    Beside the fields of a tiny one, which a file decides, a config keeps those of others.
    """
    if config["regularization"] != "tiny":
        return dict(config)
    others = Autoencoder.__dataclass_fields__.keys() - TinyAutoencoder.__dataclass_fields__
    return {name: value for name, value in config.items() if name not in others}


def make_autoencoder(config: Config) -> nn.Module:
    """The autoencoder that `config` describes.

    regularization "identity" is no compression, "tiny" is TAESD's architecture.
    """
    if config["regularization"] == "identity":
        return Identity(config["image_channels"])
    if config["regularization"] == "tiny":
        fields = module_fields(own_fields(config))
        blocks = {half: tuple(fields[half]) for half in ("encoder_blocks", "decoder_blocks")}
        return TinyAutoencoder(**{**fields, **blocks})  # lists from a file aren't hashable
    return Autoencoder(**module_fields(config))


def init_first_stage(module: nn.Module, rng: jax.Array, image: jax.Array) -> FirstStage:
    """A first stage with random parameters and unit scale, the template for loaded parameters."""
    params = module.init(rng, image).get("params", {})
    return FirstStage(params, jnp.ones(()), jnp.zeros(()), module)


def _root(variance: np.ndarray | float) -> np.ndarray:
    """The standard deviation, which a constant channel lacks: 1 instead."""
    std = np.sqrt(np.maximum(variance, 0))
    return np.where(std > 1e-6 * np.max(std), std, 1.0)


# (mean [c], mean square [c]) of the latents -> (shift, standard deviation). "scalar", as in the
# paper, is one standard deviation over all elements, without a shift.
NORMALIZATIONS: dict[str, Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]] = {
    "scalar": lambda m, m2: (np.zeros(()), _root(np.mean(m2) - np.mean(m) ** 2)),
    "channel": lambda m, m2: (m, _root(m2 - m**2)),
    "none": lambda m, m2: (np.zeros(()), np.ones(())),
}


def latent_sums(state, constants: FirstStage, batch, rng, *, axis_name=None):
    """A step for `parallel.compile_step`: per-channel mean and mean square of the latents."""
    z = constants.encode(batch, example_keys(rng, next(iter(batch.values())).shape[0], axis_name))
    sums = {"mean": jnp.mean(z, (0, 1, 2)), "mean_square": jnp.mean(jnp.square(z), (0, 1, 2))}
    return state, pmean(sums, axis_name)


def with_measured_scale(
    first_stage: FirstStage, sums: Iterable[Mapping[str, Any]], normalization: str
) -> FirstStage:
    """Set scale and shift from the `latent_sums` of many batches (equal weight each)."""
    statistics = lookup(NORMALIZATIONS, normalization, "first_stage.normalization")
    gathered = [jax.tree.map(lambda x: np.asarray(x, np.float64), s) for s in sums]
    mean = np.mean([s["mean"] for s in gathered], 0)
    mean_square = np.mean([s["mean_square"] for s in gathered], 0)
    shift, std = statistics(mean, mean_square)
    return first_stage.replace(
        scale_factor=jnp.asarray(1.0 / std, jnp.float32), shift=jnp.asarray(shift, jnp.float32)
    )
