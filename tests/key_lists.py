"""Lists of names and shapes: `tests/keys/NAME.txt`, those of the tensors in public checkpoints.

A file is a sequence of blocks. The first line of a block names modules that look alike, the
indented ones what each of them holds: a tensor's name within it, and its shape. The checks are for
this folder's tests, which run a few of them, and for those of `parity`, which run all.
"""

import json
import re
from collections import defaultdict
from pathlib import Path

import pytest
from sparse import write_sparse

from latent_diffusion import convert
from latent_diffusion.convert.adapters import control, read_adapter, t2i_adapter
from latent_diffusion.convert.components import as_component
from latent_diffusion.convert.compvis import IGNORED
from latent_diffusion.convert.compvis_writing import as_compvis
from latent_diffusion.convert.tables import write_tensors

FOLDER = Path(__file__).parent / "keys"


def read_key_list(name):
    """{tensor name: shape} of one list."""
    keys, modules = {}, []
    for line in (FOLDER / f"{name}.txt").read_text().splitlines():
        if not line.startswith(" "):
            modules = ["" if module == "." else f"{module}." for module in line.split()]
            continue
        tensor, *shape = line.split()
        keys.update({module + tensor: tuple(map(int, shape)) for module in modules})
    return keys


def format_key_list(keys):
    """The inverse of `read_key_list`."""
    modules = defaultdict(dict)
    for name, shape in keys.items():
        parts = name.split(".")
        cut = max((i + 1 for i, part in enumerate(parts[:4]) if part.isdigit()), default=0)
        modules[".".join(parts[:cut])][".".join(parts[cut:])] = shape
    alike = defaultdict(list)
    for module, tensors in modules.items():
        alike[tuple(sorted(tensors.items()))].append(module or ".")
    blocks = sorted(alike.items(), key=lambda block: sorted(map(_natural, block[1])))
    return "".join(
        " ".join(sorted(modules, key=_natural))
        + "\n"
        + "".join(f" {' '.join([tensor, *map(str, shape)])}\n" for tensor, shape in tensors)
        for tensors, modules in blocks
    )


def _natural(name):
    return [
        (part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"\.", name)
    ]


