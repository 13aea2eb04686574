"""Stable Diffusion XL: its networks, conditioners, files and sampling."""

import json
import math
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_convert_round_trips as models
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file

import latent_diffusion as ldm
from latent_diffusion import convert
from latent_diffusion.convert import (
    clip_text,
    compvis,
    sdxl,
    sgm,
    unet,
    unet_compvis,
    unet_diffusers,
)
from latent_diffusion.core.rng import init_key
from latent_diffusion.nets.conditioners import make_conditioner
from latent_diffusion.nets.unet import UNet

BASE = {
    "model_channels": 320,
    "channel_mult": (1, 2, 4),
    "attention_resolutions": (2, 4),
    "num_head_channels": 64,
    "transformer_depth": (1, 2, 10),
    "vector_projection": True,
}
REFINER = {**BASE, "model_channels": 384, "channel_mult": (1, 2, 4, 4), "transformer_depth": 4}
# fields, widths of the inputs (latent, context, vector), parameters
UNETS = {
    "base": (BASE, (4, 2048, 2816), 2_567_463_684),
    "inpainting": (BASE, (9, 2048, 2816), 2_567_478_084),
    "refiner": (REFINER, (4, 1280, 2560), 2_259_526_660),
}


def size(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", UNETS)
def test_unets_have_the_parameters_of_the_released_ones(name):
    fields, widths, parameters = UNETS[name]
    assert size(unet.shapes(fields, *widths)) == parameters


def test_settings_of_the_original_are_those_of_diffusers():
    """The yaml of the original's base and refiner, and diffusers' config.json, in facts."""
    yaml = {
        "adm_in_channels": 2816, "num_classes": "sequential", "use_checkpoint": True,
        "in_channels": 4, "out_channels": 4, "model_channels": 320, "context_dim": 2048,
        "attention_resolutions": [4, 2], "num_res_blocks": 2, "channel_mult": [1, 2, 4],
        "num_head_channels": 64, "use_linear_in_transformer": True,
        "transformer_depth": [1, 2, 10], "spatial_transformer_attn_type": "softmax-xformers",
    }  # fmt: skip
    config = {
        "_class_name": "UNet2DConditionModel", "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256, "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "projection_class_embeddings_input_dim": 2816, "transformer_layers_per_block": [1, 2, 10],
        "use_linear_projection": True,
    }  # fmt: skip
    shared = {**BASE, "middle_depth": None}
    for fields in (
        unet_compvis.fields_from_yaml(yaml, linear=True),
        unet_diffusers.fields_from_diffusers(config),
    ):
        module = UNet(**fields)
        assert shared == {
            name: tuple(sorted(value)) if name == "attention_resolutions" else value
            for name in shared
            for value in [getattr(module, name)]
        }
    refiner = {
        "adm_in_channels": 2560, "model_channels": 384, "channel_mult": [1, 2, 4, 4],
        "context_dim": [1280] * 4, "transformer_depth": 4,
    }  # fmt: skip
    module = UNet(**unet_compvis.fields_from_yaml({**yaml, **refiner}, linear=True))
    assert module.depths == (4,) * 5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"transformer_depth": (1, 2)}, r"transformer_depth=\(1, 2\).*or 3 that are at least 1"),
        ({"transformer_depth": (1, 2, 0)}, "at least 1 where a level has attention"),
        ({"middle_depth": 0}, "middle_depth=0"),
    ],
)
def test_depths_that_no_transformer_has_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        UNet(**{**BASE, **fields}).depths  # noqa: B018


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"addition_embed_type": "image"}, "addition_embed_type='image'; supported: None or"),
        ({"addition_embed_type": "text_time"}, "needs addition_time_embed_dim"),
        (
            {"addition_embed_type": "text_time", "addition_time_embed_dim": 8,
             "class_embed_type": "projection"},
            "class_embed_type='projection'; supported: None",
        ),
        ({"transformer_layers_per_block": [1, 2]}, r"blocks; expected 4 numbers"),
        ({"transformer_layers_per_block": [1, [2], 1, 1]}, "transformer_layers_per_block="),
    ],
)  # fmt: skip
def test_settings_of_other_unets_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        unet_diffusers.fields_from_diffusers({"_class_name": "UNet2DConditionModel", **settings})


BIG_G = {
    "width": 1280, "depth": 32, "num_heads": 20, "activation": "gelu", "skip_last": 1,
    "final_norm": False, "projection_dim": 1280, "pad_id": 0, "repad": True,
}  # fmt: skip


def test_the_second_text_encoder_has_the_parameters_of_the_released_one():
    assert size(clip_text.shapes(BIG_G)) == 694_659_840


