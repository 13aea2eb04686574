"""Adapters: the formulas of their kinds, the names and settings in files, sampling with them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file
from test_lora import make_bundle
from test_model import RNG, model

import latent_diffusion as ldm
from latent_diffusion import convert
from latent_diffusion.convert.adapters import adapted, read_adapter, weights_of
from latent_diffusion.convert.adapters.adapter import weight_of_names
from latent_diffusion.convert.adapters.peft_settings import PeftSettings
from latent_diffusion.convert.bundle import with_denoiser
from latent_diffusion.generation.adapters import _changes
from latent_diffusion.optimisation.deltas import delta

OUT, IN, RANK, SIDE = 6, 4, 2, 3
CLOSE = dict(rtol=1e-5, atol=1e-5)


def draw(*shape, seed=0):
    rng = np.random.default_rng([seed, *shape])
    return rng.normal(size=shape).astype(np.float32)


def factors_of(kind):
    """A convolution [6 4 3 3], factors, and the change that the papers define."""
    w = draw(OUT, IN, SIDE, SIDE)
    if kind == "lora":
        down, up = draw(RANK, IN, SIDE, SIDE), draw(OUT, RANK, 1, 1)
        f, want = {"lora_down": down, "lora_up": up}, np.einsum("orxy,rikl->oikl", up, down)
    elif kind == "tucker":
        down, up, mid = draw(RANK, IN, 1, 1), draw(OUT, RANK, 1, 1), draw(RANK, RANK, SIDE, SIDE)
        f = {"lora_down": down, "lora_up": up, "lora_mid": mid}
        want = np.einsum("op,pqkl,qi->oikl", up[:, :, 0, 0], mid, down[:, :, 0, 0])
    elif kind == "loha":
        a, b = draw(OUT, RANK), draw(RANK, IN * SIDE**2)
        c, d = draw(OUT, RANK, seed=1), draw(RANK, IN * SIDE**2, seed=1)
        f = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d}
        want = (np.einsum("or,ri->oi", a, b) * np.einsum("or,ri->oi", c, d)).reshape(w.shape)
    elif kind == "loha tucker":
        f, want = {}, 1.0
        for n in (1, 2):
            a, b = draw(RANK, OUT, seed=n), draw(RANK, IN, seed=n)
            t = draw(RANK, RANK, SIDE, SIDE, seed=n)
            f |= {f"hada_w{n}_a": a, f"hada_w{n}_b": b, f"hada_t{n}": t}
            want = want * np.einsum("po,pqkl,qi->oikl", a, t, b)
    elif kind.startswith("lokr"):
        left, right = draw(2, 2), draw(3, 2, SIDE, SIDE)
        f = {"lokr_w1": left, "lokr_w2": right}
        if kind == "lokr factored":
            a, b, c, d = draw(2, 1), draw(1, 2), draw(3, RANK), draw(RANK, 2 * SIDE**2)
            f = {"lokr_w1_a": a, "lokr_w1_b": b, "lokr_w2_a": c, "lokr_w2_b": d}
            left, right = a * b, (c @ d).reshape(right.shape)
        if kind == "lokr tucker":
            t, c, d = draw(RANK, RANK, SIDE, SIDE), draw(RANK, 3), draw(RANK, 2)
            f = {"lokr_w1": left, "lokr_w2_a": c, "lokr_w2_b": d, "lokr_t2": t}
            right = np.einsum("po,pqkl,qi->oikl", c, t, d)
        want = np.stack([np.kron(left, right[..., y, x]) for y in range(3) for x in range(3)], -1)
        want = want.reshape(w.shape)
    elif kind == "glora":
        a1, a2, b1 = draw(IN, RANK), draw(RANK, IN), draw(OUT, RANK)
        b2 = draw(RANK, IN, SIDE, SIDE)
        f = {"a1": a1, "a2": a2, "b1": b1, "b2": b2}
        want = np.einsum("or,rikl->oikl", b1, b2) + np.einsum("oikl,ir,rj->ojkl", w, a1, a2)
    else:
        f, want = {"diff": draw(*w.shape, seed=2)}, draw(*w.shape, seed=2)
    return w, f, want


KINDS = (
    *("lora", "tucker", "loha", "loha tucker", "lokr", "lokr factored", "lokr tucker", "glora"),
    "full",
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_is_what_the_papers_define_in_numpy_and_in_a_program(kind):
    weight, factors, want = factors_of(kind)
    factors["scale"] = np.float32(0.5)
    np.testing.assert_allclose(delta(weight, factors), 0.5 * want, **CLOSE)
    np.testing.assert_allclose(jax.jit(delta)(weight, factors), 0.5 * want, **CLOSE)
    for axes, shape, name in (
        ((1, 2, 3), (OUT, 1), "magnitude"),
        ((0, 2, 3), (1, IN), "magnitude_in"),
    ):
        magnitude = np.abs(draw(*shape))
        whole = weight + delta(weight, {**factors, name: magnitude.reshape(-1)})
        norm = np.sqrt((whole**2).sum(axes))
        np.testing.assert_allclose(norm, magnitude.reshape(-1), rtol=1e-5)
        plain = weight + 0.5 * want
        direction = plain / np.sqrt((plain**2).sum(axes, keepdims=True))
        np.testing.assert_allclose(whole, direction * magnitude.reshape(*shape, 1, 1), **CLOSE)


# -------------------------------------------------------------------------------------------- names

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
SGM = "input_blocks_1_1_transformer_blocks_0_attn1"
KERNEL = "input_blocks_1_1/transformer_blocks_0/attn1/to_out/kernel"
DOWN, UP = draw(RANK, 8), draw(8, RANK)


def flat(name):
    return name.replace(".", "_")


ORIGINAL = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1"
SPELLINGS = {
    tool: (name.format(*a_and_b[0]), name.format(*a_and_b[1]))
    for tool, name, *a_and_b in (
        ("diffusers", f"unet.{BLOCK}.to_out.0.lora_{{}}.weight", "A", "B"),
        ("diffusers 0.25", f"unet.{BLOCK}.to_out.0.lora.{{}}.weight", ["down"], ["up"]),
        ("diffusers 0.17", f"unet.{BLOCK}.processor.to_out_lora.{{}}.weight", ["down"], ["up"]),
        ("save_attn_procs", f"{BLOCK}.processor.to_out_lora.{{}}.weight", ["down"], ["up"]),
        ("save_lora_adapter", f"{BLOCK}.to_out.0.lora_{{}}.weight", "A", "B"),
        ("peft", f"base_model.model.{BLOCK}.to_out.0.lora_{{}}.weight", "A", "B"),
        ("peft, named", f"base_model.model.{BLOCK}.to_out.0.lora_{{}}.default.weight", "A", "B"),
        ("kohya", f"lora_unet_{flat(BLOCK)}_to_out_0.lora_{{}}.weight", ["down"], ["up"]),
        ("kohya, sgm", f"lora_unet_{SGM}_to_out_0.lora_{{}}.weight", ["down"], ["up"]),
        ("lycoris", f"lycoris_{flat(BLOCK)}_to_out_0.lora_{{}}.weight", ["down"], ["up"]),
        ("original", f"{ORIGINAL}.to_out.0.lora_{{}}.weight", ["down"], ["up"]),
    )
}


def file_of(tmp_path, tensors, metadata=None, name="x"):
    path = tmp_path / f"{name}.safetensors"
    tensors = {k: np.ascontiguousarray(x, np.float32) for k, x in tensors.items()}
    save_file(tensors, path, None if metadata is None else {"lora_adapter_metadata": metadata})
    return path


def changed(path, weight=1.0):
    """{part/path: change} of everything that a file changes in the model of test_lora."""
    bundle = make_bundle()
    merged, found = convert.with_lora(bundle, path, weight), {}
    for (name, new), (_, old) in zip(merged.parts(), bundle.parts(), strict=True):
        for key, tensor in new.params.items():
            if tensor is not old.params[key]:
                found[f"{name}/{key}"] = tensor.read() - old.params[key].read()
    return found


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_a_module_is_known(spelling, tmp_path):
    path = file_of(tmp_path, dict(zip(SPELLINGS[spelling], (DOWN, UP), strict=True)))
    ((where, change),) = changed(path).items()
    assert where == f"unet/{KERNEL}"
    np.testing.assert_allclose(change, (UP @ DOWN).T, **CLOSE)


def test_merged_parameters_keep_their_dtype(tmp_path):
    path = file_of(tmp_path, dict(zip(SPELLINGS["diffusers"], (DOWN, UP), strict=True)))
    merged = convert.with_lora(make_bundle().astype(jnp.bfloat16), path)
    assert {tensor.read().dtype for tensor in merged.unet.params.values()} == {
        jnp.dtype("bfloat16")
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_a_small_change_of_a_file_in_few_bits_is_rounded_once_to_what_is_asked_for(dtype, tmp_path):
    """The change is a thousandth of the kernel: below half a step of these dtypes."""
    tensors = dict(zip(SPELLINGS["diffusers"], (1e-3 * DOWN, UP), strict=True))
    bundle, path = make_bundle().astype(jnp.dtype(dtype)), file_of(tmp_path, tensors)
    base = np.asarray(bundle.unet.params[KERNEL].read(), np.float32)
    both = convert.with_loras(bundle, [(path, 1.0), (path, 0.5)]).unet.params[KERNEL]
    in_turn = convert.with_lora(convert.with_lora(bundle, path, 0.5), path).unet.params[KERNEL]
    for merged in both, in_turn:
        np.testing.assert_allclose(
            merged.astype(np.float32).read() - base, 1.5e-3 * (UP @ DOWN).T, rtol=0.01, atol=1e-6
        )
    # A conversion without --dtype writes float32 where eight bits would lose the change.
    assert both.dtype == both.read().dtype == (dtype if dtype == "bfloat16" else "float32")


def test_merged_adapters_are_changes_of_the_model_itself(tmp_path):
    """Two DoRAs of one kernel, whose sum doesn't depend on their order."""
    names = [f"unet.{BLOCK}.to_out.0.lora_{x}.weight" for x in "AB"]
    magnitude = f"unet.{BLOCK}.to_out.0.lora_magnitude_vector"
    files = [
        file_of(tmp_path, {**dict(zip(names, pair, strict=True)), magnitude: norms}, name=str(i))
        for i, (pair, norms) in enumerate([((DOWN, UP), draw(8)), ((UP.T, DOWN.T), 3 + draw(8))])
    ]
    bundle = make_bundle()
    base = bundle.unet.params[KERNEL].read()
    alone = [convert.with_lora(bundle, f).unet.params[KERNEL].read() - base for f in files]
    both = convert.with_loras(bundle, [(f, 1.0) for f in files]).unet.params[KERNEL].read()
    np.testing.assert_allclose(both, base + alone[0] + alone[1], **CLOSE)


