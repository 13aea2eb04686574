"""No setting of others' files is ignored: it is used, known to be harmless, or refused by name.

`keys/yaml.toml` lists the settings of the original's classes; those of diffusers and transformers
are in `parity/test_settings.py`, which asks their own code.
"""

import tomllib
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from latent_diffusion.convert import autoencoder, compvis, cond_stage, unet_compvis
from latent_diffusion.convert.settings import Settings
from latent_diffusion.files.original_yaml import read_yaml
from latent_diffusion.files.tensor import Tensor, TensorFile

YAML = tomllib.loads((ROOT / "tests" / "keys" / "yaml.toml").read_text(encoding="utf-8"))
DDCONFIG = dict(
    ch=32, ch_mult=[1, 2], num_res_blocks=1, attn_resolutions=[16], resolution=16, in_channels=3,
    out_ch=3, z_channels=4, double_z=True,
)  # fmt: skip
UNET = dict(
    in_channels=4, out_channels=4, model_channels=32, channel_mult=[1], num_res_blocks=1,
    attention_resolutions=[1], num_heads=8, use_spatial_transformer=True, context_dim=64,
)  # fmt: skip


def tensor(*shape):
    """A tensor of which only the shape is read."""
    return Tensor(shape, np.dtype(np.float32), lambda: np.zeros(shape))


def of_model(params):
    values = compvis.MODEL.complete({"unet_config": {"params": UNET}, **params}, "LatentDiffusion")
    empty = TensorFile({})
    return compvis._diffusion(Path("x"), empty, values, None), compvis._scale_factor(
        {}, values, None
    )


def of_unet(params):
    tensors = {
        "input_blocks.0.0.weight": tensor(32, 4, 3, 3),
        "middle_block.1.transformer_blocks.0.attn2.to_k.weight": tensor(32, 64),
    }
    values = {**UNET, **params}
    return unet_compvis.fields_from_yaml(values, False), unet_compvis.widths(tensors, values)


def of_first_stage(name):
    codes = {} if name == "AutoencoderKL" else {"n_embed": 8}
    settings = {**DDCONFIG, "double_z": name == "AutoencoderKL"}

    def read(params):
        params = {"ddconfig": settings, "embed_dim": 4, **codes, **params}
        return autoencoder.fields_from_yaml({"target": f"x.{name}", "params": params})

    return read


def of_ddconfig(params):
    params = {"ddconfig": {**DDCONFIG, **params}, "embed_dim": 4}
    return autoencoder.fields_from_yaml({"target": "AutoencoderKL", "params": params})


def of_conditioner(settings, shown=None, base=None):
    """A conditioner whose tensors are as `shown`, where the yaml must agree."""

    def read(params):
        said = cond_stage._settings_of({"params": {**(base or {}), **params}}, "x", settings)
        cond_stage._agree(said, shown or {})
        return {name: said[name] for name in ("n_stages", "layer") if name in said}

    return read


TEXT = {"n_embed": 64, "n_layer": 1, "vocab_size": 11, "max_seq_len": 5}
RESCALER = {"in_channels": 182, "out_channels": 3, "bias": False}
CLASSES = {"n_classes": 1000, "embed_dim": 512}
READERS = {
    "LatentDiffusion": of_model,
    "UNetModel": of_unet,
    **{name: of_first_stage(name) for name in ("AutoencoderKL", "VQModelInterface", "GumbelVQ")},
    "ddconfig": of_ddconfig,
    "ClassEmbedder": of_conditioner(cond_stage._CLASS_SETTINGS, CLASSES, CLASSES),
    "BERTEmbedder": of_conditioner(cond_stage.text.YAML, TEXT, TEXT),
    "SpatialRescaler": of_conditioner(cond_stage._RESCALER_SETTINGS, RESCALER, RESCALER),
    "FrozenCLIPEmbedder": of_conditioner(cond_stage._CLIP_SETTINGS),
    "FrozenOpenCLIPEmbedder": of_conditioner(
        cond_stage._OPEN_CLIP_SETTINGS, base={"layer": "penultimate"}
    ),
}


def outcome(read, base, name, value):
    """How a setting is taken: "refused" (by its name), "used" or "silent"."""
    try:
        return "silent" if read({name: value}) == base else "used"
    except ValueError as error:
        assert name in str(error) and len(str(error)) < 500
        return "refused"


@pytest.mark.parametrize("owner", READERS)
def test_settings_of_the_original(owner):
    read, listed = READERS[owner], dict(YAML[owner])
    harmless, base = listed.pop("harmless", {}), read({})
    outcomes = {name: outcome(read, base, name, value) for name, value in listed.items()}
    assert "silent" not in outcomes.values(), outcomes
    taken = {name: outcome(read, base, name, value) for name, value in harmless.items()}
    assert set(taken.values()) <= {"silent"}, taken
    assert outcome(read, base, "no_such_setting", 1) == "refused"


def test_every_class_of_the_original_is_listed():
    assert YAML.keys() == READERS.keys()


def test_settings_that_the_original_leaves_out_have_its_defaults():
    required = {"in_channels", "out_channels", "model_channels", "num_res_blocks"}
    least = {
        k: v for k, v in UNET.items() if k in required | {"num_heads", "attention_resolutions"}
    }
    assert unet_compvis.fields_from_yaml(least, False)["channel_mult"] == (1, 2, 4, 8)
    least = {k: v for k, v in DDCONFIG.items() if k not in ("ch_mult", "double_z")}
    config = {"target": "AutoencoderKL", "params": {"ddconfig": least, "embed_dim": 4}}
    assert autoencoder.fields_from_yaml(config)["channel_mult"] == (1, 2, 4, 8)
    for name in required:
        with pytest.raises(ValueError, match=f"UNetModel does not say {name}"):
            unet_compvis.fields_from_yaml({k: v for k, v in UNET.items() if k != name}, False)
    with pytest.raises(ValueError, match="neither num_heads nor num_head_channels"):
        unet_compvis.fields_from_yaml({k: v for k, v in UNET.items() if k != "num_heads"}, False)


def test_numbers_with_exponents_are_numbers(tmp_path):
    """As OmegaConf reads them; in YAML 1.1 they are texts without a point."""
    file = tmp_path / "a.yaml"
    file.write_text("model: {a: 1e-4, b: -2E+3, c: 1.5e3, d: 1e4x, e: '1e-4', f: 0.5}")
    read = read_yaml(file)
    assert read == {"a": 1e-4, "b": -2e3, "c": 1500.0, "d": "1e4x", "e": "1e-4", "f": 0.5}


WRONG = [None, True, -5, 0.5, float("nan"), "x", [], {}, [[[]]], 10**12, [None]]
FITTING = {False: [True], 3: [], 0.5: [-5, 0.5, 10**12], "x": ["x"], (3,): [[]]}


@pytest.mark.parametrize("example", FITTING, ids=repr)
def test_a_value_of_another_kind_is_refused(example):
    settings = Settings(defaults={"key": example})
    for value in WRONG:
        if any(type(fit) is type(value) and fit == value for fit in FITTING[example]):
            assert settings.complete({"key": value}, "X")["key"] == value
        else:
            with pytest.raises(ValueError, match=r"^X\.key="):
                settings.complete({"key": value}, "X")