ENCODER = {
    "vocab_size": 9, "max_length": 5, "width": 64, "num_heads": 1, "depth": 2, "skip_last": 1,
    "empty": (7, 8), "pad_id": 8, "final_norm": False, "zero_null": True,
}  # fmt: skip
SECOND = {**ENCODER, "projection_dim": 6, "pad_id": 0, "repad": True}
CONFIG = {"sizes": {"width": 4}, "clip_text_2": SECOND, "clip_text": ENCODER}
TOKENS = np.array([[7, 3, 8, 8, 8], [7, 8, 8, 8, 8]], np.int32)
BATCH = {
    "tokens": jnp.asarray(TOKENS),
    "original_size": jnp.array([[8, 16]] * 2),
    "crop_top_left": jnp.array([[0, 4]] * 2),
    "target_size": jnp.array([[8, 8]] * 2),
}


def condition(config, drop=(False, False), batch=BATCH):
    conditioner, drop = make_conditioner(config), jnp.array(drop)
    params = jax.jit(conditioner.init)(init_key(0), batch, drop)
    return params["params"], conditioner.apply(params, batch, drop)


def test_two_encoders_of_one_text_are_joined_along_its_width():
    params, both = condition(CONFIG)
    assert both.context.shape == (2, 5, 128) and both.vector.shape == (2, 6 + 6 * 4)
    for config, context in (
        ({"clip_text": ENCODER}, both.context[..., :64]),
        ({"clip_text_2": SECOND}, both.context[..., 64:]),
    ):
        alone = make_conditioner(config).apply({"params": params}, BATCH, jnp.zeros(2, bool))
        np.testing.assert_array_equal(alone.context, context)
    np.testing.assert_array_equal(alone.vector, both.vector[:, :6])  # before the sizes


def test_the_second_encoder_sees_its_own_padding():
    """The last states see all of the text, and so tell the paddings apart."""
    params, _ = condition({"clip_text_2": SECOND})
    own = np.where(np.arange(5) > (TOKENS == 8).argmax(1)[:, None], 0, TOKENS)
    drop = jnp.zeros(2, bool)
    rows = [
        make_conditioner({"clip_text_2": {**SECOND, "repad": repad}}).apply(
            {"params": params}, {"tokens": jnp.asarray(tokens)}, drop
        )
        for repad, tokens in ((True, TOKENS), (False, own), (False, TOKENS))
    ]
    np.testing.assert_array_equal(rows[0].context, rows[1].context)
    assert np.abs(rows[0].context - rows[2].context).max() > 1e-3
    # The vector is of the end, which sees no padding.
    np.testing.assert_array_equal(rows[0].vector, rows[2].vector)


def test_a_dropped_text_is_zeros_and_sizes_stay():
    _, out = condition(CONFIG, (True, False))
    assert not out.context[0].any() and not out.vector[0, :6].any()
    assert out.context[1].any() and out.vector[1, :6].any()
    np.testing.assert_array_equal(out.vector[0, 6:], out.vector[1, 6:])
    refiner = {name: {**CONFIG[name]} for name in ("clip_text_2", "sizes")}
    refiner["clip_text_2"]["zero_null"] = False
    _, out = condition(refiner, (True, False))  # the other example is the empty prompt
    np.testing.assert_array_equal(out.context[0], out.context[1])


def test_the_order_of_conditioners_is_that_of_the_alphabet():
    """A ConfigDict has it, too: a vector doesn't depend on where its config comes from."""
    names = ["clip_text", "clip_text_2", "sizes"]
    assert list(make_conditioner(CONFIG).config) == names
    assert list(make_conditioner(ConfigDict(CONFIG)).config) == names


def low_rank(out, into=models.WIDTH):
    return models.random((2, into)), models.random((out, 2))


@pytest.mark.parametrize("kind", ["kohya", "diffusers"])
def test_lora_of_both_text_encoders(kind, tmp_path):
    """The first encoder's last layer, which files have, changes nothing."""
    kohya = kind == "kohya"
    down, up = (
        ("lora_down.weight", "lora_up.weight") if kohya else ("lora_A.weight", "lora_B.weight")
    )
    starts = ("lora_te1_", "lora_te2_") if kohya else ("text_encoder.", "text_encoder_2.")
    modules = [(starts[0], 0), (starts[0], 1), (starts[1], 1)]
    tensors, factors = {}, []
    for start, layer in modules:
        name = f"text_model.encoder.layers.{layer}.mlp.fc2"
        module = start + (name.replace(".", "_") if kohya else name)
        a, b = low_rank(models.WIDTH, 4 * models.WIDTH)
        tensors |= {f"{module}.{down}": a, f"{module}.{up}": b}
        factors.append((b @ a).T)
    own = {"lora_unet_input_blocks_1_1_proj_in": "unet.down_blocks.0.attentions.0.proj_in"}
    for original, theirs in own.items():
        a, b = low_rank(32, 32)
        module = original if kohya else theirs
        tensors |= {f"{module}.{down}": a, f"{module}.{up}": b}
        change = (b @ a).T
    save_file(tensors, tmp_path / "lora.safetensors")
    bundle = models.make_bundle("xl")
    merged = convert.with_lora(bundle, tmp_path / "lora.safetensors", 1.0)
    expected = {
        ("clip_text", "layers_0/fc2/kernel"): factors[0],
        ("clip_text_2", "layers_1/fc2/kernel"): factors[2],
        ("unet", "input_blocks_1_1/proj_in/kernel"): change,
    }
    for (name, part), (_, before) in zip(merged.parts(), bundle.parts(), strict=True):
        for path, tensor in part.params.items():
            delta = tensor.read() - before.params[path].read()
            np.testing.assert_allclose(delta, expected.get((name, path), 0), atol=1e-6)


