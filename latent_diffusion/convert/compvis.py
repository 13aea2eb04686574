"""The original's files: one .ckpt or .safetensors with the whole model, and a yaml beside it.

Without a yaml the architecture is inferred from the shapes of the tensors. Shapes don't show the
number of heads, the schedule and the prediction: these are taken from the released model whose
U-Net has the same size.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from latent_diffusion.convert import (
    autoencoder,
    cond_stage,
    dit,
    sd3,
    sgm,
    taming,
    tokenizers,
    unet,
    unet_compvis,
)
from latent_diffusion.convert import autoencoder_tiny as tiny
from latent_diffusion.convert.adapters.control import is_control
from latent_diffusion.convert.bundle import (
    Bundle,
    Part,
    check_depth,
    input_widths,
    read_part,
    recognise_schedule,
)
from latent_diffusion.convert.cond_stage import AUGMENTOR, EMBEDDER
from latent_diffusion.convert.inputs import conditioners_for
from latent_diffusion.convert.scheduler import ASSUMED
from latent_diffusion.convert.settings import Settings, check_class
from latent_diffusion.convert.tables import read_tensors, within
from latent_diffusion.core.types import lookup
from latent_diffusion.files.original_yaml import read_yaml
from latent_diffusion.files.reading import reading
from latent_diffusion.files.tensor import Tensor, TensorFile
from latent_diffusion.files.tensors import open_tensors
from latent_diffusion.process.schedules import BETAS, make_schedule

log = logging.getLogger(__name__)

UNET, FIRST_STAGE, COND_STAGE = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
SAMPLING = {"sampler": "ddim", "num_steps": 50, "spacing": "original"}
# Tensors that are not read: schedules are computed anew; losses and averages are for training.
IGNORED = (
    r"model_ema\..*",
    r"(first_stage_model\.)?loss\..*",
    r"(sqrt_|log_)?(one_minus_)?(recip_|recipm1_)?(alphas_cumprod|betas)(_prev)?",
    r"sqrt_recip(m1)?_alphas_cumprod",
    r"posterior_(variance|log_variance_clipped|mean_coef1|mean_coef2)",
    r"logvar|scale_factor|lvlb_weights",
    r"noise_augmentor\.(?!data_).*",
    r"denoiser\.sigmas",
)


UNUSED = (r"out\.[02]\.(weight|bias)",)  # in U-Nets that predict codes by `id_predictor` instead


class Released(NamedTuple):
    """Settings of a released model that the shapes of its tensors don't show."""

    beta_start: float
    beta_end: float
    heads: Mapping[str, int]
    scale_factor: float = 1.0
    prediction: str = "eps"