CONVOLUTIONS = {  # diffusers' module: our kernel, which is the original's name
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
    "time_embedding.linear_1": "time_embed_0",
    "down_blocks.0.resnets.0.conv1": "input_blocks_1_0/in_layers_2",
    "down_blocks.0.resnets.0.time_emb_proj": "input_blocks_1_0/emb_layers_1",
    "mid_block.resnets.1.conv2": "middle_block_2/out_layers_3",
    "up_blocks.0.resnets.0.conv_shortcut": "output_blocks_0_0/skip_connection",
    "up_blocks.0.attentions.1.proj_in": "output_blocks_1_1/proj_in",
}


def test_convolutions_norms_biases_and_text_encoders_are_found_in_all_names(tmp_path):
    params = make_bundle().unet.params
    for name, kernel in CONVOLUTIONS.items():
        *rows, columns = params[f"{kernel}/kernel"].shape
        convolution = len(rows) == 3 or "proj_in" in name
        positions = rows[:-1] if len(rows) == 3 else (1, 1) if convolution else ()
        down = draw(RANK, rows[-1], *positions)
        up = draw(columns, RANK, *[1] * len(positions))
        want = np.einsum("or,ri...->...io", up.reshape(columns, RANK), down)
        ends = (("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight"))
        for spelled, (a, b) in zip(
            (f"unet.{name}", f"lora_unet_{flat(name)}", f"lora_unet_{kernel.replace('/', '_')}"),
            (ends[0], ends[1], ends[1]),
            strict=True,
        ):
            path = file_of(tmp_path, {f"{spelled}.{a}": down, f"{spelled}.{b}": up})
            ((where, change),) = changed(path).items()
            assert where == f"unet/{kernel}/kernel"
            np.testing.assert_allclose(change, want.reshape(change.shape), **CLOSE)
    tensors = {
        "lora_unet_mid_block_resnets_0_norm1.w_norm": draw(8),
        "lora_unet_mid_block_resnets_0_norm1.b_norm": draw(8, seed=1),
        "lora_unet_conv_in.diff": draw(8, 3, 3, 3),
        "lora_unet_conv_in.diff_b": draw(8, seed=2),
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": draw(RANK, 16),
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": draw(64, RANK),
        "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": np.float32(1.0),  # not of the bias
        "lora_te_text_model_encoder_layers_0_mlp_fc1.diff_b": draw(64, seed=4),
        f"unet.{BLOCK}.to_out.0.lora_A.weight": DOWN,
        f"unet.{BLOCK}.to_out.0.lora_B.weight": UP,
        f"unet.{BLOCK}.to_out.0.lora_B.bias": draw(8, seed=3),
        f"unet.{BLOCK}.to_out.0.alpha": np.float32(1.0),
    }
    found = changed(file_of(tmp_path, tensors), 2.0)
    want = {
        "unet/middle_block_0/in_layers_0/scale": 2 * draw(8),
        "unet/middle_block_0/in_layers_0/bias": 2 * draw(8, seed=1),
        "unet/input_blocks_0_0/kernel": 2 * draw(8, 3, 3, 3).transpose(2, 3, 1, 0),
        "unet/input_blocks_0_0/bias": 2 * draw(8, seed=2),
        "clip_text/layers_0/fc1/kernel": 2 / RANK * (draw(64, RANK) @ draw(RANK, 16)).T,
        "clip_text/layers_0/fc1/bias": 2 * draw(64, seed=4),
        f"unet/{KERNEL}": (UP @ DOWN).T,
        f"unet/{KERNEL.replace('kernel', 'bias')}": draw(8, seed=3),
    }
    assert found.keys() == want.keys()
    for where, change in want.items():
        np.testing.assert_allclose(found[where], change, **CLOSE)