def test_a_lora_of_stable_diffusion_1_is_refused(tmp_path):
    a, b = low_rank(320, 320)
    name = "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_q"
    tensors = {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=f"1 modules aren't in this model: {name}"):
        convert.with_lora(models.make_bundle("xl"), tmp_path / "lora.safetensors", 1.0)


@pytest.mark.parametrize(
    ("start", "layer", "name"),
    [("lora_te_", 0, "xl"), ("lora_te_", 1, "xl"), ("lora_te_", 0, "refiner"),
     ("lora_te1_", 0, "clip"), ("lora_te1_", 1, "clip"), ("lora_te2_", 0, "clip")],
)  # fmt: skip
def test_a_lora_of_another_models_text_encoder_alone_is_refused(start, layer, name, tmp_path):
    """CLIP-L has the same shapes in Stable Diffusion 1 and XL; kohya's names tell them apart.

    A name of XL's idle last layer is no excuse.
    """
    a, b = low_rank(4 * models.WIDTH)
    module = f"{start}text_model_encoder_layers_{layer}_mlp_fc1"
    save_file(
        {f"{module}.lora_down.weight": a, f"{module}.lora_up.weight": b},
        tmp_path / "lora.safetensors",
    )
    with pytest.raises(ValueError, match=f"1 modules aren't .*: {module}; lora_te_ is") as error:
        convert.with_lora(models.make_bundle(name), tmp_path / "lora.safetensors")
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    path = tmp_path_factory.mktemp("xl")
    convert.write(models.make_bundle("xl"), path, "diffusers")
    return path


def changed(path, **entries):
    file = path / "model_index.json"
    index = json.loads(file.read_text())
    file.write_text(json.dumps({**index, **entries}))
    return index


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"text_encoder_2": [None, None]}, "it lacks the second text encoder"),
        ({"text_encoder": [None, None]}, "a context of width 64, its U-Net takes 128"),
        ({"requires_aesthetics_score": True}, "vector has 53 numbers; .* 5 sizes are 45"),
    ],
)
def test_folders_that_lack_a_part_are_refused(entries, message, pipeline):
    index = changed(pipeline, **entries)
    try:
        with pytest.raises(ValueError, match=message):
            convert.read(pipeline)
    finally:
        changed(pipeline, **index)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """Files of the base and of the refiner in sgm's layout, without their yaml, and the tensors."""
    folder, files = tmp_path_factory.mktemp("sgm"), {}
    for name in ("xl", "refiner"):
        file = folder / f"{name}.safetensors"
        convert.write(models.make_bundle(name), file, "compvis")
        file.with_suffix(".yaml").unlink()
        files[name] = file, load_file(file)
    return files


@pytest.fixture
def released(monkeypatch):
    """The widths of the test's U-Nets are those of released models, which need no yaml."""
    for context, known in ((128, (320, 2048, 4)), (64, (384, 1280, 4))):
        known = compvis.RELEASED[known]._replace(heads={"num_heads": 8})
        monkeypatch.setitem(compvis.RELEASED, (32, context, 4), known)
    monkeypatch.setattr(sdxl, "TIME_WIDTH", models.SIZES["width"])


@pytest.mark.parametrize(
    ("name", "part", "message"),
    [
        ("xl", "conditioner.", r"it lacks conditioner\.embedders\.… \(the text encoders of St"),
        ("refiner", "conditioner.", r"it lacks conditioner\.embedders\.… \(the text encoders of"),
        ("xl", "conditioner.embedders.0.", "width 64, its U-Net takes 128: the first is missing"),
        ("xl", "conditioner.embedders.1.", "it lacks the second text encoder, which gives the"),
        ("xl", "conditioner.embedders.1.model.text_projection", "second text encoder's text_proj"),
    ],
)
def test_single_files_that_lack_a_part_are_refused(name, part, message, single, released, tmp_path):
    left = {key: x for key, x in single[name][1].items() if not key.startswith(part)}
    save_file(left, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"^{tmp_path}/model.*{message}") as error:
        convert.read(tmp_path / "model.safetensors")
    assert "\n" not in str(error.value)


