"""The networks: sizes of the released ones, and what their parts promise."""

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from latent_diffusion.core.types import Conditioning
from latent_diffusion.nets.attention import AttentionBlock
from latent_diffusion.nets.autoencoder import Autoencoder, Identity
from latent_diffusion.nets.convolution import upsample_nearest
from latent_diffusion.nets.dot_product_attention import attend
from latent_diffusion.nets.layers import Conv, Dense, GroupNorm, timestep_embedding
from latent_diffusion.nets.unet import UNet

KEY = jax.random.key(0)
SMALL_AUTOENCODER = {
    "channels": 8,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "num_groups": 4,
    "resolution": 16,
}
SMALL_UNET = {
    "out_channels": 2,
    "model_channels": 8,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "num_heads": 2,
    "num_groups": 4,
}


def test_an_existing_parameter_is_read_without_its_initialiser_and_must_have_the_layers_shape():
    def init(key, shape):
        raise AssertionError(shape)

    x, params = jnp.ones((1, 2)), {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.ones(3)}
    layer = Dense(3, kernel_init=init)
    np.testing.assert_array_equal(layer.apply({"params": params}, x), np.full((1, 3), 5.0))
    with pytest.raises(flax.errors.ScopeParamShapeError, match=r"kernel.*\(2, 3\).*\(2, 4\)"):
        layer.apply({"params": {**params, "kernel": jnp.ones((2, 4))}}, x)


def test_timestep_embedding_is_the_golden_one():
    cosines = [-0.83907153, 0.54030231, 0.99500417, 0.99995]
    sines = [-0.54402111, 0.84147098, 0.09983342, 0.00999983]
    golden = [[*cosines, *sines]]
    np.testing.assert_allclose(timestep_embedding(jnp.array([10.0]), 8), golden, atol=1e-6)


def test_group_norm_has_zero_mean_and_unit_variance_per_group():
    x = 3 + 5 * jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, 6)), jnp.float32)
    y, _ = jax.jit(GroupNorm(2).init_with_output)(KEY, x)
    groups = np.asarray(y).reshape(2, 16, 2, 3)
    np.testing.assert_allclose(groups.mean((1, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(groups.var((1, 3)), 1, atol=1e-4)
    with pytest.raises(ValueError, match="6 channels are not divisible by num_groups=4"):
        GroupNorm(4).init(KEY, x)


def test_convolutions_start_uniform_within_one_over_root_fan_in():
    params = jax.jit(Conv(64).init)(KEY, jnp.zeros((1, 4, 4, 16)))["params"]
    bound = (9 * 16) ** -0.5
    for leaf in (params["kernel"], params["bias"]):
        assert 0.8 * bound < float(jnp.abs(leaf).max()) <= bound
    np.testing.assert_allclose(params["kernel"].std(), bound / 3**0.5, rtol=0.05)


def test_upsampling_repeats_pixels():
    x = np.arange(4.0, dtype=np.float32).reshape(1, 2, 2, 1)
    expected = x.repeat(2, 1).repeat(2, 2)
    np.testing.assert_array_equal(upsample_nearest(jnp.asarray(x)), expected)


def test_attention_is_the_textbook_softmax():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, n, 3, 4)).astype(np.float32) for n in (5, 7, 7))
    scores = np.einsum("blnd,bsnd->bnls", q, k) / 2.0
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    expected = np.einsum("bnls,bsnd->blnd", weights, v)
    got = attend(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), "xla")
    np.testing.assert_allclose(got, expected, atol=1e-5)
    with pytest.raises(ValueError, match="unknown attention implementation 'flash'"):
        attend(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), "flash")


def test_qkv_orders_differ_by_a_permutation_of_channels():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 2, 4)), jnp.float32)
    legacy, new = (AttentionBlock(2, legacy_order=flag, num_groups=2) for flag in (True, False))
    params = jax.jit(legacy.init)(KEY, x)["params"]
    params["proj_out"]["kernel"] = jnp.eye(4)
    # Columns of the joint map, [head, (q k v), channel] -> [(q k v), head, channel].
    order = np.arange(12).reshape(2, 3, 2).transpose(1, 0, 2).ravel()
    moved = {"kernel": params["qkv"]["kernel"][:, order], "bias": params["qkv"]["bias"][order]}
    got = new.apply({"params": params | {"qkv": moved}}, x)
    np.testing.assert_allclose(got, legacy.apply({"params": params}, x), atol=1e-6)


