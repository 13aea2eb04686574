"""Control nets and T2I-Adapters of a sampling call: hints, scales, windows, the network."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax.numpy as jnp
import numpy as np

from latent_diffusion.convert.adapters import Adapter, ControlWeights, T2IWeights
from latent_diffusion.convert.adapters.adapter import weight_of_names
from latent_diffusion.core.types import Array, Batch, Control, Params
from latent_diffusion.generation import conditions
from latent_diffusion.models.denoiser import Denoiser
from latent_diffusion.nets.control import HINT, Controlled, ControlNet, controlled_params
from latent_diffusion.nets.t2i_adapter import T2IAdapter
from latent_diffusion.process import guidance
from latent_diffusion.process.options import SamplingOptions
from latent_diffusion.process.schedules import Timesteps

SETTINGS = {"start": 0.0, "end": 1.0, "guess": False, "null": True}


def checked(controls: Sequence[Any]) -> list[tuple[Any, Any, Any, dict[str, Any]]]:
    """The entries (adapter, hint, weight, settings); ValueError for anything else."""
    entries = []
    for entry in controls:
        if not (isinstance(entry, tuple | list) and len(entry) in (3, 4)):
            raise ValueError(f"controls are (adapter, hint, weight), not {str(entry)[:80]}")
        adapter, hint, weight, *more = entry
        if not isinstance(adapter, Adapter):
            raise ValueError(f"controls come from load_adapter, not {str(adapter)[:80]}")
        if not isinstance(adapter, ControlWeights | T2IWeights):
            raise ValueError(f"{adapter.path}: give this adapter as {adapter.argument}=")
        settings = dict(more[0]) if more else {}
        if unknown := sorted(set(settings) - set(SETTINGS)):
            names = ", ".join(SETTINGS)
            raise ValueError(f"{adapter.path}: unknown setting {unknown[0]!r}; known: {names}")
        if isinstance(adapter, T2IWeights) and (wrong := sorted(settings.keys() - {"null"})):
            raise ValueError(
                f"{adapter.path}: {wrong[0]} is a setting of control nets; a T2I-Adapter's "
                "features are the same at every step"
            )
        settings = {**SETTINGS, **settings}
        if not 0 <= settings["start"] < settings["end"] <= 1:
            raise ValueError(
                f"{adapter.path}: start={settings['start']} and end={settings['end']} must have "
                "0 ≤ start < end ≤ 1"
            )
        entries.append((adapter, hint, weight, settings))
    return entries


def size_of(controls: Sequence[Any]) -> tuple[int, int] | None:
    """The size of the first hint, which is the default size of the picture."""
    shapes = [np.shape(hint) for _, hint, _, _ in checked(controls)]
    return (shapes[0][-3], shapes[0][-2]) if shapes and len(shapes[0]) in (3, 4) else None


def entries(controls: Sequence[Any], size: tuple[int, int], total: int) -> dict[str, np.ndarray]:
    """The batch entries "hint_0" … [total H W 3]."""
    batch = {}
    for i, (adapter, hint, _, _) in enumerate(checked(controls)):
        try:
            least = adapter.module.shrinks[-1] if isinstance(adapter, T2IWeights) else 1
            if size[0] % least or size[1] % least:
                raise ValueError(f"hint of {size[0]}×{size[1]}: sides must be multiples of {least}")
            rows = conditions.for_all({"hint": _hint(hint, size)}, total)["hint"]
            turned = isinstance(adapter, ControlWeights) and adapter.bgr
            batch[f"hint_{i}"] = rows[..., ::-1] if turned else rows
        except ValueError as error:
            raise ValueError(f"{adapter.path}: {error}") from error
    return batch


def _hint(hint: Any, size: tuple[int, int]) -> np.ndarray:
    """A hint [N H W 3] in [0, 1], but −1 in all channels of a hole, as nets for inpainting have it.

    Pixels of −1 and 1 alone are no holes in white, but edges in the range of pictures.
    """
    given = np.asarray(hint)
    holes = (given == -1).all(-1, keepdims=True) if given.ndim else np.zeros(1, bool)
    if not holes.any() or {-1, 1} == {*np.unique(given).tolist()}:
        return conditions.numbers("hint", hint, (*size, 3), 0, 1)
    outside = conditions.numbers("hint", np.where(holes, 0, given), (*size, 3), 0, 1)
    return np.where(holes, np.float32(-1), outside)


def numbers_of(controls: Sequence[Any]) -> list[dict[str, Any]]:
    """Each control's numbers, inputs of the compiled program: scales, null, start and end."""
    numbers = []
    for adapter, _, weight, settings in checked(controls):
        count = len(adapter.blocks)
        if not isinstance(weight, Mapping) and np.ndim(weight):
            if len(weight) != count:
                raise ValueError(f"{adapter.path}: {len(weight)} weights for {count} outputs")
            scales = np.asarray(weight, np.float32)
        else:
            scales = weight_of_names(adapter.blocks, weight, adapter.path)
        pooled = adapter.fields.get("global_pooling", False)
        if settings["guess"] and not pooled:
            scales = scales * np.logspace(-1, 0, count, dtype=np.float32)
        null = settings["null"] and not settings["guess"] and not pooled
        ends = {name: np.float32(settings[name]) for name in ("start", "end")}
        numbers.append({"scales": scales, "null": np.float32(null), **ends})
    return numbers


