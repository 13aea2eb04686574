"""The original's files: one .ckpt or .safetensors with everything in it, and a yaml beside.

Where there is no yaml the architecture is read off the tensors' shapes, and what leaves no trace
in them (heads, schedule, prediction) is looked up among the released models.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from latent_diffusion.convert import autoencoder, text, unet
from latent_diffusion.convert.bundle import (
    Bundle,
    Part,
    flat,
    input_widths,
    recognise_schedule,
    with_folded_scale,
)
from latent_diffusion.convert.tables import (
    Table,
    prefixed,
    read_tensors,
    write_tensors,
)
from latent_diffusion.convert.tensors import (
    Tensor,
    TensorFile,
    in_memory,
    open_tensors,
    write_safetensors,
)
from latent_diffusion.schedules import make_schedule

UNET, FIRST_STAGE, COND_STAGE = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
# Tensors that carry nothing: schedules are recomputed, losses and averages have no place here.
IGNORED = (
    r"model_ema\..*",
    r"(first_stage_model\.)?loss\..*",
    r"(sqrt_|log_)?(one_minus_)?(recip_|recipm1_)?(alphas_cumprod|betas)(_prev)?",
    r"sqrt_recip(m1)?_alphas_cumprod",
    r"posterior_(variance|log_variance_clipped|mean_coef1|mean_coef2)",
    r"logvar|scale_factor|lvlb_weights",
)


class Released(NamedTuple):
    """What the shapes of a released model don't tell (fact sheet §7.2, §10)."""

    beta_start: float
    beta_end: float
    heads: Mapping[str, int]
    scale_factor: float = 1.0
    prediction: str = "eps"


# (model_channels, width of the context, channels of the latent)
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
    (256, 1024, 4): Released(0.0001, 0.02, {"num_heads": 8}, 0.08333, "v"),  # SD x4 upscaler
}
_SD2_BASE_STEPS = 875_000  # the checkpoint of SD v2 (and 2.1) that predicts eps


def read_compvis(path: Path, config: Path | None = None, ema: bool | None = None) -> Bundle:
    """Read a single file. config: its yaml; None looks for one of the same name beside it.

    ema: averaged parameters of the U-Net (True), the live ones (False), or the averaged ones if
    there are any (None). Raises ValueError with the reason for refusing the file.
    """
    opened = open_tensors(path)
    config = config or next((c for c in (path.with_suffix(".yaml"),) if c.is_file()), None)
    params = _load_yaml(config) if config else {}
    if "encoder.conv_in.weight" in opened.tensors:
        fields = autoencoder.fields_from_shapes(opened.tensors)
        if params:
            fields = autoencoder.fields_from_yaml(params)
        table, tree = autoencoder.compvis_table(fields), autoencoder.shapes(fields)
        return Bundle(autoencoder=_part(path, fields, table, tree, opened.tensors))
    if f"{UNET}input_blocks.0.0.weight" not in opened.tensors:
        some = ", ".join(list(opened.tensors)[:3])
        raise ValueError(f"{path}: no model of the original: its tensors are {some} …")
    return _read_whole(path, opened, params, ema)


def _load_yaml(path: Path) -> dict[str, Any]:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["params"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a model's yaml: {error!r}") from error


def _read_whole(
    path: Path, opened: TensorFile, params: Mapping[str, Any], ema: bool | None
) -> Bundle:
    tensors = _choose_ema(path, opened.tensors, ema)
    own = {name: _within(tensors, name) for name in (UNET, FIRST_STAGE, COND_STAGE)}
    fields = unet.fields_from_shapes(own[UNET])
    context = unet.context_dim(own[UNET])
    key = (fields["model_channels"], context, fields["out_channels"])
    released = RELEASED.get(key)
    if params:
        fields = unet.fields_from_yaml(params["unet_config"]["params"])
    elif released is None:
        raise ValueError(
            f"{path}: its U-Net (width {key[0]}, context {key[1]}, {key[2]} channels) is none of "
            "the released ones; put the model's yaml beside it under the same name"
        )
    else:
        fields = {**fields, **released.heads}
    linear = own[UNET].get("middle_block.1.proj_in.weight")
    is_linear = linear is not None and len(linear.shape) == 2
    in_channels = own[UNET]["input_blocks.0.0.weight"].shape[1]
    label = own[UNET].get("label_emb.0.0.weight")
    tree = unet.shapes(fields, in_channels, context, None if label is None else label.shape[1])
    bundle = Bundle(
        unet=_part(path, fields, unet.compvis_table(fields, is_linear), tree, own[UNET]),
        diffusion=_diffusion(opened, params, released),
        scale_factor=_scale_factor(tensors, params, released),
        image_size=256,
        notes={"linear_projections": is_linear},
    )
    bundle = replace(bundle, sampling=SAMPLING)
    if own[FIRST_STAGE]:
        given = params.get("first_stage_config", {}).get("params")
        known = autoencoder.fields_from_shapes(own[FIRST_STAGE])
        ae = autoencoder.fields_from_yaml(given) if given else known
        table, ae_tree = autoencoder.compvis_table(ae), autoencoder.shapes(ae)
        part = _part(path, ae, table, ae_tree, own[FIRST_STAGE])
        bundle = replace(bundle, autoencoder=part)
        side = params.get("image_size") or (64 if fields["out_channels"] < 16 else 48)
        bundle = replace(bundle, image_size=side * bundle.downsampling)
    conditioners = _conditioners(path, own[COND_STAGE])
    used = [name for prefix in own for name in _names(own[prefix], prefix)]
    _check_left_over(path, tensors, used)
    return replace(bundle, conditioners=conditioners)


SAMPLING = {
    "sampler": "ddim",
    "num_steps": 50,
    "spacing": "original",
    "guidance_scale": 1.0,
}


def _within(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)}


