"""`Model.sample` as users call it, on a model without training and small enough to compile fast."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion.data.tokenizers import WordTokenizer
from latent_diffusion.generation.model import Model
from latent_diffusion.generation.sampling import ProgressBar
from latent_diffusion.models.denoiser import Denoiser
from latent_diffusion.models.first_stage import init_first_stage, make_autoencoder
from latent_diffusion.nets.conditioners import make_conditioner
from latent_diffusion.nets.unet import UNet
from latent_diffusion.process.schedules import make_schedule
from latent_diffusion.runtime import parallel

RNG = jax.random.key(5)
IMAGE = np.random.default_rng(0).uniform(-1, 1, (1, 8, 8, 3)).astype(np.float32)
MASK = np.zeros((1, 8, 8, 1), np.float32)
MASK[:, :, 4:] = 1.0


CFG_PP = {"cfg_pp": True, "guidance_scale": 0.5}


@functools.cache
def model():
    """Pixel space, so that the decoder adds nothing; every parameter is random."""
    identity = make_autoencoder({"regularization": "identity", "image_channels": 3})
    first_stage = init_first_stage(identity, RNG, jnp.zeros((1, 8, 8, 3)))
    fields = {"vocab_size": 16, "max_length": 3, "width": 6, "depth": 0}
    conditioner = make_conditioner({"text": fields})
    tokens, drop = {"tokens": jnp.zeros((1, 3), jnp.int32)}, jnp.zeros(1, bool)
    conditioning, text = conditioner.init_with_output(RNG, tokens, drop)
    unet = UNet(3, 8, (1,), 1, (1,), num_heads=2, num_groups=4)
    shapes = jax.eval_shape(unet.init, RNG, jnp.zeros((1, 8, 8, 3)), jnp.zeros(1), conditioning)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape)), shapes["params"])
    params = {"unet": params, "conditioner": text["params"]}
    denoiser = Denoiser(params, make_schedule(), unet, conditioner, "v")
    defaults = {"sampler": "ddim", "num_steps": 4, "spacing": "trailing", "guidance_scale": 3.0}
    tokenizer = WordTokenizer.train(["red blue green cat dog"], 16, 3)
    return Model(first_stage, denoiser, tokenizer, defaults, image_size=8)


def sample(prompts=("red cat", "blue dog"), **options):
    return model().sample(RNG, list(prompts), **{"mode": "single", **options})


@functools.cache
def plain():
    return sample(num_images=4)


def test_image_7_is_the_same_at_any_batch_size_and_number_of_devices():
    assert jax.device_count() == 8
    images = plain()
    assert images.shape == (8, 8, 8, 3) and np.std(images) > 0.1
    assert np.abs(images[7] - images[6]).max() > 0.1
    # 9 images on 8 devices, so that the batch is padded; and batches of 3 on one.
    many = sample(["red cat", "blue dog", "cat"], num_images=4, mode="pmap")
    np.testing.assert_allclose(many[:8], images, atol=2e-4)
    np.testing.assert_allclose(sample(num_images=4, batch_size=3), images, atol=2e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"negative_prompts": [""]},  # the unconditional is the empty prompt
        {"more_prompts": [("green dog", 0.0)]},
        {"guidance_scale": [3.0] * 4, "guidance_interval": (0, 999)},
        {"negative_prompts": ["red cat", "blue dog"], "perpendicular": 0.7},  # all of it shared
        {"image": IMAGE, "strength": 1.0},  # all of it is made anew
        {"tile_size": 8},  # one tile
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_that_change_nothing(options):
    np.testing.assert_allclose(sample(num_images=4, **options), plain(), atol=2e-4)


def test_large_pictures_are_made_in_tiles():
    z_T = np.random.default_rng(2).normal(size=(2, 4, 8, 3)).astype(np.float32)
    wide = sample(z_T=z_T, image_size=(4, 8), tile_size=4, tile_overlap=0)
    for part in (np.s_[:, :, :4], np.s_[:, :, 4:]):
        alone = sample(z_T=np.ascontiguousarray(z_T[part]), image_size=(4, 4))
        np.testing.assert_allclose(wide[part], alone, atol=2e-4)
    with pytest.raises(ValueError, match="tile overlap 4 must lie in"):
        sample(tile_size=4, tile_overlap=4)


def test_a_call_compiles_one_program_and_equal_options_reuse_it(caplog):
    def compiled(rng, prompts):
        caplog.clear()
        with jax.log_compiles():
            model().sample(rng, prompts, mode="single", num_steps=6)
        return [m for m in caplog.messages if m.startswith("Compiling")]

    assert sum("step" in message for message in compiled(RNG, ["red cat"])) == 1
    assert compiled(jax.random.key(6), ["green dog"]) == []


def test_a_call_runs_one_program_for_each_batch(monkeypatch):
    runs, compile_eval = [], parallel.compile_eval

    def counting(*args, **options):
        program = compile_eval(*args, **options)
        return lambda *inputs: runs.append(len(inputs[2]["index"])) or program(*inputs)

    monkeypatch.setattr(parallel, "compile_eval", counting)
    sample(num_images=4, batch_size=3, guidance_rescale=0.1)
    assert runs == [3, 3, 3]  # the last one padded


def test_cfg_pp_steps_with_the_unconditional_noise():
    """Scale 0 of it is the unconditional model, whose samples no prompt changes."""
    images = sample(guidance_scale=0.0, cfg_pp=True)
    other = sample(["cat", "dog"], guidance_scale=0.0, cfg_pp=True)
    np.testing.assert_allclose(images, other, atol=2e-4)
    assert np.abs(sample(guidance_scale=0.6, cfg_pp=True) - images).max() > 0.01


def test_strength_0_returns_the_image():
    images = sample(image=IMAGE, strength=0.0)
    np.testing.assert_allclose(images, np.repeat(IMAGE, 2, 0), atol=1e-6)


def test_inpainting_keeps_every_pixel_outside_the_hole_and_reports_its_steps():
    seen = []
    options = {"negative_prompts": ["dog", "green"], "guidance_rescale": 0.5, "num_images": 2}
    images = sample(image=IMAGE, mask=MASK, progress=lambda t: seen.append(int(t)), **options)
    np.testing.assert_array_equal(images[:, :, :4], np.repeat(IMAGE[:, :, :4], 4, 0))
    assert np.abs(images[:, :, 4:] - IMAGE[:, :, 4:]).max() > 0.1
    assert np.abs(images[0, :, 4:] - images[1, :, 4:]).max() > 0.1
    assert sorted(seen) == [249, 499, 749, 999]


class Counter:
    """A progress function with a total."""

    total, calls = None, 0

    def __call__(self, t):
        self.calls += 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_images": 2, "batch_size": 2}, 8),  # two batches of four steps
        ({"sampler": "heun"}, 14),  # batches of one; two evaluations a step, but for the last one
        ({"image": IMAGE, "strength": 0.5}, 4),
        ({"image": IMAGE, "strength": 0.0}, 0),
        ({"num_images": 4, "mode": "pmap"}, 4),
        ({"num_images": 4, "mode": "mesh"}, 4),
    ],
)
def test_progress_reaches_its_total(options, expected):
    counter = Counter()
    sample(progress=counter, **options)
    assert counter.calls == counter.total == expected


def test_a_function_that_is_an_empty_list_is_called():
    class Seen(list):
        def __call__(self, t):
            self.append(int(t))

    sample(progress=(seen := Seen()), num_steps=1)
    assert seen == [999, 999]


def test_the_bar_counts_the_evaluations_of_all_batches():
    bar = ProgressBar()
    sample(progress=bar, num_images=2, batch_size=2)
    assert bar._bar.n == bar.total == 8
    bar._bar.close()


@pytest.mark.parametrize(
    "options",
    [
        {"num_images": 2, "batch_size": 2},
        {"num_images": 4, "mode": "pmap"},
        {"num_images": 4, "mode": "mesh"},
        {"image": IMAGE, "mask": MASK, "sampler": "heun", "num_steps": 1},
        {
            "image": IMAGE,
            "strength": 0.5,
            "sampler": "ddpm",
            "guidance_scale": [2.0, 3.0, 4.0, 5.0],
        },
        {"end": 0.5, "negative_prompts": "dog", "perpendicular": 1.0},
        {"tile_size": 4, "tile_overlap": 0, "clip_x0": 1.0, "sampler": "dpm_solver_pp_2m"},
    ],
)
def test_functions_that_look_on_change_nothing(options):
    """On one device bit for bit, though the evaluations then run one by one."""
    estimates = []
    watched = sample(preview=lambda t, z_0: estimates.append(z_0), **options)
    atol = 5e-6 if "mode" in options else 0
    np.testing.assert_allclose(watched, sample(**options), rtol=0, atol=atol)
    assert len(estimates[0]) == (8 if "mode" in options else options.get("batch_size", 1))
    assert all(np.isfinite(z_0).all() and np.std(z_0) > 0.1 for z_0 in estimates)


def test_pictures_have_the_size_of_their_noise_or_of_the_picture_they_start_from():
    z_T = np.random.default_rng(2).normal(size=(2, 4, 8, 3)).astype(np.float32)
    np.testing.assert_array_equal(sample(z_T=z_T), sample(z_T=z_T, image_size=np.array([4, 8])))
    half = sample(image=IMAGE[:, :4], strength=0.0)
    np.testing.assert_allclose(half, np.repeat(IMAGE[:, :4], 2, 0), atol=1e-6)
    filled = sample(image=IMAGE[:, :4], mask=MASK[:, :4])
    np.testing.assert_array_equal(filled[:, :, :4], np.repeat(IMAGE[:, :4, :4], 2, 0))


def test_words_that_nobody_knows_are_named(caplog):
    model().condition("red bird cat")
    assert caplog.messages == ["unknown words in 'red bird cat': bird"]


def test_a_tile_below_the_trained_size_is_warned_of(caplog):
    sample(tile_size=8, image_size=(8, 16))
    assert not caplog.records
    sample(tile_size=4)
    assert "tile_size=4: tiles are smaller than the trained pictures, which have 8" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": IMAGE, "strength": 1.5}, r"strength must lie in \[0, 1\], got 1.5"),
        ({"strength": 0.5}, "strength needs image: give both"),
        ({"image": IMAGE}, "image needs strength .* or mask"),
        ({"image": IMAGE[:, :4], "mask": MASK}, r"image has shape \(1, 4, 8, 3\), expected"),
        ({"negative_prompts": ["a"] * 3}, "3 negative_prompts for 2 prompts"),
        ({"guidance_scale": [1.0, 2.0]}, "2 guidance scales for 4 steps"),
        ({"quantize_x0": True}, "quantize_x0 needs a first stage whose latents are codes"),
        ({"num_steps": 0}, r"num_steps must lie in 1 … 1000 \(the schedule's T\), got 0"),
        ({"num_steps": 1001}, "num_steps must lie in 1 … 1000"),
        ({"num_steps": 4.5}, "num_steps=4.5 must be an integer"),
        ({"num_steps": True}, "num_steps=True must be an integer"),
        ({"num_stesp": 4}, "unknown option 'num_stesp' for sampler 'ddim' with spacing 'trailing'"),
        ({"sampler": "heun", "eta": 1.0}, "unknown option 'eta' for sampler 'heun'"),
        ({"spacing": "even"}, "unknown spacing 'even'; known: ays"),
        ({"sampler": "dimm"}, "unknown sampler 'dimm'; known: "),
        ({"sampler": ["ddim"]}, r"sampler=\['ddim'\] must be a text"),
        ({"spacing": {"trailing": 1}}, r"spacing={'trailing': 1} must be a text"),
        ({"cfg_pp": True}, r"scale of CFG\+\+ must lie in \[0, 1\], got 3"),
        ({"cfg_pp": True, "sampler": "heun"}, "cfg_pp works with ddim, euler, .*, not heun"),
        ({**CFG_PP, "more_prompts": [("cat", 1)]}, "more_prompts and cfg_pp don't go"),
        ({**CFG_PP, "guidance_rescale": 0.5}, "cfg_pp knows no guidance_interval or"),
        ({"perpendicular": 1.0}, "perpendicular needs negative_prompts: give both"),
        ({"guidance_rescale": 1.5}, r"guidance_rescale must lie in \[0, 1\], got 1.5"),
        ({"guidance_interval": (700, 300)}, r"guidance_interval must be \(low, high\), timesteps"),
        ({"dynamic_threshold": 995.0}, r"dynamic_threshold must lie in \(0, 1\], got 995"),
        ({"noise_dropout": 1.0, "eta": 1.0}, r"noise_dropout must lie in \[0, 1\), got 1"),
        ({"guidance_interval": (0.2, 0.8)}, r"timesteps of 0 … 999 and no shares .* \(0.2, 0.8\)"),
        ({"guidance_scale": float("nan")}, "guidance_scale must lie in the reals, got nan"),
        ({"guidance_scale": "3"}, "guidance_scale='3' must be a list of numbers"),
        ({"guidance_interval": 300}, "guidance_interval=300 must be a list of numbers"),
        ({"guidance_interval": [1, 2, 3]}, "guidance_interval has 3 values, expected 2"),
        ({"cfg_pp": 1}, "cfg_pp=1 must be true or false"),
        ({"tile_overlap": 4}, "tile_overlap needs tile_size: give both"),
        ({"target_scale": 2.0}, "target_scale needs target: give both"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"num_images": 0}, "num_images=0 must be at least 1"),
        (
            {"image": IMAGE * 127, "strength": 0.5},
            r"image: values in \[-12\d.*, expected \[-1, 1\]",
        ),
        ({"image": IMAGE, "mask": MASK * 255}, r"mask: values in \[0, 255\], expected \[0, 1\]"),
        ({"mask": MASK}, "mask says where an image is made anew: give image, too"),
        ({"image_size": 8}, r"image_size=8 must be \(height, width\), whole numbers of pixels"),
        ({"image_size": (8.0, 8.0)}, r"image_size=\(8.0, 8.0\) must be \(height, width\), whole"),
        ({"more_prompts": ["cat"]}, r"more_prompts: 'cat': write \(text, weight\)"),
        ({"more_prompts": [("cat", None)]}, r"more_prompts: \('cat', None\): write"),
        ({"more_prompts": [("cat", np.nan)]}, r"more_prompts: \('cat', nan\): write"),
        ({"negative_prompts": 5}, "negative_prompts=5 must be a text, or a list of texts"),
        ({"spacing": "karras", "rho": 0.0}, r"rho must lie in \(0, inf\), got 0"),
        ({"threshold_limit": 2.0}, "threshold_limit needs dynamic_threshold: give both"),
        ({"classifier_scale": 2.0}, "classifier_scale needs classifier: give both"),
        ({"target_distance": "lpips"}, "target_distance needs target: give both"),
        ({"image_size": (10**9, 8)}, "image_size 1000000000×8: sides lie in 1 … 65536 pixels"),
        (
            {"z_T": np.zeros((2, 4, 4, 3)), "image_size": (8, 8)},
            r"z_T has shape \(2, 4, 4, 3\), expected \(2, 8, 8, 3\)",
        ),
    ],
)
def test_bad_input_is_one_line(options, message):
    with pytest.raises(ValueError, match=message):
        sample(**options)


def test_an_option_finds_what_it_needs_among_the_models_defaults():
    for default, given in (
        ({"dynamic_threshold": 0.995}, {"threshold_limit": 2.0}),
        ({"tile_size": 8}, {"tile_overlap": 2}),
    ):
        made = model().replace(defaults={**model().defaults, **default})
        with pytest.raises(ValueError, match="parallel mode"):  # before anything is compiled
            made.sample(RNG, "cat", mode="none", **given)


def test_pixels_have_no_codes():
    for call, given in (
        (model().encode_to_indices, IMAGE),
        (model().decode_indices, jnp.zeros((1, 8, 8), jnp.int32)),
    ):
        with pytest.raises(ValueError, match="pixels and tiny autoencoders have no codebook"):
            call(given)


def test_nearest_latents_are_scaled_entries_of_the_codebook():
    fields = {"regularization": "vq", "channels": 4, "channel_mult": (1,), "num_groups": 2}
    fields |= {"embed_dim": 2, "z_channels": 2, "num_codes": 5, "num_res_blocks": 1}
    codes = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2)), jnp.float32)
    first_stage = init_first_stage(
        make_autoencoder({"regularization": "identity", "image_channels": 3}),
        RNG,
        jnp.asarray(IMAGE),
    ).replace(
        module=make_autoencoder(fields),
        params={"quantize": {"embedding": codes}},
        scale_factor=jnp.array(2.0),
        shift=jnp.array(0.5),
    )
    entries = (codes - 0.5) * 2.0
    z = entries[jnp.array([[[3, 1], [0, 4]]])]
    np.testing.assert_allclose(first_stage.nearest(z + 1e-3), z, atol=1e-5)
