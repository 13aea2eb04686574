"""Priors in files: taming-transformers' and workdirs, read and written."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import taming_files
import yaml
from taming_files import BOXES
from test_prior_model import VQ, numbers

import latent_diffusion as ldm
from latent_diffusion import convert
from latent_diffusion.core.trees import leaves_by_path
from latent_diffusion.core.types import Conditioning
from latent_diffusion.generation.model import Model
from latent_diffusion.models.first_stage import FirstStage
from latent_diffusion.models.prior import check_null, make_prior
from latent_diffusion.nets.autoencoder import Autoencoder

RNG = jax.random.key(0)
GPT = {"vocab_size": 40, "max_length": 33, "width": 8, "depth": 2, "num_heads": 2}
# What taming's files can say: groups of 32 channels.
FIELDS = {**VQ, "channels": 32, "num_groups": 32, "num_codes": 40, "resolution": 8}
MAPS = {**FIELDS, "image_channels": 3}
CONDITIONS = {
    "start": {"token": 3},
    "class_token": {"num_classes": 5},
    "coordinates": {"num_places": 40, "factor": 2},
    "layout_tokens": {"vocab_size": 40, "max_length": 17, "has_null": False},
    "code_map": {"key": "segmentation", "autoencoder": MAPS},
}


def test_a_released_prior_fits_and_comes_out_under_its_names(tmp_path):
    taming_files.check_prior("drin", tmp_path)


def made(conditioners, fields=FIELDS, **sizes):
    """A model with random parameters."""
    module = Autoencoder(**fields)
    shapes = jax.eval_shape(module.init, RNG, jnp.zeros((1, 8, 8, 3)))["params"]
    first_stage = FirstStage(numbers(shapes, 0), jnp.ones(()), jnp.zeros(()), module)
    prior = make_prior({**GPT, **sizes}, conditioners, module)
    batch = {
        "segmentation": jnp.zeros((1, 8, 8), jnp.int32),
        "class_label": jnp.zeros(1, jnp.int32),
    }
    batch |= {"layout": jnp.zeros((1, 17), jnp.int32), "tokens": jnp.zeros((1, 2), jnp.int32)}
    batch = prior.conditioner.prepare(batch, first_stage, (4, 4), None)
    shapes = jax.eval_shape(prior.conditioner.init, RNG, batch, jnp.zeros(1, bool))
    conditioner = numbers(shapes.get("params", {}), 1)
    one = jnp.zeros((1, 1), jnp.int32)
    context = jnp.zeros((1, 2, 8)) if "text" in conditioners else None
    told = Conditioning(tokens=one, context=context)
    transformer = jax.eval_shape(prior.transformer.init, RNG, one, told)["params"]
    params = {"transformer": numbers(transformer, 2), "conditioner": conditioner}
    return Model(first_stage=first_stage, prior=prior.replace(params=params), image_size=8)


def same(one, two):
    for a, b in ((one.first_stage, two.first_stage), (one.prior, two.prior)):
        a, b = leaves_by_path(a.params), leaves_by_path(b.params)
        assert a.keys() == b.keys()
        for path, leaf in a.items():
            np.testing.assert_array_equal(leaf, b[path])
    assert one.prior.transformer == two.prior.transformer and two.image_size == 8
    assert list(one.conditioner.config) == list(two.conditioner.config)
    for a, b in zip(one.conditioner.parts(), two.conditioner.parts(), strict=True):
        if hasattr(a, "autoencoder"):  # one of them states its defaults, too
            assert Autoencoder(**a.autoencoder) == Autoencoder(**b.autoencoder)
            a, b = (part.clone(autoencoder={}) for part in (a, b))
        assert a == b


@pytest.mark.parametrize("name", CONDITIONS)
def test_taming_files_come_back_bitwise(name, tmp_path):
    one, path = made({name: CONDITIONS[name]}, dropout=0.1), tmp_path / "prior.safetensors"
    one.save(path, format="compvis")
    same(one, two := ldm.load(path))
    with pytest.raises(ValueError, match="guidance_scale=2 needs a "):  # none has a null condition
        check_null(two.conditioner, "guidance_scale=2")
    tensors = safetensors.numpy.load_file(path)
    np.testing.assert_array_equal(
        tensors["transformer.blocks.1.attn.mask"][0, 0], np.tril(np.ones((33, 33)))
    )
    two.save(tmp_path / "again.safetensors", format="compvis")
    again = safetensors.numpy.load_file(tmp_path / "again.safetensors")
    assert tensors.keys() == again.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(again[key], tensor)


def test_a_taming_file_says_the_size_of_the_pictures(tmp_path):
    """Its `resolution` is that size, which here only says where attention is."""
    fields = {**FIELDS, "resolution": 256, "attn_resolutions": (128,)}
    one, path = made({"start": {}}, fields), tmp_path / "prior.safetensors"
    one.save(path, format="compvis")
    same(one, two := ldm.load(path))
    assert two.first_stage.module.attn_resolutions == (4,)
    with pytest.raises(ValueError, match=r"has square pictures, not \(8, 16\); save it as orbax"):
        one.replace(image_size=(8, 16)).save(path, format="compvis")


TEXT = {"vocab_size": 9, "max_length": 2, "width": 8, "depth": 1, "num_heads": 1, "head_dim": 8}


@pytest.mark.parametrize("causal", [True, False])
def test_a_workdir_keeps_any_prior(causal, tmp_path):
    conditions = {"code_map": CONDITIONS["code_map"], "start": {"token": 38}, "text": TEXT}
    one = made(conditions, causal=causal, dropout=0.1, vocab_size=40 if causal else 41)
    one = one.replace(defaults={"temperature": 0.5})
    one.save(tmp_path / "run", format="orbax")
    two = ldm.load(tmp_path / "run")
    same(one, two)
    assert two.defaults["temperature"] == 0.5


UNSAVABLE = [
    (
        {"start": {}},
        {"causal": False, "vocab_size": 41},
        "compvis",
        "taming-transformers' priors are causal",
    ),
    ({"class_token": {"num_classes": 3, "offset": 4}}, {}, "compvis", "with one table for codes"),
    ({"start": {}, "text": TEXT}, {}, "compvis", "no prior conditioned by start . text"),
    ({"start": {}}, {}, "diffusers", "diffusers has no pipeline with a prior"),
]


@pytest.mark.parametrize(("conditions", "sizes", "format", "message"), UNSAVABLE)
def test_a_prior_that_a_format_can_not_express_is_refused(
    conditions, sizes, format, message, tmp_path
):
    with pytest.raises(ValueError, match=message):
        made(conditions, **sizes).save(tmp_path / "x.safetensors", format=format)


def change(model, path, value):
    *parents, last = path.split(".")
    for parent in parents:
        model = model[parent]
    model[last] = value


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small prior of classes in taming-transformers' format."""
    path = tmp_path_factory.mktemp("prior") / "prior.safetensors"
    made({"class_token": {"num_classes": 5}}).save(path, format="compvis")
    return path


