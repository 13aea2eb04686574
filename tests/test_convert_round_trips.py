"""Whole models through every format and back: the same tensors under the same names, bitwise."""

import copy
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from conftest import ROOT
from safetensors.numpy import load_file, save_file

import latent_diffusion as ldm
from configs import semantic_synthesis
from latent_diffusion import convert
from latent_diffusion.convert import autoencoder, clip_image, clip_text, cond_stage, text, unet
from latent_diffusion.convert.describe import describe, missing
from latent_diffusion.convert.inputs import NOISE_LEVEL
from latent_diffusion.convert.scheduler import ASSUMED
from latent_diffusion.files.tensor import in_memory
from latent_diffusion.generation.loading import as_model
from latent_diffusion.nets.conditioners.maps import SpatialRescaler

WIDTH = 64  # of the texts
AUTOENCODER = dict(
    channels=32, channel_mult=(1, 2), num_res_blocks=1, z_channels=4, embed_dim=4, resolution=16,
    regularization="kl",
)  # fmt: skip
UNET = dict(
    model_channels=32, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(1,),
    num_heads=8, out_channels=4,
)  # fmt: skip
TEXT = dict(vocab_size=11, max_length=5, width=WIDTH, depth=1, num_heads=8, head_dim=64)
CLIP = dict(vocab_size=600, max_length=5, width=WIDTH, depth=2, num_heads=1)
IMAGE = dict(
    image_size=6, patch_size=3, width=WIDTH, depth=1, num_heads=1, projection_dim=5, num_levels=1000
)
LOW_RES = {"num_levels": 7, "width": 128, "keep": True, "max_noise_level": 5, "beta_end": 0.03}
MASKED = {"mask_first": True, "known_mask": 0.0, "hole": 0.0, "keep": True}
FIRST = {**CLIP, "skip_last": 1, "final_norm": False, "zero_null": True}
SECOND = {
    **FIRST, "activation": "gelu", "pad_id": 0, "projection_dim": 5, "repad": True,
}  # fmt: skip
SIZES = {"aesthetic_score": False, "width": 8}
_LAYERS = "conditioner.embedders.0.transformer.text_model."
FAMILIES = {  # input channels, linear projections, conditioners, what nothing needs
    "text": (4, False, {"text": TEXT}, {
        "cond_stage_model.transformer.to_logits.weight": (11, WIDTH),
        "cond_stage_model.transformer.to_logits.bias": (11,),
    }),
    "clip": (9, False, {"clip_text": CLIP, "masked_image": MASKED}, {
        "cond_stage_model.transformer.text_model.embeddings.position_ids": (1, 5),
    }),
    "open-clip": (7, True, {
        "clip_text": {**CLIP, "skip_last": 1, "activation": "gelu", "pad_id": 0},
        "low_res": LOW_RES,
    }, {
        "cond_stage_model.model.text_projection": (WIDTH, WIDTH),
        "cond_stage_model.model.logit_scale": (),
    }),
    "xl": (9, True, {
        "clip_text": FIRST, "masked_image": MASKED, "clip_text_2": SECOND, "sizes": SIZES,
    }, {
        f"{_LAYERS}embeddings.position_ids": (1, 5),
        f"{_LAYERS}encoder.layers.1.self_attn.q_proj.weight": (WIDTH, WIDTH),
        f"{_LAYERS}final_layer_norm.weight": (WIDTH,),
        "conditioner.embedders.1.model.logit_scale": (),
        "v_pred": (0,),
        "ztsnr": (0,),
    }),
    "refiner": (4, True, {
        "clip_text_2": {**SECOND, "zero_null": False}, "sizes": {**SIZES, "aesthetic_score": True},
    }, {}),
    "unclip": (4, True, {"clip_text": CLIP, "clip_image": IMAGE}, {
        "embedder.model.token_embedding.weight": (11, WIDTH),
    }),
}  # fmt: skip
MAKE = {"text": text.shapes, "clip_text": clip_text.shapes, "clip_image": clip_image.shapes}
MAKE["clip_text_2"] = clip_text.shapes
VECTORS = {"unclip": 10, "xl": 5 + 6 * 8, "refiner": 5 + 5 * 8}
OF_V = ("open-clip", "xl")
GUIDANCE = {"open-clip": 9.0, "unclip": 10.0, "refiner": 5.0}  # of their pipelines
RNG = np.random.default_rng(0)