UNET, FIRST_STAGE, COND_STAGE = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
# U-Net, first stage, conditioner: a list's name, the same and its prefix, or names and shapes
CHECKPOINTS = {
    "celeba256": ("celeba256", "vq-f4", {}),
    "lsun_churches256": ("lsun_churches256", "kl-f8", {}),
    "cin256": ("cin256", "vq-f8", {"embedding.weight": (1000, 512)}),
    "cin256-v2": ("cin256-v2", "vq-f4", {"embedding.weight": (1001, 512)}),
    "text2img256": ("text2img256", "vq-f4", "conditioner-bert-640"),
    "txt2img-1p4B": ("txt2img-1p4B", "kl-f8", "conditioner-bert-1280"),
    "layout2img": ("layout2img", "vq-f4", "conditioner-bert-layout"),
    "retrieval768": ("retrieval768", "kl-f16", {}),
    "bsr_sr": ("bsr_sr", "vq-f4", {}),
    "inpainting_big": ("inpainting_big", "vq-f4-noattn", "first-stage-vq-f4-noattn"),
    "semantic_synthesis256": (
        "semantic_synthesis256",
        "vq-f4",
        {"channel_mapper.weight": (3, 182, 1, 1)},
    ),
    "sd-v1": ("sd-v1", "kl-f8", ("diffusers-clip-l", "transformer.")),
    "sd-v1-inpainting": ("sd-v1", "kl-f8", ("diffusers-clip-l", "transformer.")),
    "sd-v2": ("sd-v2", "kl-f8", "conditioner-open-clip-h"),
    "sd-v2-depth": ("sd-v2", "kl-f8", "conditioner-open-clip-h"),
    "sd-v2-unclip-h": ("sd-v2-unclip-h", "kl-f8", "conditioner-open-clip-h"),
    "sd-x4-upscaler": ("sd-x4-upscaler", "kl-f4-z4", "conditioner-open-clip-h"),
    "sdxl": ("sdxl", "kl-f8", {}),
    "sdxl-inpainting": ("sdxl", "kl-f8", {}),
    "sdxl-refiner": ("sdxl-refiner", "kl-f8", {}),
}
_FIRST, _SECOND = ("diffusers-clip-l", "transformer."), ("conditioner-open-clip-g", "")
SGM = {  # text encoders of Stable Diffusion XL, and the prefixes of their names
    "sdxl": (_FIRST, _SECOND),
    "sdxl-inpainting": (_FIRST, _SECOND),
    "sdxl-refiner": (_SECOND,),
}
EMBEDDERS = {"sd-v2-unclip-h": "conditioner-open-clip-h-image"}  # further encoders
IN_CHANNELS = {
    "sd-v1-inpainting": 9,
    "sd-v2-depth": 5,
    "sdxl-inpainting": 9,
}  # beside an otherwise equal U-Net
INPUTS = {  # conditioners
    "celeba256": [],
    "lsun_churches256": [],
    "cin256": ["class_label"],
    "cin256-v2": ["class_label"],
    "text2img256": ["text"],
    "txt2img-1p4B": ["text"],
    "layout2img": ["layout"],
    "retrieval768": [],
    "bsr_sr": ["low_res"],
    "inpainting_big": ["masked_image"],
    "semantic_synthesis256": ["spatial_rescaler"],
    "sd-v1": ["clip_text"],
    "sd-v1-inpainting": ["clip_text", "masked_image"],
    "sd-v2": ["clip_text"],
    "sd-v2-depth": ["clip_text", "depth"],
    "sd-v2-unclip-h": ["clip_text", "clip_image"],
    "sd-x4-upscaler": ["clip_text", "low_res"],
    "sdxl": ["clip_text", "clip_text_2", "sizes"],
    "sdxl-inpainting": ["masked_image", "clip_text", "clip_text_2", "sizes"],
    "sdxl-refiner": ["clip_text_2", "sizes"],
}
FACTS = {  # M parameters and tensors of the U-Net
    "celeba256": (274.06, 368),
    "lsun_churches256": (294.97, 520),
    "cin256": (394.98, 626),
    "cin256-v2": (400.92, 688),
    "text2img256": (403.62, 688),
    "txt2img-1p4B": (872.30, 686),
    "layout2img": (246.28, 1328),
    "retrieval768": (1335.48, 688),
    "bsr_sr": (113.62, 306),
    "inpainting_big": (387.25, 416),
    "semantic_synthesis256": (215.23, 216),
    "sd-v1": (859.52, 686),
    "sd-v1-inpainting": (859.54, 686),
    "sd-v2": (865.91, 686),
    "sd-v2-depth": (865.91, 686),
    "sd-v2-unclip-h": (870.17, 690),
    "sd-x4-upscaler": (472.37, 686),
    "sdxl": (2567.46, 1680),
    "sdxl-inpainting": (2567.48, 1680),
    "sdxl-refiner": (2259.53, 1220),
}
BUFFERS = (
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)


def prefixed(prefix, keys):
    return {prefix + name: shape for name, shape in keys.items()}


def with_average(keys):
    """The names of the moving average too, as files in training have them."""
    average = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): shape
        for name, shape in keys.items()
        if name.startswith(UNET)
    }
    return {**keys, **average, "model_ema.decay": (), "model_ema.num_updates": ()}


def millions(part):
    return round(sum(tensor.size for tensor in part.params.values()) / 1e6, 2)


def shapes(tensors):
    return {name: tensor.shape for name, tensor in tensors.items()}


def is_ignored(name):
    return any(re.fullmatch(pattern, name) for pattern in IGNORED)


