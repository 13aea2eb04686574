"""Control nets and T2I-Adapters of a sampling call: hints, scales, windows, the network."""

from collections.abc import Sequence
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
            known = ", ".join(SETTINGS)
            raise ValueError(f"{adapter.path}: unknown setting {unknown[0]!r}; known: {known}")
        if isinstance(adapter, T2IWeights) and (own := sorted(settings.keys() - {"null"})):
            raise ValueError(
                f"{adapter.path}: {own[0]} is a setting of control nets; a T2I-Adapter's features "
                "are the same at every step"
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
    """The size of the first hint, which that of the picture is by default."""
    shapes = [np.shape(hint) for _, hint, _, _ in checked(controls)]
    return (shapes[0][-3], shapes[0][-2]) if shapes and len(shapes[0]) in (3, 4) else None


def entries(controls: Sequence[Any], size: tuple[int, int], total: int) -> dict[str, np.ndarray]:
    """The batch entries "hint_0" … [total H W 3]."""
    found = {}
    for i, (adapter, hint, _, _) in enumerate(checked(controls)):
        try:
            least = adapter.module.shrinks[-1] if isinstance(adapter, T2IWeights) else 1
            if size[0] % least or size[1] % least:
                raise ValueError(f"hint of {size[0]}×{size[1]}: sides must be multiples of {least}")
            own = {"hint": conditions.numbers("hint", hint, (*size, 3), 0, 1)}
            rows = conditions.for_all(own, total)["hint"]
            turned = isinstance(adapter, ControlWeights) and adapter.bgr
            found[f"hint_{i}"] = rows[..., ::-1] if turned else rows
        except ValueError as error:
            raise ValueError(f"{adapter.path}: {error}") from error
    return found


def numbers_of(controls: Sequence[Any]) -> list[dict[str, Any]]:
    """What varies of each control without a new compilation: scales, null, start and end."""
    found = []
    for adapter, _, weight, settings in checked(controls):
        count = len(adapter.blocks)
        if isinstance(weight, Sequence | np.ndarray):
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
        found.append({"scales": scales, "null": np.float32(null), **ends})
    return found


class Extractor(flax.struct.PyTreeNode):
    """A T2I-Adapter, and the places of the U-Net that its features join."""

    params: Params
    module: T2IAdapter = flax.struct.field(pytree_node=False)
    places: tuple[int, ...] = flax.struct.field(pytree_node=False)


def bound(model: Any, controls: Sequence[Any]) -> list[tuple[Adapter, ControlNet | None, Any]]:
    """Each adapter, its net for the model, and its parameters (or an `Extractor`)."""
    found: list[tuple[Adapter, ControlNet | None, Any]] = []
    f = model.first_stage.module.downsampling
    for adapter, *_ in checked(controls):
        unet, own = model.denoiser.network, model.denoiser.params[model.denoiser.name]
        if isinstance(adapter, T2IWeights):
            places = adapter.places(unet, f)
            found.append((adapter, None, Extractor(adapter.tree(), adapter.module, places)))
        else:
            found.append((adapter, adapter.net(unet, own, f), adapter.tree(own)))
    return found


def with_nets(denoiser: Denoiser, nets: tuple[ControlNet, ...]) -> Denoiser:
    """The denoiser, whose network has the control nets as well, but no parameters of them yet."""
    unet: Any = denoiser.network
    return denoiser.replace(network=Controlled(unet, nets)) if nets else denoiser


def with_params(denoiser: Denoiser, params: Sequence[Any]) -> Denoiser:
    """The denoiser of `with_nets` with the parameters of the nets."""
    params = [own for own in params if not isinstance(own, Extractor)]
    if not params:
        return denoiser
    own = controlled_params(denoiser.params[denoiser.name], params)
    return denoiser.replace(params={**denoiser.params, denoiser.name: own})


def inputs(
    denoiser: Denoiser,
    params: Sequence[Any],
    batch: Batch,
    numbers: Sequence[dict[str, Any]],
    timesteps: Timesteps,
    options: SamplingOptions,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of a `Conditioning`, and of the null one; hints are embedded once.

    params: of each control. numbers: of `numbers_of`.
    """
    rounded = guidance.ROUNDINGS[options.network_timesteps or "exact"]
    given: list[Control] = []
    null: list[Control] = []
    features: list[dict[int, Array]] = [{}, {}]
    nets = iter(getattr(denoiser.network, "nets", ()))
    for i, (own, number) in enumerate(zip(params, numbers, strict=True)):
        if isinstance(own, Extractor):
            made: Any = own.module.apply({"params": own.params}, batch[f"hint_{i}"])
            for place, scale, x in zip(own.places, number["scales"], made, strict=True):
                for total, factor in zip(features, (1.0, number["null"]), strict=True):
                    total[place] = total.get(place, 0.0) + factor * scale * x
            continue
        net: Any = next(nets)
        hint: Any = net.hint_net.apply({"params": own[HINT]}, batch[f"hint_{i}"])
        window: Any = _window(number["start"], number["end"], timesteps)
        window = denoiser.schedule.time_t(rounded(window))
        window = window + 1e-4 * (1 + jnp.abs(window))  # equal timesteps may differ by rounding
        window = jnp.broadcast_to(window, (len(hint), 2))
        scales = jnp.broadcast_to(number["scales"], (len(hint), len(number["scales"])))
        given.append(Control(hint, scales, window))
        null.append(Control(hint, number["null"] * scales, window))
    listed = [tuple(map(own.get, range(1 + max(own, default=-1)))) for own in features]
    with_hints = {"controls": tuple(given), "features": listed[0]}
    return with_hints, {"controls": tuple(null), "features": listed[1]}


def _window(start: Array, end: Array, timesteps: Timesteps) -> Array:
    """The timesteps after which, and until which, a control counts.

    Of S steps, those count that begin at the share `start` of all or later, and end at `end` or
    before, as in diffusers.
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