def random(shape):
    return np.asarray(0.1 * RNG.standard_normal(shape), np.float32)


def part(fields, shapes):
    """A module's random parameters; scales of norms are about 1, so that signals get through."""

    def leaf(path, x):
        return random(x.shape) + np.float32(path[-1].key == "scale")

    return convert.as_part(fields, jax.tree_util.tree_map_with_path(leaf, shapes))


def make_bundle(name):
    channels, linear, conditioners, _ = FAMILIES[name]
    fields = {**UNET, "vector_projection": name in VECTORS}
    context = 2 * WIDTH if name == "xl" else WIDTH
    parts = {}
    for key, own in conditioners.items():
        params = {NOISE_LEVEL: in_memory(random((7, 128)))} if key == "low_res" else {}
        parts[key] = convert.Part(own, params)
        if key in MAKE:
            parts[key] = part(own, MAKE[key](own))
    return convert.Bundle(
        autoencoder=part(AUTOENCODER, autoencoder.shapes(AUTOENCODER)),
        scale_factor=0.25,
        unet=part(fields, unet.shapes(fields, channels, context, VECTORS.get(name))),
        conditioners=parts,
        diffusion={
            **ASSUMED,
            "prediction": "v" if name in OF_V else "eps",
            "zero_terminal_snr": name == "xl",
        },
        image_size=16,
        notes={"linear_projections": linear},
    )


def test_writers_see_the_fields_that_a_run_leaves_at_their_defaults(tmp_path, monkeypatch):
    seen = {}
    for name in ("compvis", "diffusers", "orbax"):
        monkeypatch.setitem(convert.FORMATS, name, lambda bundle, *_: seen.update(b=bundle))
        bundle = make_bundle("text").with_part("sizes", convert.Part({"width": 8}, {}))
        convert.write(bundle, tmp_path / name, name)
        fields = seen["b"].conditioners["sizes"].fields
        assert fields["width"] == 8 and fields.get("aesthetic_score", True) is (name == "orbax")


def equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], strict=True)