@pytest.mark.parametrize("attn_type", ["vanilla", "linear", "none"])
@pytest.mark.parametrize("regularization", ["kl", "none"])
def test_autoencoder_round_trip_has_the_right_shapes(attn_type, regularization):
    module = Autoencoder(
        **SMALL_AUTOENCODER,
        attn_type=attn_type,
        attn_resolutions=(8,),
        regularization=regularization,
        tanh_out=True,
        dropout=0.1,
        embed_dim=3,
    )
    x = jnp.zeros((2, 16, 12, 3))
    variables = jax.eval_shape(module.init, KEY, x)
    moments = jax.eval_shape(lambda v: module.apply(v, x, method="encode"), variables)
    assert moments.shape == (2, 8, 6, 6 if regularization == "kl" else 3)
    out = jax.eval_shape(lambda v: module.apply(v, x), variables)
    assert out.x.shape == x.shape
    assert out.regularization.shape == ()


def test_autoencoder_says_what_it_expected():
    module = Autoencoder(**SMALL_AUTOENCODER)
    with pytest.raises(ValueError, match=r"image of 15×16 must be divisible by f=2"):
        module.init(KEY, jnp.zeros((1, 15, 16, 3)))
    with pytest.raises(ValueError, match="image has 4 channels, expected 3"):
        module.init(KEY, jnp.zeros((1, 16, 16, 4)))
    with pytest.raises(ValueError, match="unknown attn_type 'cubic'"):
        Autoencoder(**SMALL_AUTOENCODER, attn_type="cubic").init(KEY, jnp.zeros((1, 16, 16, 3)))
    with pytest.raises(ValueError, match="regularization='vae'"):
        Autoencoder(regularization="vae").init(KEY, jnp.zeros((1, 16, 16, 3)))


def test_identity_first_stage_changes_nothing():
    x = jax.random.normal(KEY, (1, 4, 4, 3))
    module = Identity()
    moments = module.apply({}, x, method="encode")
    z = module.apply({}, moments, None, method="latents")
    np.testing.assert_array_equal(module.apply({}, z, method="decode"), x)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"transformer_depth": 0, "legacy_qkv_order": False},
        {"use_scale_shift_norm": True, "resblock_updown": True},
        {"remat": "dots_saveable", "dtype": jnp.bfloat16, "dropout": 0.1},
        {"disable_self_attentions": (True, False), "num_head_channels": 4},
        {"vector_projection": True, "num_codes": 5},
    ],
    ids=lambda fields: "+".join(fields) or "default",
)
def test_every_unet_option_builds_and_keeps_the_latent_size(fields):
    unet = UNet(**(SMALL_UNET | fields))
    width = 5 if fields.get("vector_projection") else 32
    conditioning = Conditioning(
        concat=jnp.zeros((2, 4, 6, 1)), context=jnp.zeros((2, 3, 7)), vector=jnp.zeros((2, width))
    )
    z, t = jnp.zeros((2, 4, 6, 2)), jnp.zeros(2)
    variables = jax.eval_shape(unet.init, KEY, z, t, conditioning)
    out = jax.eval_shape(
        lambda v: unet.apply(v, z, t, conditioning, True, rngs={"dropout": KEY}), variables
    )
    assert out.shape == (2, 4, 6, fields.get("num_codes", 2))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))


def test_every_residual_block_drops_in_training_alone():
    unet = UNet(**SMALL_UNET, resblock_updown=True, dropout=0.5)
    conditioning = Conditioning(context=jnp.zeros((1, 3, 7)))
    given = (jnp.zeros((1, 4, 4, 2)), jnp.zeros(1), conditioning)
    variables = jax.eval_shape(unet.init, KEY, *given)
    idle = {}

    def watched(call, args, kwargs, context):
        if isinstance(context.module, nn.Dropout):
            idle["/".join(context.module.path[:-1])] = kwargs["deterministic"]
        return call(*args, **kwargs)

    leaves = flatten_dict(variables["params"], sep="/")
    blocks = {path.split("/in_layers_0")[0] for path in leaves if "/in_layers_0/" in path}
    for train in (True, False):

        def applied(v, train=train):
            return unet.apply(v, *given, train, rngs={"dropout": KEY})

        with nn.intercept_methods(watched):
            jax.eval_shape(applied, variables)
        assert idle == dict.fromkeys(blocks, not train) and len(blocks) == 10


