"""The names that others give the modules of a model in files of adapters."""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from latent_diffusion.convert import clip_text, dit, mmdit, unet
from latent_diffusion.convert.bundle import Bundle, Part
from latent_diffusion.convert.tables import Layout, Pair, Table, pairs, prefixed

BACKBONES = ("unet", "dit", "mmdit")
_ENCODERS = {"clip_text": "text_encoder", "clip_text_2": "text_encoder_2"}


class Place(NamedTuple):
    """Where an array of theirs lies in the parameters of a `Denoiser`.

    path: of our parameter. names: of the modules that it joins, of which this is number `part`, in
    diffusers' words: "unet.mid_block…", "text_encoder.text_model…". shape: of their array.
    """

    path: str
    names: tuple[str, ...]
    part: int
    layout: Layout
    shape: tuple[int, ...]


def pairs_of(bundle: Bundle, kohya: bool = False) -> Iterator[tuple[str, Part, str, Pair]]:
    """Every parameter that diffusers names: its part, the prefix of the names, the pair.

    kohya: the names are those that kohya's sd-scripts make theirs of. They are the original's for
    Stable Diffusion 3, and a DiT has none.
    """
    for name, part in bundle.parts():
        table: Table
        if name == "unet":
            linear, text_time = bundle.linear_projections, bundle.time_width is not None
            prefix, table = "unet", unet.diffusers_table(part.fields, linear, text_time)
        elif name == "mmdit" and kohya:
            prefix, table = "unet", mmdit.original_table(part.fields)
        elif name == "mmdit":
            prefix, table = "transformer", mmdit.diffusers_table(part.fields)
        elif name == "dit" and not kohya:
            # Of the timestep's embedding every block has a copy, which could get another change.
            rules = dit.diffusers_table(part.fields)
            table = [rule for rule in rules if not rule.ours.startswith("t_embedder")]
            prefix = "transformer"
        elif name in _ENCODERS:
            prefix, table = _ENCODERS[name], clip_text.transformers_table(part.fields)
            table = [
                rule if rule.theirs == "text_projection" else prefixed([rule], "text_model.")[0]
                for rule in table
            ]
        else:
            continue
        for pair in pairs(table, part.params, partly=True):
            yield name, part, prefix, pair


def places(bundle: Bundle) -> dict[str, dict[str, Place]]:
    """The places of "weight" and "bias" of every module, by each name that a file may call it."""
    two = has_two(bundle)
    found: dict[str, dict[str, Place]] = {}
    paths: dict[str, tuple[str, ...]] = {}
    for part_name, part, prefix, pair in pairs_of(bundle):
        modules, arrays = zip(*(name.rpartition(".")[::2] for name in pair.theirs), strict=True)
        names = tuple(f"{prefix}.{module}" for module in modules)
        section = part_name if part_name in BACKBONES else f"conditioner/{part_name}"
        path = f"{section}/{pair.ours}"
        for i, shape in enumerate(_shapes(pair, part)):
            place = Place(path, names, i, pair.layout, shape)
            for spelling in _spellings(prefix, modules[i], two):
                found.setdefault(spelling, {})[arrays[i]] = place
        paths[path] = names
    for name, part in bundle.parts():
        if name in BACKBONES:
            for spelling, array, place in _original(bundle, name, part, paths):
                found.setdefault(spelling, {})[array] = place
    return found


def is_idle(bundle: Bundle, name: str) -> bool:
    """Whether a module of a file is in a layer of a text encoder that nothing computes.

    kohya's files for Stable Diffusion XL have the first encoder's last layer.
    """
    part = bundle.conditioners.get("clip_text")
    if part is None or part.fields.get("final_norm", True):
        return False
    layers = range(part.fields["depth"] - part.fields["skip_last"], part.fields["depth"])
    starts = [f"text_encoder.text_model.encoder.layers.{i}." for i in layers]
    kohya = kohya_prefix("text_encoder", has_two(bundle))
    starts += [f"{kohya}_text_model_encoder_layers_{i}_" for i in layers]
    return name.startswith(tuple(starts))


def has_two(bundle: Bundle) -> bool:
    """Whether a model is of those with two of CLIP's text encoders, as SDXL and its refiner."""
    return "clip_text_2" in bundle.conditioners


def kohya_prefix(prefix: str, two: bool) -> str:
    """kohya's prefix for diffusers', which tells a model's only text encoder from one of two."""
    table = {"unet": "lora_unet", "transformer": "lora_transformer", "text_encoder_2": "lora_te2"}
    return table.get(prefix, "lora_te1" if two else "lora_te")


def _spellings(prefix: str, module: str, two: bool) -> tuple[str, ...]:
    """diffusers with its prefix and without, kohya's sd-scripts, LyCORIS' own wrapper."""
    flat = module.replace(".", "_")
    if prefix in ("unet", "transformer"):
        return f"{prefix}.{module}", module, f"lora_{prefix}_{flat}", f"lycoris_{flat}"
    bare = () if two else (module,)
    return f"{prefix}.{module}", *bare, f"{kohya_prefix(prefix, two)}_{flat}"


def _shapes(pair: Pair, part: Part) -> list[tuple[int, ...]]:
    """The shapes of the arrays that files have for a parameter."""
    stand_in = np.broadcast_to(np.int8(0), part.params[pair.ours].shape)
    return [theirs.shape for theirs in pair.layout.write(stand_in)]


def _original(
    bundle: Bundle, name: str, part: Part, paths: Mapping[str, tuple[str, ...]]
) -> Iterator[tuple[str, str, Place]]:
    """The original's names of a backbone's arrays, with kohya's prefix and with its own.

    paths: the names of diffusers' modules, by path of our parameter. Maps that diffusers separates,
    such as q, k and v, are one here.
    """
    tables: dict[str, Callable[[], Table]] = {
        "unet": lambda: unet.compvis_table(part.fields, bundle.linear_projections),
        "mmdit": lambda: mmdit.original_table(part.fields),
        "dit": lambda: dit.dit_table(part.fields),
    }
    for pair in pairs(tables[name](), part.params, partly=True):
        names = paths.get(f"{name}/{pair.ours}", ())
        if len(pair.theirs) > 1 or not names:
            continue
        module, _, array = pair.theirs[0].rpartition(".")
        own = names if len(names) == 1 else (names[0].rpartition(".")[0],)
        place = Place(f"{name}/{pair.ours}", own, 0, pair.layout, _shapes(pair, part)[0])
        for spelling in (f"lora_unet_{module.replace('.', '_')}", f"diffusion_model.{module}"):
            yield spelling, array, place
