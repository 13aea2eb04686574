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

from latent_diffusion import convert
from latent_diffusion.data.tokenizers import Tokenizer
from latent_diffusion.generation import conditions, guides
from latent_diffusion.models.classifier import NoisyClassifier
from latent_diffusion.models.denoiser import Denoiser, plan
from latent_diffusion.models.first_stage import FirstStage
from latent_diffusion.process.guidance import paste
from latent_diffusion.process.tiling import pad_to_multiple, tiled
from latent_diffusion.rng import example_keys, keys_of_examples
from latent_diffusion.runtime import parallel
from latent_diffusion.types import Array, Conditioning, Float, Int, Num

log = logging.getLogger(__name__)
CONDITIONS = 1  # folded into an image's key: the noise of its conditions


class Model(flax.struct.PyTreeNode):
    """First stage and denoiser with their parameters: a pytree.

    A half is a model too; asking it for what it lacks raises ValueError. `defaults` are the
    sampling options that `sample` falls back to; image_size is the side of a trained image; origin
    is what a file said that `save` must say again (see `convert.bundle`).
    """

    first_stage: FirstStage | None = None
    denoiser: Denoiser | None = None
    tokenizer: Tokenizer | None = flax.struct.field(pytree_node=False, default=None)
    defaults: Mapping[str, Any] = flax.struct.field(pytree_node=False, default_factory=dict)
    image_size: int = flax.struct.field(pytree_node=False, default=256)
    origin: Mapping[str, Any] = flax.struct.field(pytree_node=False, default_factory=dict)

    def encode(
        self,
        images: Num[Array | np.ndarray, "B H W C"],
        rng: jax.Array | None = None,
        *,
        tile_size: int | None = None,
        tile_overlap: int | None = None,
    ) -> Float[Array, "B h w c"]:
        """Scaled latents of images in [-1, 1]; rng None takes the posterior's mode.

        Sides that are not multiples of f are padded with their last pixels; `decode` crops them.
        tile_size, tile_overlap: pixels; large images go through in tiles (see `tiling`). None:
        the whole image at once; a quarter of the tile. Raises ValueError for images of another
        range (but not for reconstructions, which reach a little beyond).
        """
        first_stage = self._need("first_stage")
        images = conditions.in_range(images)
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

    def encode_to_indices(self, images: Num[Array | np.ndarray, "B H W C"]) -> Int[Array, "B h w"]:
        """Places in the codebook of a vq first stage; ValueError for one without codebook."""
        return _apply(self._need("first_stage"), "encode_to_indices", conditions.in_range(images))

    def decode_indices(self, indices: Int[Array, "B h w"]) -> Float[Array, "B H W C"]:
        """Images from places in the codebook."""
        return _apply(self._need("first_stage"), "decode_indices", indices)

    def condition(
        self,
        prompts: Sequence[str] | None = None,
        class_labels: Sequence[int] | None = None,
        *,
        image_size: tuple[int, int] | None = None,
        rng: jax.Array | None = None,
        **given: Any,
    ) -> Conditioning:
        """The conditioning for what the model takes, one example each.

        given: as in `sample`, `image` and `mask` among them. rng: for conditions that are noised.
        """
        denoiser = self._need("denoiser")
        given |= {"prompts": prompts, "class_labels": class_labels}
        batch, size = self._conditions(given, image_size)
        count = len(next(iter(batch.values()), np.zeros(1)))
        keys = None if rng is None else example_keys(rng, count)
        f = self._downsampling()
        latent = (size[0] // f, size[1] // f)
        told = {key: jnp.asarray(value) for key, value in batch.items()}
        told = denoiser.conditioner.prepare(told, self.first_stage, latent, keys)
        return denoiser.condition(told, jnp.zeros(count, bool))

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
        layout: Any = None,
        segmentation: Array | np.ndarray | None = None,
        low_res: Array | np.ndarray | None = None,
        noise_level: int | Sequence[int] | None = None,
        depth: Array | np.ndarray | None = None,
        neighbours: Array | np.ndarray | None = None,
        image_embedding: Array | np.ndarray | None = None,
        classifier: NoisyClassifier | None = None,
        classifier_labels: Sequence[int] | None = None,
        classifier_scale: float | int = 1.0,
        target: Array | np.ndarray | None = None,
        target_scale: float | int = 1.0,
        target_distance: str = "l2",
        quantize_x0: bool = False,
        tile_size: int | None = None,
        tile_overlap: int | None = None,
        batch_size: int = 64,
        mode: str = "auto",
        **options: Any,
    ) -> np.ndarray:
        """Images [N H W C] in [-1, 1]: `num_images` for each condition, condition-major.

        Image i depends on rng and i alone, not on batch_size or devices. z_T: start noise [N h w c]
        instead of fresh. image_size: (H, W), default that of the conditions, else as trained.

        What a model is conditioned on must be given, and nothing else may be: `prompts`,
        `class_labels`, `layout` (lists of (class, (left, top, right, bottom)) in [0, 1], or
        tokens), `segmentation` [N H W] of classes, `low_res` [N h w 3] and its `noise_level`
        (default 20), `depth` [N H W 1], `neighbours` [N k D], `image_embedding` [N D]; unCLIP takes
        an `image` of any size and a `noise_level` (default 0), inpainting `image` and `mask`. One
        example serves all.

        Any model can be steered as it samples: `classifier` (see `load_classifier`) toward
        `classifier_labels`, and by `target` [N h w C] toward pictures that become it when they are
        reduced to its size, by "l2" or "lpips"; scale 1 is Bayes' rule (App. C of the paper).

        options: `sampler`, `num_steps`, `spacing`, `guidance_scale` (a number, or one a step), and
        those of the sampler (`eta` …) and the spacing (`end` …); else the model's defaults (see
        `denoiser.plan`).

        negative_prompts: instead of the unconditional; one for all, or one a prompt; the option
        `perpendicular` = weight steers away only from what they don't share with the prompt (beside
        the unconditional). more_prompts: (text, weight) pairs for every image, beside its prompt of
        weight 1; a negative weight steers away. image: [N H W C] in [-1, 1], mask: [N H W 1]; one
        for all, or one for each image made; `strength` in [0, 1] says how much of it is made anew,
        or `mask` (1 = hole) where; outside the hole its pixels are kept. quantize_x0: every
        estimate of z_0 becomes its closest codes. tile_size, tile_overlap: as in `encode`: network
        and decoder see a tile at a time. Further options: `guidance_interval` (low, high)
        in timesteps, `guidance_rescale`, `cfg_pp` (guidance_scale in [0, 1]), `clip_x0`,
        `dynamic_threshold`, `progress(t)` and `preview(t, z_0)`, called on the host from within the
        loop (by every device for its images). Equal options, the same functions among them, reuse
        the compiled program.
        """
        denoiser, first_stage = self._need("denoiser"), self._need("first_stage")
        timesteps, options = plan(denoiser.schedule, self.defaults, options)
        if num_images < 1:
            raise ValueError(f"num_images={num_images} must be at least 1")
        given = {"prompts": prompts, "class_labels": class_labels, "layout": layout}
        given |= {"segmentation": segmentation, "low_res": low_res, "noise_level": noise_level}
        given |= {"depth": depth, "neighbours": neighbours, "image_embedding": image_embedding}
        pictures = {"image": image, "mask": mask}  # conditions of some models
        given |= {key: x for key, x in pictures.items() if key in denoiser.conditioner.keys}
        told, (height, width) = self._conditions(given, image_size)
        told = {k: np.repeat(v, num_images, axis=0) for k, v in told.items()}
        total = len(next(iter(told.values()), np.zeros(num_images)))
        f = first_stage.module.downsampling
        if height % f or width % f:
            raise ValueError(f"image_size {height}×{width} must be divisible by f={f}")
        shape = (height // f, width // f, first_stage.module.latent_channels)
        batch = {**told, "index": np.arange(total, dtype=np.int32)}
        batch |= self._negatives(negative_prompts, num_images, total)
        batch |= {
            f"more_{i}": np.repeat(self._tokens([text]), total, axis=0)
            for i, (text, _) in enumerate(more_prompts)
        }
        strength = options.get("strength")
        hole = None if "mask" in told else mask
        if "image" not in told or strength is not None or hole is not None:
            batch |= conditions.known_image(image, hole, strength, (total, height, width))
        if z_T is not None:
            if z_T.shape != (total, *shape):
                raise ValueError(f"z_T has shape {z_T.shape}, expected {(total, *shape)}")
            batch["z_T"] = np.asarray(z_T)

        channels = getattr(first_stage.module, "image_channels", 3)
        guides.check_schedule(classifier, denoiser.schedule)
        batch |= guides.entries(classifier, classifier_labels, target, channels, total)
        scales = guides.Scales(classifier_scale, target_scale, target_distance)
        distance = None if target is None else guides.load_distance(target_distance)

        mode = parallel.resolve_mode(mode)
        batch_size = min(batch_size, total)
        batch_size += -batch_size % parallel.num_parts(mode)
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
        if tile_size is not None:
            options["tile"] = _tile(tile_size, tile_overlap, f)
        weights = tuple(float(weight) for _, weight in more_prompts)
        program = _program(
            mode, shape, weights, quantize_x0, scales, tuple(sorted(options.items()))
        )
        frozen = (Model(first_stage, denoiser), timesteps, classifier, distance)
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
        tokens = self._tokens(prompts)
        return {"negative": np.repeat(tokens, total // len(tokens), axis=0)}

    def _downsampling(self) -> int:
        """f; 8, the most common, where there is no first stage."""
        return 8 if self.first_stage is None else self.first_stage.module.downsampling

    def _conditions(
        self, given: Mapping[str, Any], image_size: tuple[int, int] | None
    ) -> tuple[dict[str, np.ndarray], tuple[int, int]]:
        """The batch entries that the denoiser's conditioner reads, and the size of the picture."""
        conditioner, f = self._need("denoiser").conditioner, self._downsampling()
        size = image_size or conditions.size_of(given, f) or (self.image_size, self.image_size)
        latent = (size[0] // f, size[1] // f)
        return conditions.batch_of(conditioner, self._tokens, given, size, latent), size

    def _tokens(self, prompts: Sequence[str]) -> np.ndarray:
        """Prompts as the model's tokenizer writes them; a word it doesn't know is named."""
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer: load it with tokenizer=PATH")
        for prompt in prompts:
            if unknown := self.tokenizer.unknown_words(prompt):
                log.warning("unknown words in %r: %s", prompt, ", ".join(unknown))
        return self.tokenizer(list(prompts))


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
    f = first_stage.module.downsampling
    return _decoded(first_stage, latents, None if tile is None else _tile(tile, overlap, f))


def _decoded(
    first_stage: FirstStage, latents: jax.Array, tile: tuple[int, int] | None
) -> jax.Array:
    return (
        first_stage.decode(latents) if tile is None else tiled(first_stage.decode, latents, *tile)
    )


def _tile(size: int, overlap: int | None, f: int) -> tuple[int, int]:
    """A tile's side and overlap in the latent, from those in pixels."""
    overlap = size // 4 // f * f if overlap is None else overlap
    if size % f or overlap % f:
        raise ValueError(f"tile size {size} and overlap {overlap} must be multiples of f={f}")
    return size // f, overlap // f


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
    scales: guides.Scales,
    options: tuple[tuple[str, Any], ...],
):
    """One compiled program for a whole sampling call, reused by later calls with equal options."""

    def step(state, constants, batch, rng, *, axis_name=None):
        (model, timesteps, classifier, distance), size = constants, batch["index"].shape[0]
        denoiser, first_stage = model.denoiser, model.first_stage
        keys = keys_of_examples(rng, batch["index"])
        noise = jax.vmap(jax.random.fold_in, (0, None))(keys, CONDITIONS)
        told = denoiser.conditioner.prepare(batch, first_stage, shape[:2], noise)

        def condition(tokens=None, drop=False):
            other = told if tokens is None else {**told, "tokens": told[tokens]}
            return denoiser.condition(other, jnp.full(size, drop))

        known, hole, f = batch.get("known"), batch.get("hole"), first_stage.module.downsampling
        z_0 = denoiser.sample(
            keys,
            condition(),
            condition(drop=True),
            timesteps,
            shape,
            negative=condition("negative") if "negative" in batch else None,
            more=[(condition(f"more_{i}"), weight) for i, weight in enumerate(weights)],
            nearest=first_stage.nearest if quantize_x0 else None,
            guide=guides.guide(batch, denoiser.schedule, first_stage, classifier, distance, scales),
            z_T=batch.get("z_T"),
            z_0=None if known is None else first_stage.encode({"image": known}),
            # A latent position is in the hole as soon as one of its pixels is.
            mask=None if hole is None else nn.max_pool(hole, (f, f), (f, f)),
            **dict(options),
        )
        images = _decoded(first_stage, z_0, dict(options).get("tile"))
        if "mask" in batch:  # a model of inpainting: what isn't missing stays as it is
            return paste(images, batch["image"], batch["mask"])
        return images if hole is None else paste(images, known, hole)

    return parallel.compile_eval(step, mode)
