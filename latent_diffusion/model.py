"""What users hold: a trained model, whole or in part, that encodes, decodes and samples."""

import functools
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from latent_diffusion import convert, parallel
from latent_diffusion.denoiser import Denoiser, plan
from latent_diffusion.first_stage import FirstStage
from latent_diffusion.guidance import paste
from latent_diffusion.rng import example_keys, keys_of_examples
from latent_diffusion.tiling import pad_to_multiple, tiled
from latent_diffusion.tokenizers import WordTokenizer
from latent_diffusion.types import Array, Conditioning, Float, Int, Num

log = logging.getLogger(__name__)


class Model(flax.struct.PyTreeNode):
    """First stage and denoiser with their parameters: a pytree.

    A half is a model too; asking it for what it lacks raises ValueError. `defaults` are the
    sampling options that `sample` falls back to; image_size is the side of a trained image; origin
    is what a file said that `save` must say again (see `convert.bundle`).
    """

    first_stage: FirstStage | None = None
    denoiser: Denoiser | None = None
    tokenizer: WordTokenizer | None = flax.struct.field(pytree_node=False, default=None)
    defaults: Mapping[str, Any] = flax.struct.field(pytree_node=False, default_factory=dict)
    image_size: int = flax.struct.field(pytree_node=False, default=256)
    origin: Mapping[str, Any] = flax.struct.field(pytree_node=False, default_factory=dict)

    def encode(
        self,
        images: Float[Array, "B H W C"],
        rng: jax.Array | None = None,
        *,
        tile_size: int | None = None,
        tile_overlap: int | None = None,
    ) -> Float[Array, "B h w c"]:
        """Scaled latents of images in [-1, 1]; rng None takes the posterior's mode.

        Sides that are not multiples of f are padded with their last pixels; `decode` crops them.
        tile_size, tile_overlap: pixels; large images go through in tiles (see `tiling`). None:
        the whole image at once; a quarter of the tile.
        """
        first_stage = self._need("first_stage")
        keys = None if rng is None else example_keys(rng, images.shape[0])
        images = pad_to_multiple(images, first_stage.module.downsampling)
        return _encode(first_stage, images, keys, tile_size, tile_overlap)

    def decode(
        self,
        latents: Float[Array, "B h w c"],
        *,
        size: tuple[int, int] | None = None,
        tile_size: int | None = None,
        tile_overlap: int | None = None,
    ) -> Float[Array, "B H W C"]:
        """Images, nominally in [-1, 1], from scaled latents; cropped to `size` (H, W).

        tile_size, tile_overlap: as in `encode`, in pixels of the image.
        """
        images = _decode(self._need("first_stage"), latents, tile_size, tile_overlap)
        return images if size is None else images[:, : size[0], : size[1]]

    def encode_to_indices(self, images: Float[Array, "B H W C"]) -> Int[Array, "B h w"]:
        """Places in the codebook of a vq first stage; ValueError for one without codebook."""
        return _apply(self._need("first_stage"), "encode_to_indices", images)

    def decode_indices(self, indices: Int[Array, "B h w"]) -> Float[Array, "B H W C"]:
        """Images from places in the codebook."""
        return _apply(self._need("first_stage"), "decode_indices", indices)

    def condition(
        self,
        prompts: Sequence[str] | None = None,
        class_labels: Sequence[int] | None = None,
    ) -> Conditioning:
        """The conditioning for some prompts or class labels, one example each."""
        batch = self._conditions(prompts, class_labels)
        size = len(next(iter(batch.values()), np.zeros(1)))
        return self._need("denoiser").condition(batch, jnp.zeros(size, bool))

    def denoise(
        self,
        z_t: Float[Array, "B h w c"],
        t: Num[Array, " B"],
        conditioning: Conditioning | None = None,
    ) -> Float[Array, "B h w k"]:
        """The raw network output for noisy scaled latents z_t at timesteps t."""
        return self._need("denoiser").denoise(z_t, t, conditioning)

    def sample(
        self,
        rng: jax.Array,
        prompts: Sequence[str] | None = None,
        class_labels: Sequence[int] | None = None,
        *,
        num_images: int = 1,
        negative_prompts: Sequence[str] | None = None,
        more_prompts: Sequence[tuple[str, float | int]] = (),
        image: Array | np.ndarray | None = None,
        mask: Array | np.ndarray | None = None,
        z_T: Float[Array | np.ndarray, "B h w c"] | None = None,
        image_size: tuple[int, int] | None = None,
        quantize_x0: bool = False,
        batch_size: int = 64,
        mode: str = "auto",
        **options: Any,
    ) -> np.ndarray:
        """Images [N H W C] in [-1, 1]: `num_images` for each prompt or label, prompt-major.

        Image i depends on rng and i alone, not on batch_size or devices. z_T: start noise [N h w c]
        instead of fresh. image_size: (H, W), default as trained. options: `sampler`, `num_steps`,
        `spacing`, `guidance_scale` (a number, or one a step), and those of the sampler (`eta` …)
        and the spacing (`end` …); else the model's defaults (see `denoiser.plan`).

        negative_prompts: instead of the unconditional; one for all, or one a prompt. more_prompts:
        (text, weight) pairs for every image, beside its prompt of weight 1; a negative weight
        steers away. image: [N H W C] in [-1, 1], mask: [N H W 1]; one for all, or one for each
        image made; `strength` in [0, 1] says how much of it is made anew, or `mask` (1 = hole)
        where; outside the hole its pixels are kept. quantize_x0: every estimate of z_0 becomes its
        closest codes. Further options: `guidance_interval` (low, high) in timesteps,
        `guidance_rescale`, `clip_x0`, `dynamic_threshold`, `progress(t)` and `preview(t, z_0)`,
        called on the host from within the loop (by every device for its images). Equal options,
        the same functions among them, reuse the compiled program.
        """
        denoiser, first_stage = self._need("denoiser"), self._need("first_stage")
        timesteps, options = plan(denoiser.schedule, self.defaults, options)
        if num_images < 1:
            raise ValueError(f"num_images={num_images} must be at least 1")
        conditions = self._conditions(prompts, class_labels)
        conditions = {k: np.repeat(v, num_images, axis=0) for k, v in conditions.items()}
        total = len(next(iter(conditions.values()), np.zeros(num_images)))
        height, width = image_size or (self.image_size, self.image_size)
        f = first_stage.module.downsampling
        if height % f or width % f:
            raise ValueError(f"image_size {height}×{width} must be divisible by f={f}")
        shape = (height // f, width // f, first_stage.module.latent_channels)
        batch = {**conditions, "index": np.arange(total, dtype=np.int32)}
        batch |= self._negatives(negative_prompts, num_images, total)
        batch |= {
            f"more_{i}": np.repeat(self._conditions([text], None)["tokens"], total, axis=0)
            for i, (text, _) in enumerate(more_prompts)
        }
        batch |= _known_image(image, mask, options.get("strength"), (total, height, width))
        if z_T is not None:
            if z_T.shape != (total, *shape):
                raise ValueError(f"z_T has shape {z_T.shape}, expected {(total, *shape)}")
            batch["z_T"] = np.asarray(z_T)

        mode = parallel.resolve_mode(mode)
        batch_size = min(batch_size, total)
        batch_size += -batch_size % parallel.num_parts(mode)
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
        weights = tuple(float(weight) for _, weight in more_prompts)
        program = _program(mode, shape, weights, quantize_x0, tuple(sorted(options.items())))
        frozen = (Model(first_stage, denoiser), timesteps)
        images = []
        for start in range(0, total, batch_size):
            index = np.minimum(np.arange(start, start + batch_size), total - 1)  # pad with the last
            part = {key: value[index] for key, value in batch.items()}
            part = parallel.process_rows(part, mode)
            images.append(program({}, frozen, part, rng))
        return np.concatenate(images)[:total]

    def save(self, path: str | os.PathLike, format: str = "orbax", dtype: Any = None) -> None:
        """Write the model to a folder (`diffusers`, `orbax`) or a file (`compvis`).

        dtype: of the parameters there, default float32. Raises ValueError where the format has no
        words for this model. `latent_diffusion.load` reads all three back.
        """
        convert.write(convert.bundle_of(self), path, format, dtype)

    def _need(self, part: str) -> Any:
        value = getattr(self, part)
        if value is None:
            have = "a first stage" if part == "denoiser" else "a denoiser"
            raise ValueError(f"this model has no {part.replace('_', ' ')}, only {have}")
        return value

    def _negatives(
        self, prompts: Sequence[str] | None, num_images: int, total: int
    ) -> dict[str, np.ndarray]:
        if prompts is None:
            return {}
        if isinstance(prompts, str):
            prompts = [prompts]
        if len(prompts) not in (1, total // num_images):
            raise ValueError(
                f"{len(prompts)} negative_prompts for {total // num_images} prompts; "
                "give one for all, or one for each"
            )
        tokens = self._conditions(prompts, None)["tokens"]
        return {"negative": np.repeat(tokens, total // len(tokens), axis=0)}

    def _conditions(
        self, prompts: Sequence[str] | None, class_labels: Sequence[int] | None
    ) -> dict[str, np.ndarray]:
        """The batch entries that the denoiser's conditioner reads."""
        wanted = self._need("denoiser").conditioner.keys
        batch: dict[str, np.ndarray] = {}
        if prompts is not None and self.tokenizer is not None:
            for prompt in prompts:
                if unknown := self.tokenizer.unknown_words(prompt):
                    log.warning("unknown words in %r: %s", prompt, ", ".join(unknown))
            batch["tokens"] = self.tokenizer(list(prompts))
        if class_labels is not None:
            batch["class_label"] = np.asarray(class_labels, np.int32)
        given = {"tokens": "prompts", "class_label": "class_labels"}
        for key in set(wanted) - set(batch):
            raise ValueError(f"this model is conditioned on {key}: give {given.get(key, key)}")
        for name, value in (("prompts", prompts), ("class_labels", class_labels)):
            if value is not None and name not in [given[key] for key in wanted if key in given]:
                takes = ", ".join(given.get(key, key) for key in wanted) or "no condition"
                raise ValueError(f"{name} given, but this model takes {takes}")
        return batch


def _known_image(
    image: Array | np.ndarray | None,
    mask: Array | np.ndarray | None,
    strength: float | int | None,
    size: tuple[int, int, int],
) -> dict[str, np.ndarray]:
    """The batch entries of image-to-image and inpainting: "known" and "hole"."""
    if strength is not None and not 0 <= strength <= 1:
        raise ValueError(f"strength must lie in [0, 1], got {strength}")
    if image is None:
        if mask is not None or strength is not None:
            raise ValueError("mask and strength change an image: give image, too")
        return {}
    if mask is None and strength is None:
        raise ValueError("image needs strength (image-to-image) or mask (inpainting)")

    def fit(name: str, value: Any) -> np.ndarray:
        value = np.asarray(value, np.float32)
        if len(value) not in (1, size[0]) or value.shape[1:3] != size[1:]:
            raise ValueError(
                f"{name} has shape {value.shape}, expected 1 or {size[0]} of {size[1:]}"
            )
        return np.broadcast_to(value, (size[0], *value.shape[1:]))

    given = {"known": image} if mask is None else {"known": image, "hole": mask}
    return {name: fit({"known": "image", "hole": "mask"}[name], x) for name, x in given.items()}


@functools.partial(jax.jit, static_argnames=("tile", "overlap"))
def _encode(
    first_stage: FirstStage,
    images: jax.Array,
    keys: jax.Array | None,
    tile: int | None,
    overlap: int | None,
) -> jax.Array:
    if tile is None:
        return first_stage.latents(first_stage.moments(images), keys)
    overlap = tile // 4 if overlap is None else overlap
    return first_stage.latents(tiled(first_stage.moments, images, tile, overlap), keys)


@functools.partial(jax.jit, static_argnames=("tile", "overlap"))
def _decode(
    first_stage: FirstStage, latents: jax.Array, tile: int | None, overlap: int | None
) -> jax.Array:
    if tile is None:
        return first_stage.decode(latents)
    f = first_stage.module.downsampling
    overlap = tile // 4 if overlap is None else overlap
    if tile % f or overlap % f:
        raise ValueError(f"tile size {tile} and overlap {overlap} must be multiples of f={f}")
    return tiled(first_stage.decode, latents, tile // f, overlap // f)


@functools.partial(jax.jit, static_argnames="method")
def _apply(first_stage: FirstStage, method: str, x: jax.Array) -> jax.Array:
    out: Any = first_stage.module.apply({"params": first_stage.params}, x, method=method)
    return out


@functools.lru_cache(maxsize=16)
def _program(
    mode: str,
    shape: tuple[int, int, int],
    weights: tuple[float, ...],
    quantize_x0: bool,
    options: tuple[tuple[str, Any], ...],
):
    """One compiled program for a whole sampling call, reused by later calls with equal options."""

    def step(state, constants, batch, rng, *, axis_name=None):
        (model, timesteps), size = constants, batch["index"].shape[0]
        denoiser, first_stage = model.denoiser, model.first_stage

        def condition(tokens=None, drop=False):
            other = batch if tokens is None else {**batch, "tokens": batch[tokens]}
            return denoiser.condition(other, jnp.full(size, drop))

        known, hole, f = batch.get("known"), batch.get("hole"), first_stage.module.downsampling
        z_0 = denoiser.sample(
            keys_of_examples(rng, batch["index"]),
            condition(),
            condition("negative") if "negative" in batch else condition(drop=True),
            timesteps,
            shape,
            more=[(condition(f"more_{i}"), weight) for i, weight in enumerate(weights)],
            nearest=first_stage.nearest if quantize_x0 else None,
            z_T=batch.get("z_T"),
            z_0=None if known is None else first_stage.encode({"image": known}),
            # A latent position is in the hole as soon as one of its pixels is.
            mask=None if hole is None else nn.max_pool(hole, (f, f), (f, f)),
            **dict(options),
        )
        images = first_stage.decode(z_0)
        return images if hole is None else paste(images, known, hole)

    return parallel.compile_eval(step, mode)
