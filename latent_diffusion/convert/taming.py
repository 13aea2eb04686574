"""taming-transformers' files: a prior with its first stage and its conditioner, and their yaml.

One file holds `transformer.`, `first_stage_model.` and, where an autoencoder encodes the condition,
`cond_stage_model.`. The yaml is required, since nothing else names the kind of condition.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from latent_diffusion.convert.bundle import Bundle, Part, check_depth, read_part
from latent_diffusion.convert.settings import Settings
from latent_diffusion.convert.shapes import array, parameter_shapes
from latent_diffusion.convert.tables import (
    Layout,
    Leaf,
    Rule,
    Table,
    read_tensors,
    within,
    write_tensors,
)
from latent_diffusion.convert.taming_stages import (
    WRITERS,
    class_and_settings,
    read_condition,
    read_vq,
    write_vq,
)
from latent_diffusion.core.types import Conditioning
from latent_diffusion.files.tensor import Tensor
from latent_diffusion.nets.autoencoder import Autoencoder
from latent_diffusion.nets.prior import CodeTransformer

PRIOR, FIRST_STAGE, COND_STAGE = "transformer.", "first_stage_model.", "cond_stage_model."
MARK = f"{PRIOR}tok_emb.weight"  # the tensor by which these files are recognised
_MASK = r"blocks\.\d+\.attn\.mask"  # a buffer, the lower triangle
_POSITIONS = Layout("positions", lambda w: w[0], lambda p: (p[None],))  # [1 L D], [L D]
TABLE: Table = (
    Rule("tok_emb", "tok_emb", "embedding"),
    Rule("", "pos_emb", (Leaf("pos_emb", ("",), _POSITIONS),)),
    Rule(r"blocks_(\d+)/(ln1|ln2)", r"blocks.\1.\2", "norm"),
    Rule(r"blocks_(\d+)/attn/(query|key|value|proj)", r"blocks.\1.attn.\2", "linear"),
    Rule(r"blocks_(\d+)/mlp_(0|2)", r"blocks.\1.mlp.\2", "linear"),
    Rule("ln_f", "ln_f", "norm"),
    Rule("head", "head", "linear"),
)
_GPT = Settings(
    names={
        "vocab_size": "vocab_size",
        "block_size": "max_length",
        "n_layer": "depth",
        "n_head": "num_heads",
        "n_embd": "width",
        "embd_pdrop": "dropout",
    },
    required={"vocab_size": 1024, "block_size": 512},
    defaults={
        "n_layer": 12,
        "n_head": 8,
        "n_embd": 256,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    allowed={"n_unmasked": (0,)},
)
_DROPOUTS = ("embd_pdrop", "resid_pdrop", "attn_pdrop")
_TARGET = "taming.models.cond_transformer.Net2NetTransformer"
_GPT_TARGET = "taming.modules.transformer.mingpt.GPT"
_IDENTITY = {"target": "taming.modules.transformer.permuter.Identity"}
_NET2NET = Settings(
    required={"transformer_config": {}, "first_stage_config": {}},
    defaults={"unconditional": False, "sos_token": 0},
    checked={
        "first_stage_key": ("image",),
        "downsample_cond_size": (-1,),
        "permuter_config": (None, _IDENTITY),
    },
    # `read_condition` reads the first two; the others are for training.
    harmless=("cond_stage_config", "cond_stage_key", "ckpt_path", "ignore_keys", "pkeep"),
)
Params = Mapping[str, Any]


def read_taming(path: Path, tensors: Mapping[str, Tensor], params: Params) -> Bundle:
    """Read a file's tensors. params: the yaml's `model.params`. ValueError if unsupported."""
    if not params:
        raise ValueError(f"{path}: a prior needs its yaml, which says what the condition is")
    params = _NET2NET.complete(params, "Net2NetTransformer")
    rest = {n: t for n, t in tensors.items() if not n.startswith((PRIOR, FIRST_STAGE, COND_STAGE))}
    read_tensors((), {}, rest, str(path))  # refuses tensors that belong to no part
    first_stage = read_vq(path, within(tensors, FIRST_STAGE), params["first_stage_config"])
    prior = _read_transformer(path, within(tensors, PRIOR), params["transformer_config"])
    side = params["first_stage_config"]["params"]["ddconfig"]["resolution"]
    bundle = Bundle(autoencoder=first_stage, prior=prior, image_size=side)
    conditioners = read_condition(path, within(tensors, COND_STAGE), params, bundle)
    return Bundle(first_stage, prior=prior, conditioners=conditioners, image_size=side)


def _read_transformer(path: Path, tensors: Mapping[str, Tensor], config: Params) -> Part:
    _, params = class_and_settings(config, "transformer_config", {_GPT_TARGET: None})
    params = _GPT.complete(params, "GPT")
    if len({params[name] for name in _DROPOUTS}) > 1:
        raise ValueError(f"{path}: GPT has one dropout here, not three different {_DROPOUTS}")
    fields = _GPT.read(params, "GPT")
    fields["num_codes"] = fields["vocab_size"]
    check_depth(path, fields, tensors)
    return read_part(path, fields, TABLE, shapes(fields), tensors, ignored=(_MASK,))


def shapes(fields: Params) -> Any:
    """The tree of parameter shapes of a transformer with these fields."""
    codes = array(1, 1, dtype="int32")
    return parameter_shapes(CodeTransformer(**fields), codes, Conditioning(tokens=codes))


# --------------------------------------------------------------------------------------- writing


def as_taming(bundle: Bundle) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors under taming's names, not yet read, and the `model` of the yaml.

    Raises ValueError where taming-transformers' code can't express the prior.
    """
    assert bundle.prior is not None and bundle.autoencoder is not None
    module = CodeTransformer(**bundle.prior.fields)
    ((name, part), *others) = bundle.conditioners.items() or [("", Part({}, {}))]
    if not module.causal or module.num_codes != module.vocab_size or part.fields.get("offset"):
        raise ValueError(
            "taming-transformers' priors are causal, with one table for codes and conditions; "
            "save this one as orbax"
        )
    if others or name not in WRITERS:
        names = " + ".join(sorted(bundle.conditioners)) or "nothing"
        raise ValueError(
            f"taming-transformers has no prior conditioned by {names}; save it as orbax"
        )
    settings = _GPT.write(module) | dict.fromkeys(_DROPOUTS, module.dropout)
    tensors = {PRIOR + n: t for n, t in write_tensors(TABLE, bundle.prior.params).items()}
    for i in range(module.depth):
        tensors[f"{PRIOR}blocks.{i}.attn.mask"] = _triangle(module.max_length)
    first_stage, vq = write_vq(_at_size(bundle.autoencoder, bundle.image_size))
    tensors |= {FIRST_STAGE + n: t for n, t in first_stage.items()}
    condition, key, config = WRITERS[name](part)
    tensors |= {COND_STAGE + n: t for n, t in condition.items()}
    params = {
        "cond_stage_key": key,
        "transformer_config": {"target": _GPT_TARGET, "params": settings},
        "first_stage_config": vq,
        "cond_stage_config": config,
    }
    if name == "start":
        params["sos_token"] = part.fields.get("token", 0)
    return tensors, {
        "target": "taming.models.cond_transformer.Net2NetTransformer",
        "params": params,
    }


def _at_size(part: Part, size: Any) -> Part:
    """The first stage with the side of pictures as `resolution`, and attention at the same levels.

    taming-transformers has no other setting for the size. ValueError if they aren't square.
    """
    if not isinstance(size, int):
        raise ValueError(f"taming-transformers has square pictures, not {size}; save it as orbax")
    module = Autoencoder(**part.fields)
    if size == module.resolution:
        return part
    levels = range(len(module.channel_mult))
    attends = tuple(size >> i for i in levels if module.resolution >> i in module.attn_resolutions)
    return replace(part, fields={**part.fields, "resolution": size, "attn_resolutions": attends})


def _triangle(size: int) -> Tensor:
    shape = (1, 1, size, size)
    return Tensor(shape, np.dtype(np.float32), lambda: np.tril(np.ones(shape, np.float32)))
