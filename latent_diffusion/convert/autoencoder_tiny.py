"""TAESD's files: diffusers' AutoencoderTiny, and the original's two, an encoder and a decoder.

The original numbers the layers of each half from 0; number 0 of its decoder is a clamp.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latent_diffusion.convert.bundle import Bundle, read_part
from latent_diffusion.convert.settings import Fields, Settings, decimal, single
from latent_diffusion.convert.shapes import array, parameter_shapes
from latent_diffusion.convert.tables import Rule, Table, write_tensors
from latent_diffusion.files.tensor import Tensor
from latent_diffusion.files.tensors import open_tensors
from latent_diffusion.nets.tiny_autoencoder import TinyAutoencoder

NAME = "AutoencoderTiny"
_SETTINGS = Settings(
    names={
        "num_encoder_blocks": "encoder_blocks",
        "num_decoder_blocks": "decoder_blocks",
        "latent_channels": "embed_dim",
        "in_channels": "image_channels",
    },
    defaults={
        "in_channels": 3,
        "out_channels": 3,
        "encoder_block_out_channels": (64, 64, 64, 64),
        "decoder_block_out_channels": (64, 64, 64, 64),
        "latent_channels": 4,
        "num_encoder_blocks": (1, 3, 3, 3),
        "num_decoder_blocks": (3, 3, 3, 1),
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
    },
    allowed={"act_fn": ("relu",), "upsample_fn": ("nearest",), "upsampling_scaling_factor": (2,)},
    # The magnitude and the shift are for storing latents as bytes.
    harmless=("latent_magnitude", "latent_shift", "force_upcast", "block_out_channels"),
)
_TABLE: Table = (
    Rule(r"(encoder|decoder)/layers_(\d+)", r"\1.layers.\2", "conv"),
    Rule(r"(encoder|decoder)/layers_(\d+)/conv_(\d+)", r"\1.layers.\2.conv.\3", "conv"),
)
HALVES = ("encoder", "decoder")
# Tensors that identify the original's halves: the first convolutions of the net and of a block.
ENCODER, DECODER = {"0.weight", "1.conv.0.weight"}, {"1.weight", "3.conv.0.weight"}


def fields_from_diffusers(config: Mapping[str, Any]) -> Fields:
    """Our fields from a config.json; ValueError for a setting that our module can't express."""
    fields, values = _SETTINGS.read(config, NAME), _SETTINGS.complete(config, NAME)
    widths = [*values["encoder_block_out_channels"], *values["decoder_block_out_channels"]]
    fields["channels"] = single({"block_out_channels": widths}, "block_out_channels", NAME)
    if values["out_channels"] != values["in_channels"]:
        raise ValueError(f"{NAME}.out_channels={values['out_channels']}; supported: in_channels")
    for half in ("encoder", "decoder"):
        if len(values[f"{half}_block_out_channels"]) != len(values[f"num_{half}_blocks"]):
            raise ValueError(f"{NAME}: {half}_block_out_channels and num_{half}_blocks differ")
    if len(fields["encoder_blocks"]) != len(fields["decoder_blocks"]):
        raise ValueError(f"{NAME}: encoder and decoder differ in the number of levels")
    return {"regularization": "tiny", **fields}


def meaning(config: Mapping[str, Any]) -> Any:
    """All settings of a config.json that change the model, in a form that can be compared."""
    values = _SETTINGS.complete(config, NAME)
    scaling = decimal(values["scaling_factor"]), decimal(values["shift_factor"])
    return NAME, fields_from_diffusers(config), scaling