def check_checkpoint(name, tmp_path):
    unet, first_stage, conditioner = CHECKPOINTS[name]
    if isinstance(conditioner, str):
        conditioner = read_key_list(conditioner)
    if isinstance(conditioner, tuple):
        conditioner = prefixed(conditioner[1], read_key_list(conditioner[0]))
    keys = {
        **prefixed(UNET, read_key_list(f"unet-{unet}")),
        **prefixed(FIRST_STAGE, read_key_list(f"first-stage-{first_stage}")),
        **prefixed(COND_STAGE, conditioner),
        **prefixed("embedder.model.", read_key_list(EMBEDDERS[name]) if name in EMBEDDERS else {}),
    }
    for index, (encoder, prefix) in enumerate(SGM.get(name, ())):
        keys |= prefixed(f"conditioner.embedders.{index}.{prefix}", read_key_list(encoder))
    if name in IN_CHANNELS:
        width, _, *kernel = keys[f"{UNET}input_blocks.0.0.weight"]
        keys[f"{UNET}input_blocks.0.0.weight"] = (width, IN_CHANNELS[name], *kernel)
    buffers = {buffer: (1000,) for buffer in BUFFERS}
    if name in EMBEDDERS:
        buffers |= {f"noise_augmentor.{buffer}": (1000,) for buffer in BUFFERS}
    path = write_sparse(tmp_path / "model.safetensors", {**with_average(keys), **buffers})
    bundle = convert.read(path)
    assert (millions(bundle.unet), len(bundle.unet.params)) == FACTS[name]
    assert list(bundle.conditioners) == INPUTS[name]
    written, _ = as_compvis(bundle)
    assert shapes(written) == {k: v for k, v in keys.items() if not is_ignored(k)}


FIRST_STAGES = {  # M parameters
    "kl-f4": 55.31, "kl-f8": 83.65, "kl-f16": 69.61, "kl-f32": 103.88, "vq-f4": 55.32,
    "vq-f4-noattn": 53.22, "vq-f8": 67.72, "vq-f8-n256": 67.65, "vq-f16": 69.59,
}  # fmt: skip


def check_first_stage(name, tmp_path):
    keys = read_key_list(f"first-stage-{name}")
    losses = {"loss.logvar": (), "loss.discriminator.main.0.weight": (64, 3, 4, 4)}
    bundle = convert.read(write_sparse(tmp_path / "model.safetensors", {**keys, **losses}))
    assert millions(bundle.autoencoder) == pytest.approx(FIRST_STAGES[name], abs=0.011)
    written, _ = as_compvis(bundle)
    assert shapes(written) == keys


