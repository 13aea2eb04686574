"""First stages with a codebook: as a model, as a frozen stage, and in training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import make_batch, make_config

from latent_diffusion.core.rng import init_key
from latent_diffusion.generation.model import Model
from latent_diffusion.models.first_stage import FirstStage, make_autoencoder
from latent_diffusion.runtime import parallel
from latent_diffusion.tasks import TASKS
from latent_diffusion.training.batch_spec import batch_spec

CODES = 16
SMALL = {"channels": 4, "channel_mult": (1, 1), "num_res_blocks": 1, "num_groups": 2}
SMALL |= {"z_channels": 3, "embed_dim": 3, "attn_type": "none", "num_codes": CODES}


def _images(seed=0, size=8):
    return jax.random.uniform(jax.random.key(seed), (2, size, size, 3), minval=-1, maxval=1)


def _frozen(regularization, **fields):
    module = make_autoencoder(SMALL | {"regularization": regularization} | fields)
    init = jax.jit(lambda rng: module.init(rng, _images())["params"])
    params = init(init_key(0))
    # Codes as far apart as the latents are, so that quantising changes them.
    if "quantize" in params:
        params["quantize"]["embedding"] = jax.random.normal(jax.random.key(1), (CODES, 3))
    return FirstStage(params, jnp.asarray(0.5), jnp.asarray(0.1), module)


@pytest.mark.parametrize("regularization", ["vq", "gumbel"])
def test_indices_there_and_back_are_the_reconstruction(regularization):
    model, x = Model(first_stage=_frozen(regularization)), _images()
    indices = model.encode_to_indices(x)
    assert indices.shape == (2, 4, 4) and indices.dtype == jnp.int32
    assert int(indices.min()) >= 0 and int(indices.max()) < CODES
    assert len(np.unique(indices)) > 1
    decoded = model.decode_indices(indices)
    np.testing.assert_allclose(decoded, model.decode(model.encode(x)), atol=1e-5)
    reconstruct = jax.jit(model.first_stage.module.apply)
    np.testing.assert_allclose(
        decoded, reconstruct({"params": model.first_stage.params}, x).x, atol=1e-5
    )


def test_latents_stay_continuous_and_are_quantised_after_unscaling():
    """VQ-reg (paper §3.1): the decoder absorbs the quantisation."""
    first_stage, x = _frozen("vq"), _images()
    z = first_stage.encode({"image": x})
    unscaled = z / 0.5 + 0.1
    codes = first_stage.params["quantize"]["embedding"]
    nearest = jnp.argmin(jnp.sum((unscaled[..., None, :] - codes) ** 2, -1), -1)
    assert float(jnp.abs(unscaled - codes[nearest]).max()) > 0.1

    def decode_codes(z):
        return first_stage.module.apply({"params": first_stage.params}, z, method="decode_codes")

    np.testing.assert_allclose(first_stage.decode(z), decode_codes(codes[nearest]), atol=1e-5)
    np.testing.assert_allclose(first_stage.nearest(z), 0.5 * (codes[nearest] - 0.1), atol=1e-5)


def test_no_codebook_no_indices():
    module = make_autoencoder(SMALL | {"regularization": "kl"})
    params = jax.eval_shape(module.init, jax.random.key(0), _images())["params"]
    model = Model(first_stage=FirstStage(params, jnp.ones(()), jnp.zeros(()), module))
    with pytest.raises(ValueError, match="regularization='kl' has no codebook"):
        jax.eval_shape(model.encode_to_indices, _images())


def test_images_of_another_range_or_with_other_channels_are_refused():
    model, x = Model(first_stage=_frozen("vq")), _images()
    bytes_of = ((x + 1) * 127.5).astype(jnp.uint8)
    for call in (model.encode, model.encode_to_indices):
        with pytest.raises(ValueError, match=r"dtype uint8, expected floats in \[-1, 1\]"):
            call(bytes_of)
        with pytest.raises(ValueError, match=r"values up to 25\d.*, expected \[-1, 1\]"):
            call(bytes_of.astype(jnp.float32))
        with pytest.raises(ValueError, match="image has 4 channels, expected 3"):
            call(jnp.zeros((1, 8, 8, 4)))


@pytest.mark.parametrize("mode", ["odd", "tiled"])
def test_large_and_odd_images_go_through_the_model(mode):
    """Odd sides are padded and cropped; tiles of a model without norms' reach agree inside."""
    model = Model(first_stage=_frozen("vq"))
    if mode == "odd":
        x = _images(size=8)[:, :7, :5]
        out = model.decode(model.encode(x), size=(7, 5))
        whole = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)), mode="edge")
        np.testing.assert_array_equal(out, model.decode(model.encode(whole))[:, :7, :5])
        return
    x = _images(size=32)
    z = model.encode(x, tile_size=32)
    np.testing.assert_allclose(z, model.encode(x), atol=1e-5)  # one tile is the whole
    tiles = model.encode(x, tile_size=16, tile_overlap=8)
    assert tiles.shape == z.shape
    assert np.corrcoef(tiles.ravel(), z.ravel())[0, 1] > 0.9  # norms see a tile, not the whole
    out = model.decode(z, tile_size=16, tile_overlap=8)
    assert out.shape == x.shape
    # A quarter of a tile is cut to whole positions of the latent.
    np.testing.assert_array_equal(
        model.encode(x, tile_size=12), model.encode(x, tile_size=12, tile_overlap=2)
    )
    few = model.encode(x, tile_size=16, tile_overlap=0), model.decode(z, tile_size=16)
    for one, other in ((tiles, z), (tiles, few[0]), (out, model.decode(z)), (out, few[1])):
        assert np.abs(one - other).max() > 1e-5
    with pytest.raises(ValueError, match="tile size 15 and overlap 8 must be multiples of f=2"):
        model.decode(z, tile_size=15, tile_overlap=8)
    for call, given in ((model.encode, x), (model.decode, z)):
        with pytest.raises(ValueError, match="tile_overlap=8 needs tile_size: give both"):
            call(given, tile_overlap=8)