# (model_channels, width of the context, channels of the latent) of each U-Net
RELEASED = {
    (224, None, 3): Released(0.0015, 0.0195, {"num_head_channels": 32}),  # celeba, ffhq, beds
    (192, None, 4): Released(0.0015, 0.0155, {"num_heads": 8}),  # churches
    (256, 512, 4): Released(0.0015, 0.0195, {"num_head_channels": 32}),  # cin, f8
    (192, 512, 3): Released(0.0015, 0.0195, {"num_heads": 1}),  # cin v2
    (192, 640, 3): Released(0.0015, 0.0195, {"num_head_channels": 32}),  # text2img256
    (128, 512, 3): Released(0.0015, 0.0205, {"num_head_channels": 32}),  # layout2img
    (128, None, 3): Released(0.0015, 0.0205, {"num_heads": 8}),  # semantic synthesis
    (160, None, 3): Released(0.0015, 0.0155, {"num_head_channels": 32}),  # bsr_sr
    (256, None, 3): Released(0.0015, 0.0205, {"num_heads": 8}),  # inpainting_big
    (448, 768, 16): Released(0.0015, 0.015, {"num_head_channels": 32}, 0.22765929),  # retrieval
    (320, 1280, 4): Released(0.00085, 0.012, {"num_heads": 8}, 0.18215),  # txt2img-1p4B
    (320, 768, 4): Released(0.00085, 0.012, {"num_heads": 8}, 0.18215),  # SD v1
    (320, 1024, 4): Released(0.00085, 0.012, {"num_head_channels": 64}, 0.18215, "v"),  # SD v2
    (320, 2048, 4): Released(0.00085, 0.012, {"num_head_channels": 64}, 0.13025),  # SDXL
    (384, 1280, 4): Released(0.00085, 0.012, {"num_head_channels": 64}, 0.13025),  # its refiner
    (256, 1024, 4): Released(0.0001, 0.02, {"num_heads": 8}, 0.08333, "v"),  # SD x4 upscaler
}
MODEL = Settings(  # those of LatentDiffusion and of the classes that extend it
    names={
        "beta_schedule": "schedule",
        "linear_start": "beta_start",
        "linear_end": "beta_end",
        "timesteps": "num_timesteps",
        "parameterization": "prediction",
    },
    defaults={
        "beta_schedule": "linear",
        "linear_start": 1e-4,
        "linear_end": 2e-2,
        "timesteps": 1000,
        "parameterization": "eps",
        "scale_factor": 1.0,
        "scale_by_std": False,
    },
    required={"unet_config": {}},
    optional={
        "first_stage_config": {},
        "embedder_config": {},
        "noise_aug_config": {},
        "low_scale_config": {},
        "image_size": 64,
    },
    checked={
        "given_betas": (None,),
        "cosine_s": (8e-3,),
        "v_posterior": (0.0,),
        "num_timesteps_cond": (None, 1),
        "use_positional_encodings": (False,),
        "cond_stage_forward": (None,),
        "force_null_conditioning": (False, True),  # matters to training and logs alone
    },
    harmless=(
        # The tensors show the first two; `cond_stage` reads the settings of the second.
        "conditioning_key", "cond_stage_config", "channels", "first_stage_key", "cond_stage_key",
        "concat_mode", "concat_keys", "masked_image_key", "depth_stage_config", "low_scale_key",
        "noise_level_key", "embedding_key", "clip_denoised", "loss_type", "ckpt_path",
        "ignore_keys", "load_only_unet", "monitor", "use_ema", "log_every_t",
        "original_elbo_weight", "l_simple_weight", "scheduler_config", "learn_logvar",
        "logvar_init", "cond_stage_trainable", "unet_trainable", "make_it_fit", "ucg_training",
        "reset_ema", "reset_num_ema_updates", "finetune_keys", "keep_finetune_dims",
        "c_concat_log_start", "c_concat_log_end", "embedding_dropout", "base_learning_rate",
    ),
)  # fmt: skip
_TARGET = Settings(  # those of every module in a yaml
    optional={"params": {}}, defaults={"target": ""}, harmless=("base_learning_rate",)
)
CLASSES = (  # classes of models; they differ in how they prepare their conditions
    "LatentDiffusion", "LatentInpaintDiffusion", "LatentDepth2ImageDiffusion",
    "LatentUpscaleDiffusion", "LatentUpscaleFinetuneDiffusion", "LatentFinetuneDiffusion",
    "ImageEmbeddingConditionedLatentDiffusion", "Layout2ImgDiffusion", "ControlLDM",
    "MinimalRETRODiffusion", "DiffusionEngine",
)  # fmt: skip
PARAMETERIZATIONS = ("eps", "x0", "v")
_SD2_BASE_STEPS = 875_000  # training steps of the checkpoint of SD v2 (and 2.1) that predicts eps