# ----------------------------------------------------------------------------------------- settings

PAIR = dict(zip(SPELLINGS["diffusers"], (DOWN, UP), strict=True))
PEFT = dict(zip(SPELLINGS["peft"], (DOWN, UP), strict=True))
SETTINGS = [
    ({"r": 2, "lora_alpha": 16}, 8.0),
    ({"r": 2, "lora_alpha": 16, "use_rslora": True}, 16 / 2**0.5),
    ({"r": 4, "rank_pattern": {"to_out.0": 2}, "lora_alpha": 3}, 1.5),
    ({"r": 2, "lora_alpha": 16, "alpha_pattern": {f"^{BLOCK}.to_out.0": 1}}, 0.5),
    ({"r": 2, "lora_alpha": 16, "alpha_pattern": {"^to_out.0": 1, "attn2.to_out.0": 1}}, 8.0),
    ({"r": 2}, 4.0),
    ({"r": 2, "lora_alpha": 2, "lora_dropout": 0.1, "target_modules": ["to_k"]}, 1.0),
]


@pytest.mark.parametrize(("settings", "scale"), SETTINGS)
def test_alpha_may_be_in_the_header_or_in_a_config_beside(settings, scale, tmp_path):
    header = json.dumps({f"unet.{key}": value for key, value in settings.items()})
    want = scale * (UP @ DOWN).T
    (change,) = changed(file_of(tmp_path, PAIR, header)).values()
    np.testing.assert_allclose(change, want, **CLOSE)
    file = file_of(tmp_path, PEFT, name="adapter_model")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **settings}))
    for path in (file, tmp_path):
        (change,) = changed(path).values()
        np.testing.assert_allclose(change, want, **CLOSE)