def folder_tensors(path):
    return {
        f"{file.parent.name}/{name}": tensor
        for file in path.rglob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_whole_models(name, tmp_path):
    bundle, unused = make_bundle(name), FAMILIES[name][3]

    # A file as the original wrote it, with what nothing needs.
    first = tmp_path / "first.safetensors"
    convert.write(bundle, first, "compvis")
    theirs = load_file(first) | {key: random(shape) for key, shape in unused.items()}
    save_file(theirs, first)
    read = convert.read(first)
    assert sorted(read.conditioners) == sorted(bundle.conditioners)
    for key, own in bundle.conditioners.items():
        assert {k: read.conditioners[key].fields[k] for k in own.fields} == own.fields
    assert {k: read.diffusion[k] for k in bundle.diffusion} == bundle.diffusion
    of_xl = "clip_text_2" in bundle.conditioners  # whose files don't say the size
    assert read.scale_factor == 0.25 and read.image_size == (256 if of_xl else 16)
    convert.write(read, tmp_path / "again.safetensors", "compvis")
    equal(load_file(tmp_path / "again.safetensors"), theirs)
    configs = [yaml.safe_load((tmp_path / f"{f}.yaml").read_text()) for f in ("first", "again")]
    assert configs[0] == configs[1]

    # A model in memory remembers it all.
    ldm.load(first).save(tmp_path / "model.safetensors", format="compvis")
    equal(load_file(tmp_path / "model.safetensors"), theirs)

    # A pipeline's folder, and the same again.
    convert.write(read, tmp_path / "folder", "diffusers")
    pipeline = convert.read(tmp_path / "folder")
    convert.write(pipeline, tmp_path / "folder2", "diffusers")
    equal(folder_tensors(tmp_path / "folder2"), folder_tensors(tmp_path / "folder"))
    for file in (tmp_path / "folder").rglob("*.json"):
        again = tmp_path / "folder2" / file.relative_to(tmp_path / "folder")
        assert json.loads(again.read_text()) == json.loads(file.read_text())
    assert pipeline.conditioners.keys() == bundle.conditioners.keys()
    assert pipeline.sampling["guidance_scale"] == GUIDANCE.get(name, 7.5)
    if "low_res" in pipeline.conditioners:
        fields = pipeline.conditioners["low_res"].fields
        assert (fields["max_noise_level"], fields["beta_end"]) == (5, 0.03)

    # Our own workdir, which keeps what computations need, and what files say.
    convert.write(pipeline, tmp_path / "workdir", "orbax")
    ours = convert.read(tmp_path / "workdir")
    convert.write(ours, tmp_path / "folder3", "diffusers")
    for file in (tmp_path / "folder").rglob("*.json"):
        again = tmp_path / "folder3" / file.relative_to(tmp_path / "folder")
        assert json.loads(again.read_text()) == json.loads(file.read_text())
    got, want = dict(ours.parts()), dict(bundle.parts())
    assert got.keys() == want.keys()
    for key in want:
        equal(*({k: np.asarray(t.read()) for k, t in p[key].params.items()} for p in (got, want)))
    assert (
        ours.unet.fields["out_channels"] == 4
        and ours.notes["linear_projections"] == read.notes["linear_projections"]
    )


def classes_in(config, owner="model"):
    """Every module of a yaml that has a class: its name, and itself."""
    if isinstance(config, dict):
        if "target" in config:
            yield owner, config
        for name, value in config.items():
            if name not in ("lossconfig", "scheduler_config", "loss_fn_config", "sampler_config"):
                yield from classes_in(value, owner if name == "params" else name)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_class_of_another_name_is_refused(name, tmp_path):
    path = tmp_path / "model.safetensors"
    convert.write(make_bundle(name), path, "compvis")
    written = yaml.safe_load(path.with_suffix(".yaml").read_text())
    owners = [owner for owner, _ in classes_in(written["model"])]
    assert {"model", "first_stage_config"} < set(owners)
    for number in range(len(owners)):
        changed = copy.deepcopy(written)
        (_, module) = list(classes_in(changed["model"]))[number]
        module["target"] = "somebody.else.OtherClass"
        path.with_suffix(".yaml").write_text(yaml.safe_dump(changed))
        with pytest.raises(ValueError, match=f"^{path}.*OtherClass"):
            convert.read(path)


def test_settings_of_embedders_are_known(tmp_path):
    path = tmp_path / "model.safetensors"
    convert.write(make_bundle("refiner"), path, "compvis")
    written = yaml.safe_load(path.with_suffix(".yaml").read_text())
    first = written["model"]["params"]["conditioner_config"]["params"]["emb_models"][0]
    for name, value in {"max_length": 40, "legacy": True, "never_heard_of": 3}.items():
        changed = copy.deepcopy(first)
        first["params"] = {**first["params"], name: value}
        path.with_suffix(".yaml").write_text(yaml.safe_dump(written))
        with pytest.raises(ValueError, match=f"^{path}.*emb_models.{name}={value}"):
            convert.read(path)
        first["params"] = changed["params"]


def test_the_index_decides_the_class_of_the_scheduler(tmp_path, caplog):
    convert.write(make_bundle("text"), tmp_path / "folder", "diffusers")
    file = tmp_path / "folder" / "model_index.json"
    index = json.loads(file.read_text())

    def read(name):
        file.write_text(json.dumps({**index, "scheduler": ["diffusers", name]}))
        return convert.read(tmp_path / "folder")

    assert read("DDIMScheduler").sampling["sampler"] == "ddim"
    other = read("EulerDiscreteScheduler")
    assert other.sampling["sampler"] == "euler" and other.sampling["spacing"] == "trailing"
    caplog.clear()
    convert.write(other, tmp_path / "again", "diffusers")
    config = json.loads((tmp_path / "again" / "scheduler" / "scheduler_config.json").read_text())
    assert config["_class_name"] == "EulerDiscreteScheduler" and not caplog.records
    unknown = read("NewScheduler")
    assert unknown.diffusion == other.diffusion and "NewScheduler" in caplog.text


def test_a_pipeline_without_the_scheduler_that_it_names_is_refused(tmp_path, caplog):
    """A part of a download; where the index names none, the log says what is assumed."""
    convert.write(make_bundle("open-clip"), tmp_path, "diffusers")
    index = json.loads((tmp_path / "model_index.json").read_text())
    for name in ("scheduler", "low_res_scheduler"):
        (tmp_path / name).rename(tmp_path / "elsewhere")
        with pytest.raises(ValueError, match=f"{name}/scheduler_config.json: No such file"):
            convert.read(tmp_path)
        (tmp_path / "elsewhere").rename(tmp_path / name)
    for name in ("scheduler", "low_res_scheduler"):
        shutil.rmtree(tmp_path / name)
        del index[name]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert convert.read(tmp_path).diffusion["prediction"] == "eps"
    assert "no scheduler; taken for a model that predicts eps" in caplog.text


@pytest.mark.parametrize(
    ("model", "name"),
    [("open-clip", "low_res_scheduler"), ("unclip", "image_noising_scheduler")],
)
def test_settings_of_the_noise_of_a_condition_are_used_or_refused(model, name, tmp_path):
    convert.write(make_bundle(model), tmp_path, "diffusers")
    file = tmp_path / name / "scheduler_config.json"
    config = json.loads(file.read_text())
    for settings, reason in (
        ({"rescale_betas_zero_snr": True}, f"{name}.rescale_betas_zero_snr=True; supported"),
        ({"trained_betas": [0.1, 0.2]}, rf"{name}.trained_betas=\[0.1, 0.2\]; supported: None"),
        ({"beta_schedule": "linear"}, f"{name}.beta_schedule='linear'; supported: '"),
        ({"never_heard_of": 3}, f"{name}.never_heard_of=3: this setting is unknown"),
        ({"num_train_timesteps": 2.5}, f"{name}.num_train_timesteps=2.5; expected a value such"),
    ):
        file.write_text(json.dumps({**config, **settings}))
        with pytest.raises(ValueError, match=f"^{tmp_path}: {reason}"):
            convert.read(tmp_path)
    del config["beta_schedule"]  # whose default is that of the class
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{name}.beta_schedule='linear'; supported"):
        convert.read(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index[name] = ["diffusers", "EulerDiscreteScheduler"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"{name}._class_name='EulerDiscreteScheduler'; supported"):
        convert.read(tmp_path)


def test_an_upscaler_has_as_many_noise_levels_as_its_schedule(tmp_path):
    convert.write(make_bundle("open-clip"), tmp_path, "diffusers")
    file = tmp_path / "low_res_scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_train_timesteps": 9}))
    with pytest.raises(ValueError, match="num_train_timesteps=9; the U-Net has 7 levels"):
        convert.read(tmp_path)