def read_compvis(
    path: Path, config: Path | None = None, ema: bool | None = None, tokenizer: Path | None = None
) -> Bundle:
    """Read a single file. Raises ValueError with the reason if it can't be read.

    config: the yaml; None takes that of the same name beside the file, if it exists.
    ema: the averaged parameters of the U-Net (True), the live ones (False), or the averaged ones if
    the file has them (None).
    tokenizer: the text encoder's tokenizer; None looks for it beside the file.
    """
    opened = open_tensors(path)
    beside = path.with_suffix(".yaml")
    file = beside if config is None and beside.is_file() else config
    model = {}
    if file is not None:
        with reading(file):
            model = _TARGET.complete(read_yaml(file), "model")
    bundle = _read(path, opened, model, ema)
    if ema is not None and bundle.unet is None:
        raise ValueError(
            f"{path}: ema={ema} is for files with a U-Net, of which there are averages"
        )
    if file is not None and not _has_yaml(bundle):
        if config is not None:
            raise ValueError(f"{path}: config={config} is for kinds of files that have a yaml")
        log.warning("%s: %s isn't used: this kind of file has no yaml", path, file)
    tokenizer = tokenizer or tokenizers.beside(path, bundle.conditioners)
    return bundle if tokenizer is None else tokenizers.with_tokenizer(bundle, tokenizer)


def _has_yaml(bundle: Bundle) -> bool:
    """Whether the model is of the original's code: no Stable Diffusion 3, DiT, or TAESD."""
    first_stage = bundle.autoencoder
    tiny_alone = first_stage is not None and first_stage.fields["regularization"] == "tiny"
    return bundle.mmdit is None and bundle.dit is None and not tiny_alone


def _read(path: Path, opened: TensorFile, model: Mapping[str, Any], ema: bool | None) -> Bundle:
    """Read a model's tensors. model: its class and settings in the yaml; empty without a yaml."""
    if "encoder.conv_in.weight" in opened.tensors:
        log.warning(
            "%s: a first stage alone doesn't say the scale of its latents, which is taken as 1 "
            "(Stable Diffusion's is 0.18215); model.first_stage.replace(scale_factor=…) changes it",
            path,
        )
        return Bundle(autoencoder=_read_first_stage(path, opened.tensors, model))
    if f"{UNET}input_blocks.0.0.weight" in opened.tensors:
        params = dict(model["params"] or {}) if model else {}
        check_class(model, CLASSES, "model")
        if sgm.is_engine(model):
            params = sgm.as_latent_diffusion(params)
        params = MODEL.complete(params, "LatentDiffusion") if model else {}
        return _read_whole(path, opened, params, ema, model)
    if opened.tensors.keys() & {sd3.MARK, sd3.NETWORK + sd3.MARK}:
        return sd3.read(path, opened.tensors)
    if dit.PATCHES in opened.tensors:
        return dit.read_dit(path, opened.tensors)
    if any(opened.tensors.keys() >= half for half in (tiny.ENCODER, tiny.DECODER)):
        return tiny.read_original(path, opened.tensors)
    if taming.MARK in opened.tensors:
        check_class(model, ("Net2NetTransformer",), "model")
        return taming.read_taming(path, opened.tensors, model.get("params") or {})
    if is_control(opened.tensors):
        raise ValueError(f"{path} is a control net, no model: give it to load_adapter")
    some = ", ".join(list(opened.tensors)[:3])
    raise ValueError(f"{path}: no model of the original: its tensors are {some} …")