def test_alpha_may_be_an_integer(tmp_path):
    name = SPELLINGS["kohya"][0].removesuffix(".lora_down.weight")
    pair = dict(zip(SPELLINGS["kohya"], (DOWN, UP), strict=True))
    (change,) = changed(file_of(tmp_path, {**pair, f"{name}.alpha": np.int64(6)})).values()
    np.testing.assert_allclose(change, 3 * (UP @ DOWN).T, **CLOSE)
    for alpha, reason in (
        (np.float32(np.nan), "alpha is nan"),
        (np.zeros(2), "alpha has the shape"),
    ):
        path = file_of(tmp_path, {**pair, f"{name}.alpha": alpha})
        with pytest.raises(ValueError, match=rf"^{path}.*{reason}"):
            read_adapter(path)


@pytest.mark.parametrize("target", ["/dev/zero", "/dev/null"])
def test_a_config_beside_that_is_no_file_is_not_read(target, tmp_path):
    file_of(tmp_path, PEFT, name="adapter_model")
    config = tmp_path / "adapter_config.json"
    config.symlink_to(target)
    with pytest.raises(ValueError, match=f"^{tmp_path}"):
        read_adapter(tmp_path)
    config.unlink()
    config.write_text("[1, 2]")
    with pytest.raises(ValueError, match=f"^{config}: not a JSON object, but list"):
        read_adapter(tmp_path)


