"""The compiled program of a sampling call, and the batches that it runs on."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from latent_diffusion.convert.adapters import adapted
from latent_diffusion.core.rng import keys_of_examples, sampling_keys
from latent_diffusion.core.trees import leaves_by_path
from latent_diffusion.core.types import Array, Batch, Keys
from latent_diffusion.generation import controls, guides, image_prompts
from latent_diffusion.models.first_stage import FirstStage
from latent_diffusion.nets.conditioners.sizes import SIZES
from latent_diffusion.process.guidance import paste
from latent_diffusion.process.options import SamplingOptions
from latent_diffusion.process.plan import own_options
from latent_diffusion.process.samplers import SAMPLERS
from latent_diffusion.process.schedules import NoiseSchedule, Timesteps
from latent_diffusion.process.tiling import tiled
from latent_diffusion.runtime import parallel


def placed(owner: Any, networks: Any, mode: str) -> Any:
    """The networks of `owner` on the devices of a mode.

    The first call places them there. Later calls reuse them, unless the owner's parameters or the
    mode have changed. They are freed together with the owner.
    """
    leaves, structure = jax.tree.flatten(networks)
    last_mode, last_leaves, in_place = vars(owner).get("_placed", (None, [], None))
    same = len(leaves) == len(last_leaves) and all(map(lambda a, b: a is b, leaves, last_leaves))
    if mode != last_mode or not same:
        in_place = parallel.place(leaves, mode)
        vars(owner)["_placed"] = (mode, leaves, in_place)
    return jax.tree.unflatten(structure, in_place)


def run(
    networks: dict[str, Any],
    planned: Any,
    batch: dict[str, np.ndarray],
    latent: tuple[int, int, int],
    rng: jax.Array,
    batch_size: int,
    mode: str,
    images_of: Any = None,
) -> np.ndarray:
    """Images [N H W C], batch by batch.

    networks: "first_stage", "denoiser", the changes of "adapters", the parameters of "controls" and
    of "image_prompts", and "classifier" and "distance" (either may be None), on their devices.
    planned: timesteps, options, the weights of further prompts, the numbers of all adapters. batch:
    [N ...] entries. latent: (h, w, c). rng: one key, or keys [N] of the images. images_of: computes
    the images of a batch; None is a denoiser's sampling. Raises ValueError, in one line, if an
    image isn't finite.
    """
    total = len(batch["index"])
    if rng.shape not in ((), (total,)):
        raise ValueError(f"rng has {rng.shape} keys; expected one key, or {total} for the images")
    rows = batch_rows(total, batch_size, parallel.num_parts(mode))
    leaves, structure = jax.tree.flatten(networks)
    step = _compiled(mode, latent, structure, jax.tree.structure(planned), images_of or _sample)
    images = []
    for start in range(0, total, rows):
        index = np.minimum(np.arange(start, start + rows), total - 1)  # repeat the last
        part = {key: value[index] for key, value in batch.items()}
        keys = rng[index] if rng.ndim else keys_of_examples(rng, jnp.asarray(part["index"]))
        part["keys"] = np.asarray(jax.random.key_data(keys))
        part = parallel.process_rows(part, mode)
        images.append(step(leaves, planned, part, rng if rng.ndim == 0 else rng[0]))
        _check_finite(images[-1], start, networks)
    jax.effects_barrier()  # wait for the last calls of `progress` and `preview`
    return np.concatenate(images)[:total]


def batch_rows(total: int, batch_size: int, parts: int) -> int:
    """The number of images in each batch, chosen so that few programs serve calls of any size.

    A device gets 1, 4, 16 … images, or its part of batch_size. If a batch of n images costs n + 1
    units of time, the choice is the largest batch whose time is at most 5 % above the least.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    largest, needed = -(-batch_size // parts), -(-total // parts)
    sizes = [largest, *(4**k for k in reversed(range(16)) if 4**k < largest)]
    times = [-(-needed // size) * (size + 1) for size in sizes]
    fast = (size for size, time in zip(sizes, times, strict=True) if time <= 1.05 * min(times))
    return parts * next(fast)


def num_evaluations(schedule: NoiseSchedule, timesteps: Timesteps, options: SamplingOptions) -> int:
    """The number of evaluations of the network for a batch."""
    if len(timesteps) == 1:
        return 0
    return len(SAMPLERS[options.sampler].table(schedule, timesteps, **own_options(options)).t)


def num_calls(total: int, batch_size: int, mode: str) -> int:
    """The number of calls of `progress` per evaluation of `total` images: by batch and device."""
    rows = batch_rows(total, batch_size, parallel.num_parts(mode))
    return -(-total // rows) * (jax.local_device_count() if mode == "pmap" else 1)


def decoded(first_stage: FirstStage, latents: jax.Array, tile: tuple[int, int] | None) -> jax.Array:
    """Images of scaled latents. tile: (side, overlap) in the latent, None for the whole."""
    if tile is None:
        return first_stage.decode(latents)
    return tiled(first_stage.decode, latents, *tile)


def overlap_of_tiles(size: int, overlap: int | None, f: int) -> int:
    """The overlap in pixels: by default a quarter of a tile, cut to whole latent positions."""
    return size // 4 // f * f if overlap is None else overlap


def tile_of_latent(size: int | None, overlap: int | None, f: int) -> tuple[int, int] | None:
    """A tile's side and overlap in the latent, from side and overlap in pixels."""
    if size is None:
        return None
    overlap = overlap_of_tiles(size, overlap, f)
    if size % f or overlap % f:
        raise ValueError(f"tile size {size} and overlap {overlap} must be multiples of f={f}")
    return size // f, overlap // f


@functools.lru_cache(maxsize=32)
def _compiled(
    mode: str, latent: tuple[int, int, int], networks: Any, planned: Any, images_of: Any
) -> Any:
    """The program for a size of the latent and for the structures of its inputs.

    Parameters are inputs, too, so the program has no copy of them.
    """

    def step(leaves, planned, batch, rng, *, axis_name=None):
        keys = jax.random.wrap_key_data(batch["keys"], impl=jax.random.key_impl(rng))
        return images_of(networks.unflatten(leaves), planned, batch, keys, latent)

    name = f"{images_of.__module__}.{images_of.__qualname__}"
    return parallel.compile_eval(step, mode, description=repr((name, latent, networks, planned)))


def _sample(
    networks: dict[str, Any],
    planned: tuple[Any, ...],
    batch: Batch,
    image_keys: Keys,
    latent: tuple[int, int, int],
) -> Array:
    """Prepare the conditions, sample latents, decode them, and paste them into their picture.

    If the option `end` stops the sampling, the result is the noisy latents.
    """
    denoiser, first_stage = networks["denoiser"], networks["first_stage"]
    timesteps, options, weights, (of_adapters, of_controls, of_pictures) = planned
    if networks["adapters"]:
        params = adapted(denoiser.params, networks["adapters"], of_adapters)
        denoiser = denoiser.replace(params=params)
    denoiser = controls.with_params(denoiser, networks["controls"])
    size, f = batch["index"].shape[0], first_stage.module.downsampling
    keys = sampling_keys(image_keys)
    prepared = denoiser.conditioner.prepare(batch, first_stage, latent[:2], keys.conditions)

    inputs = (batch, of_controls, timesteps, options)
    with_hints, without = controls.inputs(denoiser, networks["controls"], *inputs)
    pictured = image_prompts.inputs(networks["image_prompts"], batch, of_pictures)
    with_hints, without = with_hints | pictured[0], without | pictured[1]

    def condition(tokens: str = "tokens", drop: bool = False) -> Any:
        names = {"tokens": tokens, "tokens_weights": f"{tokens}_weights"}
        if drop or tokens == "negative":  # these may have other sizes
            names |= {key: f"negative_{key}" for key in SIZES}
        entries = {key: prepared[name] for key, name in names.items() if name in prepared}
        hints = without if drop or tokens == "negative" else with_hints
        conditioning = denoiser.condition({**prepared, **entries}, jnp.full(size, drop))
        return dataclasses.replace(conditioning, **hints)

    hole, picture = batch.get("hole"), batch.get("known")
    tile = tile_of_latent(options.tile_size, options.tile_overlap, f)
    steer = (networks["classifier"], networks["distance"], options)
    z_0 = denoiser.sample(
        keys,
        condition(),
        condition(drop=True),
        timesteps,
        latent,
        options,
        negative=condition("negative") if "negative" in batch else None,
        more=[(condition(f"more_{i}"), weight) for i, weight in enumerate(weights)],
        nearest=first_stage.nearest if options.quantize_x0 else None,
        z_T=batch.get("z_T"),
        z_0=None if picture is None else first_stage.encode({"image": picture}),
        # A latent position is in the hole as soon as one of its pixels is.
        mask=None if hole is None else nn.max_pool(hole, (f, f), (f, f)),
        guide=guides.guide(batch, denoiser.schedule, first_stage, *steer),
        tile=tile,
    )
    if options.end is not None:
        return z_0
    images = jnp.clip(decoded(first_stage, z_0, tile), -1.0, 1.0)
    if "mask" in batch:  # a model of inpainting: the picture around the hole doesn't change
        return paste(images, batch["image"], batch["mask"])
    return images if hole is None else paste(images, batch["known"], hole)


def _check_finite(images: np.ndarray, first: int, networks: dict[str, Any]) -> None:
    bad = np.flatnonzero(~np.isfinite(images).all(axis=(1, 2, 3)))
    if not len(bad):
        return
    for path, leaf in leaves_by_path(networks).items():
        if not jnp.isfinite(leaf).all():
            raise ValueError(f"parameter {path} isn't finite, so images can't be sampled")
    raise ValueError(
        f"image {first + bad[0]} isn't finite: its latents grew beyond all bounds; "
        "another sampler, more steps or a smaller guidance_scale may help"
    )