def _read_whole(
    path: Path,
    opened: TensorFile,
    params: Mapping[str, Any],
    ema: bool | None,
    model: Mapping[str, Any],
) -> Bundle:
    tensors = _choose_ema(path, opened.tensors, ema)
    markers = {name: tensors.pop(name) for name in sgm.MARKERS if name in tensors}
    prefixes = (UNET, FIRST_STAGE, COND_STAGE, EMBEDDER, AUGMENTOR, sgm.EMBEDDERS)
    parts = {prefix: within(tensors, prefix) for prefix in prefixes}
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefixes)}
    read_tensors((), {}, rest, str(path), IGNORED)  # refuses tensors that belong to no part
    table = parts[UNET].pop("label_emb.weight", None)
    projection = parts[UNET].get("middle_block.1.proj_in.weight")
    linear = projection is not None and len(projection.shape) == 2
    unet_part, released = _read_unet(path, parts[UNET], params, linear)
    conditioners = cond_stage.read(path, parts[COND_STAGE], params)
    conditioners |= cond_stage.read_embedder(path, parts[EMBEDDER], parts[AUGMENTOR], params)
    in_channels, context, vector = input_widths(unet_part)
    if vector is not None and not parts[sgm.EMBEDDERS] and "clip_image" not in conditioners:
        raise ValueError(
            f"{path}: it lacks {sgm.EMBEDDERS}… (the text encoders of Stable Diffusion XL) or "
            f"{EMBEDDER}… (unCLIP's image encoder), which give its U-Net's vector"
        )
    if "spatial_rescaler" not in conditioners:
        has_text = bool(conditioners.keys() & {"text", "clip_text"} or parts[sgm.EMBEDDERS])
        out_channels = unet_part.fields["out_channels"]
        conditioners |= conditioners_for(in_channels, out_channels, has_text, table)
    if "low_res" in conditioners and params.get("low_scale_config"):
        noised = cond_stage.low_res_from_yaml(params["low_scale_config"])
        part = conditioners["low_res"]
        conditioners["low_res"] = replace(part, fields={**part.fields, **noised})
    diffusion = _diffusion(path, opened, params, released)
    sampling = {**SAMPLING, "guidance_scale": 7.5 if "clip_text" in conditioners else 1.0}
    if parts[sgm.EMBEDDERS]:
        sampling["guidance_scale"] = 5.0
    if "v_pred" in markers:
        diffusion["prediction"] = "v"
    if "ztsnr" in markers:  # the last timestep is pure noise, and sampling starts from it
        diffusion["zero_terminal_snr"], sampling["spacing"] = True, "trailing"
    unet_part = replace(unet_part, unused={**unet_part.unused, **markers})
    bundle = Bundle(
        unet=unet_part,
        conditioners=conditioners,
        diffusion=diffusion,
        scale_factor=_scale_factor(tensors, params, released),
        sampling=sampling,
        notes={
            "linear_projections": linear,
            "parameters": _which(opened.tensors, ema),
            "first_stage_twice": "encoder.conv_in.weight" in parts[COND_STAGE],
        },
    )
    if parts[sgm.EMBEDDERS]:
        bundle = sgm.with_embedders(bundle, path, parts[sgm.EMBEDDERS], model)
    if not parts[FIRST_STAGE]:
        return bundle
    settings = params.get("first_stage_config") or {}
    bundle = replace(bundle, autoencoder=_read_first_stage(path, parts[FIRST_STAGE], settings))
    side = params.get("image_size") or _side(unet_part.fields, context, diffusion["prediction"])
    side = sgm.SIDE if parts[sgm.EMBEDDERS] else side
    return replace(bundle, image_size=side * bundle.downsampling)


def _read_unet(
    path: Path, tensors: Mapping[str, Tensor], params: Mapping[str, Any], linear: bool
) -> tuple[Part, Released | None]:
    """Read the U-Net. Returns it, and the released model of the same size."""
    fields, context = unet_compvis.fields_from_shapes(tensors), unet_compvis.context_dim(tensors)
    size = (fields["model_channels"], context, fields["out_channels"])
    released = RELEASED.get(size)
    settings: Mapping[str, Any] = {}
    if params:
        network = _TARGET.complete(params["unet_config"], "unet_config")
        check_class(network, ("UNetModel", "ControlledUnetModel"), "unet_config")
        settings = network["params"] or {}
        fields = unet_compvis.fields_from_yaml(settings, linear)
    elif released is None:
        raise ValueError(
            f"{path}: its U-Net (width {size[0]}, context {size[1]}, {size[2]} channels) is none "
            "of the released ones; put the model's yaml beside it under the same name"
        )
    else:
        fields |= released.heads
    check_depth(path, fields, tensors)
    tree = unet.shapes(fields, *unet_compvis.widths(tensors, settings))
    unused = UNUSED if fields.get("num_codes") else ()
    table = unet.compvis_table(fields, linear)
    return read_part(path, fields, table, tree, tensors, unused), released


