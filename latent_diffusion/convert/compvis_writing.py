"""Write a model as a single file of the original, and its yaml."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from latent_diffusion.convert import (
    autoencoder,
    autoencoder_tiny,
    cond_stage,
    dit,
    sd3,
    sgm,
    taming,
    unet,
    unet_compvis,
)
from latent_diffusion.convert.bundle import Bundle, Size, input_widths, with_folded_scale
from latent_diffusion.convert.compvis import (
    COND_STAGE,
    FIRST_STAGE,
    MODEL,
    PARAMETERIZATIONS,
    UNET,
    UNUSED,
)
from latent_diffusion.convert.inputs import check_inputs, table_of
from latent_diffusion.convert.settings import decimal
from latent_diffusion.convert.tables import matching, prefixed, write_tensors
from latent_diffusion.core.types import lookup
from latent_diffusion.files.tensor import Tensor
from latent_diffusion.files.tensors import write_safetensors
from latent_diffusion.process.schedules import BETAS

log = logging.getLogger(__name__)

DDPM = "ldm.models.diffusion.ddpm"
# Classes of later versions of the original's code, by the conditioners of the model.
_TARGETS = {
    frozenset({"clip_text", "masked_image"}): f"{DDPM}.LatentInpaintDiffusion",
    frozenset({"clip_text", "depth"}): f"{DDPM}.LatentDepth2ImageDiffusion",
    frozenset({"clip_text", "low_res"}): f"{DDPM}.LatentUpscaleDiffusion",
    frozenset({"clip_text", "clip_image"}): f"{DDPM}.ImageEmbeddingConditionedLatentDiffusion",
}


def write_compvis(
    bundle: Bundle, path: Path, progress: Callable[[int], Any] = lambda count: None
) -> None:
    """Write one .safetensors file under the original's names, and its yaml beside it.

    progress: is called with the number of parameters in each tensor that is written. Raises
    ValueError where the original's code can't express the model, and where the yaml would replace
    that of another file.
    """
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: the name of a file of the original must end in .safetensors")
    if bundle.dit is not None:  # DiT's files have no yaml
        write_safetensors(path, dit.as_dit(bundle, path), progress=progress)
        return
    if bundle.mmdit is not None:  # Stable Diffusion 3's files have no yaml either
        write_safetensors(path, sd3.as_single(bundle), progress=progress)
        _warn_of_size(path, bundle, 1024)
        return
    alone = bundle.autoencoder if bundle.unet is None and bundle.prior is None else None
    if alone is not None and alone.fields["regularization"] == "tiny":
        for file, tensors in autoencoder_tiny.as_original(bundle, path).items():
            write_safetensors(file, tensors, progress=progress)
        return
    tensors, config = as_compvis(with_folded_scale(bundle))
    if (file := path.with_suffix(".yaml")).exists() and not path.exists():
        raise ValueError(f"{file} exists, and the yaml of {path.name} would replace it")
    write_safetensors(path, tensors, progress=progress)
    file.write_text(yaml.safe_dump({"model": config}, sort_keys=False), encoding="utf-8")
    if "clip_text_2" in bundle.conditioners and bundle.autoencoder is not None:
        _warn_of_size(path, bundle, bundle.in_pixels(sgm.SIDE))


def _warn_of_size(path: Path, bundle: Bundle, read: Size) -> None:
    if bundle.image_size != read:
        said = f"{path}: such a file doesn't say the size of trained pictures"
        log.warning("%s: %s is read as %s", said, bundle.image_size, read)


def as_compvis(bundle: Bundle) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors under the original's names, not yet read, and the `model` of the yaml."""
    if bundle.prior is not None:
        return taming.as_taming(bundle)
    tensors: dict[str, Tensor] = {}
    first_stage: dict[str, Any] = {}
    if bundle.autoencoder is not None:
        fields = bundle.autoencoder.fields
        first_stage = autoencoder.yaml_from_fields(fields)
        prefix = FIRST_STAGE if bundle.unet is not None else ""
        names = prefixed(autoencoder.compvis_table(fields), prefix)
        tensors |= write_tensors(names, bundle.autoencoder.params)
    if bundle.unet is None:
        if not tensors:
            raise ValueError("there is nothing to save: the model is empty")
        return tensors, first_stage
    of_xl = "clip_text_2" in bundle.conditioners
    if bundle.diffusion["zero_terminal_snr"] and not of_xl:
        raise ValueError("the original's code has no zero_terminal_snr; save it as orbax")
    lookup(BETAS, bundle.diffusion["schedule"], "schedule of the original")
    predictions = dict.fromkeys(PARAMETERIZATIONS)
    lookup(predictions, bundle.diffusion["prediction"], "prediction of the original")
    check_inputs(bundle)
    linear, fields = bundle.linear_projections, bundle.unet.fields
    widths, side = input_widths(bundle.unet), bundle.latent_size
    if not isinstance(side, int):
        raise ValueError(f"the original has square pictures, not {side}; save it as diffusers")
    config = unet_compvis.yaml_from_fields(fields, widths, linear, side)
    tensors |= write_tensors(prefixed(unet.compvis_table(fields, linear), UNET), bundle.unet.params)
    tensors |= {UNET + name: t for name, t in matching(UNUSED, bundle.unet.unused).items()}
    if of_xl:
        further, settings = sgm.write(bundle)
        config["params"].pop("use_spatial_transformer")  # sgm's code has no such setting
        network = {**config, "target": "sgm.modules.diffusionmodules.openaimodel.UNetModel"}
        for name in ("image_size", "legacy", "use_spatial_transformer"):
            network["params"].pop(name, None)
        engine = {
            "scale_factor": decimal(bundle.scale_factor),
            "network_config": network,
            **settings,
        }
        if first_stage:
            kind = "sgm.models.autoencoder.AutoencoderKL"
            engine["first_stage_config"] = {**first_stage, "target": kind}
        return tensors | further, {
            "target": "sgm.models.diffusion.DiffusionEngine",
            "params": engine,
        }
    if (table := table_of(bundle.conditioners)) is not None:
        tensors[f"{UNET}label_emb.weight"] = table
        config["params"]["num_classes"] = table.shape[0]
    condition, conditioner, key = cond_stage.write(bundle)
    tensors |= {COND_STAGE + name: tensor for name, tensor in condition.items()}
    embedder, further = cond_stage.write_embedder(bundle)
    tensors |= embedder
    params = {
        **{name: bundle.diffusion[field] for name, field in MODEL.names.items()},
        "image_size": side,
        "unet_config": config,
        "channels": fields["out_channels"],
        "scale_factor": decimal(bundle.scale_factor),
        **({"first_stage_config": first_stage} if first_stage else {}),
        "cond_stage_config": conditioner,
        "conditioning_key": key,
        **further,
        **cond_stage.low_res_to_yaml(bundle.conditioners.get("low_res")),
    }
    target = _TARGETS.get(frozenset(bundle.conditioners), f"{DDPM}.LatentDiffusion")
    return tensors, {"target": target, "params": params}
