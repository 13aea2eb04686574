"""Training a prior: the codes that it sees, those of its loss, and a run up to its samples."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from PIL import Image
from test_prior_model import numbers
from tiny import BATCH, SIZE, make_batch, make_config

import latent_diffusion as ldm
from configs import openmoji_prior
from latent_diffusion import data
from latent_diffusion.convert.pretrained import read_pretrained
from latent_diffusion.core.rng import init_key
from latent_diffusion.core.trees import leaves_by_path
from latent_diffusion.evaluate import command
from latent_diffusion.evaluate.__main__ import evaluate
from latent_diffusion.evaluate.features import FeatureNet
from latent_diffusion.generation.model import Model
from latent_diffusion.models.first_stage import FirstStage, make_autoencoder
from latent_diffusion.models.prior import Prior
from latent_diffusion.optimisation.optimizers import make_optimizer
from latent_diffusion.runtime import parallel, workdir
from latent_diffusion.tasks import TASKS
from latent_diffusion.tasks.prior import make_prior_training
from latent_diffusion.training import loop, moments, start
from latent_diffusion.training.batch_spec import batch_spec

RNG = jax.random.key(3)
LENGTH, CODES = 64, 16


@functools.cache
def setup(*fields):
    """The task with random parameters (averages differ), constants and a batch."""
    config = make_config("prior", **dict(fields))
    task = make_prior_training(config)
    rng = np.random.default_rng(0)
    state, constants = jax.eval_shape(task.init, jax.random.key(0), batch_spec(config))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state)
    params, averages, constants = (
        jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype), tree)
        for tree in (state.params, state.params, constants)
    )
    codes = rng.integers(0, CODES, (BATCH, 8, 8)).astype(np.int32)
    batch = {key: jnp.asarray(x) for key, x in {**make_batch(config), "codes": codes}.items()}
    return (
        task,
        zeros.replace(params=params, ema_params=averages),
        constants,
        {**batch, "codes": codes},
    )


def bits_of(logits, codes):
    logits = np.asarray(logits, np.float64)
    return np.asarray(optax.softmax_cross_entropy_with_integer_labels(logits, codes)) / np.log(2)


def test_a_causal_prior_is_evaluated_by_the_likelihood_of_the_averaged_parameters():
    task, state, constants, batch = setup(("prior.pkeep", 0.5), ("prior.label_smoothing", 0.2))
    got = jax.jit(task.eval_step)(state, constants, batch, RNG)
    prior = task.prior.replace(params=state.ema_params)
    codes = jnp.asarray(batch["codes"].reshape(BATCH, -1))
    logits = prior.logits(codes, prior.condition(batch, jnp.zeros(BATCH, bool)))
    np.testing.assert_allclose(got["bits_per_code"], bits_of(logits, codes).mean(1), rtol=1e-4)
    np.testing.assert_allclose(got["loss"], got["bits_per_code"] * np.log(2), rtol=1e-5)


def test_training_smooths_labels_and_logs_bits_without():
    fields = [("transformer.dropout", 0.0), ("prior.drop_rate", 0.0)]
    plain, smooth = setup(*fields), setup(*fields, ("prior.label_smoothing", 0.25))
    task, state, constants, batch = plain
    state = state.replace(step=jnp.asarray(1000, jnp.int32))  # the average is warm
    (after, a), (_, b) = (
        jax.jit(made[0].train_step)(state, constants, batch, RNG) for made in (plain, smooth)
    )
    assert float(a["bits_per_code"]) == pytest.approx(float(b["bits_per_code"]), rel=1e-5)
    assert float(a["loss"]) == pytest.approx(float(a["bits_per_code"]) * np.log(2), rel=1e-5)
    prior, codes = task.prior.replace(params=state.params), batch["codes"].reshape(BATCH, -1)
    logits = prior.logits(jnp.asarray(codes), prior.condition(batch, jnp.zeros(BATCH, bool)))
    every = np.mean([bits_of(logits, np.full_like(codes, code)) for code in range(CODES)])
    want = (0.75 * bits_of(logits, codes).mean() + 0.25 * every) * np.log(2)
    assert float(b["loss"]) == pytest.approx(want, rel=1e-5)
    assert float(b["loss"]) != pytest.approx(float(a["loss"]), rel=1e-4)
    assert float(a["perplexity"]) == pytest.approx(2 ** float(a["bits_per_code"]), rel=1e-5)
    head = [x["transformer"]["head"]["kernel"] for x in (state.ema_params, after.params)]
    average = after.ema_params["transformer"]["head"]["kernel"]
    np.testing.assert_allclose(average, 0.9 * head[0] + 0.1 * head[1], atol=1e-6)


def test_the_pictures_of_a_run_are_guided_samples_of_the_averaged_prior(monkeypatch):
    task, state, constants, batch = setup()
    seen = []

    def sample(prior, keys, conditioning, null, *given):
        seen.extend([prior.params["transformer"], conditioning.tokens, null.tokens])
        return jnp.zeros((BATCH, 8, 8), jnp.int32)

    monkeypatch.setattr(Prior, "sample", sample)
    monkeypatch.setattr(FirstStage, "decode_indices", lambda self, indices: indices)
    task.show(state, constants, batch, RNG)
    params, tokens, null = seen
    jax.tree.map(np.testing.assert_array_equal, params, state.ema_params["transformer"])
    np.testing.assert_array_equal(tokens[:, 0], CODES + batch["class_label"])
    assert (null == 25).all()  # the null token of the smoke variant


@pytest.mark.parametrize("pkeep", [1.0, 0.7, 0.0])
def test_so_many_codes_are_kept_and_all_are_asked_for(pkeep):
    task, *_ = setup(("prior.pkeep", pkeep))
    keys = jax.random.split(RNG, 50)
    codes = jnp.zeros((50, LENGTH), jnp.int32)
    seen, asked = task._inputs(codes, keys, True)
    assert asked.all() and int(seen.max()) < CODES
    share = float(jnp.mean(seen == 0))
    assert share == pytest.approx(pkeep + (1 - pkeep) / CODES, abs=0.03)
    assert (task._inputs(codes, keys, False)[0] == 0).all()


def counts(least, train, number=4000):
    """How many of 64 codes are masked, in so many draws."""
    task, *_ = setup(("transformer.causal", False), ("prior.min_masked", least))
    codes = jnp.arange(LENGTH)[None].repeat(number, 0) % CODES
    seen, asked = jax.jit(task._inputs, static_argnums=2)(
        codes, jax.random.split(RNG, number), train
    )
    mask = task.prior.transformer.mask_token
    np.testing.assert_array_equal(seen, jnp.where(asked, mask, codes))
    return np.asarray(asked.sum(1))


def test_training_masks_a_cosine_share_and_evaluation_every_number_alike():
    masked = counts(0.0, train=True)
    assert masked.min() >= 1 and masked.max() == LENGTH
    # P(share ≥ cos(π/2 · u)) = u: half of the draws lie below cos(π/4).
    assert np.mean(masked <= np.ceil(LENGTH * 0.5**0.5)) == pytest.approx(0.5, abs=0.04)
    assert counts(0.5, train=True).min() == 32
    even = np.bincount(counts(0.5, train=False, number=12_800), minlength=65)
    assert even[0] == 0 and even[1:].min() > 130 and even[1:].max() < 270  # 200 each


def test_a_masked_prior_is_asked_for_masked_codes_alone():
    task, state, constants, batch = setup(("transformer.causal", False))
    got = jax.jit(task.eval_step)(state, constants, batch, RNG)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(RNG, jnp.arange(BATCH))
    k_seen = jax.vmap(lambda key: jax.random.split(key, 3)[0])(keys)
    codes = jnp.asarray(batch["codes"].reshape(BATCH, -1))
    seen, asked = task._inputs(codes, k_seen, False)
    prior = task.prior.replace(params=state.ema_params)
    bits = bits_of(prior.logits(seen, prior.condition(batch, jnp.zeros(BATCH, bool))), codes)
    want = [bits[i][np.asarray(asked[i])].mean() for i in range(BATCH)]
    np.testing.assert_allclose(got["bits_per_code"], want, rtol=1e-4)


def test_codes_are_those_of_the_frozen_first_stage_and_the_loss_falls():
    config = make_config("prior", **{"optimizer.learning_rate": 1e-2})
    task = TASKS["prior"](config)
    init = jax.jit(lambda rng: task.init(rng, batch_spec(config)))
    state, constants = init(init_key(0))
    batch, step, losses = make_batch(config), jax.jit(task.train_step), []
    pictures = {"image": jnp.asarray(batch["image"])}
    cached = {**batch, "codes": constants.first_stage.indices(pictures)}
    _, a = step(state, constants, batch, RNG)
    _, b = step(state, constants, cached, RNG)
    assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-5)
    for _ in range(10):
        state, metrics = step(state, constants, cached, RNG)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.9 * losses[0]
    assert set(state.params) == {"transformer", "conditioner"}


def test_a_masked_prior_takes_the_same_steps_on_many_devices():
    fields = {"transformer.causal": False, "transformer.dropout": 0.0}
    fields |= {"optimizer.eps": 1e-2, "optimizer.learning_rate": 1e-3}
    task, first, constants, batch = setup(*fields.items())
    batch = {key: np.asarray(batch[key]) for key in ("codes", "class_label")}  # and no picture

    def run(mode, mesh=None, rules=()):
        step = parallel.compile_step(task.train_step, mode, mesh=mesh, rules=rules)
        state = parallel.place(jax.tree.map(np.asarray, first), mode, mesh, rules)
        for _ in range(3):
            state, _ = step(state, constants, batch, RNG)
        return leaves_by_path(jax.tree.map(np.asarray, state.params))

    want, before = run("single"), leaves_by_path(first.params)
    mesh = parallel.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    rules = ((r"(query|key|value|mlp_0|head)/kernel", "tensor(-1)"), (".*", "fsdp(min_mb=0.002)"))
    for got in (run("pmap"), run("mesh", mesh, rules)):
        for path, leaf in want.items():
            np.testing.assert_allclose(got[path], leaf, rtol=0, atol=2e-6, err_msg=path)
    assert np.abs(want["transformer/head/kernel"] - before["transformer/head/kernel"]).max() > 1e-3


def test_weight_decay_is_of_linear_maps_alone():
    config = openmoji_prior.get_config("layout")
    config.optimizer.update({"learning_rate": 1.0, "warmup_steps": 0, "weight_decay": 0.5})
    config.optimizer.schedule = "constant"
    task, *_ = setup()
    shapes, _ = jax.eval_shape(task.init, RNG, batch_spec(make_config("prior")))
    params = jax.tree.map(lambda x: jnp.ones(x.shape), shapes.params)
    tx = make_optimizer(config.optimizer, 10)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    decayed = {path for path, leaf in leaves_by_path(updates).items() if np.any(leaf)}
    kernels = {path for path in leaves_by_path(params) if path.endswith("/kernel")}
    assert decayed == kernels and len(kernels) == 7 < len(leaves_by_path(params))


def test_dropping_needs_a_null_condition():
    config = make_config("prior", **{"conditioners.class_token.null": None})
    with pytest.raises(ValueError, match=r"guidance_scale=2 needs a null condition, and class_t"):
        make_prior_training(config)
    config.prior.sampling.guidance_scale = 1.0
    with pytest.raises(ValueError, match=r"drop_rate=0.1 needs a null condition, and class_t"):
        make_prior_training(config)


@pytest.mark.parametrize("variant", ["", "masked", "mirrored", "class", "layout", "segmentation"])
def test_every_variant_fits_its_first_stage(variant):
    config = openmoji_prior.get_config(variant)
    task = make_prior_training(config)
    state, constants = jax.eval_shape(task.init, RNG, batch_spec(config))
    assert constants.first_stage.params["quantize"]["embedding"].shape == (512, 4)
    used = state.params["transformer"]["pos_emb"].shape[0]
    assert used == config.transformer.max_length


def test_cached_codes_are_integers_of_every_picture(tmp_path):
    config = make_config("prior")
    _, _, constants, _ = setup()
    images = np.random.default_rng(0).integers(0, 256, (11, SIZE, SIZE, 3), np.uint8)
    source = data.ArraySource({"image": images, "class_label": np.arange(11)})
    cached = moments.with_moments(config, tmp_path, constants.first_stage, source)
    (file,) = tmp_path.glob("codes-*.npy")
    assert np.load(file).dtype == np.int32 and set(cached[0]) == {"codes", "class_label", "window"}
    want = constants.first_stage.indices({"image": jnp.asarray(images / np.float32(127.5) - 1)})
    np.testing.assert_array_equal([cached[i]["codes"] for i in range(11)], want)


def test_a_run_from_the_first_stage_to_samples_and_scores(tmp_path, monkeypatch):
    """And what it refuses: pixels, which have no codes, and another task's workdir."""
    small = {"data.image_size": SIZE, "batch_size": 8, "log.num_images": 2, "num_steps": 2}
    first = openmoji_prior.get_config("first_stage_smoke")
    first.autoencoding.update({"disc_start": 9, "adversarial_start": 9})
    first.autoencoding.discriminator.num_layers = 1
    for config in (first, prior := openmoji_prior.get_config("smoke")):
        config.autoencoder.update({"channel_mult": (1, 1), "num_groups": 4})
        config.update_from_flattened_dict(small)
    loop.train(first, tmp_path / "first_stage")
    prior.first_stage.path = str(tmp_path / "first_stage")
    loop.train(prior, tmp_path / "prior")
    lines = (tmp_path / "prior" / "metrics.jsonl").read_text()
    for name in ("bits_per_code", "perplexity", "eval_bits_per_code", "eval_perplexity"):
        assert f'"{name}"' in lines
    assert list((tmp_path / "prior").glob("codes-*.npy"))
    assert list((tmp_path / "prior" / "images").glob("*inputs_samples*.png"))
    model = ldm.load(tmp_path / "prior")
    images = model.sample(RNG, class_labels=[0, 5], temperature=0.5)
    assert images.shape == (2, SIZE, SIZE, 3) and model.defaults["guidance_scale"] == 2.0

    net = FeatureNet("alexnet", {}, lambda params, levels: {"features": levels.mean((1, 2))})
    monkeypatch.setattr(command, "make_features", lambda *given: net)
    options = {"metrics": ["fd"], "features": "alexnet", "num_images": 24, "batch_size": 24}
    scores = [
        evaluate(workdir=str(tmp_path / "prior"), guidance_scale=scale, **options)
        for scale in (2.0, 9.0)
    ]
    assert scores[0]["reference"] == "synthetic@train" and scores[0]["step"] == 2
    found = [score["metrics"]["fd_alexnet"] for score in scores]
    assert 0 < found[0] != found[1] < np.inf
    prior.first_stage.path = str(tmp_path / "prior")
    with pytest.raises(ValueError, match="of 'prior', but prior needs one of 'autoencoding'; "):
        loop.train(prior, tmp_path / "other")


