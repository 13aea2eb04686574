"""The names that the modules of a model have in files of adapters."""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from latent_diffusion.convert import clip_text, dit, mmdit, unet
from latent_diffusion.convert.bundle import Bundle, Part
from latent_diffusion.convert.tables import CONV, LINEAR, Layout, Pair, Table, pairs, prefixed

BACKBONES = ("unet", "dit", "mmdit")
_ENCODERS = {"clip_text": "text_encoder", "clip_text_2": "text_encoder_2"}


class Place(NamedTuple):
    """Where an array of an adapter's file belongs in the parameters of a `Denoiser`.

    path: of our parameter. names: diffusers' names of the modules that the parameter joins, such as
    "unet.mid_block…" or "text_encoder.text_model…"; the array belongs to number `part` of them.
    layout: how the parameter is made of their arrays. shape: that of the array.
    """

    path: str
    names: tuple[str, ...]
    part: int
    layout: Layout
    shape: tuple[int, ...]


def pairs_of(bundle: Bundle, kohya: bool = False) -> Iterator[tuple[str, Part, str, Pair]]:
    """For each parameter with a name in diffusers: name and part, prefix of the names, and `Pair`.

    kohya: yield the names from which kohya's sd-scripts derive theirs. They are the original's for
    Stable Diffusion XL and 3; a DiT has none.
    """
    for name, part in bundle.parts():
        table: Table
        linear, text_time = bundle.linear_projections, bundle.time_width is not None
        if name == "unet" and kohya and text_time:
            prefix, table = "unet", unet.compvis_table(part.fields, linear)
        elif name == "unet":
            prefix, table = "unet", unet.diffusers_table(part.fields, linear, text_time)
        elif name == "mmdit" and kohya:
            prefix, table = "unet", mmdit.original_table(part.fields)
        elif name == "mmdit":
            prefix, table = "transformer", mmdit.diffusers_table(part.fields)
        elif name == "dit" and not kohya:
            # Every block has a copy of the timestep's embedding, and the changes could differ.
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


def own_pairs(bundle: Bundle) -> Iterator[tuple[str, Part, str, Pair]]:
    """Like `pairs_of`, for kernels of the denoiser that have no name in diffusers.

    Only adapters of workdirs have them.
    """
    named = {(name, pair.ours) for name, _, _, pair in pairs_of(bundle)}
    parts = [(name, part) for name, part in bundle.parts() if name not in ("autoencoder", "prior")]
    for name, part in parts:
        for path, tensor in part.params.items():
            module, _, leaf = path.rpartition("/")
            if leaf == "kernel" and (name, path) not in named:
                layout = CONV if len(tensor.shape) == 4 else LINEAR
                theirs = (module.replace("/", ".") + ".weight",)
                prefix = name if name in BACKBONES else f"conditioner.{name}"
                yield name, part, prefix, Pair(path, theirs, layout)


def section_path(part: str, path: str) -> str:
    """The path of a part's parameter in the parameters of a `Denoiser`."""
    return f"{part}/{path}" if part in BACKBONES else f"conditioner/{part}/{path}"


def places(bundle: Bundle) -> dict[str, dict[str, Place]]:
    """{module: {"weight" | "bias": place}}, for each spelling of a module's name in files."""
    two = has_two(bundle)
    by_spelling: dict[str, dict[str, Place]] = {}
    paths: dict[str, tuple[str, ...]] = {}
    for part_name, part, prefix, pair in pairs_of(bundle):
        modules, arrays = zip(*(name.rpartition(".")[::2] for name in pair.theirs), strict=True)
        names = tuple(f"{prefix}.{module}" for module in modules)
        path = section_path(part_name, pair.ours)
        for i, shape in enumerate(_shapes(pair, part)):
            place = Place(path, names, i, pair.layout, shape)
            for spelling in _spellings(prefix, modules[i], two):
                by_spelling.setdefault(spelling, {})[arrays[i]] = place
        paths[path] = names
    for name, part in bundle.parts():
        if name in BACKBONES:
            for spelling, array, place in _original(bundle, name, part, paths):
                by_spelling.setdefault(spelling, {})[array] = place
    for part_name, part, prefix, pair in own_pairs(bundle):
        module = f"{prefix}.{pair.theirs[0].removesuffix('.weight')}"
        path, (shape,) = section_path(part_name, pair.ours), _shapes(pair, part)
        by_spelling[module] = {"weight": Place(path, (module,), 0, pair.layout, shape)}
    return by_spelling


def is_idle(bundle: Bundle, name: str) -> bool:
    """Whether a module of a file is in a layer of a text encoder whose output is not used.

    kohya's files for Stable Diffusion XL have such modules, in the first encoder's last layer.
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
    """Whether the model's family has two CLIP text encoders, as for SDXL and its refiner."""
    return "clip_text_2" in bundle.conditioners


def kohya_prefix(prefix: str, two: bool) -> str:
    """kohya's prefix in the place of diffusers'. two: whether the model has two text encoders."""
    table = {"unet": "lora_unet", "transformer": "lora_transformer", "text_encoder_2": "lora_te2"}
    return table.get(prefix, "lora_te1" if two else "lora_te")


def _spellings(prefix: str, module: str, two: bool) -> tuple[str, ...]:
    """Names as in diffusers with its prefix and without, kohya's sd-scripts, and LyCORIS."""
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
    """The original's names of a backbone's arrays, with kohya's prefix and with the original's.

    paths: the names of diffusers' modules, by path of our parameter. Linear maps that diffusers
    separates, such as q, k and v, are one map here.
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
        modules = names if len(names) == 1 else (names[0].rpartition(".")[0],)
        place = Place(f"{name}/{pair.ours}", modules, 0, pair.layout, _shapes(pair, part)[0])
        for spelling in (f"lora_unet_{module.replace('.', '_')}", f"diffusion_model.{module}"):
            yield spelling, array, place
