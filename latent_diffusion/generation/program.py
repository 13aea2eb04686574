"""The compiled programs of a sampling call, and the batches that they run on.

A call runs one program for each batch. If `progress` or `preview` look on, it runs three: until the
first evaluation of the network, for each evaluation, and after the last. Barriers keep the compiler
from moving work across their borders, so the images are the same. None of these programs calls the
host; those that do can't be stored on disk.
"""

import dataclasses
import functools
import reprlib
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from latent_diffusion.convert.adapters import adapted
from latent_diffusion.core.rng import independent, keys_of_examples, sampling_keys
from latent_diffusion.core.trees import is_key, leaves_by_path
from latent_diffusion.core.types import Array, Batch, Keys
from latent_diffusion.generation import controls, guides, image_prompts
from latent_diffusion.models.sampling import begin, denoise_of, finish, noise_keys
from latent_diffusion.nets.conditioners.sizes import SIZES
from latent_diffusion.process.guidance import paste
from latent_diffusion.process.samplers import table as sampler
from latent_diffusion.runtime import parallel


class Call(NamedTuple):
    """The inputs of a program, while it is traced: those of `run`, and the keys of the images.

    After `_begin`, the batch also has "sampling" (see `models.sampling`), "state" (see
    `samplers.table`), and "adapted": the network's parameters that adapters have changed, by path.
    """

    networks: dict[str, Any]
    planned: Any
    batch: Batch
    image_keys: Keys
    latent: tuple[int, int, int]


class Watch(NamedTuple):
    """Functions that look on while a denoiser samples; see `SamplingOptions`."""

    progress: Callable[[Any], None] | None = None
    preview: Callable[[Any, Any], None] | None = None