MARKS = {  # markers in a file: prediction, zero terminal SNR, spacing
    (): ("eps", False, "original"),
    ("v_pred",): ("v", False, "original"),
    ("v_pred", "ztsnr"): ("v", True, "trailing"),
}


def test_a_single_file_of_other_pictures_than_the_released_model_says_so(tmp_path, caplog):
    for side, warnings in ((sgm.SIDE, 0), (8, 1)):
        made = models.make_bundle("xl")
        made = replace(made, image_size=made.in_pixels(side))
        convert.write(made, tmp_path / "xl.safetensors", "compvis")
        assert len(caplog.messages) == warnings
    assert "doesn't say the size of trained pictures: 16 is read as 256" in caplog.text


@pytest.mark.parametrize("markers", MARKS)
def test_markers_say_what_no_yaml_says(markers, single, released, tmp_path):
    """And are written again, by a model in memory, too, with their own shape and dtype."""
    tensors = {key: x for key, x in single["xl"][1].items() if key not in ("v_pred", "ztsnr")}
    tensors |= {name: np.zeros((0, 3), np.float16) for name in markers}
    beside = {"denoiser.sigmas": np.zeros(1000, np.float32)}  # as the released files have it
    save_file({**tensors, **beside}, tmp_path / "model.safetensors")
    model = ldm.load(tmp_path / "model.safetensors")
    schedule = model.denoiser.schedule
    got = model.denoiser.prediction, bool(schedule.alphas[-1] == 0), model.defaults["spacing"]
    assert got == MARKS[markers]
    model.save(tmp_path / "again.safetensors", "compvis")
    models.equal(load_file(tmp_path / "again.safetensors"), tensors)


def test_minus_infinity_of_diffusers_is_read(pipeline):
    file = pipeline / "scheduler" / "scheduler_config.json"
    text = file.read_text()
    config = {**json.loads(text), "_class_name": "DPMSolverMultistepScheduler"}
    file.write_text(json.dumps({**config, "lambda_min_clipped": -math.inf}))
    kind = ["diffusers", "DPMSolverMultistepScheduler"]
    index = changed(pipeline, scheduler=kind)
    assert convert.read(pipeline).sampling["sampler"] == "dpm_solver_pp_2m"
    changed(pipeline, **index)
    file.write_text(text)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_in_half_precision_decodes_in_float32(dtype, pipeline, tmp_path):
    whole, half = ldm.load(pipeline), ldm.load(pipeline, dtype=dtype)
    z = jnp.asarray(models.random((2, 8, 8, 4)))
    np.testing.assert_array_equal(half.decode(z), whole.decode(z))
    assert {leaf.dtype for leaf in jax.tree.leaves(half.denoiser.params)} == {jnp.dtype(dtype)}
    masked = {"image": jnp.zeros((2, 8, 8, 3)), "mask": jnp.ones((2, 8, 8, 1))}
    masked["masked_latents"] = z

    def answer(denoiser):
        conditioning = denoiser.condition({**BATCH, **masked}, jnp.zeros(2, bool))
        return denoiser.denoise(z, jnp.array([3.0, 400.0]), conditioning)

    want, got = answer(whole.denoiser), jax.jit(answer)(half.denoiser)
    difference = np.abs(want - np.asarray(got, np.float32)).max() / np.abs(want).max()
    assert 1e-4 < difference < 0.1
    leaves, structure = jax.tree.flatten(half.denoiser)
    text = jax.jit(lambda leaves: answer(structure.unflatten(leaves))).lower(leaves).as_text()
    products = re.findall(r"stablehlo\.(?:dot_general|convolution).*: \((.*)\) ->", text)
    short = {"bfloat16": "xbf16>", "float16": "xf16>"}[dtype]
    full = [product for product in products if product.count(short) != 2]
    assert len(products) > 20
    if dtype == "bfloat16":
        assert full == []
    else:  # attention computes in float32 where there is no GPU
        assert len(full) < len(products) / 2
    half.save(pipeline / "again", "diffusers")
    assert (
        ldm.load(pipeline / "again").denoiser.params["unet"]["out_2"]["bias"].dtype == jnp.float32
    )
    with pytest.raises(ValueError, match=r"unknown dtype 'int4'; known: .*float16, .*, int8"):
        ldm.load(pipeline, dtype="int4")
