"""What users hold: a trained model, whole or in part, that encodes, decodes and samples."""

import functools
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from latent_diffusion import convert, parallel
from latent_diffusion.denoiser import Denoiser
from latent_diffusion.first_stage import FirstStage
from latent_diffusion.rng import example_keys, keys_of_examples
from latent_diffusion.schedules import spacing
from latent_diffusion.tokenizers import WordTokenizer
from latent_diffusion.types import Array, Conditioning, Float, Num

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
        self, images: Float[Array, "B H W C"], rng: jax.Array | None = None
    ) -> Float[Array, "B h w c"]:
        """Scaled latents of images in [-1, 1]; rng None takes the posterior's mode."""
        keys = None if rng is None else example_keys(rng, images.shape[0])
        return _encode(self._need("first_stage"), images, keys)

    def decode(self, latents: Float[Array, "B h w c"]) -> Float[Array, "B H W C"]:
        """Images, nominally in [-1, 1], from scaled latents."""
        return _decode(self._need("first_stage"), latents)

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
        z_T: Float[Array | np.ndarray, "B h w c"] | None = None,
        image_size: tuple[int, int] | None = None,
        batch_size: int = 64,
        mode: str = "auto",
        **options: Any,
    ) -> np.ndarray:
        """Images [N H W C] in [-1, 1]: `num_images` for each prompt or label, prompt-major.

        Image i depends on rng and i alone, not on batch_size or devices. z_T: start noise [N h w c]
        instead of fresh. image_size: (H, W), default as trained. options: `sampler`, `num_steps`,
        `spacing`, `guidance_scale`, and the sampler's own (`eta` …); else the model's defaults.
        """
        denoiser, first_stage = self._need("denoiser"), self._need("first_stage")
        options = {**self.defaults, **options}
        own = {name: options.pop(name) for name in ("offset", "end") if name in options}
        timesteps = spacing(
            options.pop("spacing"), denoiser.schedule, _integer("num_steps", options), **own
        )
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
        if z_T is not None:
            if z_T.shape != (total, *shape):
                raise ValueError(f"z_T has shape {z_T.shape}, expected {(total, *shape)}")
            batch["z_T"] = np.asarray(z_T)

        mode = parallel.resolve_mode(mode)
        devices = 1 if mode == "single" else jax.device_count()
        batch_size = min(batch_size, total)
        batch_size += -batch_size % devices
        program = _program(mode, shape, tuple(sorted(options.items())))
        frozen = (Model(first_stage, denoiser), timesteps)
        images = []
        for start in range(0, total, batch_size):
            index = np.minimum(np.arange(start, start + batch_size), total - 1)  # pad with the last
            part = {key: value[index] for key, value in batch.items()}
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


def _integer(name: str, options: dict[str, Any]) -> int:
    value = options.pop(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be an integer")
    return value


@jax.jit
def _encode(first_stage: FirstStage, images: jax.Array, keys: jax.Array | None) -> jax.Array:
    return first_stage.encode({"image": images}, keys)


@jax.jit
def _decode(first_stage: FirstStage, latents: jax.Array) -> jax.Array:
    return first_stage.decode(latents)


@functools.lru_cache(maxsize=16)
def _program(mode: str, shape: tuple[int, int, int], options: tuple[tuple[str, Any], ...]):
    """One compiled program for a whole sampling call, reused by later calls with equal options."""

    def step(state, constants, batch, rng, *, axis_name=None):
        (model, timesteps), size = constants, batch["index"].shape[0]
        denoiser, first_stage = model.denoiser, model.first_stage
        z_0 = denoiser.sample(
            keys_of_examples(rng, batch["index"]),
            denoiser.condition(batch, jnp.zeros(size, bool)),
            denoiser.condition(batch, jnp.ones(size, bool)),
            timesteps,
            shape,
            z_T=batch.get("z_T"),
            **dict(options),
        )
        return first_stage.decode(z_0)

    return parallel.compile_eval(step, mode)
