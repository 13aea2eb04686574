"""A trained model, whole or in part: it encodes, decodes and samples."""

import dataclasses
import functools
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from latent_diffusion import convert
from latent_diffusion.core.rng import example_keys, sampling_keys
from latent_diffusion.core.types import Array, Conditioning, Float, Int, Num
from latent_diffusion.data.tokenizers import Tokenizer
from latent_diffusion.generation import adapters as adapting
from latent_diffusion.generation import codes, conditions, guides, program, refining
from latent_diffusion.generation import controls as controlling
from latent_diffusion.generation import image_prompts as picturing
from latent_diffusion.generation.prompts import Tokenize, beside, check_beside, make_tokenize
from latent_diffusion.models.classifier import NoisyClassifier
from latent_diffusion.models.denoiser import Denoiser
from latent_diffusion.models.first_stage import FirstStage
from latent_diffusion.models.prior import Prior
from latent_diffusion.nets.conditioners import Conditioner
from latent_diffusion.process.options import check_needs
from latent_diffusion.process.plan import plan
from latent_diffusion.process.tiling import pad_to_multiple
from latent_diffusion.runtime import parallel

log = logging.getLogger(__name__)

LARGEST = 1 << 16  # pixels of a side


class Model(flax.struct.PyTreeNode):
    """First stage and denoiser (or prior) with their parameters: a pytree.

    A model may have only one half; calls that need the other half raise ValueError. defaults:
    options of `sample` that apply unless the caller sets them. image_size: the side of training
    images, or (height, width). origin: facts of the loaded file that `save` writes again (see
    `convert.bundle`).
    """

    first_stage: FirstStage | None = None
    denoiser: Denoiser | None = None
    tokenizer: Tokenizer | None = flax.struct.field(pytree_node=False, default=None)
    defaults: Mapping[str, Any] = flax.struct.field(pytree_node=False, default_factory=dict)
    image_size: int | tuple[int, int] = flax.struct.field(pytree_node=False, default=256)
    origin: Mapping[str, Any] = flax.struct.field(pytree_node=False, default_factory=dict)
    prior: Prior | None = None

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
        tile_size: encode large images in tiles of this side, in pixels (see `tiling`); None encodes
        the whole image at once. tile_overlap: pixels, by default a quarter of the tile. Raises
        ValueError for images of another range (but not for reconstructions, which may slightly
        exceed it). A first stage of one channel sees the brightness of RGB.
        """
        first_stage = self._need("first_stage").in_tiles(tile_size, tile_overlap)
        images = conditions.in_range(images)
        keys = None if rng is None else example_keys(rng, images.shape[0])
        seen = conditions.in_channels(images, self._channels())
        seen = pad_to_multiple(seen, first_stage.module.downsampling)
        return _encode(first_stage, seen, keys)

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
        images = _decode(self._need("first_stage").in_tiles(tile_size, tile_overlap), latents)
        return images if size is None else images[:, : size[0], : size[1]]

    def encode_to_indices(self, images: Num[Array | np.ndarray, "B H W C"]) -> Int[Array, "B h w"]:
        """Codebook indices of a vq first stage; ValueError for a first stage without codebook."""
        first_stage = self._need("first_stage")
        images = conditions.in_channels(conditions.in_range(images), self._channels())
        return _apply(first_stage, "encode_to_indices", images)

    def decode_indices(self, indices: Int[Array, "B h w"]) -> Float[Array, "B H W C"]:
        """Images from codebook indices; ValueError for a first stage without codebook."""
        return _apply(self._need("first_stage"), "decode_indices", indices)

    @property
    def trained_size(self) -> tuple[int, int]:
        """Height and width of training pictures, in pixels."""
        size = self.image_size
        return size if isinstance(size, tuple) else (size, size)

    @property
    def downsampling(self) -> int:
        """f, pixels per latent position along each side; without a first stage 8, as is usual."""
        return 8 if self.first_stage is None else self.first_stage.module.downsampling

    def condition(
        self,
        prompts: str | Sequence[str] | None = None,
        class_labels: int | Sequence[int] | None = None,
        *,
        prompt_weights: bool = False,
        image_size: tuple[int, int] | None = None,
        rng: jax.Array | None = None,
        **values: Any,
    ) -> Conditioning:
        """The conditioning for conditions of the model, as in `sample`, an example for each.

        prompt_weights, values: as in `sample`, including `image` and `mask`. rng: for the noise
        that some conditions get; `sample` with the same rng adds the same noise.
        """
        values |= {"prompts": prompts, "class_labels": class_labels}
        tokenize = make_tokenize(self, prompt_weights, prompts)
        batch, size = self._conditions(values, image_size, tokenize)
        count = len(next(iter(batch.values()), np.zeros(1)))
        keys = None if rng is None else sampling_keys(example_keys(rng, count)).conditions
        entries: Any = {key: jnp.asarray(value) for key, value in batch.items()}
        latent = self._latent_size(size)
        entries = self.conditioner.prepare(entries, self.first_stage, latent, keys)
        return self._conditioned().condition(entries, jnp.zeros(count, bool))

    def denoise(
        self,
        z_t: Float[Array, "B h w c"],
        t: Num[Array, " B"],
        conditioning: Conditioning | None = None,
    ) -> Float[Array, "B h w k"]:
        """The raw network output for noisy scaled latents z_t at timesteps t."""
        return self._need("denoiser").denoise(z_t, t, conditioning)

    def logits(self, codes: Int[Array, "B L"], conditioning: Conditioning) -> Float[Array, "B L K"]:
        """A prior's logits: position i predicts code i; codes are in row-major order."""
        return self._need("prior").logits(codes, conditioning)

    def sample(
        self,
        rng: jax.Array,
        prompts: str | Sequence[str] | None = None,
        class_labels: int | Sequence[int] | None = None,
        *,
        num_images: int = 1,
        negative_prompts: str | Sequence[str] | None = None,
        more_prompts: Sequence[tuple[str, float | int]] = (),
        prompt_weights: bool = False,
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
        original_size: tuple[int, int] | Array | np.ndarray | None = None,
        crop_top_left: tuple[int, int] | Array | np.ndarray | None = None,
        target_size: tuple[int, int] | Array | np.ndarray | None = None,
        aesthetic_score: float | Array | np.ndarray | None = None,
        negative_original_size: tuple[int, int] | Array | np.ndarray | None = None,
        negative_crop_top_left: tuple[int, int] | Array | np.ndarray | None = None,
        negative_target_size: tuple[int, int] | Array | np.ndarray | None = None,
        negative_aesthetic_score: float | Array | np.ndarray | None = None,
        classifier: NoisyClassifier | None = None,
        classifier_labels: Sequence[int] | None = None,
        target: Array | np.ndarray | None = None,
        adapters: Sequence[Any] = (),
        controls: Sequence[Any] = (),
        image_prompts: Sequence[Any] = (),
        batch_size: int = 64,
        mode: str = "auto",
        refiner: tuple[Any, float] | None = None,
        **options: Any,
    ) -> np.ndarray:
        """Images [N H W C] in [-1, 1]: `num_images` for each condition, condition-major.

        Image i depends only on rng and i, not on batch_size or devices; alternatively, rng has the
        keys [N] of the images. z_T: start noise [N h w c] instead of fresh noise. image_size:
        (H, W), by default that of the conditions, of z_T or of `image`, or of training images.
        batch_size: the largest number of images that are sampled at once.

        Conditions: a model takes the conditions of its training, and needs all of them: `prompts`,
        `class_labels`, `layout` (lists of (class, (left, top, right, bottom)) in [0, 1], or
        tokens), `segmentation` [N H W] of classes, `low_res` [N h w 3] and its `noise_level`
        (default 20, or the highest below), `depth` [N H W 1], `neighbours` [N k D],
        `image_embedding` [N D]; unCLIP takes an `image` of any size and a `noise_level` (default
        0), inpainting `image` and `mask`;
        Stable Diffusion XL `original_size` (H, W), `crop_top_left` (y, x) and `target_size` (H, W),
        in pixels, its refiner `aesthetic_score` instead of the last: by default the sizes are the
        picture's, nothing is cropped, and the score is 6. A single example applies to all images.
        With the prefix `negative_` they are those of the unconditional prediction, by default the
        same, with a score of 2.5.

        `start` and `end` are shares of the noise: with `end` the call returns the latents [N h w c]
        at this share instead of images. They are the z_T of another call with this `start`, perhaps
        of another model. `refiner`, a pair of such a model and the share of the noise at which it
        takes over, joins both calls (docs/sdxl.md).

        Any model also takes: `negative_prompts`, which replace the unconditional, one for all or
        one for each prompt. `more_prompts`: (text, weight) pairs for every image, beside its prompt
        of weight 1; a negative weight steers away. `prompt_weights`: all these texts may have
        `(word:1.3)`, `[word]` and `BREAK` (docs/samplers.md), and any length; for CLIP's text
        encoders. `image` [N H W C] in [-1, 1], one for all or one for each result: the option
        `strength` sets how much of it changes, or `mask` [N H W 1] where (1 is a hole; other pixels
        don't change). `classifier` (see `load_classifier`), which steers toward
        `classifier_labels`; `target` [N h w C], which the results resemble when they are reduced to
        its size (App. C of the paper). `adapters`: pairs of an adapter (see `load_adapter`) and its
        weight, or weights by prefixes of diffusers' names such as "unet.up_blocks"; the sum of
        their changes is added for this call, and other weights need no new compilation. `controls`:
        (control net, hint, weight), or with settings as a fourth; hints are [N H W 3] in [0, 1],
        one for all or one for each image, and determine the size by default. `image_prompts`:
        (IP-Adapter, pictures, weight); pictures are [N H W 3] in [-1, 1] of any size, or embeddings
        [N D], one for all or one for each image, or a list of such arrays, to which the network
        attends together (see docs/adapters.md). A grey model takes `image` in RGB, too.

        Of these, a prior takes `prompt_weights`, and `image` with `mask`, whose hole it draws
        again; it draws pictures larger than those of training through windows.

        options: see `process.options.SamplingOptions` and docs/samplers.md, and for a prior
        `PriorOptions` and docs/priors.md; all others are the model's `defaults`. Numbers among them
        may vary without a new compilation.

        Raises ValueError, in one line, for bad input, and if an image isn't finite.
        """
        if refiner is not None:
            arguments = {**locals(), **options}  # all arguments, by name
            for name in ("self", "rng", "refiner", "options"):
                del arguments[name]
            return refining.sample(self, refiner, rng, arguments)
        first_stage = self._need("first_stage")
        values = {"prompts": prompts, "class_labels": class_labels, "layout": layout}
        values |= {"segmentation": segmentation, "low_res": low_res, "noise_level": noise_level}
        values |= {"depth": depth, "neighbours": neighbours, "image_embedding": image_embedding}
        values |= {"original_size": original_size, "crop_top_left": crop_top_left}
        values |= {"target_size": target_size, "aesthetic_score": aesthetic_score}
        opposite: dict[str, Any] = {"original_size": negative_original_size}
        opposite |= {"crop_top_left": negative_crop_top_left}
        opposite |= {"target_size": negative_target_size}
        opposite |= {"aesthetic_score": negative_aesthetic_score}
        if self.prior is not None:
            tokenize = make_tokenize(self, prompt_weights, prompts)
            sized = {"mask": mask, "known": image}
            examples, size = self._conditions(values, image_size, tokenize, **sized)
            batch = conditions.repeated(examples, num_images)
            call: dict[str, Any] = {"image": image, "mask": mask, "target": target, "z_T": z_T}
            call |= {"adapters": tuple(adapters), "controls": tuple(controls)}
            call |= {"image_prompts": tuple(image_prompts)}
            call |= {"negative_prompts": negative_prompts, "more_prompts": more_prompts}
            call |= {f"negative_{name}": value for name, value in opposite.items()}
            call |= {"classifier": classifier, "classifier_labels": classifier_labels, **options}
            window = min(self.trained_size) // self.downsampling
            latent = (*self._latent_size(size), window)
            return codes.draw(self, batch, latent, call, rng, batch_size, mode)
        model = adapting.with_words(self, adapters) if self.denoiser is not None else self
        denoiser = model._need("denoiser")
        changes = {"image": image, "negative_prompts": negative_prompts}
        conditions.check_start(denoiser.conditioner, image, z_T)
        check_beside(model, negative_prompts, more_prompts)
        given = {**options, **changes, "classifier": classifier, "target": target}
        check_needs(given, self.defaults)
        timesteps, chosen = plan(denoiser.schedule, denoiser.prediction, self.defaults, options)
        guides.warn_of_scale(self.origin, chosen)

        pictures = {"image": image, "mask": mask}  # conditions of some models
        values |= {key: x for key, x in pictures.items() if key in denoiser.conditioner.keys}
        hole = None if "mask" in values else mask
        varied = options.get("strength") is not None or (chosen.start is not None and z_T is None)
        starts = "image" not in values or hole is not None or varied
        sized = {"mask": mask, "z_T": z_T, "known": image if starts else None}
        more_texts = [text for text, _ in more_prompts]
        tokenize = make_tokenize(model, prompt_weights, prompts, negative_prompts, more_texts)
        preferred = controlling.size_of(controls) if image_size is None else image_size
        examples, size = model._conditions(values, preferred, tokenize, **sized)
        batch = conditions.repeated(examples, num_images)
        total, channels = len(batch["index"]), self._channels()
        latent = (*self._latent_size(size), first_stage.module.latent_channels)

        if starts:
            shape = (*size, channels)
            batch |= conditions.known_image(image, hole, varied, shape, total)
        batch |= beside(tokenize, negative_prompts, more_prompts, num_images, total)
        prompting = picturing.bound(model, image_prompts)
        batch |= controlling.entries(controls, size, total)
        batch |= picturing.entries(image_prompts, total)
        sizes = conditions.negative_sizes(denoiser.conditioner, opposite, total // num_images)
        batch |= {name: np.repeat(rows, total // len(rows), 0) for name, rows in sizes.items()}
        guides.check_classifier(classifier, denoiser.schedule, latent[2])
        batch |= guides.entries(classifier, classifier_labels, target, channels, total)
        if z_T is not None:
            batch["z_T"] = conditions.array("z_T", z_T, (total, *latent))

        trained = min(self.trained_size)
        if chosen.tile_size is not None and chosen.tile_size < trained:
            log.warning(
                "tile_size=%d: tiles are smaller than the trained pictures, which have %d pixels",
                *(chosen.tile_size, trained),
            )
        mode = parallel.resolve_mode(mode)
        adapted, weights = adapting.bound(self, adapters, mode)
        nets = controlling.bound(self, controls)
        on_devices = program.placed(self, {"first_stage": first_stage, "denoiser": denoiser}, mode)
        networks = {
            "adapters": adapted,
            "controls": [program.placed(adapter, tree, mode) for adapter, _, tree in nets],
            "image_prompts": [program.placed(adapter, tree, mode) for adapter, tree in prompting],
            "first_stage": on_devices["first_stage"],
            "denoiser": controlling.with_nets(
                on_devices["denoiser"], tuple(net for _, net, _ in nets if net)
            ),
            "classifier": None
            if classifier is None
            else program.placed(classifier, classifier, mode),
            "distance": None if target is None else guides.load_distance(chosen.target_distance),
        }
        more = [np.float32(weight) for _, weight in more_prompts]
        numbers = (
            weights,
            controlling.numbers_of(controls),
            picturing.numbers_of(prompting, image_prompts),
        )
        watch = program.Watch(chosen.progress, chosen.preview)
        chosen = dataclasses.replace(chosen, progress=None, preview=None)
        planned = (timesteps, chosen, more, numbers)
        return program.run(networks, planned, batch, latent, rng, batch_size, mode, watch=watch)

    def save(self, path: str | os.PathLike, format: str = "orbax", dtype: Any = None) -> None:
        """Write the model to a folder (`diffusers`, `orbax`) or a file (`compvis`).

        dtype: type of the written parameters, by default the model's. Raises ValueError if the
        format can't describe this model. `latent_diffusion.load` reads all three formats.
        """
        convert.write(convert.bundle_of(self), path, format, dtype)

    def _need(self, part: str) -> Any:
        value = getattr(self, part)
        if value is None:
            names = ("first_stage", "denoiser", "prior")
            parts = [name.replace("_", " ") for name in names if getattr(self, name) is not None]
            have = " and ".join(f"a {name}" for name in parts)
            raise ValueError(f"this model has no {part.replace('_', ' ')}, only {have}")
        return value

    @property
    def conditioner(self) -> Conditioner:
        """The conditioner of the denoiser or of the prior."""
        conditioner: Conditioner = self._conditioned().conditioner
        return conditioner

    def _conditioned(self) -> Any:
        """The part that has conditions: the prior or the denoiser."""
        return self.prior or self._need("denoiser")

    def _channels(self) -> int:
        """The channels of a picture."""
        return getattr(getattr(self.first_stage, "module", None), "image_channels", 3)

    def _latent_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(h, w) of a picture's latent; ValueError for sides that f doesn't divide."""
        f = self.downsampling
        if not 0 < min(size) <= max(size) <= LARGEST:
            raise ValueError(f"image_size {size[0]}×{size[1]}: sides lie in 1 … {LARGEST} pixels")
        if size[0] % f or size[1] % f:
            raise ValueError(f"image_size {size[0]}×{size[1]} must be divisible by f={f}")
        return size[0] // f, size[1] // f

    def _conditions(
        self,
        values: Mapping[str, Any],
        image_size: tuple[int, int] | None,
        tokenize: Tokenize,
        **sized: Any,
    ) -> tuple[dict[str, np.ndarray], tuple[int, int]]:
        """The batch entries that the conditioner reads, and the size of the picture.

        sized: other arguments of the call that imply the size, see `conditions.size_of`.
        """
        conditioner = self.conditioner
        implied = conditions.size_of({**values, **sized}, self.downsampling)
        size = implied or self.trained_size
        if image_size is not None:
            size = conditions.size_in_pixels("image_size", image_size)
        latent = self._latent_size(size)
        channels = self._channels()
        return conditions.batch_of(conditioner, tokenize, values, size, latent, channels), size


@jax.jit
def _encode(first_stage: FirstStage, images: jax.Array, keys: jax.Array | None) -> jax.Array:
    return first_stage.latents(first_stage.moments(images), keys)


@jax.jit
def _decode(first_stage: FirstStage, latents: jax.Array) -> jax.Array:
    return first_stage.decode(latents)


@functools.partial(jax.jit, static_argnames="method")
def _apply(first_stage: FirstStage, method: str, x: jax.Array) -> jax.Array:
    if not hasattr(first_stage.module, method):
        raise ValueError(
            "pixels and tiny autoencoders have no codebook; 'vq' and 'gumbel' have one"
        )
    out: Any = first_stage.module.apply({"params": first_stage.params}, x, method=method)
    return out