def test_latents_are_drawn_with_a_key_and_likeliest_without():
    model, x = Model(first_stage=_frozen("kl")), _images()
    drawn = [model.encode(x, rng) for rng in (None, jax.random.key(1), jax.random.key(2))]
    for one, other in ((0, 1), (1, 2)):
        assert np.abs(drawn[one] - drawn[other]).max() > 1e-4


def _train(steps, mode="single", **fields):
    """The first state, and state and metrics after every step."""
    fields = {f"autoencoder.{k}": v for k, v in SMALL.items() if k != "channel_mult"} | fields
    config = make_config("autoencoding", **fields)
    task = TASKS["autoencoding"](config)
    init = jax.jit(lambda rng: task.init(rng, batch_spec(config)))
    state, constants = init(init_key(0))
    first, batch = state, make_batch(config)
    step = parallel.compile_step(task.train_step, mode, donate_state=False)
    state = parallel.place(state, mode)
    history = []
    for _ in range(steps):
        state, metrics = step(state, constants, batch, jax.random.key(7))
        history.append((jax.tree.map(np.asarray, state), jax.tree.map(float, metrics)))
    return first, history


AVERAGED = {
    "autoencoder.regularization": "vq",
    "autoencoder.codebook_ema_decay": 0.8,
    "autoencoder.codebook_restart_below": 0.1,
    "autoencoding.reduction": "mean",
    "autoencoding.reg_weight": 1.0,
}


def test_an_averaged_codebook_stays_in_use_and_is_the_same_on_eight_devices():
    first, history = _train(25, **AVERAGED)
    state, metrics = history[-1]
    assert metrics["codebook_usage"] >= CODES / 2
    assert metrics["perplexity"] > CODES / 4
    codes = state.params["autoencoder"]["quantize"]["embedding"]
    np.testing.assert_array_equal(codes, state.codebook["quantize"]["embedding"])
    assert (codes != first.params["autoencoder"]["quantize"]["embedding"]).any()
    _, [*_, (many, many_metrics)] = _train(3, "pmap", **AVERAGED)
    one, one_metrics = history[2]
    for want, got in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-4 * max(1.0, float(np.abs(want).max())))
    assert one_metrics["codebook_usage"] == many_metrics["codebook_usage"]


def test_a_frozen_codebook_and_a_fixed_logvar_stay_bitwise():
    """Neither the averages of codes nor weight decay move them."""
    fields = {"optimizer.frozen": ("quantize",), "optimizer.name": "adamw"}
    fields |= {"autoencoding.learn_logvar": False, "autoencoding.logvar_init": 2.0}
    first, [_, (state, _)] = _train(2, **AVERAGED, **fields)
    before, after = (x.params["autoencoder"] for x in (first, state))
    np.testing.assert_array_equal(after["quantize"]["embedding"], before["quantize"]["embedding"])
    assert state.params["logvar"] == 2.0
    assert np.any(after["quant_conv"]["kernel"] != before["quant_conv"]["kernel"])