def _names(own: Mapping[str, Tensor], prefix: str) -> list[str]:
    return [prefix + name for name in own]


def _check_left_over(path: Path, tensors: Mapping[str, Tensor], used: list[str]) -> None:
    rest = {name: tensors[name] for name in tensors.keys() - set(used)}
    read_tensors((), {}, rest, str(path), IGNORED)


def _choose_ema(path: Path, tensors: Mapping[str, Tensor], ema: bool | None) -> dict[str, Tensor]:
    """The tensors with the averaged U-Net in place of the live one, if wanted.

    The average's names are the live ones without dots. That isn't one to one in general, so they
    are made from the live names, never taken apart.
    """
    live = [name for name in tensors if name.startswith(UNET)]
    averaged = {name: "model_ema." + name[len("model.") :].replace(".", "") for name in live}
    there = [name for name in live if averaged[name] in tensors]
    if ema is False or (ema is None and not there):
        return dict(tensors)
    if len(there) != len(live):
        absent = next(averaged[name] for name in live if averaged[name] not in tensors)
        raise ValueError(f"{path}: its averaged parameters lack {absent}; load it with ema=False")
    return {**tensors, **{name: tensors[averaged[name]] for name in live}}


def _scale_factor(
    tensors: Mapping[str, Tensor], params: Mapping[str, Any], released: Released | None
) -> float:
    """A buffer of the file if it was measured in training, else from the yaml."""
    if "scale_factor" in tensors:
        return float(tensors["scale_factor"].read())
    if params:
        return float(params.get("scale_factor", 1.0))
    return released.scale_factor if released else 1.0


def _diffusion(
    opened: TensorFile, params: Mapping[str, Any], released: Released | None
) -> dict[str, Any]:
    schedule: dict[str, Any] = {"schedule": "linear", "num_timesteps": 1000}
    schedule["zero_terminal_snr"] = False
    prediction = "eps"
    if params:
        schedule["schedule"] = params.get("beta_schedule", "linear")
        schedule["num_timesteps"] = params.get("timesteps", 1000)
        schedule["beta_start"] = params.get("linear_start", 1e-4)
        schedule["beta_end"] = params.get("linear_end", 2e-2)
        prediction = params.get("parameterization", "eps")
    elif released is not None:
        schedule.update(beta_start=released.beta_start, beta_end=released.beta_end)
        prediction = released.prediction
        if prediction == "v" and opened.metadata.get("global_step") == _SD2_BASE_STEPS:
            prediction = "eps"
    if "betas" in opened.tensors and not params:
        betas = opened.tensors["betas"].read().astype(np.float64)
        schedule = recognise_schedule(make_schedule(betas=betas))
    return {**schedule, "prediction": prediction}


def _part(
    where: Path,
    fields: Mapping[str, Any],
    table: Table,
    tree: Any,
    tensors: Mapping[str, Tensor],
    ignored: tuple[str, ...] = (r"loss\..*",),
) -> Part:
    shapes = {path: leaf.shape for path, leaf in flat(tree).items()}
    return Part(fields, read_tensors(table, shapes, tensors, str(where), ignored))


def _conditioners(where: Path, tensors: Mapping[str, Tensor]) -> dict[str, Part]:
    """The conditioner, recognised by a tensor of its own. A copy of the first stage is none."""
    if not tensors or "encoder.conv_in.weight" in tensors:
        return {}
    for mark, (name, read) in CONDITIONERS.items():
        if mark in tensors:
            return {name: read(where, tensors)}
    some = ", ".join(list(tensors)[:3])
    raise ValueError(f"{where}: unknown conditioner: its tensors are {some} …")


def _read_text(where: Path, tensors: Mapping[str, Tensor]) -> Part:
    fields = text.fields_from_shapes(tensors)
    return _part(
        where, fields, text.compvis_table(fields), text.shapes(fields), tensors, text.UNUSED
    )


