"""Files of IP-Adapters, plain and plus, as the original writes them and diffusers reads them."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import flax.struct
import numpy as np
from flax.core import FrozenDict
from flax.traverse_util import unflatten_dict

from latent_diffusion.convert import unet
from latent_diffusion.convert.adapters.adapter import Adapter, arrays_of, frozen
from latent_diffusion.convert.bundle import Part, as_params, flat, read_part
from latent_diffusion.convert.pretrained import read_pretrained
from latent_diffusion.convert.shapes import array, parameter_shapes
from latent_diffusion.convert.tables import LINEAR, SAME, Leaf, Rule, Table, count, write_tensors
from latent_diffusion.core.types import Params
from latent_diffusion.files.tensor import Tensor, in_memory
from latent_diffusion.files.tensors import write_safetensors
from latent_diffusion.nets.conditioners.clip_image import ClipImage
from latent_diffusion.nets.image_prompt import ImageProjection, Resampler
from latent_diffusion.nets.unet import UNet

PROJECTION = "image_proj"
ENCODER = "image_encoder"  # the folder beside a file
_KEY, _VALUE = "to_k_ip", "to_v_ip"
_HEAD = 64  # channels of a head of the resampler


class Attention(NamedTuple):
    """A cross-attention of a U-Net.

    block: our name of its block. inner: our name of its transformer block. name: diffusers' name.
    """

    block: str
    inner: str
    name: str


class ImagePrompt(Adapter):
    """An IP-Adapter: its parameters by path, as float32 arrays.

    Attentions are numbered in diffusers' order: down, up, middle. fields: those of its projection.
    encoder: parameters of the image encoder, whose fields are encoder_fields; None without one.
    """

    argument: ClassVar[str] = "image_prompts"
    params: Mapping[str, Any]
    fields: Mapping[str, Any] = flax.struct.field(pytree_node=False)
    encoder: Params = None
    encoder_fields: Mapping[str, Any] = flax.struct.field(pytree_node=False, default=FrozenDict())

    @property
    def plus(self) -> bool:
        """Whether the projection takes the image encoder's tokens, and not its embedding."""
        return "inner" in self.fields

    @property
    def projection(self) -> ImageProjection | Resampler:
        """The network that makes tokens of the image encoder's output."""
        return Resampler(**self.fields) if self.plus else ImageProjection(**self.fields)

    @property
    def width(self) -> int:
        """The width of the projection's input: of the encoder's embedding, or of its tokens."""
        first = "proj_in" if self.plus else "proj"
        return int(self.params[f"{PROJECTION}/{first}/kernel"].shape[0])

    @property
    def module(self) -> ClipImage:
        """The image encoder; ValueError where there is none."""
        if self.encoder is None:
            raise ValueError(
                f"{self.path}: no folder {ENCODER} lies beside it, which pictures need: load it "
                f"with image_encoder=PATH" + ("" if self.plus else ", or give embeddings")
            )
        return ClipImage(**self.encoder_fields)

    def tree(self) -> dict[str, Any]:
        """The parameters as a tree: of the projection, and of each attention by its number."""
        return unflatten_dict(dict(self.params), sep="/")

    def attentions(self, module: Any, params: Params) -> tuple[Attention, ...]:
        """The attentions of a U-Net with these parameters; ValueError if they don't fit."""
        if not isinstance(module, UNet):
            raise ValueError(f"{self.path}: an IP-Adapter is for a U-Net, which this model isn't")
        places, unet_params = tuple(cross_attentions(module)), flat(params)
        for i, place in enumerate(places):
            for ours, name in (("to_k", _KEY), ("to_v", _VALUE)):
                kernel = self.params.get(f"{i}/{name}/kernel")
                expected = unet_params[f"{place.block}/{place.inner}/attn2/{ours}/kernel"].shape
                shape = None if kernel is None else kernel.shape
                if shape != expected:
                    raise ValueError(
                        f"{self.path}: {_number(i)}.{name}.weight is "
                        f"{'absent' if shape is None else shape[::-1]}, {place.name}.{ours} of the "
                        f"U-Net {expected[::-1]}; it is another one's"
                    )
        if f"{len(places)}/{_KEY}/kernel" in self.params:
            raise ValueError(
                f"{self.path}: it has more attentions than the U-Net, which has {len(places)}"
            )
        return places


def _number(i: int) -> int:
    """The number of the cross-attention `i` in files, which also count self-attentions."""
    return 2 * i + 1


def cross_attentions(module: UNet) -> Iterator[Attention]:
    """The cross-attentions of a U-Net in the order of files: down, up, middle."""
    blocks = [block for block in unet.walk(module) if block.kind == "attention"]
    blocks.sort(key=lambda block: block.level == len(module.channel_mult))  # the middle is the last
    for block in blocks:
        for j in range(module.depths[block.level]):
            inner = f"transformer_blocks.{j}"
            yield Attention(block.ours, inner.replace(".", "_"), f"{block.theirs}.{inner}.attn2")


# --------------------------------------------------------------------------------------- reading