def test_a_pipeline_names_no_parts_or_settings_that_are_ignored(tmp_path, caplog):
    convert.write(make_bundle("text"), tmp_path, "diffusers")
    index = json.loads((tmp_path / "model_index.json").read_text())
    for entries, reason in (
        ({"unet": ["diffusers", "UNet3DConditionModel"]}, "unknown class of unet .*UNet3DCond"),
        ({"transformer": ["x", "FluxTransformer2DModel"]}, "unknown class of transformer .*Flux"),
        ({"motion_adapter": ["diffusers", "MotionAdapter"]}, "unknown class of motion_adapter"),
        (
            {"unet": ["UNet2DConditionModel"]},
            r"its index says unet=\['UNet2D.*'\], which is un",
        ),
        ({"is_cosxl_edit": True}, "its index says is_cosxl_edit=True, which is unknown"),
        ({key: [None, None] for key in ("bert", "text_encoder")}, "nothing .* the U-Net's context"),
    ):
        (tmp_path / "model_index.json").write_text(json.dumps({**index, **entries}))
        with pytest.raises(ValueError, match=reason):
            convert.read(tmp_path)
    fine = {"is_cosxl_edit": False, "safety_checker": ["x", "StableDiffusionSafetyChecker"]}
    (tmp_path / "model_index.json").write_text(json.dumps({**index, **fine}))
    assert convert.read(tmp_path).unet is not None and "safety_checker" in caplog.text