class Extractor(flax.struct.PyTreeNode):
    """A T2I-Adapter, and the indices of the U-Net's blocks to which its features are added."""

    params: Params
    module: T2IAdapter = flax.struct.field(pytree_node=False)
    places: tuple[int, ...] = flax.struct.field(pytree_node=False)


def bound(model: Any, controls: Sequence[Any]) -> list[tuple[Adapter, ControlNet | None, Any]]:
    """Each adapter, its net for the model, and its parameters (or an `Extractor`)."""
    nets: list[tuple[Adapter, ControlNet | None, Any]] = []
    f = model.first_stage.module.downsampling
    for adapter, *_ in checked(controls):
        unet, params = model.denoiser.network, model.denoiser.params[model.denoiser.name]
        if isinstance(adapter, T2IWeights):
            places = adapter.places(unet, f)
            nets.append((adapter, None, Extractor(adapter.tree(), adapter.module, places)))
        else:
            nets.append((adapter, adapter.net(unet, params, f), adapter.tree(params)))
    return nets


def with_nets(denoiser: Denoiser, nets: tuple[ControlNet, ...]) -> Denoiser:
    """The denoiser with control nets in its network, but without their parameters."""
    unet: Any = denoiser.network
    return denoiser.replace(network=Controlled(unet, nets)) if nets else denoiser


def with_params(denoiser: Denoiser, params: Sequence[Any]) -> Denoiser:
    """The denoiser of `with_nets` with the parameters of the nets."""
    params = [tree for tree in params if not isinstance(tree, Extractor)]
    if not params:
        return denoiser
    controlled = controlled_params(denoiser.params[denoiser.name], params)
    return denoiser.replace(params={**denoiser.params, denoiser.name: controlled})


def inputs(
    denoiser: Denoiser,
    params: Sequence[Any],
    batch: Batch,
    numbers: Sequence[dict[str, Any]],
    timesteps: Timesteps,
    options: SamplingOptions,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of the `Conditioning`, and of the null `Conditioning`; hints are embedded once.

    params: parameters of each control. numbers: from `numbers_of`.
    """
    rounded = guidance.ROUNDINGS[options.network_timesteps or "exact"]
    conditional: list[Control] = []
    null: list[Control] = []
    features: list[dict[int, Array]] = [{}, {}]
    nets = iter(getattr(denoiser.network, "nets", ()))
    for i, (tree, number) in enumerate(zip(params, numbers, strict=True)):
        if isinstance(tree, Extractor):
            made: Any = tree.module.apply({"params": tree.params}, batch[f"hint_{i}"])
            for place, scale, x in zip(tree.places, number["scales"], made, strict=True):
                for total, factor in zip(features, (1.0, number["null"]), strict=True):
                    total[place] = total.get(place, 0.0) + factor * scale * x
            continue
        net: Any = next(nets)
        hint: Any = net.hint_net.apply({"params": tree[HINT]}, batch[f"hint_{i}"])
        window: Any = _window(number["start"], number["end"], timesteps)
        window = denoiser.schedule.time_t(rounded(window))
        window = window + 1e-4 * (1 + jnp.abs(window))  # equal timesteps may differ by rounding
        window = jnp.broadcast_to(window, (len(hint), 2))
        scales = jnp.broadcast_to(number["scales"], (len(hint), len(number["scales"])))
        conditional.append(Control(hint, scales, window))
        null.append(Control(hint, number["null"] * scales, window))
    listed = [tuple(map(x.get, range(1 + max(x, default=-1)))) for x in features]
    with_hints = {"controls": tuple(conditional), "features": listed[0]}
    return with_hints, {"controls": tuple(null), "features": listed[1]}


def _window(start: Array, end: Array, timesteps: Timesteps) -> Array:
    """The timesteps after which, and until which, a control is used.

    As in diffusers, it is used in steps that begin at the share `start` of all steps or later, and
    that end at the share `end` or before.
    """
    steps = len(timesteps) - 1
    first = jnp.ceil(start * steps - 1e-3).astype(jnp.int32)
    after_last = jnp.floor(end * steps + 1e-3).astype(jnp.int32)
    t = jnp.asarray(timesteps, jnp.float32)
    beyond = jnp.float32(1e6)
    until = jnp.where(first == 0, beyond, t[jnp.minimum(first, steps)])
    until = jnp.where(after_last <= first, -beyond, until)
    after = jnp.where(after_last >= steps, -beyond, t[jnp.minimum(after_last, steps)])
    return jnp.stack([after, until])