def with_yaml(saved, path, edit):
    """A copy of the file with another yaml."""
    shutil.copy(saved, path)
    model = yaml.safe_load(saved.with_suffix(".yaml").read_text())
    edit(model["model"]["params"])
    path.with_suffix(".yaml").write_text(yaml.safe_dump(model))
    return path


COORDINATES = {"target": "taming.modules.misc.coord.CoordStage"}
COORDINATES["params"] = {"n_embed": 40, "down_factor": True}
REFUSED = [
    ("transformer_config.target", "taming.modules.transformer.mingpt.CodeGPT", "CodeGPT'; known"),
    ("transformer_config.params.n_unmasked", 4, "GPT.n_unmasked=4; supported: 0"),
    ("transformer_config.params.bias", False, "GPT.bias=False: this setting is unknown"),
    ("transformer_config.params.attn_pdrop", 0.1, "GPT has one dropout here"),
    ("first_stage_config.target", "ldm.models.autoencoder.AutoencoderKL", "AutoencoderKL.n_embed"),
    ("first_stage_config.params.remap", "used.npy", "VQModel.remap='used.npy'; supported: None"),
    ("cond_stage_config", "__is_first_stage__", "cond_stage_config='__is_first_stage__'; supp"),
    ("cond_stage_config.target", "my.Stage", "unknown target of cond_stage_config 'my.Stage'"),
    ("permuter_config", {"target": "Subsample"}, "Net2NetTransformer.permuter_config="),
    ("downsample_cond_size", 64, "downsample_cond_size=64; supported: -1"),
    ("first_stage_key", "depth", "first_stage_key='depth'; supported: 'image'"),
    ("cond_stage_config.params.n_classes", "5", "Labelator.n_classes='5'; expected a value such"),
    ("cond_stage_config.params.n_classes", 0, "Labelator.n_classes=0; expected a value such as"),
    ("cond_stage_config.params.quantize_interface", False, "Labelator.quantize_interface=False; s"),
    ("cond_stage_config.params", None, "Labelator does not say n_classes"),
    ("cond_stage_config", {"params": {}}, "cond_stage_config does not say target"),
    ("cond_stage_config", COORDINATES, "CoordStage.down_factor=True; expected a value such as 16"),
    ("first_stage_config.params", None, "VQModel does not say ddconfig"),
    ("first_stage_config.params.ddconfig.ch_mult", [], r"ddconfig.ch_mult=\[\]; expected"),
    ("sos_token", 0.5, "Net2NetTransformer.sos_token=0.5; expected a value such as 0"),
    ("unconditional", 1, "Net2NetTransformer.unconditional=1; expected a value such as False"),
    ("surprise", 1, "Net2NetTransformer.surprise=1: this setting is unknown"),
]


