"""Read an encoder of texts or images from any file that may hold it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from latent_diffusion.convert import bert, clip_image, clip_text, t5, text
from latent_diffusion.convert.bundle import Part, check_depth, conditioner_shapes, read_part
from latent_diffusion.convert.tables import Table, below
from latent_diffusion.files.tensor import Tensor


class Encoder(NamedTuple):
    """The files in which one of our encoders may lie.

    module: has `fields_from_config`, `config_from_fields`, `unused` and `fields_from_shapes`.
    tables: the tables of names, each by the name of a tensor that only files with these names have.
    prefixes: beginnings that names may have; they are removed in this order.
    folders: folders of a pipeline that may hold the encoder.
    write: makes the tensors of such a folder.
    bare: whether the shapes of tensors show the fields, so that no config.json is needed.
    """

    module: Any
    tables: Mapping[str, Callable[[Mapping[str, Any]], Table]]
    prefixes: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    write: Callable[[Part], dict[str, Tensor]] | None = None
    bare: bool = False


_CLIP_TEXT = Encoder(
    clip_text,
    {"positional_embedding": clip_text.open_clip_table, "": clip_text.transformers_table},
    ("cond_stage_model.", "model.", "transformer.text_model.", "text_model."),
    ("text_encoder",),
    clip_text.transformers_tensors,
    bare=True,
)
ENCODERS = {
    "bert": Encoder(bert, {"": bert.transformers_table}, ("bert.",)),
    "clip_image": Encoder(
        clip_image,
        {"": clip_image.transformers_table},
        folders=("image_encoder",),
        write=clip_image.transformers_tensors,
    ),
    "clip_text": _CLIP_TEXT,
    "clip_text_2": _CLIP_TEXT._replace(folders=("text_encoder_2",)),
    "t5_text": Encoder(
        t5, {"": t5.transformers_table}, (), ("text_encoder_3",), t5.transformers_tensors, bare=True
    ),
    "text": Encoder(
        text,
        {"token_emb.weight": text.compvis_table, "": text.diffusers_table},
        ("cond_stage_model.", "transformer."),
        ("bert",),
        text.diffusers_tensors,
        bare=True,
    ),
}


def read_encoder(
    name: str,
    where: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    chosen: Mapping[str, Any] | None = None,
) -> Part:
    """Read the encoder `name` from the tensors of the file `where`.

    config: its config.json; without it the shapes show the fields. chosen: fields that the user has
    set. Raises ValueError where the tensors don't fit, and a KeyError that names an absent setting
    or tensor.
    """
    encoder = ENCODERS[name]
    beside = {n: t for n, t in tensors.items() if n == clip_text.PROJECTION}
    for prefix in encoder.prefixes:
        tensors = {**below(tensors, prefix), **beside}
    if config is not None:
        fields = encoder.module.fields_from_config(config)
    elif encoder.bare:
        fields = encoder.module.fields_from_shapes(tensors)
    else:
        raise ValueError(
            f"pretrained.{name}={where} is a bare file; give a folder with config.json"
        )
    fields = {**fields, **(chosen or {})}
    check_depth(where, fields, tensors)
    table = next(t for mark, t in encoder.tables.items() if mark in tensors or not mark)
    shapes, unused = conditioner_shapes(name, fields), encoder.module.unused(fields)
    return read_part(where, fields, table(fields), shapes, tensors, unused)