@pytest.mark.parametrize("format", ["diffusers", "compvis"])
def test_classes_that_are_added_to_the_timestep_are_kept_with_the_unet(format, tmp_path):
    fields = {"num_classes": 6, "width": 128, "route": "vector"}
    classes = convert.Part(fields, {"embedding/embedding": in_memory(random((7, 128)))})
    bundle = replace(make_bundle("text"), conditioners={"class_label": classes})
    if format == "diffusers":
        with pytest.raises(ValueError, match="no pipeline for models conditioned by class_label, "):
            convert.write(bundle, tmp_path / "pipeline", format)
        bundle = replace(bundle, autoencoder=None)
    path = tmp_path / "model.safetensors"
    convert.write(bundle, path, format)
    again = convert.read(path)
    assert again.conditioners["class_label"].fields == fields
    equal(*({k: np.asarray(t.read()) for k, t in b.conditioners["class_label"].params.items()}
            for b in (again, bundle)))  # fmt: skip


def test_a_shift_of_the_latents_is_read(tmp_path):
    bundle = make_bundle("text")
    convert.write(replace(bundle, unet=None, conditioners={}), tmp_path, "diffusers")
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "shift_factor": 0.5}))
    read = convert.read(tmp_path)
    assert (read.scale_factor, read.shift) == (0.25, 0.5)
    convert.write(bundle, tmp_path / "pipeline", "diffusers")
    shutil.copy(tmp_path / "config.json", tmp_path / "pipeline" / "vae" / "config.json")
    read = convert.read(tmp_path / "pipeline")
    assert (read.scale_factor, read.shift) == (0.25, 0.5)
    convert.write(replace(read, unet=None, conditioners={}), tmp_path / "run", "orbax")
    model = as_model(convert.read(tmp_path / "run"))
    assert (model.first_stage.scale_factor, model.first_stage.shift) == (0.25, 0.5)


def test_fields_of_a_workdir_are_used_or_refused_by_name(tmp_path):
    convert.write(make_bundle("text"), tmp_path, "orbax")
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())

    def with_fields(section, **fields):
        path.write_text(json.dumps({**config, section: {**config[section], **fields}}))
        return convert.read(tmp_path)

    older = with_fields("sampling", start="sigma", end=0).sampling
    assert (older["spread"], older["last"]) == ("sigma", 0)
    assert not {"start", "end"} & older.keys()
    shares = with_fields("sampling", start=0.5, end=0.25).sampling
    assert (shares["start"], shares["end"]) == (0.5, 0.25)
    for section in ("sampling", "diffusion", "data", "tokenizer"):
        with pytest.raises(ValueError, match=rf"config.json: unknown field {section}.word; anoth"):
            with_fields(section, word=1)
    for task, reason in (("denoisin", "unknown task 'denoisin'"), ("classifying", "is a classif")):
        path.write_text(json.dumps({**config, "task": task}))
        with pytest.raises(ValueError, match=reason):
            convert.read(tmp_path)


def test_a_workdir_joins_no_other_files(tmp_path):
    """The checkpoint of an earlier model would stay beside the new config."""
    bundle = make_bundle("text")
    convert.write(bundle, tmp_path / "first", "orbax")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "first").rglob("*")}
    with pytest.raises(ValueError, match=r"first isn't empty: choose another folder"):
        convert.write(bundle, tmp_path / "first", "orbax")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "first").rglob("*")} == before


