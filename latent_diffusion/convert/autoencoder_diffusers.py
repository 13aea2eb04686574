"""The settings of diffusers' autoencoders, and the differences between versions of their files."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from latent_diffusion.convert.autoencoder import check_codes
from latent_diffusion.convert.settings import Fields, Settings
from latent_diffusion.core.types import lookup
from latent_diffusion.files.tensor import Tensor, in_memory
from latent_diffusion.nets.autoencoder import Autoencoder

_BOTH = Settings(  # those of both diffusers' classes
    names={
        "layers_per_block": "num_res_blocks",
        "norm_num_groups": "num_groups",
        "in_channels": "image_channels",
        "latent_channels": "z_channels",
    },
    defaults={
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",),
        "block_out_channels": (64,),
        "layers_per_block": 1,
        "norm_num_groups": 32,
        "latent_channels": 4,
        "mid_block_add_attention": True,
        # 0.18215 in the class, too, but the released VQ models lack the setting and have 1.
        "scaling_factor": 0.18215,
    },
    allowed={"act_fn": ("silu", "swish")},
    harmless=("sample_size", "force_upcast"),  # `read_size` reads the first
)
_SETTINGS = {
    "AutoencoderKL": replace(
        _BOTH,
        defaults={**_BOTH.defaults, "use_quant_conv": True, "use_post_quant_conv": True},
        optional={"shift_factor": 0.0},
        checked=dict.fromkeys(("latents_mean", "latents_std"), (None,)),
    ),
    "VQModel": replace(
        _BOTH,
        defaults={
            **_BOTH.defaults,
            "latent_channels": 3,
            "num_vq_embeddings": 256,
            "scaling_factor": 1.0,
        },
        optional={"vq_embed_dim": 3},
        checked={"norm_type": ("group",), "lookup_from_codebook": (False,)},
    ),
}
_BLOCKS = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def with_new_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a diffusers file under today's names; versions before 0.18 had other names."""

    def new(name: str) -> str:
        *module, last, leaf = name.split(".")
        return ".".join([*module, _OLD_ATTENTION.get(last, last), leaf])

    return {new(name): tensor for name, tensor in tensors.items()}


# The settings of diffusers that leave out a 1×1 convolution beside the latent → its name.
_QUANT_CONVS = {"use_quant_conv": "quant_conv", "use_post_quant_conv": "post_quant_conv"}


def without_quant_convs(config: Mapping[str, Any], fields: Fields) -> dict[str, Tensor]:
    """Identities in the place of the convolutions beside the latent that the config leaves out."""
    absent = [name for setting, name in _QUANT_CONVS.items() if not config.get(setting, True)]
    return identities(fields["z_channels"], absent)


def identities(
    z_channels: int, names: Collection[str] = tuple(_QUANT_CONVS.values())
) -> dict[str, Tensor]:
    """The tensors of convolutions beside the latent that are identities."""
    tensors = {}
    for name in names:
        width = (2 if name == "quant_conv" else 1) * z_channels
        tensors[f"{name}.weight"] = in_memory(np.eye(width, dtype=np.float32)[..., None, None])
        tensors[f"{name}.bias"] = in_memory(np.zeros(width, np.float32))
    return tensors


def _changes_nothing(tensors: Mapping[str, Tensor], name: str) -> bool:
    weight, bias = (np.asarray(tensors[f"{name}.{leaf}"].read()) for leaf in ("weight", "bias"))
    return not bias.any() and np.array_equal(weight[..., 0, 0], np.eye(len(weight)))