def test_the_header_has_settings_of_each_text_encoder():
    header = {"text_encoder.r": 2, "text_encoder_2.r": 4, "text_encoder_2.lora_alpha": 12}
    settings = PeftSettings("file", header)
    for module, rank, scale in (("text_encoder.x", 2, 4), ("text_encoder_2.x", 4, 3)):
        assert settings.scale(module, "LoRA", rank) == scale
    of_loha = PeftSettings("file", {"r": 2, "alpha": 12})  # whose α has another name
    assert of_loha.scale("unet.x", "LoHa", 2) == 6


UNSUPPORTED = [
    ({"r": 4}, "its rank is 2, but .* says r=4"),
    ({"r": 2, "lora_alpha": "x"}, "lora_alpha='x', not a positive number"),
    ({"r": 2, "use_dora": True}, "use_dora, and its magnitude is absent"),
    ({"r": 2, "lora_bias": True}, "lora_bias, and its bias is absent"),
    ({"r": 2, "use_rslora": "no"}, "use_rslora='no' isn't supported; supported: True or False or"),
    ({"r": 2, "bias": "all"}, "bias='all' isn't supported"),
    ({"r": 2, "fan_in_fan_out": True}, "fan_in_fan_out='True' isn't supported"),
    ({"r": 2, "modules_to_save": ["conv_in"]}, "modules_to_save=.* isn't supported"),
    ({"r": 2, "init_lora_weights": "pissa"}, "init_lora_weights='pissa' isn't supported"),
    ({"r": 2, "never_heard_of": 3}, "never_heard_of='3' isn't supported"),
    ({"r": 2, "rank_pattern": {"(a+)+$": 2}}, "rank_pattern=.* isn't by names of modules"),
]


@pytest.mark.parametrize(("settings", "message"), UNSUPPORTED)
def test_a_setting_that_matters_is_refused_by_its_name(settings, message, tmp_path):
    header = json.dumps({f"unet.{key}": value for key, value in settings.items()})
    path = file_of(tmp_path, PAIR, header)
    with pytest.raises(ValueError, match=rf"^{path}.*{message}"):
        read_adapter(path)