def test_averages_of_the_original_take_the_place_of_the_live_u_net_if_all_are_there(tmp_path):
    path, prefix = tmp_path / "model.safetensors", "model.diffusion_model."
    convert.write(make_bundle("text"), path, "compvis")
    tensors = load_file(path)
    live = {name: array for name, array in tensors.items() if name.startswith(prefix)}
    averages = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): array + 1
        for name, array in live.items()
    }
    save_file(tensors | averages, path)

    def bias(**how):
        return np.asarray(convert.read(path, **how).unet.params["out_2/bias"].read())

    np.testing.assert_array_equal(bias(), live[f"{prefix}out.2.bias"] + 1)
    np.testing.assert_array_equal(bias(ema=False), live[f"{prefix}out.2.bias"])
    lost = "model_ema.diffusion_modelout2bias"
    save_file(tensors | {k: v for k, v in averages.items() if k != lost}, path)
    with pytest.raises(ValueError, match=f"its averaged parameters lack {lost}; load it with ema"):
        convert.read(path)
    np.testing.assert_array_equal(bias(ema=False), live[f"{prefix}out.2.bias"])


def test_the_scale_of_the_latents_is_that_which_training_has_measured(tmp_path):
    path = tmp_path / "model.safetensors"
    convert.write(make_bundle("text"), path, "compvis")
    model = yaml.safe_load(path.with_suffix(".yaml").read_text())
    model["model"]["params"]["scale_by_std"] = True
    path.with_suffix(".yaml").write_text(yaml.safe_dump(model))
    with pytest.raises(ValueError, match="scale_by_std, but the file has no scale_factor"):
        convert.read(path)
    save_file({**load_file(path), "scale_factor": np.array(0.75, np.float32)}, path)
    assert convert.read(path).scale_factor == 0.75


def test_the_original_has_no_schedules_of_others(tmp_path):
    bundle = make_bundle("text")
    bundle = replace(bundle, diffusion={**bundle.diffusion, "schedule": "edm"})
    with pytest.raises(ValueError, match="unknown schedule of the original 'edm'"):
        convert.write(bundle, tmp_path / "model.safetensors", "compvis")


def test_boxes_are_told_from_words_by_their_number():
    fields = dict(vocab_size=8192, max_length=92, width=16, depth=1, num_heads=8, head_dim=64)
    inner = part(fields, text.shapes(fields)).params
    layout = convert.Part(fields, {f"transformer/{path}": t for path, t in inner.items()})
    tensors, _, key = cond_stage.write(convert.Bundle(conditioners={"layout": layout}))
    assert key == "crossattn"
    again = cond_stage.read(Path("layout2img.ckpt"), tensors, {})
    assert again.keys() == {"layout"} and again["layout"].fields == fields
    equal(*({k: t.read() for k, t in p.params.items()} for p in (again["layout"], layout)))


def test_a_map_of_classes_is_halved_twice_unless_its_yaml_says_otherwise():
    tensors = {"channel_mapper.weight": in_memory(random((3, 182, 1, 1)))}
    part = cond_stage.read(Path("semantic.ckpt"), tensors, {})["spatial_rescaler"]
    released = semantic_synthesis.get_config().conditioners.spatial_rescaler
    assert SpatialRescaler(**part.fields) == SpatialRescaler(**released)


@pytest.mark.parametrize(
    ("format", "name"),
    [("diffusers", "text"), ("compvis", "text"), ("diffusers", "refiner"), ("compvis", "refiner")],
)
def test_conditioners_that_others_lack_are_named_before_anything_is_written(format, name, tmp_path):
    bundle = make_bundle(name)
    maps = convert.Part({}, {"embedding/embedding": in_memory(random((11, 8)))})
    sets = [{**bundle.conditioners, "word_map": maps}]
    if name == "refiner":
        sets.append({"clip_text_2": bundle.conditioners["clip_text_2"]})
    for conditioners in sets:
        named = r" \+ ".join(sorted(conditioners))
        with pytest.raises(ValueError, match=f"conditioned by {named}[;,].*save it as orbax"):
            others = replace(bundle, conditioners=conditioners)
            convert.write(others, tmp_path / "model.safetensors", format)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["diffusers", "compvis"])