def read_component(where: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Bundle:
    """Read the component in diffusers' folder."""
    fields, values = fields_from_diffusers(config), _SETTINGS.complete(config, NAME)
    bundle = _read(where, fields, tensors)
    scale = {"scale_factor": values["scaling_factor"], "shift": values["shift_factor"]}
    return Bundle(autoencoder=bundle.autoencoder, **scale, notes={"autoencoder": dict(config)})


def as_component(bundle: Bundle) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config.json and the tensors of diffusers' folder."""
    assert bundle.autoencoder is not None
    module = TinyAutoencoder(**bundle.autoencoder.fields)
    widths = [module.channels] * len(module.encoder_blocks)
    config = {
        **_SETTINGS.write(module),
        "_class_name": NAME,
        "out_channels": module.image_channels,
        "encoder_block_out_channels": widths,
        "decoder_block_out_channels": widths,
        "scaling_factor": decimal(bundle.scale_factor),
        "shift_factor": decimal(bundle.shift),
    }
    return config, write_tensors(_TABLE, bundle.autoencoder.params)


def read_original(path: Path, tensors: Mapping[str, Tensor]) -> Bundle:
    """Read the original's two files: `path` has one half, and the file of the other lies beside it.

    Raises ValueError where the other file is absent.
    """
    halves = {"encoder": ENCODER, "decoder": DECODER}
    half = "encoder" if tensors.keys() >= ENCODER else "decoder"
    other, beside = _other(path, half)
    if half not in path.name or not beside.is_file():
        raise ValueError(
            f"{path} is the {half} of a tiny autoencoder: its {other} must lie beside it, as in "
            f"taesd_{half}{path.suffix} and taesd_{other}{path.suffix}"
        )
    both = {half: tensors, other: open_tensors(beside).tensors}
    if not both[other].keys() >= halves[other]:
        raise ValueError(f"{beside} isn't the {other} of {path.name}")
    named = {}
    for name, parts in both.items():
        for key, tensor in parts.items():
            number, _, rest = key.partition(".")
            if not number.isdecimal():
                raise ValueError(f"{path}: a tiny autoencoder has no tensor {key}")
            layer = int(number) - (name == "decoder")
            named[f"{name}.layers.{layer}.{rest}"] = tensor
    return _read(path, _fields_from_shapes(path, named), named)


def as_original(bundle: Bundle, path: Path) -> dict[Path, dict[str, Tensor]]:
    """The tensors of the original's two files: `path`, and the other half beside it.

    Raises ValueError for a name that has neither "encoder" nor "decoder" in it.
    """
    half = next((half for half in HALVES if half in path.name), None)
    if half is None:
        raise ValueError(
            f"{path} must have encoder or decoder in its name, as taesd_decoder.safetensors has: "
            "a tiny autoencoder is a file of each"
        )
    other, beside = _other(path, half)
    files = {half: path, other: beside}
    halves: dict[Path, dict[str, Tensor]] = {path: {}, beside: {}}
    for name, tensor in as_component(bundle)[1].items():
        side, _, layer, rest = name.split(".", 3)
        halves[files[side]][f"{int(layer) + (side == 'decoder')}.{rest}"] = tensor
    return halves


def _other(path: Path, half: str) -> tuple[str, Path]:
    """The name and the file of the other half."""
    other = HALVES[half == "encoder"]
    return other, path.with_name(path.name.replace(half, other))


def _fields_from_shapes(path: Path, tensors: Mapping[str, Tensor]) -> Fields:
    """Infer the architecture: the lengths of the runs of blocks between other convolutions."""
    blocks = {}
    for half in ("encoder", "decoder"):
        layers = {int(name.split(".")[2]) for name in tensors if name.startswith(half)}
        runs, run = [], 0
        if max(layers) > 4 * len(tensors):  # most layers have tensors
            raise ValueError(f"{path}: {len(tensors)} tensors can't be {max(layers)} layers")
        for layer in range(max(layers) + 1):
            if f"{half}.layers.{layer}.conv.0.weight" in tensors:
                run += 1
            elif layer in layers and layer:
                runs.append(run)
                run = 0
        blocks[f"{half}_blocks"] = tuple(runs)
    if len(blocks["encoder_blocks"]) != len(blocks["decoder_blocks"]):
        raise ValueError(f"{path}: encoder and decoder differ in the number of levels")
    channels, image_channels = tensors["encoder.layers.0.weight"].shape[:2]
    width = tensors["decoder.layers.0.weight"].shape[1]
    sizes = {"channels": channels, "image_channels": image_channels, "embed_dim": width}
    return {"regularization": "tiny", **blocks, **sizes}


def _read(where: Path, fields: Fields, tensors: Mapping[str, Tensor]) -> Bundle:
    layers = sum(fields["encoder_blocks"]) + sum(fields["decoder_blocks"])
    if 6 * layers > len(tensors):  # checked here because computing the shapes may take long
        raise ValueError(f"{where}: {len(tensors)} tensors can't be {layers} blocks")
    module = TinyAutoencoder(**fields)
    side = module.downsampling
    tree = parameter_shapes(module, array(1, side, side, module.image_channels))
    return Bundle(autoencoder=read_part(where, fields, _TABLE, tree, tensors))
