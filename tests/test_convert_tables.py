"""The tables: exact inverses, complete on every released architecture, strict about the rest."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from latent_diffusion.convert import (
    autoencoder,
    autoencoder_diffusers,
    bert,
    clip_image,
    clip_text,
    unet,
    unet_compvis,
    unet_diffusers,
)
from latent_diffusion.convert.tables import CONV, KINDS, joint_qkv, read_tensors, write_tensors
from latent_diffusion.files.tensor import in_memory
from latent_diffusion.nets.attention import AttentionBlock


def flat_shapes(tree):
    return {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}


def random_params(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {
        path: in_memory(rng.standard_normal(shape, np.float32)) for path, shape in shapes.items()
    }


KL = dict(channels=8, channel_mult=(1, 2), num_res_blocks=1, num_groups=4, embed_dim=4)
AUTOENCODERS = {
    "kl": KL,
    "kl-attention": {**KL, "attn_resolutions": (128,)},
    "vq": {**KL, "regularization": "vq", "num_codes": 6, "z_channels": 3, "embed_dim": 2},
    "no-attention": {**KL, "attn_type": "none"},
}
UNET = dict(
    model_channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2,),
    num_heads=2, num_groups=4, out_channels=3,
)  # fmt: skip
UNETS = {  # fields, widths of its inputs, linear projections
    "transformer": (UNET, (3, 6, None), False),
    "transformer-linear-deep": ({**UNET, "transformer_depth": 2}, (3, 6, None), True),
    "plain": ({**UNET, "transformer_depth": 0, "num_head_channels": 4}, (3, None, None), False),
    "plain-new-order": (
        {**UNET, "transformer_depth": 0, "legacy_qkv_order": False,
         "attention_resolutions": ()}, (3, None, None), False,
    ),
    "updown": (
        {**UNET, "transformer_depth": 0, "num_head_channels": 4, "resblock_updown": True,
         "use_scale_shift_norm": True}, (3, None, None), False,
    ),
    "depths": (
        {**UNET, "channel_mult": (1, 2, 2), "attention_resolutions": (2, 4),
         "transformer_depth": (1, 2, 3)}, (3, 6, None), True,
    ),
    "middle-depth": (
        {**UNET, "channel_mult": (1, 2, 2), "transformer_depth": (1, 2, 1),
         "attention_resolutions": (1, 2), "middle_depth": 3},
        (3, 6, None), True,
    ),
    "crossed": ({**UNET, "disable_self_attentions": (True, False)}, (7, 6, None), False),
    "vector": ({**UNET, "vector_projection": True}, (3, 6, 5), True),
}  # fmt: skip


def check_round_trip(table, shapes):
    """ours -> theirs -> ours is the identity, bitwise, and no two of theirs share a name."""
    ours = random_params(shapes)
    theirs = write_tensors(table, ours)
    assert sum(t.size for t in theirs.values()) == sum(t.size for t in ours.values())
    back = read_tensors(table, shapes, theirs, "tensors")
    for path, tensor in ours.items():
        np.testing.assert_array_equal(back[path].read(), tensor.read(), strict=True)
    return theirs


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_autoencoders_round_trip_and_are_recognised(name):
    fields = AUTOENCODERS[name]
    shapes = flat_shapes(autoencoder.shapes(fields))
    theirs = check_round_trip(autoencoder.compvis_table(fields), shapes)
    known = autoencoder.fields_from_shapes(theirs)
    assert flat_shapes(autoencoder.shapes({**known, "num_groups": 4})) == shapes
    assert {k: v for k, v in known.items() if k in fields} == {
        k: v for k, v in fields.items() if k in known
    }
    check_round_trip(autoencoder.diffusers_table(fields), shapes)
    config = autoencoder_diffusers.diffusers_from_fields(fields, 32)
    again = autoencoder_diffusers.fields_from_diffusers(config)
    assert {k: again[k] for k in fields} == fields


@pytest.mark.parametrize("name", UNETS)
def test_unets_round_trip_and_are_recognised(name):
    fields, widths, linear = UNETS[name]
    shapes = flat_shapes(unet.shapes(fields, *widths))
    theirs = check_round_trip(unet.compvis_table(fields, linear), shapes)
    known = unet_compvis.fields_from_shapes(theirs)
    heads = {k: v for k, v in fields.items() if k not in known}  # leave no trace in the shapes
    assert flat_shapes(unet.shapes({**heads, **known}, *widths)) == shapes
    assert {k: v for k, v in known.items() if k in fields} == {
        k: v for k, v in fields.items() if k in known
    }
    assert unet_compvis.context_dim(theirs) == widths[1]
    check_round_trip(unet.diffusers_table(fields, linear), shapes)
    if name == "plain-new-order":
        return  # its configuration in diffusers' words is that of another order
    config = unet_diffusers.diffusers_from_fields(fields, widths, linear, 8)
    again = unet_diffusers.fields_from_diffusers(config)
    assert {k: again[k] for k in fields if k in again} == {
        k: v for k, v in fields.items() if k in again
    }


CLIP_TEXT = dict(vocab_size=9, max_length=5, width=64, depth=2, num_heads=1)


def test_clips_text_encoder_round_trips_and_is_recognised():
    ids = {"empty": (7, 8), "pad_id": 8, "mlp_width": None}
    shapes = flat_shapes(clip_text.shapes(CLIP_TEXT))
    theirs = check_round_trip(clip_text.transformers_table(CLIP_TEXT), shapes)
    assert "encoder.layers.1.self_attn.k_proj.bias" in theirs
    known = clip_text.fields_from_shapes(theirs)
    assert known == {**CLIP_TEXT, **ids}
    config = clip_text.config_from_fields({**known, "activation": "gelu"})
    assert clip_text.fields_from_config(config) == {**known, "activation": "gelu"}

    theirs = check_round_trip(clip_text.open_clip_table(CLIP_TEXT), shapes)
    assert theirs["transformer.resblocks.0.attn.in_proj_weight"].shape == (192, 64)
    fields = clip_text.fields_from_shapes(theirs)  # as Stable Diffusion 2 takes it
    assert fields == {**CLIP_TEXT, **ids, "pad_id": 0, "skip_last": 1, "activation": "gelu"}
    shapes = flat_shapes(clip_text.shapes(fields))
    table, ignored = clip_text.open_clip_table(fields), clip_text.unused(fields)
    got = read_tensors(table, shapes, theirs, "tensors", ignored)
    assert not any(path.startswith("layers_1") for path in got)
    with pytest.raises(ValueError, match=r"left over: transformer\.resblocks\.1"):
        read_tensors(table, shapes, theirs, "tensors")


ENCODERS = {
    bert: dict(vocab_size=9, max_positions=7, width=6, depth=2, num_heads=2, mlp_width=10),
    clip_image: dict(
        image_size=6, patch_size=3, width=6, depth=2, num_heads=2, mlp_width=None,
        activation="gelu", projection_dim=5,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", ENCODERS, ids=lambda family: family.__name__)
def test_other_encoders_round_trip(family):
    fields = ENCODERS[family]
    check_round_trip(family.transformers_table(fields), flat_shapes(family.shapes(fields)))
    again = family.fields_from_config(family.config_from_fields(fields))
    assert {name: again[name] for name in fields} == fields


def test_clips_image_encoder_in_openclips_names_with_its_statistics():
    fields = {**ENCODERS[clip_image], "width": 64, "num_heads": 1, "num_levels": 9}
    fields["activation"] = "quick_gelu"
    table = [*clip_image.open_clip_table(fields), *clip_image.statistics_table("data_")]
    theirs = check_round_trip(table, flat_shapes(clip_image.shapes(fields)))
    assert theirs["data_std"].shape == (1, 5) and theirs["proj"].shape == (64, 5)
    assert {**clip_image.fields_from_shapes(theirs), "num_levels": 9} == fields


@pytest.mark.parametrize("interleaved", [True, False])
def test_joint_attention_equals_three_maps(interleaved):
    """What the joint map computes from q, k, v maps of ours is attention with those maps."""
    rng = np.random.default_rng(1)
    q, k, v, o = (rng.standard_normal((8, 8)).astype(np.float32) for _ in range(4))
    x = rng.standard_normal((2, 4, 4, 8)).astype(np.float32)
    kernel, bias = joint_qkv(("q", "k", "v"), 2, interleaved)
    zero = np.zeros(8, np.float32)
    params = {
        "norm": {"scale": np.ones(8, np.float32), "bias": zero},
        "qkv": {"kernel": kernel.layout.read(q, k, v), "bias": bias.layout.read(zero, zero, zero)},
        "proj_out": {"kernel": KINDS["linear"][0].layout.read(o), "bias": zero},
    }
    block = AttentionBlock(2, interleaved, num_groups=4)
    got = block.apply({"params": params}, jax.numpy.asarray(x))
    groups = x.reshape(2, 16, 4, 2)
    mean, var = (f(groups, axis=(1, 3), keepdims=True) for f in (np.mean, np.var))
    h = ((groups - mean) / np.sqrt(var + 1e-5)).reshape(2, 16, 8)
    heads = [(h @ w.T).reshape(2, 16, 2, 4) for w in (q, k, v)]
    scores = np.einsum("blnd,bsnd->bnls", heads[0], heads[1]) / 2
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("bnls,bsnd->blnd", weights, heads[2]).reshape(2, 16, 8) @ o.T
    np.testing.assert_allclose(got, x + out.reshape(x.shape), atol=2e-5)


def test_reading_is_strict_and_tells_both_sides():
    table = autoencoder.compvis_table(KL)
    shapes = flat_shapes(autoencoder.shapes(KL))
    theirs = write_tensors(table, random_params(shapes))
    theirs["loss.logvar"] = in_memory(np.zeros(()))
    del theirs["decoder.conv_out.bias"]
    theirs["encoder.conv_in.weight"] = in_memory(np.zeros((8, 4, 3, 3), np.float32))
    theirs["encoder.conv_in.bias"] = in_memory(np.zeros(8, np.int64))
    with pytest.raises(ValueError, match="does not fit") as error:
        read_tensors(table, shapes, theirs, "vae.safetensors")
    text = str(error.value)
    assert "1 missing: decoder/conv_out/bias ← decoder.conv_out.bias" in text
    assert "encoder/conv_in/kernel (3, 3, 3, 8) ← encoder.conv_in.weight (8, 4, 3, 3)" in text
    assert "1 left over: loss.logvar" in text
    assert "1 not floating-point: encoder/conv_in/bias ← encoder.conv_in.bias int64" in text
    with pytest.raises(ValueError, match="no name for other/kernel"):
        write_tensors(table, {"other/kernel": in_memory(np.zeros(3))})


@pytest.mark.parametrize(
    ("said", "heads"),
    [({}, (8, 8)), ({"attention_head_dim": 4}, (8, 4)), ({"attention_head_dim": None}, (1, None))],
)
def test_heads_of_a_unet_without_a_text(said, heads):
    """The setting is their width; without a width there is one head."""
    fields = unet_diffusers.fields_from_diffusers({"_class_name": "UNet2DModel", **said})
    module = unet.UNet(**fields)
    assert (module.num_heads, module.num_head_channels) == heads


def test_what_others_cannot_express_is_said():
    with pytest.raises(ValueError, match="32 groups"):
        autoencoder.yaml_from_fields(KL)
    with pytest.raises(ValueError, match="linear"):
        autoencoder_diffusers.diffusers_from_fields({**KL, "attn_type": "linear"}, 32)
    with pytest.raises(ValueError, match="embed_dim"):
        autoencoder_diffusers.diffusers_from_fields({**KL, "embed_dim": 3}, 32)
    with pytest.raises(ValueError, match="one width for all heads"):
        fields = {**UNET, "transformer_depth": 0, "attention_resolutions": (1, 2)}
        unet_diffusers.diffusers_from_fields(fields, (3, None, None), False, 8)
    with pytest.raises(ValueError, match=r"UNet2DModel\.freq_shift=1"):
        unet_diffusers.fields_from_diffusers(
            {"_class_name": "UNet2DModel", "block_out_channels": [8], "freq_shift": 1}
        )


@pytest.mark.parametrize("name", UNETS)
def test_yaml_of_a_unet_is_read_back(name):
    fields, widths, linear = UNETS[name]
    fields = {**fields, "num_groups": 32, "model_channels": 32}
    params = unet_compvis.yaml_from_fields(fields, widths, linear, 8)["params"]
    again = unet_compvis.fields_from_yaml(params, linear)
    assert {k: v for k, v in fields.items() if k in again} == {
        k: v for k, v in again.items() if k in fields
    }
    assert set(fields) - set(again) == {"num_groups"} | (
        {"num_heads"} if "num_head_channels" in fields else set()
    )


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_yaml_of_an_autoencoder_is_read_back(name):
    fields = {**AUTOENCODERS[name], "num_groups": 32, "channels": 32}
    config = autoencoder.yaml_from_fields(fields)
    again = autoencoder.fields_from_yaml(config)
    assert {k: again[k] for k in fields if k != "num_groups"} == {
        k: v for k, v in fields.items() if k != "num_groups"
    }


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_half_precision_keeps_its_dtype(dtype):
    shapes, dtype = {"encoder/conv_in/kernel": (3, 3, 3, 8)}, jax.numpy.dtype(dtype)
    half = {"encoder.conv_in.weight": in_memory(np.ones((8, 3, 3, 3), dtype))}
    ours = read_tensors(autoencoder.compvis_table(KL), shapes, half, "x")
    assert ours["encoder/conv_in/kernel"].dtype == dtype
    assert jax.numpy.asarray(ours["encoder/conv_in/kernel"].read()).dtype == dtype


def test_a_convolution_is_read_in_the_order_of_the_others():
    """PyTorch's [out in height width] becomes [height width in out]."""
    theirs = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    ours = CONV.read(theirs)
    assert ours.shape == (4, 5, 3, 2) and ours[1, 2, 0, 1] == theirs[1, 0, 1, 2]
    np.testing.assert_array_equal(CONV.write(ours)[0], theirs)
