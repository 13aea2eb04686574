"""Control nets of a sampling call: hints, scales and windows, and the network that has them."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from latent_diffusion.convert.adapters import Adapter, ControlWeights
from latent_diffusion.convert.adapters.adapter import weight_of_names
from latent_diffusion.generation import conditions
from latent_diffusion.models.denoiser import Denoiser
from latent_diffusion.nets.control import HINT, Controlled, ControlNet, controlled_params
from latent_diffusion.process import guidance
from latent_diffusion.process.options import SamplingOptions
from latent_diffusion.process.schedules import Timesteps
from latent_diffusion.types import Array, Batch, Control

SETTINGS = {"start": 0.0, "end": 1.0, "guess": False, "null": True}


def checked(controls: Sequence[Any]) -> list[tuple[ControlWeights, Any, Any, dict[str, Any]]]:
    """The entries (adapter, hint, weight, settings); ValueError for anything else."""
    entries = []
    for entry in controls:
        if not (isinstance(entry, tuple | list) and len(entry) in (3, 4)):
            raise ValueError(f"controls are (adapter, hint, weight), not {str(entry)[:80]}")
        adapter, hint, weight, *more = entry
        if not isinstance(adapter, Adapter):
            raise ValueError(f"controls come from load_adapter, not {str(adapter)[:80]}")
        if not isinstance(adapter, ControlWeights):
            raise ValueError(f"{adapter.path}: give this adapter as {adapter.argument}=")
        settings = dict(more[0]) if more else {}
        if unknown := sorted(set(settings) - set(SETTINGS)):
            known = ", ".join(SETTINGS)
            raise ValueError(f"{adapter.path}: unknown setting {unknown[0]!r}; known: {known}")
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
            own = {"hint": conditions.numbers("hint", hint, (*size, 3), 0, 1)}
            rows = conditions.for_all(own, total)["hint"]
            found[f"hint_{i}"] = rows[..., ::-1] if adapter.bgr else rows
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
        pooled = adapter.fields["global_pooling"]
        if settings["guess"] and not pooled:
            scales = scales * np.logspace(-1, 0, count, dtype=np.float32)
        null = settings["null"] and not settings["guess"] and not pooled
        ends = {name: np.float32(settings[name]) for name in ("start", "end")}
        found.append({"scales": scales, "null": np.float32(null), **ends})
    return found


def bound(model: Any, controls: Sequence[Any]) -> list[tuple[ControlWeights, ControlNet, Any]]:
    """Each adapter, its net for the model, and its parameters."""
    found = []
    for adapter, *_ in checked(controls):
        unet, own = model.denoiser.network, model.denoiser.params[model.denoiser.name]
        net = adapter.net(unet, own, model.first_stage.module.downsampling)
        found.append((adapter, net, adapter.tree(own)))
    return found


def with_nets(denoiser: Denoiser, nets: tuple[ControlNet, ...]) -> Denoiser:
    """The denoiser, whose network has the control nets as well, but no parameters of them yet."""
    unet: Any = denoiser.network
    return denoiser.replace(network=Controlled(unet, nets)) if nets else denoiser


def with_params(denoiser: Denoiser, params: Sequence[Any]) -> Denoiser:
    """The denoiser of `with_nets` with the parameters of the nets."""
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
) -> tuple[tuple[Control, ...], tuple[Control, ...]]:
    """The inputs of the nets beside a condition, and beside the null; hints are embedded once."""
    rounded = guidance.ROUNDINGS[options.network_timesteps or "exact"]
    given, null = [], []
    for i, (own, number) in enumerate(zip(params, numbers, strict=True)):
        net: Any = denoiser.network.nets[i]
        hint: Any = net.hint_net.apply({"params": own[HINT]}, batch[f"hint_{i}"])
        window: Any = _window(number["start"], number["end"], timesteps)
        window = denoiser.schedule.time_t(rounded(window))
        window = window + 1e-4 * (1 + jnp.abs(window))  # equal timesteps may differ by rounding
        window = jnp.broadcast_to(window, (len(hint), 2))
        scales = jnp.broadcast_to(number["scales"], (len(hint), len(number["scales"])))
        given.append(Control(hint, scales, window))
        null.append(Control(hint, number["null"] * scales, window))
    return tuple(given), tuple(null)


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