@pytest.mark.parametrize(("field", "value", "message"), REFUSED)
def test_settings_that_mean_something_else_are_refused_by_name(
    field, value, message, saved, tmp_path
):
    path = with_yaml(saved, tmp_path / "x.safetensors", lambda p: change(p, field, value))
    with pytest.raises(ValueError, match=f"^{path}.*{message}"):
        convert.read(path)


def test_harmless_settings_are_read(saved, tmp_path):
    harmless = {"ckpt_path": "x.ckpt", "ignore_keys": [], "pkeep": 0.9, "unconditional": False}
    path = with_yaml(saved, tmp_path / "x.safetensors", lambda p: p.update(harmless))
    assert ldm.load(path).conditioner.keys == ("class_label",)


START = {"cond_stage_config": {"target": "taming.modules.util.SOSProvider"}}
START["cond_stage_config"]["params"] = {"sos_token": 4}


@pytest.mark.parametrize(
    "settings",
    [START, {"unconditional": True, "sos_token": 4}],
    ids=["SOSProvider", "unconditional"],
)
def test_a_prior_without_a_condition_begins_with_its_token(settings, saved, tmp_path):
    path = with_yaml(saved, tmp_path / "x.safetensors", lambda p: p.update(settings))
    one = ldm.load(path).condition()
    assert one.tokens.tolist() == [[4]] and one.token_maps is None


def test_a_first_stage_of_segmentations_has_another_class_in_tamings_code(tmp_path):
    """Which has a random map to colours, too; it comes back."""
    made({"code_map": CONDITIONS["code_map"]}).save(tmp_path / "a.safetensors", format="compvis")
    one = ldm.load(tmp_path / "a.safetensors")

    def edit(params):
        condition = params["cond_stage_config"]
        condition["target"] = "taming.models.vqgan.VQSegmentationModel"
        condition["params"] |= {"n_labels": 3, "image_key": "segmentation"}

    path = with_yaml(tmp_path / "a.safetensors", tmp_path / "b.safetensors", edit)
    tensors = safetensors.numpy.load_file(path)
    colours = np.random.default_rng(0).normal(size=(3, 3, 1, 1)).astype(np.float32)
    tensors["cond_stage_model.colorize"] = colours
    safetensors.numpy.save_file(tensors, path)
    same(one, two := ldm.load(path))
    maps = np.random.default_rng(1).integers(0, 3, (1, 8, 8))
    codes = [np.asarray(model.condition(segmentation=maps).token_maps) for model in (one, two)]
    np.testing.assert_array_equal(*codes)
    assert len(np.unique(codes[0])) > 1


def test_what_a_file_lacks_is_named(saved, tmp_path):
    path = tmp_path / "x.safetensors"
    with_yaml(saved, path, lambda p: p["transformer_config"]["params"].update(n_layer=3))
    with pytest.raises(ValueError, match=r"does not fit: 16 missing: blocks_2/attn/key/bias"):
        ldm.load(path)
    boxes = {"cond_stage_config": BOXES, "cond_stage_key": "objects_center_points"}
    with_yaml(saved, path, lambda p: p.update(boxes))
    with pytest.raises(ValueError, match="cond_stage_key='objects_center_points' of DummyCond"):
        ldm.load(path)
    path.with_suffix(".yaml").unlink()
    with pytest.raises(ValueError, match="a prior needs its yaml, which says what the condition"):
        ldm.load(path)
    tensors = safetensors.numpy.load_file(path) | {"x": np.zeros(1, np.float32)}
    safetensors.numpy.save_file(tensors, path)
    with_tensor = with_yaml(saved, tmp_path / "y.safetensors", lambda p: None)
    shutil.copy(path, with_tensor)
    with pytest.raises(ValueError, match="1 left over: x"):
        ldm.load(with_tensor)