NOBODY = Watch()


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
    watch: Watch = NOBODY,
) -> np.ndarray:
    """Images [N H W C], batch by batch.

    networks: "first_stage", "denoiser", the changes of "adapters", the parameters of "controls" and
    of "image_prompts", and "classifier" and "distance" (either may be None), on their devices.
    planned: timesteps, options, the weights of further prompts, the numbers of all adapters. batch:
    [N ...] entries. latent: (h, w, c). rng: one key, or keys [N] of the images. images_of: computes
    the images of a batch; None is a denoiser's sampling. watch: functions that look on, for a
    denoiser. Raises ValueError, in one line, if an image isn't finite.
    """
    total = len(batch["index"])
    if not is_key(rng):
        raise ValueError(f"rng={reprlib.repr(rng)} must be a key: jax.random.key(seed)")
    if rng.shape not in ((), (total,)):
        raise ValueError(f"rng has {rng.shape} keys; expected one key, or {total} for the images")
    rows = batch_rows(total, batch_size, parallel.num_parts(mode))
    leaves, structure = jax.tree.flatten(networks)
    structures = (mode, latent, structure, jax.tree.structure(planned))
    images: list[np.ndarray] = []
    for start in range(0, total, rows):
        index = np.minimum(np.arange(start, start + rows), total - 1)  # repeat the last
        part = {key: value[index] for key, value in batch.items()}
        indices = jnp.asarray(part["index"])
        keys = independent(rng[index]) if rng.ndim else keys_of_examples(rng, indices)
        part["keys"] = np.asarray(jax.random.key_data(keys))
        part = parallel.process_rows(part, mode)
        inputs = (leaves, planned, part, keys[0])
        if any(function is not None for function in watch):
            num_batches = None if images else -(-total // rows)
            count = min(rows, total - start)
            images.append(_watched(structures, inputs, watch, count, num_batches))
        else:
            images.append(_compiled(*structures, images_of or _sample)(*inputs))
        _check_finite(images[-1], start, networks)
    return np.concatenate(images)[:total]


def _watched(
    structures: tuple[Any, ...],
    inputs: tuple[Any, ...],
    watch: Watch,
    count: int,
    num_batches: int | None,
) -> np.ndarray:
    """The images of a batch, and calls of the functions of `watch` at each evaluation.

    count: the number of its images; the other rows are padding, which `preview` doesn't see.
    num_batches: of the whole call, for its first batch, which tells `progress` their number.
    """
    mode, (leaves, planned, batch, rng) = structures[0], inputs

    def run_part(part: Any) -> Any:
        return _compiled(*structures, part)(leaves, planned, {**batch, **made}, rng)

    batch, made = parallel.place_batch(batch, mode), {}
    made = run_part(_begin)
    t = made["sampling"].table.t
    timesteps = parallel.gathered(t, mode)[: t.shape[-1]]
    bar: Any = watch.progress
    if num_batches is not None and hasattr(bar, "total"):
        bar.total = len(timesteps) * num_batches
    for t in timesteps:
        if watch.progress is not None:
            watch.progress(t)
        made["state"] = run_part(_evaluate)
        if watch.preview is not None:
            watch.preview(t, parallel.gathered(made["state"].seen, mode)[:count])
        jax.block_until_ready(made["state"].z)  # else `progress` would run ahead
    images: np.ndarray = run_part(_end)
    return images


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


@functools.lru_cache(maxsize=32)
def _compiled(
    mode: str, latent: tuple[int, int, int], networks: Any, planned: Any, function: Any
) -> Any:
    """The program of a function, for a size of the latent and for the structures of its inputs.

    Parameters are inputs, too, so the program has no copy of them. The outputs of `_begin` and
    `_evaluate` stay on the devices.
    """

    def step(leaves, planned, batch, rng, *, axis_name=None):
        keys = jax.random.wrap_key_data(batch["keys"], impl=jax.random.key_impl(rng))
        return function(Call(networks.unflatten(leaves), planned, batch, keys, latent))

    name = f"{function.__module__}.{function.__qualname__}"
    description = repr((name, latent, networks, planned))
    if function in (_begin, _evaluate):
        return parallel.compile_part(step, mode, "index", description=description)
    return parallel.compile_eval(step, mode, description=description)


def _sample(call: Call) -> Array:
    """Images by a denoiser; if the option `end` stops the sampling, the noisy latents."""
    made = jax.lax.optimization_barrier(_begin(call))
    table = made["sampling"].table
    if len(table.t):
        state = _advance(call._replace(batch={**call.batch, **made}), jnp.int32(len(table.t)))
        made["state"] = jax.lax.optimization_barrier(state)
    return _end(call._replace(batch={**call.batch, **made}))


def _begin(call: Call) -> dict[str, Any]:
    """Prepare the conditions, and all else that precedes the first evaluation of the network."""
    networks, planned, batch, image_keys, latent = call
    denoiser, first_stage = networks["denoiser"], networks["first_stage"]
    timesteps, options, weights, (of_adapters, of_controls, of_pictures) = planned
    changed: dict[str, Array] = {}
    if networks["adapters"]:
        params = adapted(denoiser.params, networks["adapters"], of_adapters)
        denoiser = denoiser.replace(params=params)
        paths = {path for change in networks["adapters"] for path in change}
        of_network = flatten_dict({denoiser.name: params[denoiser.name]}, sep="/")
        changed = {path: of_network[path] for path in paths & of_network.keys()}
    denoiser = controls.with_params(denoiser, networks["controls"])
    size, f = batch["index"].shape[0], first_stage.module.downsampling
    first_stage = first_stage.in_tiles(options.tile_size, options.tile_overlap)
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
    sampling, z = begin(
        denoiser,
        keys,
        condition(),
        condition(drop=True),
        timesteps,
        latent,
        options,
        negative=condition("negative") if "negative" in batch else None,
        more=[(condition(f"more_{i}"), weight) for i, weight in enumerate(weights)],
        z_T=batch.get("z_T"),
        z_0=None if picture is None else first_stage.encode({"image": picture}),
        # A latent position is in the hole as soon as one of its pixels is.
        mask=None if hole is None else nn.max_pool(hole, (f, f), (f, f)),
        tile=first_stage.tile,
    )
    return {"sampling": sampling, "adapted": changed, "state": sampler.start(sampling.table, z)}


def _evaluate(call: Call) -> sampler.State:
    """The state of the sampler after the next evaluation of the network."""
    return _advance(call, call.batch["state"].i + 1)


def _advance(call: Call, stop: Array) -> sampler.State:
    """The state of the sampler before evaluation `stop`."""
    networks, planned, batch, image_keys, _ = call
    denoiser, first_stage, options = networks["denoiser"], networks["first_stage"], planned[1]
    params = flatten_dict(denoiser.params, sep="/") | batch["adapted"]
    denoiser = denoiser.replace(params=unflatten_dict(params, sep="/"))
    denoiser = controls.with_params(denoiser, networks["controls"])
    keys = sampling_keys(image_keys)
    guiding = (networks["classifier"], networks["distance"], options)
    denoise = denoise_of(
        denoiser,
        batch["sampling"],
        keys,
        nearest=first_stage.nearest if options.quantize_x0 else None,
        guide=guides.guide(batch, denoiser.schedule, first_stage, *guiding),
        tile=first_stage.in_tiles(options.tile_size, options.tile_overlap).tile,
    )
    noise = noise_keys(batch["sampling"], keys)
    return sampler.advance_until(batch["sampling"].table, batch["state"], stop, denoise, noise)


def _end(call: Call) -> Array:
    """Decode the latents, and paste the images into their picture."""
    first_stage, options, batch = call.networks["first_stage"], call.planned[1], call.batch
    z_0 = finish(batch["sampling"], batch["state"].z)
    if options.end is not None:
        return z_0
    first_stage = first_stage.in_tiles(options.tile_size, options.tile_overlap)
    images = jnp.clip(first_stage.decode(z_0), -1.0, 1.0)
    if "mask" in batch:  # a model of inpainting: the picture around the hole doesn't change
        return paste(images, batch["image"], batch["mask"])
    return images if "hole" not in batch else paste(images, batch["known"], batch["hole"])


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