def is_image_prompt(names: Any) -> bool:
    """Whether tensors of these names are an IP-Adapter."""
    return any(name.startswith("ip_adapter.") for name in names)


def read_image_prompt(
    path: Path, tensors: Mapping[str, Tensor], encoder: str | os.PathLike | None = None
) -> ImagePrompt:
    """The IP-Adapter in a file. encoder: folder of its image encoder, by default beside the file.

    Raises ValueError for an adapter for faces (FaceID), and for an encoder of another width.
    """
    part = open_part(path, tensors)
    adapter = ImagePrompt(path=str(path), params=arrays_of(part), fields=frozen(part.fields))
    beside = path.parent / ENCODER
    if encoder is None and not beside.is_dir():
        return adapter
    encoder_part = read_pretrained("clip_image", Path(encoder or beside), {})
    module = ClipImage(**encoder_part.fields)
    width = module.width if adapter.plus else module.projection_dim
    if width != adapter.width:
        raise ValueError(
            f"{path}: it takes {adapter.width} numbers, of which the image encoder at "
            f"{encoder or beside} makes {width}: load it with image_encoder=PATH"
        )
    return adapter.replace(
        encoder=as_params(encoder_part), encoder_fields=frozen(encoder_part.fields)
    )


def open_part(path: Path, tensors: Mapping[str, Tensor]) -> Part:
    """The parameters of an IP-Adapter, not yet read, and the fields of its projection."""
    others = {
        "perceiver_resampler.proj_in.weight": "FaceID plus",
        "proj.3.weight": "full",
        "proj.2.weight": "FaceID",
    }
    for end, kind in others.items():
        if f"{PROJECTION}.{end}" in tensors:
            raise ValueError(f"{path}: IP-Adapters of the kind {kind} aren't read; plain, plus are")
    fields, attentions = _fields(tensors), count(tensors, "ip_adapter.")
    return read_part(path, fields, table(attentions), _shapes(fields, tensors), tensors)


def _fields(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    def shape(name: str) -> tuple[int, ...]:
        return tensors[f"{PROJECTION}.{name}"].shape

    if f"{PROJECTION}.latents" not in tensors:
        (width,) = shape("norm.weight")
        return {"num_tokens": shape("proj.weight")[0] // width, "width": width}
    _, num_tokens, inner = shape("latents")
    return {
        "num_tokens": num_tokens,
        "width": shape("proj_out.weight")[0],
        "inner": inner,
        "num_heads": shape("layers.0.0.to_q.weight")[0] // _HEAD,
        "depth": count(tensors, f"{PROJECTION}.layers."),
    }


def _shapes(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Params:
    """The tree of parameter shapes. tensors: those of the file; they show the widths."""
    plus = "inner" in fields
    input_width = tensors[f"{PROJECTION}.{'proj_in' if plus else 'proj'}.weight"].shape[1]
    inputs = array(1, 1, input_width) if plus else array(1, input_width)
    module = Resampler(**fields) if plus else ImageProjection(**fields)
    tree = {PROJECTION: parameter_shapes(module, inputs)}
    for i in range(count(tensors, "ip_adapter.")):
        for name in (_KEY, _VALUE):
            tensor = tensors.get(f"ip_adapter.{_number(i)}.{name}.weight")
            inner = 1 if tensor is None else tensor.shape[0]
            tree.setdefault(str(i), {})[name] = {"kernel": array(fields["width"], inner)}
    return tree


def table(attentions: int) -> Table:
    """The names of an IP-Adapter's tensors, for this number of attentions."""
    ours, theirs = f"{PROJECTION}/", f"{PROJECTION}."
    return [
        Rule(PROJECTION, PROJECTION, (Leaf("latents", (".latents",), SAME),)),
        Rule(rf"{ours}(norm|norm_out)", rf"{theirs}\1", "norm"),
        Rule(rf"{ours}(proj|proj_in|proj_out)", rf"{theirs}\1", "linear"),
        Rule(rf"{ours}layers_(\d+)_0_(norm\d)", rf"{theirs}layers.\1.0.\2", "norm"),
        Rule(rf"{ours}layers_(\d+)_1_0", rf"{theirs}layers.\1.1.0", "norm"),
        Rule(rf"{ours}layers_(\d+)_([01])_(to_\w+|\d)", rf"{theirs}layers.\1.\2.\3", "linear"),
        *(
            Rule(
                rf"{i}/({_KEY}|{_VALUE})",
                rf"ip_adapter.{_number(i)}.\1",
                (Leaf("kernel", (".weight",), LINEAR),),
            )
            for i in range(attentions)
        ),
    ]


# --------------------------------------------------------------------------------------- writing


def write_image_prompt(adapter: ImagePrompt, path: Path) -> None:
    """Write an IP-Adapter, without its image encoder, as a file of the original's."""
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: the name of an IP-Adapter's file ends in .safetensors")
    tensors = {k: in_memory(np.asarray(x)) for k, x in adapter.params.items()}
    attentions = sum(name.endswith(f"/{_KEY}/kernel") for name in tensors)
    write_safetensors(path, write_tensors(table(attentions), tensors))