def _read_class_label(where: Path, tensors: Mapping[str, Tensor]) -> Part:
    rows, width = tensors["embedding.weight"].shape
    fields = {"num_classes": rows - 1, "width": width}
    return Part(fields, {"embedding/embedding": tensors["embedding.weight"]})


CONDITIONERS: dict[str, tuple[str, Callable[[Path, Mapping[str, Tensor]], Part]]] = {
    "transformer.token_emb.weight": ("text", _read_text),
    "embedding.weight": ("class_label", _read_class_label),
}


# --------------------------------------------------------------------------------------- writing


def write_compvis(
    bundle: Bundle, path: Path, progress: Callable[[int], Any] = lambda count: None
) -> None:
    """Write one .safetensors file under the original's names, and its yaml beside it.

    Raises ValueError where the original's code can't express the model.
    """
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path}: the name of a file in the original's format ends in .safetensors"
        )
    bundle = with_folded_scale(bundle)
    tensors, config = as_compvis(bundle)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, tensors, progress=progress)
    text_of_yaml = yaml.safe_dump({"model": config}, sort_keys=False)
    path.with_suffix(".yaml").write_text(text_of_yaml, encoding="utf-8")


def as_compvis(bundle: Bundle) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors under the original's names, still unread, and the `model` of its yaml."""
    tensors: dict[str, Tensor] = {}
    first_stage: dict[str, Any] = {}
    if bundle.autoencoder is not None:
        fields = bundle.autoencoder.fields
        first_stage = autoencoder.yaml_from_fields(fields)
        prefix = FIRST_STAGE if bundle.unet is not None else ""
        table = prefixed(autoencoder.compvis_table(fields), prefix)
        tensors.update(write_tensors(table, bundle.autoencoder.params))
    if bundle.unet is None:
        if not tensors:
            raise ValueError("there is nothing to save: the model is empty")
        return tensors, first_stage
    in_channels, context, _ = input_widths(bundle.unet)
    linear, side = bundle.linear_projections, bundle.image_size // bundle.downsampling
    own = unet.yaml_from_fields(bundle.unet.fields, in_channels, context, linear, side)
    table = prefixed(unet.compvis_table(bundle.unet.fields, linear), UNET)
    tensors.update(write_tensors(table, bundle.unet.params))
    params = {**_yaml_diffusion(bundle.diffusion), "image_size": side, "unet_config": own}
    params["channels"] = bundle.unet.fields["out_channels"]
    params["scale_factor"] = float(bundle.scale_factor)
    params["conditioning_key"] = "crossattn" if context else None
    if first_stage:
        params["first_stage_config"] = first_stage
    condition, conditioner = _write_conditioner(bundle)
    tensors.update(condition)
    params["cond_stage_config"] = conditioner
    target = "ldm.models.diffusion.ddpm.LatentDiffusion"
    return tensors, {"target": target, "params": params}


def _yaml_diffusion(diffusion: Mapping[str, Any]) -> dict[str, Any]:
    if diffusion["zero_terminal_snr"]:
        raise ValueError("the original's code has no zero_terminal_snr; save it as diffusers")
    return {
        "beta_schedule": diffusion["schedule"],
        "linear_start": diffusion["beta_start"],
        "linear_end": diffusion["beta_end"],
        "timesteps": diffusion["num_timesteps"],
        "parameterization": diffusion["prediction"],
    }


def _write_conditioner(bundle: Bundle) -> tuple[dict[str, Tensor], Any]:
    if not bundle.conditioners:
        return {}, "__is_unconditional__"
    if len(bundle.conditioners) > 1 or next(iter(bundle.conditioners)) not in (
        "text",
        "class_label",
    ):
        names = ", ".join(bundle.conditioners)
        raise ValueError(f"the original's format can't hold these conditioners: {names}")
    name, part = next(iter(bundle.conditioners.items()))
    if name == "class_label":
        table = part.params["embedding/embedding"]
        params = {"n_classes": table.shape[0], "embed_dim": table.shape[1], "key": "class_label"}
        target = "ldm.modules.encoders.modules.ClassEmbedder"
        return {f"{COND_STAGE}embedding.weight": table}, {"target": target, "params": params}
    tensors = write_tensors(prefixed(text.compvis_table(part.fields), COND_STAGE), part.params)
    vocabulary, width = part.params["token_emb/embedding"].shape
    for leaf, shape in (("weight", (vocabulary, width)), ("bias", (vocabulary,))):
        zeros = in_memory(np.zeros(shape, part.params["token_emb/embedding"].dtype))
        tensors[f"{COND_STAGE}transformer.to_logits.{leaf}"] = zeros
    return tensors, text.yaml_from_fields(part.fields)