def without_identities(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors without the convolutions beside the latent; ValueError if not identities."""
    names = [prefix + name for name in _QUANT_CONVS.values()]
    if wrong := [name for name in names if not _changes_nothing(tensors, name)]:
        raise ValueError(
            f"this format has no {wrong[0]}, which is no identity; save it as diffusers"
        )
    return {n: t for n, t in tensors.items() if n.rpartition(".")[0] not in names}


def drop_quant_convs(
    config: dict[str, Any], tensors: dict[str, Tensor], source: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Leave out the convolutions that the source file lacked, if they are still identities.

    source: the config of that file. Returns the changed config and tensors.
    """
    for setting, name in _QUANT_CONVS.items():
        if setting in source:
            config[setting] = bool(source[setting] or not _changes_nothing(tensors, name))
            if not config[setting]:
                tensors = {n: t for n, t in tensors.items() if not n.startswith(f"{name}.")}
    return config, tensors


def fields_from_diffusers(config: Mapping[str, Any]) -> Fields:
    """Our fields from a config.json of AutoencoderKL or VQModel.

    Raises ValueError for a setting that our autoencoder can't express.
    """
    name = config["_class_name"]
    fields, config = _SETTINGS[name].read(config, name), complete(config)
    widths = list(config["block_out_channels"])
    if not widths or any(width % widths[0] for width in widths):
        raise ValueError(f"{name}.block_out_channels={widths}; expected multiples of the first one")
    if config["out_channels"] != config["in_channels"]:
        raise ValueError(
            f"{name}.out_channels={config['out_channels']}; supported: in_channels = "
            f"{config['in_channels']}"
        )
    attention = _attention(config, "down_block_types")
    if len(attention) != len(widths) or attention != _attention(config, "up_block_types")[::-1]:
        raise ValueError(
            f"{name}: down_block_types and up_block_types must attend at the same levels, as many "
            f"as there are block_out_channels: {len(widths)}"
        )
    # diffusers lists the levels with attention; our fields list the image's resolutions there.
    resolution = max(256, 2 ** min(len(widths) - 1, 64))
    fields |= {
        "channels": widths[0],
        "channel_mult": tuple(width // widths[0] for width in widths),
        "attn_resolutions": tuple(resolution >> i for i, yes in enumerate(attention) if yes),
        "attn_type": "vanilla" if config["mid_block_add_attention"] else "none",
        "resolution": resolution,
        "embed_dim": fields["z_channels"],
        "regularization": "kl",
    }
    if name == "VQModel":
        width = config["vq_embed_dim"] or fields["z_channels"]
        codes = {"num_codes": config["num_vq_embeddings"], "embed_dim": width}
        return {**fields, **codes, "regularization": "vq"}
    return fields


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of AutoencoderKL or VQModel, checked and with their defaults."""
    return _SETTINGS[config["_class_name"]].complete(config, config["_class_name"])


def _attention(config: Mapping[str, Any], setting: str) -> list[bool]:
    """Whether each level has attention."""
    kinds = [kind.replace("UpDecoder", "DownEncoder") for kind in config[setting]]
    return [lookup(_BLOCKS, kind, f"{config['_class_name']}.{setting}") for kind in kinds]


def diffusers_from_fields(fields: Mapping[str, Any], image_size: Any) -> dict[str, Any]:
    """A config.json for AutoencoderKL or VQModel; ValueError where they can't express the model."""
    module = Autoencoder(**fields)
    vq, levels = module.regularization == "vq", range(len(module.channel_mult))
    expressible = module.regularization in ("kl", "vq") and module.attn_type != "linear"
    if not expressible or module.tanh_out:
        raise ValueError(
            "diffusers has autoencoders with regularization kl or vq, attn_type vanilla or none, "
            f"no tanh_out, not {module.regularization!r}, {module.attn_type!r}, {module.tanh_out}"
        )
    check_codes(module)
    if not vq and module.embed_dim != module.z_channels:
        raise ValueError(
            "diffusers' AutoencoderKL needs embed_dim = z_channels, this model has "
            f"{module.embed_dim} and {module.z_channels}"
        )
    attends = [module.resolution >> i in module.attn_resolutions for i in levels]
    config = {
        **_BOTH.write(module),
        "_class_name": "VQModel" if vq else "AutoencoderKL",
        "block_out_channels": [mult * module.channels for mult in module.channel_mult],
        "down_block_types": [f"{'Attn' if a else ''}DownEncoderBlock2D" for a in attends],
        "up_block_types": [f"{'Attn' if a else ''}UpDecoderBlock2D" for a in attends[::-1]],
        "out_channels": module.image_channels,
        "mid_block_add_attention": module.attn_type != "none",
        "sample_size": list(image_size) if isinstance(image_size, tuple) else image_size,
    }
    if vq:
        config |= {"num_vq_embeddings": module.num_codes, "vq_embed_dim": module.embed_dim}
    return config
