"""Previews: a tiny autoencoder learns a frozen first stage's latents; its files, its errors."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from test_start import begin, few
from tiny import make_batch

import latent_diffusion as ldm
from latent_diffusion import convert
from latent_diffusion.convert.bundle import Bundle, as_part
from latent_diffusion.core.rng import example_keys, init_key
from latent_diffusion.models.first_stage import own_fields
from latent_diffusion.runtime.checkpoint import Checkpointer
from latent_diffusion.tasks import TASKS
from latent_diffusion.training import init_from, start

RNG = jax.random.key(3)
SCALE, SHIFT = np.float32([0.5, 2.0]), np.float32([0.25, -1.0])


def preview(path="", **fields):
    """A tiny autoencoder of the first stage of `tiny.make_config`."""
    config = few("autoencoding", **{"data.image_size": 8, "autoencoding.reg_weight": 0.5})
    config.first_stage.update({"path": str(path), "autoencoder": config.autoencoder})
    config.autoencoder = ConfigDict(
        {"regularization": "tiny", "channels": 4, "encoder_blocks": (1, 0), "embed_dim": 2,
         "decoder_blocks": (1, 0), "image_channels": 3, "dtype": None}
    )  # fmt: skip
    config.log.images_every_steps = 0
    config.update_from_flattened_dict(fields)
    return config


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    """A first stage with the scale of its latents, as a bundle and as a path."""
    config = few("autoencoding", **{"data.image_size": 8})
    task = TASKS["autoencoding"](config)
    params = task.autoencoder.init(init_key(1), jnp.zeros((1, 8, 8, 3)))["params"]
    part = as_part(config.autoencoder.to_dict(), params)
    bundle = Bundle(autoencoder=part, scale_factor=SCALE, shift=SHIFT, image_size=8)
    path = tmp_path_factory.mktemp("preview") / "first_stage"
    convert.write(bundle, path, "orbax")
    return bundle, path


def test_both_halves_learn_the_latents_of_the_frozen_first_stage(frozen):
    config = preview(**{"autoencoding.adversarial_start": 9})
    task = TASKS["autoencoding"](config)
    batch = {"image": jnp.asarray(make_batch(config)["image"][:, :8, :8])}
    state, constants = task.init(init_key(0), batch)
    first_stage = constants.first_stage.replace(scale_factor=SCALE, shift=SHIFT)
    constants = constants.replace(first_stage=first_stage)
    x, count = batch["image"], len(batch["image"])
    z = first_stage.encode(batch, example_keys(jax.random.fold_in(RNG, 0), count))

    def total(params):
        halves = {"params": params["autoencoder"]}
        x_rec = task.autoencoder.apply(halves, z, method="decode")
        own = task.autoencoder.apply(halves, x, method="encode")
        nll = jnp.sum(jnp.abs(x - x_rec) / jnp.exp(params["logvar"]) + params["logvar"]) / count
        return nll + 0.5 * jnp.sum((own - z) ** 2) / count

    want = jax.jit(jax.grad(total))(state.params)
    after, metrics = jax.jit(task.train_step)(state, constants, batch, RNG)
    np.testing.assert_allclose(metrics["loss"], total(state.params), rtol=1e-5)
    # Adam's first moment after one step is (1 - b1) times the gradient.
    got = jax.tree.map(lambda mu: mu / (1 - config.optimizer.b1), after.opt_state[0].mu)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(want))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * largest), got, want)
    shown = task.show(state, constants, batch, RNG)["reconstructions"]
    mode = {"params": state.ema_params["autoencoder"]}
    decoded = task.autoencoder.apply(mode, first_stage.encode(batch), method="decode")
    np.testing.assert_allclose(shown, decoded, atol=1e-6)
    assert task.autoencoder.last_layer == max(
        state.params["autoencoder"]["decoder"], key=lambda name: int(name.split("_")[1])
    )


def test_a_run_keeps_the_first_stage_and_its_model_is_written_as_taesd(frozen, tmp_path):
    bundle, path = frozen
    config, run = preview(path), tmp_path / "run"
    begin(config, run)
    moved = path.rename(tmp_path / "moved")  # the run goes on without it
    try:
        with Checkpointer(run / "checkpoints") as checkpoints:
            goes_on = start.start(start.resolve(config, run), run, checkpoints)
    finally:
        moved.rename(path)
    kept = goes_on.constants.first_stage
    jax.tree.map(np.testing.assert_array_equal, kept.params, convert.as_params(bundle.autoencoder))
    np.testing.assert_array_equal((kept.scale_factor, kept.shift), (SCALE, SHIFT))

    tiny = ldm.load(run)
    z_0 = jnp.asarray(np.random.default_rng(2).normal(size=(1, 4, 4, 2)), jnp.float32)
    pictures = tiny.decode(z_0)
    params = {"params": goes_on.state.ema_params["autoencoder"]}
    direct = TASKS["autoencoding"](config).autoencoder.apply(params, z_0, method="decode")
    np.testing.assert_allclose(pictures, direct, atol=1e-6)
    # The model of the first stage decodes its scaled latents by it, too.
    fast = ldm.load(path).replace(first_stage=tiny.first_stage)
    np.testing.assert_array_equal(fast.decode(z_0), pictures)
    tiny.save(tmp_path / "taesd_encoder.safetensors", format="compvis")
    tiny.save(tmp_path / "folder", format="diffusers")
    for file in ("taesd_decoder.safetensors", "folder"):
        np.testing.assert_array_equal(ldm.load(tmp_path / file).decode(z_0), pictures)
    # Other runs start from it, of a preview or of a denoiser of its latents.
    for config in (
        preview(path, init_from=str(run), **{"autoencoder.encoder_blocks": (2, 2)}),
        few("denoising", **{"first_stage.path": str(run)}),
    ):
        resolved = start.resolve(config, tmp_path / "new")
        module = TASKS[config.task](resolved).autoencoder
        assert (module.regularization, module.encoder_blocks) == ("tiny", (1, 0))
        fields = own_fields(resolved.autoencoder.to_dict())
        assert tuple(fields["encoder_blocks"]) == (1, 0) and "channel_mult" not in fields
    with pytest.raises(ValueError, match=r"must have encoder or decoder in its name"):
        tiny.save(tmp_path / "taesd.safetensors", format="compvis")


def test_a_tiny_autoencoder_is_a_first_stage_and_a_start_of_others(frozen, tmp_path):
    """Its blocks are fields that the sections of other autoencoders lack."""
    _, path = frozen
    begin(preview(path), tmp_path / "run")
    resolved = start.resolve(preview(path, init_from=str(tmp_path / "run")), tmp_path / "again")
    assert tuple(resolved.autoencoder.encoder_blocks) == (1, 0)
    task = TASKS["autoencoding"](resolved)
    batch = {"image": jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)}
    shapes, _ = jax.eval_shape(task.init, RNG, batch)
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    state = init_from.start_from(resolved, state, init_from.read(resolved))
    kept = ldm.load(tmp_path / "run").first_stage
    jax.tree.map(np.testing.assert_array_equal, state.params["autoencoder"], kept.params)

    config = few("denoising", **{"data.image_size": 8, "first_stage.path": str(tmp_path / "run")})
    on_top = start.resolve(config, tmp_path / "denoiser")
    assert TASKS["denoising"](on_top).autoencoder == kept.module
    with pytest.raises(ValueError, match=r"holds autoencoder.regularization='kl', from which 'tin"):
        start.resolve(preview(path, init_from=str(path)), tmp_path / "other")
    adapted = preview(path, **{"init_from": str(tmp_path / "run"), "lora.rank": 2})
    with pytest.raises(
        ValueError, match=r"^lora\.rank, control .* are for denoisers, not for task"
    ):
        start.resolve(adapted, tmp_path / "other")


def test_a_first_stage_that_does_not_fit_is_one_line(frozen, tmp_path, monkeypatch):
    bundle, path = frozen

    def refused(config=None):
        with pytest.raises(ValueError) as error:
            start.resolve(preview(path) if config is None else config, tmp_path / "new")
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "learns the latents of a trained model: name it by first_stage.path" in refused(
        preview()
    )
    deeper = {"autoencoder.encoder_blocks": (1, 0, 0), "autoencoder.decoder_blocks": (0, 0, 0)}
    assert "has downsampling 2, the preview has 4" in refused(preview(path, **deeper))
    wider = preview(path, **{"autoencoder.embed_dim": 3})
    assert "has latent_channels 2, the preview has 3" in refused(wider)
    tiny = replace(bundle.autoencoder, fields={"regularization": "tiny"})
    for changed, message in (
        (replace(bundle, autoencoder=None), "holds no first stage that a preview"),
        (replace(bundle, autoencoder=tiny), "holds no first stage that a preview"),
        (replace(bundle, scale_factor=1.0, shift=0.0), "doesn't know the scale of its latents"),
    ):
        monkeypatch.setattr(convert, "read", lambda path, changed=changed: changed)
        assert message in refused()