def _read_first_stage(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Part:
    """Read the first stage. config: its class and settings in the yaml; empty without them."""
    fields = (
        autoencoder.fields_from_yaml(config) if config else autoencoder.fields_from_shapes(tensors)
    )
    check_depth(path, fields, tensors)
    table, tree = autoencoder.compvis_table(fields), autoencoder.shapes(fields)
    return read_part(path, fields, table, tree, tensors, ignored=(r"loss\..*",))


def _side(fields: Mapping[str, Any], context: int | None, prediction: str) -> int:
    """The side of the latents that a released model was trained with."""
    if fields["out_channels"] == 16:
        return 48  # retrieval-augmented, 768²
    if (context, prediction) == (1024, "v"):
        return 96 if fields["model_channels"] == 320 else 128  # Stable Diffusion 2, its upscaler
    if fields["out_channels"] == 4 and context != 768 and fields["model_channels"] != 320:
        return 32  # the paper's models with f = 8
    return 64 if context != 1280 else 32


def _choose_ema(path: Path, tensors: Mapping[str, Tensor], ema: bool | None) -> dict[str, Tensor]:
    """The tensors with the averaged U-Net in place of the live one, if wanted.

    The names of the averages are those of the live tensors without dots. Without dots, different
    names may become equal, so the averages are looked up by the live names, never vice versa.
    """
    live = [name for name in tensors if name.startswith(UNET)]
    averaged = {name: "model_ema." + name[len("model.") :].replace(".", "") for name in live}
    absent = [name for name in averaged.values() if name not in tensors]
    if ema is False or (ema is None and len(absent) == len(live)):
        return dict(tensors)
    if absent:
        raise ValueError(
            f"{path}: its averaged parameters lack {absent[0]}; load it with ema=False"
        )
    return {**tensors, **{name: tensors[averaged[name]] for name in live}}


def _scale_factor(
    tensors: Mapping[str, Tensor], params: Mapping[str, Any], released: Released | None
) -> float:
    """The latents' scale: the file's, if training measured it, the yaml's or a released model's."""
    if "scale_factor" in tensors:
        return float(tensors["scale_factor"].read())
    if params:
        if params["scale_by_std"]:
            raise ValueError("LatentDiffusion.scale_by_std, but the file has no scale_factor")
        return float(params["scale_factor"])
    return released.scale_factor if released else 1.0


def _diffusion(
    path: Path, opened: TensorFile, params: Mapping[str, Any], released: Released | None
) -> dict[str, Any]:
    """The `diffusion` fields, from the yaml, else from the file's schedule or a released model."""
    if params:
        fields = MODEL.read(params, "LatentDiffusion")
        if fields["prediction"] not in PARAMETERIZATIONS:
            raise ValueError(
                f"LatentDiffusion.parameterization={fields['prediction']!r}; known: "
                f"{', '.join(PARAMETERIZATIONS)}"
            )
        lookup(BETAS, fields["schedule"], "LatentDiffusion.beta_schedule")
        return {**fields, "zero_terminal_snr": False}
    assert released is not None  # otherwise `_read_unet` has refused the file
    fields = {**ASSUMED, "beta_start": released.beta_start, "beta_end": released.beta_end}
    if "betas" in opened.tensors:
        betas = opened.tensors["betas"].read().astype(np.float64)
        fields |= recognise_schedule(make_schedule(betas=betas))
    is_base = opened.metadata.get("global_step") == _SD2_BASE_STEPS and released.prediction == "v"
    first = opened.tensors.get(f"{UNET}input_blocks.0.0.weight")
    # Stable Diffusion 2's models of depth and of inpainting are finetuned from the base model.
    beside = first is not None and first.shape[:2] in ((320, 5), (320, 9))
    prediction = "eps" if is_base or beside else released.prediction
    if released.prediction == "v" and not beside:
        log.warning(
            "%s: taken for a model that predicts %s, as its tensors don't show; a yaml beside it "
            "with parameterization: eps or v says otherwise",
            path,
            prediction,
        )
    return {**fields, "prediction": prediction}


def _which(tensors: Mapping[str, Tensor], ema: bool | None) -> str:
    """A text that says whether the U-Net's parameters are averages."""
    if "model_ema.decay" not in tensors and "model_ema.num_updates" not in tensors:
        return "the only ones in the file"
    return "live ones; the file has averages, too" if ema is False else "averages; live ones, too"
