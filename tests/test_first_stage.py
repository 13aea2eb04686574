"""The frozen first stage and its latent scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion.core.rng import normal_per_example
from latent_diffusion.core.trees import check_same_tree
from latent_diffusion.models.first_stage import (
    NORMALIZATIONS,
    FirstStage,
    init_first_stage,
    latent_sums,
    make_autoencoder,
    with_measured_scale,
)
from latent_diffusion.nets.autoencoder import Identity
from latent_diffusion.runtime import parallel
from latent_diffusion.tasks import autoencoding


def _pixels(seed):
    rng = np.random.default_rng(seed)
    spread = np.array([0.1, 0.5, 2.0], np.float32)
    return jnp.asarray(spread * rng.normal(size=(8, 4, 4, 3)).astype(np.float32) + 3 * spread)


def _measured(normalization):
    plain = FirstStage({}, jnp.ones(()), jnp.zeros(()), Identity())
    batches = [{"image": _pixels(seed)} for seed in range(4)]
    sums = [latent_sums({}, plain, batch, jax.random.key(0))[1] for batch in batches]
    z = jnp.concatenate([batch["image"] for batch in batches])
    return with_measured_scale(plain, sums, normalization), z


def test_scalar_scale_is_one_over_the_standard_deviation_of_everything():
    first_stage, z = _measured("scalar")
    np.testing.assert_allclose(first_stage.scale_factor, 1 / np.std(z), rtol=1e-5)
    assert float(first_stage.shift) == 0.0  # the paper doesn't centre


def test_the_scale_is_measured_on_all_devices():
    plain = FirstStage({}, jnp.ones(()), jnp.zeros(()), Identity())
    batch = {"image": np.asarray(_pixels(0))}
    step = parallel.compile_step(latent_sums, "pmap", donate_state=False)
    _, many = step({}, plain, batch, jax.random.key(0))
    _, one = latent_sums({}, plain, jax.tree.map(jnp.asarray, batch), jax.random.key(0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), many, one)


def test_channel_scale_gives_every_channel_mean_0_and_variance_1():
    first_stage, z = _measured("channel")
    scaled = np.asarray(first_stage.encode({"image": z}))
    np.testing.assert_allclose(scaled.mean((0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(scaled.std((0, 1, 2)), 1, atol=1e-4)


class Blurred(Identity):
    """Pixels whose posterior has variance 4."""

    def latents(self, moments, keys=None):
        noise = 0 if keys is None else 2 * normal_per_example(keys, moments.shape[1:])
        return moments + noise


def test_the_scale_is_that_of_drawn_latents():
    plain = FirstStage({}, jnp.ones(()), jnp.zeros(()), Blurred())
    batch = {"image": jnp.zeros((8, 16, 16, 3))}
    sums = [latent_sums({}, plain, batch, jax.random.key(0))[1]]
    measured = with_measured_scale(plain, sums, "scalar")
    np.testing.assert_allclose(measured.scale_factor, 0.5, rtol=0.05)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_decode_undoes_the_scale(normalization):
    first_stage, z = _measured(normalization)
    np.testing.assert_allclose(first_stage.decode(first_stage.encode({"image": z})), z, atol=1e-4)


def test_weights_of_another_architecture_are_named():
    want, have = ({"encoder": {"kernel": np.zeros(shape)}} for shape in ((3, 3, 8), (3, 3, 4)))
    message = (
        r"^runs/a holds another architecture: encoder/kernel: expected \(3, 3, 8\), got \(3, 3"
    )
    with pytest.raises(ValueError, match=message):
        check_same_tree(want, have, "runs/a")
    with pytest.raises(ValueError, match=r"encoder/bias: expected nothing, got \(8,\)"):
        check_same_tree(want, {"encoder": {"bias": np.zeros(8), **want["encoder"]}}, "runs/a")


def test_unknown_normalization_is_named():
    with pytest.raises(ValueError, match=r"unknown first_stage\.normalization 'unit'; known: "):
        _measured("unit")


def test_sampled_latents_differ_by_key_and_the_mode_does_not():
    module = make_autoencoder(
        {"regularization": "kl", "channels": 4, "channel_mult": (1,), "num_res_blocks": 1}
        | {"num_groups": 2, "embed_dim": 2, "z_channels": 2, "attn_type": "none"}
    )
    x = _pixels(0)[:2]
    first_stage = jax.jit(lambda rng: init_first_stage(module, rng, x))(jax.random.key(0))
    moments = first_stage.moments(x)
    keys = jax.random.split(jax.random.key(1), 2)
    sampled = first_stage.latents(moments, keys)
    np.testing.assert_array_equal(first_stage.latents(moments), moments[..., :2])
    assert np.abs(sampled - first_stage.latents(moments)).max() > 1e-3
    np.testing.assert_array_equal(first_stage.latents(moments, keys), sampled)


@pytest.mark.parametrize("normalization", ["channel", "scalar"])
def test_a_channel_that_is_constant_has_a_finite_scale(normalization):
    """By rounding its variance may even be negative."""
    mean, spread = np.array([1000.0, 3.0, -1.0]), np.array([-1e-9, 4.0, 0.0])
    sums = [{"mean": mean, "mean_square": mean**2 + spread}]
    stage = with_measured_scale(
        FirstStage({}, jnp.ones(()), jnp.zeros(()), Identity()), sums, normalization
    )
    assert np.isfinite(stage.scale_factor).all() and np.isfinite(stage.shift).all()
    if normalization == "channel":
        np.testing.assert_allclose(stage.scale_factor, [1, 0.5, 1], rtol=1e-6)
    dead = with_measured_scale(stage, [{"mean": mean, "mean_square": mean**2}], "channel")
    np.testing.assert_array_equal(dead.scale_factor, np.ones(3))
    moments = {"latent_mean": jnp.asarray(mean), "latent_mean_square": jnp.asarray(mean**2 - 1)}
    logged = autoencoding._with_latent_std(moments)
    assert all(np.isfinite(x) for x in logged.values()) and logged["latent_std_0"] == 0