def test_inputs_that_others_would_take_in_another_way_are_refused(format, tmp_path):
    """Files don't say the order of mask and picture: it is that of the released models."""
    bundle = make_bundle("clip")
    for fields, reason in (
        ({}, r"take masked_image.hole=0.0, this model has -1.0; save it as orbax"),
        (
            {**MASKED, "mask_first": False},
            "masked_image.mask_first=True, this model has False",
        ),
    ):
        other = bundle.with_part("masked_image", convert.Part(fields, {}))
        with pytest.raises(ValueError, match=reason):
            convert.write(other, tmp_path / "model.safetensors", format)
    upscaler = make_bundle("open-clip").with_part("low_res", convert.Part({}, {}))
    with pytest.raises(ValueError, match="no released model shows the meaning"):
        convert.write(upscaler, tmp_path / "model.safetensors", format)
    assert not list(tmp_path.iterdir())


def test_half_precision_files_are_half_as_long(tmp_path):
    bundle = replace(make_bundle("text"), unet=None, conditioners={})
    for dtype in (None, "float16"):
        convert.write(bundle, tmp_path / f"{dtype}.safetensors", "compvis", dtype)
    whole, half = ((tmp_path / f"{d}.safetensors").stat().st_size for d in (None, "float16"))
    assert half < 0.55 * whole
    tensors = load_file(tmp_path / "float16.safetensors").values()
    assert {tensor.dtype for tensor in tensors} == {np.dtype(np.float16)}
    with pytest.raises(ValueError, match="a workdir has float32 parameters: dtype=float16 is for"):
        convert.write(bundle, tmp_path / "run", "orbax", "float16")


def test_the_command_says_what_is_there_and_converts_it(tmp_path):
    bundle = replace(make_bundle("text"), unet=None, conditioners={})
    convert.write(bundle, tmp_path / "model.safetensors", "compvis")
    command = [
        sys.executable,
        "-m",
        "latent_diffusion.convert",
        str(tmp_path / "model.safetensors"),
    ]

    def run(*flags):
        return subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True)

    done = run(str(tmp_path / "folder"), "--to=diffusers", "--dtype=float16")
    assert done.returncode == 0, done.stderr
    size = sum(tensor.size for tensor in bundle.autoencoder.params.values()) / 1e6
    assert f"{size:10.2f} M in {len(bundle.autoencoder.params)} arrays, float32" in done.stdout
    assert "missing           a denoiser" in done.stdout
    (tensors,) = (load_file(file) for file in (tmp_path / "folder").glob("*.safetensors"))
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float16)}
    done = run(str(tmp_path / "folder"), "--to=diffusers")
    assert done.returncode == 1 and done.stderr.endswith("folder exists; remove it first\n")


def test_what_a_model_lacks_is_said():
    bundle = make_bundle("clip")
    text = describe(bundle)
    assert "inputs            9 channels, context 64" in text
    assert text.endswith("missing           a tokenizer")
    alone = describe(replace(bundle, autoencoder=None, conditioners={}))
    assert alone.endswith("missing           a first stage, a conditioner (context of width 64)")
    xl = make_bundle("refiner")
    lacks = [missing(replace(xl, conditioners=parts)) for parts in ({}, {"sizes": SIZES})]
    assert lacks[0] == [*lacks[1], f"a conditioner (vector of width {VECTORS['refiner']})"]


def test_what_describes_no_model_is_refused_in_one_line(tmp_path):
    conv = {"model.diffusion_model.input_blocks.0.0.weight": random((8, 4, 3, 3))}
    save_file(conv, tmp_path / "some.ckpt")
    folder = tmp_path / "unet"
    folder.mkdir()
    save_file(conv, folder / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "UNet2DModel", "block_out_channels": 8}
    for path, content, message in (
        (tmp_path / "some.ckpt", None, "damaged, or no file of this kind: "),
        (folder, {"_class_name": "UNet3DModel"}, "unknown component .*'UNet3DModel'; known: "),
        (folder, {"_class_name": "UNet2DModel", "act_fn": "relu"}, r"UNet2DModel\.act_fn='relu'"),
        (folder, config, r"UNet2DModel\.block_out_channels=8; expected"),
        (tmp_path / "nowhere", None, "does not exist"),
    ):
        if content is not None:
            (folder / "config.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message) as error:
            convert.read(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