K = f"unet.{BLOCK}.to_k"
BAD = [
    ({f"{K}.lora_A.weight": DOWN}, "LoRA with lora_down lacks lora_up"),
    ({f"{K}.lora_B.weight": UP}, "LoRA with lora_up lacks lora_down"),
    ({f"{K}.hada_w1_a": UP, f"{K}.hada_w1_b": DOWN}, "LoHa .* lacks hada_w2_a"),
    ({f"{K}.lokr_w1": UP}, "LoKr with lokr_w1 lacks lokr_w2 or lokr_w2_a and lokr_w2_b"),
    ({f"{K}.a1.weight": UP}, "GLoRA with a1 lacks a2"),
    ({f"{K}.lora_A.weight": DOWN, f"{K}.lora_B.weight": UP, f"{K}.diff": UP}, "LoRA with diff of"),
    ({f"{K}.dora_scale": UP}, "magnitude without factors"),
    ({f"{K}.lora_A.weight": UP, f"{K}.lora_B.weight": UP}, r"fit it: lora_down \(8, 2\)"),
    ({f"{K}.lora_A.weight": DOWN.T, f"{K}.lora_B.weight": UP.T}, "LoRA doesn't fit it"),
    ({f"{K}.lora_A.weight": DOWN[:0], f"{K}.lora_B.weight": UP[:0]}, "LoRA doesn't fit it"),
    ({f"{K}.lora_A.weight": draw(RANK, 9), f"{K}.lora_B.weight": UP}, "LoRA doesn't fit it"),
    ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.diff": UP}, "1 modules aren't .*: lora_te2_"),
    ({f"{K}.oft_blocks": UP}, "OFT isn't read"),
    ({f"{K}.boft_R": UP}, "BOFT isn't read"),
    ({f"{K}.on_input": UP, f"{K}.weight": UP}, "IA3 isn't read"),
    ({f"{K}.ia3_l": UP}, "IA3 isn't read"),
    ({**PAIR, "lora_controlnet": UP}, "Control-LoRA isn't read"),
    ({**PAIR, "bundle_emb.x.string_to_param.*": UP}, "textual inversion within a LoRA isn't read"),
    ({"conv_in.weight": UP}, "is no LoRA: conv_in.weight"),
    ({"<word>": UP}, "this kind isn't merged; give it to sample"),
    ({**PAIR, SPELLINGS["kohya"][0]: DOWN, SPELLINGS["kohya"][1]: UP}, "to_out.0 has two changes"),
    ({f"{K}.diff_b": UP}, "has no bias in this model"),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "message"), BAD)
def test_what_is_no_adapter_of_the_model_is_refused_by_kind_and_tensor(tensors, message, tmp_path):
    path = file_of(tmp_path, tensors)
    with pytest.raises(ValueError, match=rf"^{path}.*{message}") as error:
        convert.with_lora(make_bundle(), path)
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------- sampling


def adapter_files(tmp_path):
    """Two adapters of the model of test_model: one of kohya's with a convolution, one LoHa."""
    tensors = {
        "lora_unet_mid_block_resnets_0_conv1.lora_down.weight": draw(RANK, 8, 3, 3),
        "lora_unet_mid_block_resnets_0_conv1.lora_up.weight": draw(8, RANK, 1, 1),
        "lora_unet_up_blocks_0_attentions_0_transformer_blocks_0_attn1_to_v.lora_down.weight": DOWN,
        "lora_unet_up_blocks_0_attentions_0_transformer_blocks_0_attn1_to_v.lora_up.weight": UP,
        "lora_unet_up_blocks_0_attentions_0_transformer_blocks_0_attn1_to_v.alpha": np.float32(1),
        "lora_unet_conv_out.diff_b": draw(3),
    }
    halves = {f"{BLOCK}.to_q.hada_w{n}_{x}": draw(*s, seed=n) for n in (1, 2)
              for x, s in (("a", (8, RANK)), ("b", (RANK, 8)))}  # fmt: skip
    return file_of(tmp_path, tensors, name="one"), file_of(tmp_path, halves, name="two")


def sampled(whole, adapters=()):
    return whole.sample(RNG, ["red cat"], mode="single", num_steps=2, adapters=adapters)


def merged(whole, changes):
    """The model with changes [(path of a file, weight)] in its parameters."""
    bundle = convert.with_loras(with_denoiser(convert.Bundle(), whole.denoiser, {}), changes)
    params = {**whole.denoiser.params, "unet": convert.as_params(bundle.unet)}
    return whole.replace(denoiser=whole.denoiser.replace(params=params))