def test_estimates_become_codes_that_decode_alike():
    """On the unit sphere they replace the direction alone; Gumbel latents aren't codes."""
    for fields in ({}, {"codebook_l2": True}):
        first_stage = _frozen("vq", **fields)
        z = 2 * first_stage.encode({"image": _images()})
        nearest = first_stage.nearest(z)
        assert float(jnp.abs(nearest - z).max()) > 0.05
        np.testing.assert_allclose(first_stage.decode(nearest), first_stage.decode(z), atol=1e-5)
        if fields:
            lengths = [jnp.linalg.norm(x / 0.5 + 0.1, axis=-1) for x in (nearest, z)]
            np.testing.assert_allclose(*lengths, rtol=1e-4)
    with pytest.raises(ValueError, match="whose latents are codes"):
        _frozen("gumbel").nearest(z)


def test_gumbel_trains_and_cools_by_equal_factors():
    fields = {"autoencoder.regularization": "gumbel", "autoencoding.gumbel_temperature": (1.0, 0.1)}
    first, [_, (state, metrics)] = _train(2, **fields)
    moved = state.params["autoencoder"]["quantize"]["embedding"]
    assert (moved != first.params["autoencoder"]["quantize"]["embedding"]).any()
    assert np.isfinite(list(metrics.values())).all()
    config = make_config("autoencoding", **fields, num_steps=5)
    task = TASKS["autoencoding"](config)
    at = [float(task._temperature(jnp.asarray(step))) for step in (0, 2, 4, 9)]
    np.testing.assert_allclose(at, [1.0, 0.1**0.5, 0.1, 0.1], rtol=1e-6)


ALWAYS = {"loss", "l1", "lpips", "rec_loss", "nll_loss", "reg_loss", "logvar", "grad_norm"}
ALWAYS |= {"g_loss", "disc_loss", "d_weight", "disc_factor", "adversarial_factor"}
ALWAYS |= {"logits_real", "logits_fake"}
ALWAYS |= {"latent_std", "latent_std_0", "latent_std_1"}  # embed_dim = 2


@pytest.mark.parametrize(
    ("regularization", "own"),
    [
        ("kl", {"posterior_mean", "posterior_mean_abs", "posterior_std"}),
        ("vq", {"perplexity", "codebook_usage"}),
        ("gumbel", {"perplexity", "codebook_usage"}),
        ("none", set()),
    ],
)
def test_what_training_logs(regularization, own):
    fields = {"autoencoder.regularization": regularization, "autoencoding.perceptual": "alex"}
    config = make_config("autoencoding", **fields, **{"data.image_size": 32})
    task = TASKS["autoencoding"](config)
    state, constants = jax.eval_shape(task.init, jax.random.key(0), batch_spec(config))
    batch = {"image": jax.ShapeDtypeStruct((8, 32, 32, 3), jnp.float32)}
    _, metrics = jax.eval_shape(task.train_step, state, constants, batch, jax.random.key(0))
    assert set(metrics) == ALWAYS | own
    assert all(value.shape == () for value in metrics.values())


def test_conditional_discriminator_sees_the_condition():
    config = make_config("autoencoding", **{"autoencoding.disc_condition": "mask"})
    task, spec = TASKS["autoencoding"](config), batch_spec(config)
    assert spec["mask"].shape[-1] == 1
    state, constants = jax.eval_shape(task.init, jax.random.key(0), spec)
    assert state.disc_params["conv_in"]["kernel"].shape[2] == 3 + 1
    batch = make_batch(config) | {"mask": np.ones(spec["mask"].shape, np.float32)}
    jax.eval_shape(task.train_step, state, constants, batch, jax.random.key(0))
    with pytest.raises(ValueError, match=r"disc_condition='mask' must be .*; the batch has image "):
        pictures = {"image": batch["image"]}
        jax.eval_shape(task.train_step, state, constants, pictures, jax.random.key(0))
    config.autoencoding.disc_condition = "segmentation"  # has no channels
    task, spec = TASKS["autoencoding"](config), batch_spec(config)
    with pytest.raises(ValueError, match=r"'segmentation' must be .*, segmentation \[1, 16, 16\]"):
        jax.eval_shape(task.init, jax.random.key(0), spec)