STABLE = {
    "_class_name": "UNet2DConditionModel",
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
    "in_channels": 4,
    "out_channels": 4,
    "norm_num_groups": 32,
}
XL = {
    **STABLE,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
    "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD3 = {
    "_class_name": "SD3Transformer2DModel",
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 192,
    "in_channels": 16,
}
COMPONENTS = {
    "diffusers-sd-v1-unet": STABLE,
    "diffusers-sd-v2-unet": {
        **STABLE,
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    },
    "diffusers-sd-v2-unclip-h-unet": {
        **STABLE,
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 2048,
    },
    "diffusers-ldm-celebahq-unet": {
        "_class_name": "UNet2DModel",
        "block_out_channels": [224, 448, 672, 896],
        "down_block_types": ["DownBlock2D"] + ["AttnDownBlock2D"] * 3,
        "up_block_types": ["AttnUpBlock2D"] * 3 + ["UpBlock2D"],
        "layers_per_block": 2,
        "attention_head_dim": 32,
        "in_channels": 3,
        "out_channels": 3,
        "norm_num_groups": 32,
    },
    "diffusers-sd-vae": {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "in_channels": 3,
        "norm_num_groups": 32,
    },
    "diffusers-ldm-vqvae": {
        "_class_name": "VQModel",
        "block_out_channels": [128, 256, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "layers_per_block": 2,
        "latent_channels": 3,
        "num_vq_embeddings": 8192,
        "in_channels": 3,
        "norm_num_groups": 32,
    },
    "diffusers-sd3-medium": SD3,
    "diffusers-sd35-medium": {
        **SD3,
        "pos_embed_max_size": 384,
        "dual_attention_layers": [*range(13)],
        "qk_norm": "rms_norm",
    },
    "diffusers-sd35-large": {
        **SD3,
        "num_layers": 38,
        "num_attention_heads": 38,
        "caption_projection_dim": 2432,
        "qk_norm": "rms_norm",
    },
    "diffusers-sd3-vae": {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": 16,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "diffusers-t5-xxl": {
        "architectures": ["T5EncoderModel"],
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "vocab_size": 32128,
        "feed_forward_proj": "gated-gelu",
    },
    "diffusers-clip-l": {
        "architectures": ["CLIPTextModel"],
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "vocab_size": 49408,
    },
    "diffusers-clip-h": {
        "architectures": ["CLIPTextModel"],
        "hidden_size": 1024,
        "hidden_act": "gelu",
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "max_position_embeddings": 77,
        "vocab_size": 49408,
    },
    "diffusers-clip-g": {
        "architectures": ["CLIPTextModelWithProjection"],
        "hidden_size": 1280,
        "hidden_act": "gelu",
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
        "max_position_embeddings": 77,
        "vocab_size": 49408,
    },
    "diffusers-sdxl-unet": XL,
    "diffusers-sdxl-refiner-unet": {
        **XL,
        "block_out_channels": [384, 768, 1536, 1536],
        "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
        "attention_head_dim": [6, 12, 24, 24],
        "transformer_layers_per_block": 4,
        "cross_attention_dim": 1280,
        "projection_class_embeddings_input_dim": 2560,
    },
    "diffusers-sd-x4-upscaler-unet": {
        **STABLE,
        "in_channels": 7,
        "block_out_channels": [256, 512, 512, 1024],
        "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 3,
        "up_block_types": ["CrossAttnUpBlock2D"] * 3 + ["UpBlock2D"],
        "only_cross_attention": [True, True, True, False],
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
        "num_class_embeds": 1000,
    },
    "diffusers-ldm-bert": {
        "architectures": ["LDMBertModel"],
        "model_type": "ldmbert",
        "activation_function": "gelu",
        "vocab_size": 30522,
        "max_position_embeddings": 77,
        "d_model": 1280,
        "encoder_layers": 32,
        "encoder_ffn_dim": 5120,
        "encoder_attention_heads": 8,
        "head_dim": 64,
    },
}


def check_component(name, tmp_path):
    keys = read_key_list(name)
    stem = "model" if re.search("bert|clip|t5", name) else "diffusion_pytorch_model"
    write_sparse(tmp_path / f"{stem}.safetensors", keys)
    (tmp_path / "config.json").write_text(json.dumps(COMPONENTS[name]))
    bundle = convert.read(tmp_path)
    part, *_ = [part for part, _ in bundle.parts()]
    config, written, _ = as_component(bundle, part)
    assert shapes(written) == keys
    assert config == {**config, **COMPONENTS[name]}


CONTROL = {"_class_name": "ControlNetModel"}
T2I = {"_class_name": "T2IAdapter", "in_channels": 3}
HINTED = {  # control nets and T2I-Adapters, and the settings of those in folders
    "control-sd-v1": None,
    "control-sd-v2": None,
    "diffusers-control-sd-v1": STABLE,
    "diffusers-control-sd-v2": COMPONENTS["diffusers-sd-v2-unet"],
    "diffusers-control-sdxl": XL,
    "t2i-full": None,
    "t2i-canny": None,
    "t2i-light": None,
    "diffusers-t2i-full": T2I,
    "diffusers-t2i-canny": {**T2I, "in_channels": 1},
    "diffusers-t2i-light": {
        **T2I,
        "channels": [320, 640, 1280],
        "num_res_blocks": 4,
        "adapter_type": "light_adapter",
    },
    "diffusers-t2i-xl": {**T2I, "downscale_factor": 16, "adapter_type": "full_adapter_xl"},
}


def check_hinted(name, tmp_path, monkeypatch):
    """Of a control net or a T2I-Adapter: read, and written under the same names."""
    kind = control if "control" in name else t2i_adapter
    monkeypatch.setattr(kind, "arrays_of", lambda part: part.params)  # which are gigabytes
    keys, config = read_key_list(name), HINTED[name]
    file = "diffusion_pytorch_model.safetensors" if config else "model.safetensors"
    prefix = "control_model." if kind is control and not config else ""
    path = write_sparse(tmp_path / file, prefixed(prefix, keys))
    if config and kind is control:
        config = {k: v for k, v in config.items() if k not in ("up_block_types", "out_channels")}
        config |= CONTROL
    if config:
        path = tmp_path
        (path / "config.json").write_text(json.dumps(config))
    adapter, own = read_adapter(path), ()
    if kind is control:
        own = adapter.fields, adapter.linear, *([adapter.time_width is not None] if config else [])
    elif not config:
        own = adapter.module.kind, adapter.module.num_res_blocks
    table = (kind._diffusers if config else kind._original)(*own)
    assert shapes(write_tensors(table, adapter.params)) == keys