def test_features_of_every_skip_and_of_the_middle_reach_the_prediction():
    unet, z_t, t = UNet(**SMALL_UNET), jnp.ones((1, 8, 8, 2)), jnp.zeros(1)
    context = jnp.ones((1, 3, 4))
    params = unet.init(KEY, z_t, t, Conditioning(context=context))
    params = jax.tree.map(lambda x: x + 0.1, params)  # a fresh one predicts zero

    def predicted(**features):
        return unet.apply(params, z_t, t, Conditioning(context=context, **features))

    # Two levels of one block: the convolution, a block, the smaller picture, a block; the middle.
    widths, sides = (8, 8, 8, 16, 16), (8, 8, 4, 4, 4)
    shapes = [(1, side, side, width) for side, width in zip(sides, widths, strict=True)]
    seen = [predicted()]
    for place in range(1, len(shapes)):
        features = [jnp.full(s, float(i == place)) for i, s in enumerate(shapes)]
        seen.append(predicted(features=tuple(features)))
    differences = [jnp.abs(a - b).max() for i, a in enumerate(seen) for b in seen[:i]]
    assert min(map(float, differences)) > 1e-4


def test_a_fresh_unet_predicts_zero():
    unet = UNet(**SMALL_UNET)
    args = (jnp.ones((1, 4, 4, 2)), jnp.ones(1), Conditioning(context=jnp.ones((1, 3, 7))))
    out, _ = jax.jit(unet.init_with_output)(KEY, *args)
    np.testing.assert_array_equal(out, jnp.zeros_like(out))


def test_odd_sides_lose_a_row_before_the_convolution_that_follows():
    """Golden numbers of code that equals diffusers' (parity/test_sdxl.py, odd sides)."""
    unet = UNet(**SMALL_UNET)
    z = jnp.cos(jnp.arange(30.0)).reshape(1, 5, 3, 2)
    params = jax.eval_shape(unet.init, KEY, z, jnp.ones(1))
    waves = jax.tree.map(lambda x: jnp.cos(jnp.arange(1.0 * x.size)).reshape(x.shape), params)
    out = jax.jit(unet.apply)(waves, z, jnp.ones(1))
    assert out.shape == z.shape
    np.testing.assert_allclose(out[0, -1, :, 0], [-0.80484, 5.35572, -3.05949], atol=2e-4)
    np.testing.assert_allclose(out[0, :2, -1, 0], [-1.78186, 6.88684], atol=2e-4)


def test_unet_says_what_it_expected():
    pooled = UNet(**SMALL_UNET, resblock_updown=True)
    with pytest.raises(ValueError, match=r"latent of 5×4 must be divisible by 2"):
        pooled.init(KEY, jnp.zeros((1, 5, 4, 2)), jnp.zeros(1))
    unet = UNet(**SMALL_UNET)
    with pytest.raises(ValueError, match="vector has width 3, the timestep embedding 32"):
        unet.init(
            KEY, jnp.zeros((1, 4, 4, 2)), jnp.zeros(1), Conditioning(vector=jnp.zeros((1, 3)))
        )
    with pytest.raises(ValueError, match="concat is 2×4, the latent 4×4"):
        beside = Conditioning(concat=jnp.zeros((1, 2, 4, 3)))
        unet.init(KEY, jnp.zeros((1, 4, 4, 2)), jnp.zeros(1), beside)
    with pytest.raises(ValueError, match="cannot be split into heads"):
        UNet(**(SMALL_UNET | {"num_heads": 3})).init(
            KEY, jnp.zeros((1, 4, 4, 2)), jnp.zeros(1), Conditioning(context=jnp.zeros((1, 2, 3)))
        )