# ----------------------------------------------------------------- a condition with its own codes

MAPS = {"channels": 4, "channel_mult": (1, 1), "num_res_blocks": 1, "num_groups": 2}
MAPS |= {"z_channels": 2, "embed_dim": 2, "regularization": "vq", "num_codes": 5}
GREY = np.linspace(0, 250, SIZE, dtype=np.uint8)  # depths of a column


def write_first_stage(path, fields, seed, format="orbax"):
    """A first stage with random parameters, in a workdir or a file; returns it."""
    module = make_autoencoder(fields)
    shapes = jax.eval_shape(module.init, RNG, jnp.zeros((1, SIZE, SIZE, 3)))["params"]
    stage = FirstStage(numbers(shapes, seed), jnp.ones(()), jnp.zeros(()), module)
    Model(first_stage=stage, image_size=SIZE).save(path, format=format)
    return stage


def write_pictures(folder):
    """Eight pictures with maps of their depths."""
    rng, rows = np.random.default_rng(0), []
    for i in range(8):
        picture, depth = f"{i}.png", f"depth_{i}.png"
        Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(folder / picture)
        Image.fromarray(np.tile(GREY // (i + 1), (SIZE, 1))).save(folder / depth)
        rows.append(json.dumps({"file_name": picture, "depth": depth}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))


def test_a_code_map_is_a_first_stage_of_ones_own_and_stays_as_it_is(tmp_path):
    config = make_config("prior")
    write_first_stage(tmp_path / "pictures", config.autoencoder.to_dict(), 0)
    maps = write_first_stage(tmp_path / "maps", MAPS, 1)
    (tmp_path / "data").mkdir()
    write_pictures(tmp_path / "data")
    config.first_stage.path = str(tmp_path / "pictures")
    config.data.update({"name": "image_folder", "dir": str(tmp_path / "data"), "image_size": SIZE})
    config.data.test_fraction = 0.25
    config.conditioners = ConfigDict({"code_map": {"key": "depth", "offset": CODES, "null": 21}})
    config.pretrained.code_map = str(tmp_path / "maps")
    config.transformer.update({"vocab_size": 22, "max_length": 127, "width": 8})
    config.update_from_flattened_dict({"batch_size": 4, "num_steps": 2, "parallel.mode": "single"})
    loop.train(config, tmp_path / "prior")
    (tmp_path / "maps").rename(tmp_path / "elsewhere")  # a run that goes on has a copy
    again = start.resolve(config, tmp_path / "prior")
    assert again.conditioners.code_map.autoencoder.num_codes == 5

    model = ldm.load(tmp_path / "prior")
    kept = leaves_by_path(model.prior.params["conditioner"]["code_map"]["autoencoder"])
    assert kept.keys() == leaves_by_path(maps.params).keys()
    for path, leaf in leaves_by_path(maps.params).items():
        np.testing.assert_array_equal(kept[path], leaf)
    depth = np.tile(GREY[None, None, :, None], (2, SIZE, 1, 1)).astype(np.float32)
    grey = np.tile(2 * depth / depth.max() - 1, 3)
    codes = CODES + maps.indices({"image": jnp.asarray(grey)})
    np.testing.assert_array_equal(model.condition(depth=depth).token_maps[:, 0], codes)
    assert len(np.unique(codes)) > 1
    images = model.sample(RNG, depth=depth, guidance_scale=2.0)
    assert images.shape == (2, SIZE, SIZE, 3)


def test_a_code_map_needs_a_first_stage_with_a_codebook(tmp_path):
    config = make_config("prior", conditioners=ConfigDict({"code_map": {"key": "depth"}}))
    with pytest.raises(ValueError, match=r"^conditioners.code_map needs pretrained.code_map: "):
        make_prior_training(config)
    write_first_stage(tmp_path / "kl", {**MAPS, "regularization": "kl"}, 0)
    with pytest.raises(ValueError, match=r"^pretrained.code_map=.*kl has no codebook: its .*'kl'"):
        read_pretrained("code_map", tmp_path / "kl", {})
    with pytest.raises(ValueError, match=r"^pretrained.code_map=.*nothing does not exist"):
        read_pretrained("code_map", tmp_path / "nothing", {})


def test_a_code_map_comes_from_a_file_of_a_first_stage(tmp_path):
    fields = {**MAPS, "channels": 32, "num_groups": 32, "resolution": SIZE}
    stage = write_first_stage(tmp_path / "maps.safetensors", fields, 0, "compvis")
    part = read_pretrained("code_map", tmp_path / "maps.safetensors", {"offset": 4})
    assert (
        make_autoencoder(part.fields["autoencoder"]) == stage.module and part.fields["offset"] == 4
    )


# ------------------------------------------------------------------------------------------ texts


def test_a_prior_of_texts_is_trained_and_follows_prompts(tmp_path):
    config = make_config("prior", **{"num_steps": 2, "parallel.mode": "single"})
    write_first_stage(tmp_path / "pictures", config.autoencoder.to_dict(), 0)
    config.first_stage.path = str(tmp_path / "pictures")
    text = {"max_length": 4, "width": 8, "depth": 1, "num_heads": 2, "head_dim": 4}
    config.conditioners = ConfigDict({"start": {"token": CODES}, "text": text})
    config.tokenizer.update({"name": "word", "max_length": 4})
    config.transformer.update({"vocab_size": CODES + 1, "max_length": 64, "width": 8})
    loop.train(config, tmp_path / "prior")
    last, average = (
        workdir.load_entry(tmp_path / "prior", name)["conditioner"]["text"]["token_emb"]
        for name in ("params", "ema_params")
    )
    assert np.abs(last["embedding"] - average["embedding"]).max() > 1e-4  # it has moved

    model = ldm.load(tmp_path / "prior")
    told = [model.condition(prompts=[text]) for text in ("red circle", "blue square")]
    logits = [model.logits(jnp.zeros((1, LENGTH), jnp.int32), one) for one in told]
    assert np.abs(np.asarray(logits[0] - logits[1])).max() > 1e-4
    red, blue, again = (
        model.sample(RNG, prompts=[text] * 2, guidance_scale=30.0)
        for text in ("red circle", "blue square", "red circle")
    )
    assert red.shape == (2, SIZE, SIZE, 3) and np.abs(red - blue).max() > 0.01
    np.testing.assert_array_equal(red, again)