def test_the_longest_prefix_of_whole_names_decides_the_weight():
    names = ["unet.up_blocks.0", "unet.up_blocks.10", "unet.mid_block", "text_encoder.layers"]

    def weights(**given):
        return weight_of_names(names, given, "file").tolist()

    assert weights(**{"unet": 2, "unet.up_blocks": 3}) == [3, 3, 2, 1]
    assert weights(**{"unet.up_blocks": 3, "unet": 2}) == [3, 3, 2, 1]
    assert weights(**{"unet.up_blocks.10": 5, "": 4}) == [4, 5, 4, 4]
    assert weight_of_names(names, 0.5, "file").tolist() == [0.5] * 4
    for wrong in ("unet.up_blocks.1", "unet.up", "text"):
        with pytest.raises(ValueError, match=f"file: no module '{wrong}'; there are"):
            weights(**{wrong: 1})
    for wrong in (None, "0.5", np.nan, [1.0]):
        for weight in (wrong, {"unet": wrong}):
            with pytest.raises(ValueError, match=r"^file: the weight .* isn't a finite number$"):
                weight_of_names(names, weight, "file")


def test_sampling_with_adapters_is_sampling_with_the_merged_model(tmp_path, caplog):
    whole, files = model(), adapter_files(tmp_path)
    before = jax.tree.map(np.array, whole.denoiser.params)
    one, two = map(ldm.load_adapter, files)
    plain = sampled(whole)
    pictures = sampled(whole, [(one, 0.8), (two, -0.5)])
    assert np.abs(pictures - plain).max() > 0.1
    want = sampled(merged(whole, [(files[0], 0.8), (files[1], -0.5)]))
    np.testing.assert_allclose(pictures, want, atol=1e-3)
    np.testing.assert_array_equal(sampled(whole), plain)
    jax.tree.map(np.testing.assert_array_equal, whole.denoiser.params, before)
    np.testing.assert_allclose(sampled(whole, [(one, 0), (two, 0.0)]), plain, atol=1e-4)

    # Other weights, of the whole and of blocks, are inputs of the program.
    blocks = {"": 0.3, "unet.up_blocks": 7.0, "unet.up_blocks.0": 2.0, "unet.conv_out": 0}
    with caplog.at_level("WARNING"), jax.log_compiles():
        caplog.clear()
        pictures = sampled(whole, [(one, blocks), (two, {"unet.down_blocks": 0.5})])
    assert not [r for r in caplog.records if "Compiling" in r.getMessage()]
    parts = {"mid_block": 0.3, "up_blocks_0_att": 2.0}
    tensors = {}

    for name, array in load_file(files[0]).items():
        if "conv_out" not in name:
            weight = next(w for block, w in parts.items() if block in name)
            tensors[name] = weight * array if "lora_up" in name else array
    scaled = file_of(tmp_path, tensors, name="scaled")
    want = sampled(merged(whole, [(scaled, 1.0), (files[1], 0.5)]))
    np.testing.assert_allclose(pictures, want, atol=1e-3)
    with pytest.raises(
        ValueError, match=rf"^{files[0]}: no module 'unet.down'; there are unet.conv"
    ):
        sampled(whole, [(one, {"unet.down": 1.0})])
    with pytest.raises(ValueError, match="adapters come from load_adapter, not one"):
        sampled(whole, [("one", 1.0)])
    with pytest.raises(ValueError, match="adapters are pairs"):
        sampled(whole, [one])


def test_an_adapter_is_matched_to_each_model_anew(tmp_path):
    style = ldm.load_adapter(adapter_files(tmp_path)[0])
    first, again = (_changes(model(), style) for _ in range(2))
    assert first is again
    denoiser = model().denoiser
    kernel = {"in_layers_2": {"kernel": jnp.zeros((3, 3, 9, 8))}}
    block = {**denoiser.params["unet"]["middle_block_0"], **kernel}
    unet = {**denoiser.params["unet"], "middle_block_0": block}
    other = model().replace(denoiser=denoiser.replace(params={**denoiser.params, "unet": unet}))
    with pytest.raises(ValueError, match=r"conv1 is \(8, 9, 3, 3\); LoRA doesn't fit it"):
        _changes(other, style)


def test_a_call_that_is_watched_has_its_adapters(tmp_path):
    whole = model()
    adapters = [(ldm.load_adapter(path), 0.7) for path in adapter_files(tmp_path)]
    calls = []
    watched = whole.sample(
        *(RNG, ["red cat"]), mode="single", num_steps=2, adapters=adapters, progress=calls.append
    )
    np.testing.assert_array_equal(watched, sampled(whole, adapters))
    assert len(calls) == 2 and np.abs(watched - sampled(whole)).max() > 0.01


def test_an_adapter_reaches_the_text_encoder_in_a_program(tmp_path):
    """The parameters of CLIP, whose q, k and v are joined, as merging changes them."""
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.v_proj"
    magnitude = np.abs(draw(16))
    path = file_of(tmp_path, {
        f"{layer}.lora_A.weight": draw(RANK, 16), f"{layer}.lora_B.weight": draw(16, RANK),
        f"{layer}.lora_magnitude_vector": magnitude,
    })  # fmt: skip
    bundle = make_bundle()
    changes = ldm.load_adapter(path).changes(bundle)
    params = {"conditioner": {"clip_text": convert.as_params(bundle.conditioners["clip_text"])}}
    weights = weights_of(changes, 1.0, "")
    got = flatten_dict(jax.jit(adapted)(params, [changes], [weights]), sep="/")
    path = "layers_0/self_attn/qkv/kernel"
    base = bundle.conditioners["clip_text"].params[path].read()
    now = np.asarray(got[f"conditioner/clip_text/{path}"])
    np.testing.assert_array_equal(now[:, :32], base[:, :32])
    value = base[:, 32:] + (draw(16, RANK) @ draw(RANK, 16)).T
    value *= magnitude / np.sqrt((value**2).sum(0))
    np.testing.assert_allclose(now[:, 32:], value, **CLOSE)
    leaves, structure = jax.tree.flatten(changes)
    assert (
        jax.tree.structure(ldm.load_adapter(tmp_path / "x.safetensors").changes(bundle))
        == structure
    )
    assert all(isinstance(leaf, jnp.ndarray) for leaf in leaves)


def test_changes_of_several_adapters_are_of_the_base(tmp_path):
    """Two DoRAs of one kernel, in any order: W + (A(W) − W) + (B(W) − W)."""
    bundle, changes, sole = make_bundle(), [], []
    params = {"unet": convert.as_params(bundle.unet)}
    for i in (1, 2):
        norms = np.abs(draw(8, seed=i)).reshape(8, 1)
        path = file_of(tmp_path, {**PAIR, f"unet.{BLOCK}.to_out.0.dora_scale": norms}, name=f"{i}")
        changes.append(read_adapter(path).changes(bundle))
        sole.append(changed(path)[f"unet/{KERNEL}"])
    weights = [weights_of(own, 0.5, "") for own in changes]
    base = bundle.unet.params[KERNEL].read()
    for order in (1, -1):
        got = flatten_dict(adapted(params, changes[::order], weights[::order]), sep="/")
        np.testing.assert_allclose(got[f"unet/{KERNEL}"], base + 0.5 * sum(sole), **CLOSE)


def test_an_alpha_that_a_module_lacks_is_its_rank(tmp_path):
    """As kohya's programs read it; diffusers would take another module's."""
    pairs = {f"lora_unet_{flat(BLOCK)}_to_{m}": (DOWN, UP) for m in "qk"}
    tensors = {f"{n}.lora_down.weight": down for n, (down, _) in pairs.items()}
    tensors |= {f"{n}.lora_up.weight": up for n, (_, up) in pairs.items()}
    first, second = pairs
    tensors[f"{first}.alpha"] = np.float32(4 * RANK)
    for zero in ({}, {f"{second}.alpha": np.float32(0)}):  # kohya's programs read zero so, too
        modules = read_adapter(file_of(tmp_path, tensors | zero)).modules
        assert [float(modules[n]["weight"]["scale"]) for n in (first, second)] == [4.0, 1.0]
