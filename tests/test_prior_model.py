"""Drawing with priors: cached, in windows, masked, edited; and `Model.sample` with one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion.core.types import Conditioning
from latent_diffusion.generation.model import Model
from latent_diffusion.models.first_stage import FirstStage
from latent_diffusion.models.prior import Prior, check_null, make_prior
from latent_diffusion.nets.autoencoder import Autoencoder
from latent_diffusion.nets.conditioners import make_conditioner
from latent_diffusion.nets.prior import CodeTransformer
from latent_diffusion.process.plan import plan_prior

RNG = jax.random.key(5)
SIDE, CODES = 4, 7
VQ = {"channels": 4, "channel_mult": (1, 1), "num_res_blocks": 1, "num_groups": 2}
VQ |= {"z_channels": 2, "embed_dim": 2, "regularization": "vq", "num_codes": CODES}
CLASSES = {"class_token": {"num_classes": 3, "offset": CODES, "null": CODES + 3}}
SIZES = {"vocab_size": CODES + 5, "max_length": 33, "width": 8, "depth": 2, "num_heads": 2}


def numbers(shapes, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32) / 2, shapes)


@functools.cache
def prior_of(causal=True, maps=False, context=False):
    """A prior with random parameters, and two conditionings: the asked and the null one."""
    prior = make_prior({**SIZES, "causal": causal}, CLASSES, Autoencoder(**VQ))
    rng = np.random.default_rng(1)

    def told(label):
        return Conditioning(
            tokens=jnp.full((2, 1), CODES + label, jnp.int32),
            token_maps=jnp.asarray(rng.integers(0, 9, (2, 1, 4, 8)), jnp.int32) if maps else None,
            context=jnp.asarray(rng.normal(size=(2, 3, 5)), jnp.float32) if context else None,
        )

    asked, null = told(1), told(3)
    one = asked.replace(token_maps=asked.token_maps[..., :4]) if maps else asked
    codes = jnp.zeros((2, 16), jnp.int32)
    shapes = jax.eval_shape(prior.transformer.init, RNG, codes, one)["params"]
    return prior.replace(params={"transformer": numbers(shapes, 0)}), asked, null


def keys(count=2):
    return jax.vmap(jax.random.fold_in, (None, 0))(RNG, jnp.arange(count))


def cut(x, i, j):
    return x[..., i : i + SIDE, j : j + SIDE]


def literally(prior, asked, null, size, scale, temperature, known=None):
    """Code by code, without a cache: taming-transformers' rule for windows, spelt out."""
    logits_of = jax.jit(lambda codes, told: prior.logits(codes, told))
    codes = np.zeros((2, *size), np.int32)
    for i in range(size[0]):
        for j in range(size[1]):
            local = []
            for place, n in ((i, size[0]), (j, size[1])):
                local.append(place if place <= 2 else SIDE - (n - place) if n - place < 2 else 2)
            corner = (i - local[0], j - local[1])

            def logits(told, corner=corner, place=local[0] * SIDE + local[1]):
                if told.token_maps is not None:
                    told = told.replace(token_maps=cut(told.token_maps, *corner))
                seen = jnp.asarray(cut(codes, *corner).reshape(2, -1))
                return np.asarray(logits_of(seen, told))[:, place]

            mixed = logits(null) + scale * (logits(asked) - logits(null))
            place = i * size[1] + j
            gumbel = [jax.random.gumbel(jax.random.fold_in(k, place), (CODES,)) for k in keys()]
            codes[:, i, j] = np.argmax(mixed + temperature * np.stack(gumbel), -1)
            if known is not None:
                codes[:, i, j] = np.where(known[1][:, i, j], known[0][:, i, j], codes[:, i, j])
    return codes


@functools.partial(jax.jit, static_argnums=(3,))
def drawn(prior, asked, null, size, options, known=None):
    return prior.sample(keys(), asked, null, size, SIDE, options, known)


def options(causal=True, **given):
    return plan_prior({}, given, causal)


@pytest.mark.parametrize("context", [False, True])
def test_codes_drawn_with_a_cache_are_those_without(context):
    prior, asked, null = prior_of(context=context)
    chosen = options(guidance_scale=2.0, temperature=0.7)
    got = drawn(prior, asked, null, (4, 4), chosen)
    np.testing.assert_array_equal(got, literally(prior, asked, null, (4, 4), 2.0, 0.7))
    assert len(np.unique(got)) > 2 and np.any(got[0] != got[1])


def test_256_codes_drawn_with_a_cache_are_those_without():
    """The promise of docs/priors.md, beside which `benchmarks.prior_cache` times both."""
    sizes = {**SIZES, "max_length": 256, "num_codes": CODES}
    module = CodeTransformer(**sizes)
    told, codes = Conditioning(tokens=jnp.full((2, 1), 8)), jnp.zeros((2, 256), jnp.int32)
    shapes = jax.eval_shape(module.init, RNG, codes, told)["params"]
    prior = Prior({"transformer": numbers(shapes, 0)}, module, make_conditioner({}))
    given = (keys(), told, options(), (codes, codes > 0))
    cached = jax.jit(lambda p: p._in_order(*given))(prior)
    without = jax.jit(lambda p: p._in_windows(*given, (16, 16), 16))(prior)
    np.testing.assert_array_equal(cached, without)
    assert np.unique(np.asarray(cached[:, 128:])).size == CODES


def test_a_larger_picture_is_drawn_through_windows():
    prior, asked, null = prior_of(maps=True)
    got = drawn(prior, asked, null, (4, 8), options(guidance_scale=2.0))
    np.testing.assert_array_equal(got, literally(prior, asked, null, (4, 8), 2.0, 1.0))


@pytest.mark.parametrize("size", [(4, 4), (4, 8)])
def test_known_codes_stay_and_the_others_follow_them(size):
    prior, asked, null = prior_of(maps=size == (4, 8))
    rng = np.random.default_rng(0)
    known = (
        rng.integers(0, CODES, (2, *size)).astype(np.int32),
        rng.uniform(size=(2, *size)) < 0.5,
    )
    got = drawn(prior, asked, null, size, options(), tuple(map(jnp.asarray, known)))
    want = literally(prior, asked, null, size, 1.0, 1.0, known)
    np.testing.assert_array_equal(got, want)


def masked(**given):
    known = given.pop("known", None)
    prior, asked, null = prior_of(causal=False)
    return np.asarray(drawn(prior, asked, null, (4, 4), options(False, **given), known))


def test_one_step_draws_every_code_from_masks_alone():
    prior, asked, _ = prior_of(causal=False)
    logits = prior.logits(jnp.full((2, 16), prior.transformer.mask_token), asked)
    of_step = [jax.random.gumbel(jax.random.fold_in(key, 0), (16, CODES)) for key in keys()]
    want = np.argmax(logits + 0.5 * np.stack(of_step), -1)
    got = masked(num_steps=1, temperature=0.5, choice_temperature=0.0)
    np.testing.assert_array_equal(got.reshape(2, -1), want)


@pytest.mark.parametrize(
    ("choice_temperature", "known", "count"), [(0.0, 0, 11), (6.0, 0, 11), (0.0, 9, 4)]
)
def test_two_steps_keep_the_codes_that_were_most_certain(choice_temperature, known, count):
    """With noise in the order of certainty, half of which is left after half of the steps.

    known: so many of 16 codes are given. count: ⌊(16 − known) · cos(π/4)⌋ codes are drawn again.
    """
    prior, asked, _ = prior_of(causal=False)
    fixed, codes = np.arange(16) < known, np.arange(32).reshape(2, 16) % CODES

    def draw(tokens, step):
        of_step = [jax.random.gumbel(jax.random.fold_in(key, step), (16, CODES)) for key in keys()]
        logits = prior.logits(tokens, asked)
        made = jnp.where(fixed, codes, jnp.argmax(logits + np.stack(of_step), -1))
        sure = jnp.take_along_axis(jax.nn.log_softmax(logits), made[..., None], -1)[..., 0]
        return np.asarray(made), np.where(fixed, np.inf, sure)

    masks = jnp.where(fixed, codes, prior.transformer.mask_token)
    first, sure = draw(masks, 0)
    noise = [jax.random.gumbel(jax.random.fold_in(key, 1), (16,)) for key in keys()]
    sure = sure + choice_temperature / 2 * np.stack(noise)
    again = np.argsort(np.argsort(sure, 1, "stable"), 1) < count
    second, _ = draw(jnp.where(again, masks, first), 2)
    given = (codes.reshape(2, 4, 4), np.broadcast_to(fixed.reshape(4, 4), (2, 4, 4)))
    known = {"known": given} if known else {}
    got = masked(num_steps=2, choice_temperature=choice_temperature, **known)
    np.testing.assert_array_equal(got.reshape(2, -1), np.where(again, second, first))
    assert np.any((first != second) & again)


@pytest.mark.parametrize("num_steps", [1, 5, 32])
def test_masked_drawing_settles_every_code_and_keeps_the_known(num_steps):
    codes = jnp.arange(32).reshape(2, 4, 4) % CODES
    fixed = jnp.arange(32).reshape(2, 4, 4) % 3 == 0
    got = masked(num_steps=num_steps, known=(codes, fixed))
    assert got.min() >= 0 and got.max() < CODES
    np.testing.assert_array_equal(got[fixed], codes[fixed])
    whole = masked(num_steps=num_steps, known=(codes, fixed | ~fixed))
    np.testing.assert_array_equal(whole, codes)


# --------------------------------------------------------------------------------- Model.sample


@functools.cache
def model(causal=True):
    module = Autoencoder(**VQ)
    shapes = jax.eval_shape(module.init, RNG, jnp.zeros((1, 8, 8, 3)))["params"]
    first_stage = FirstStage(numbers(shapes, 2), jnp.ones(()), jnp.zeros(()), module)
    return Model(first_stage=first_stage, prior=prior_of(causal)[0], image_size=8)


def sample(causal=True, rng=RNG, **given):
    given = {"class_labels": [0, 2], "mode": "single", **given}
    return model(causal).sample(rng, **given)


@pytest.mark.parametrize("causal", [True, False])
def test_image_3_is_the_same_at_any_batch_size_and_number_of_devices(causal):
    images = sample(causal, num_images=2)
    assert images.shape == (4, 8, 8, 3)
    for given in ({"batch_size": 1}, {"batch_size": 3}, {"mode": "pmap"}, {"mode": "mesh"}):
        np.testing.assert_allclose(sample(causal, num_images=2, **given), images, atol=1e-5)
    assert np.abs(images - sample(causal, num_images=2, rng=jax.random.key(6))).max() > 0.01


@pytest.mark.parametrize(
    ("causal", "option", "value"),
    [
        (True, "temperature", 0.0),
        (True, "top_k", 2),
        (True, "top_p", 0.4),
        (True, "guidance_scale", 3.0),
        (True, "image_size", (8, 16)),
        (True, "class_labels", [1, 2]),
        (False, "num_steps", 3),
        (False, "choice_temperature", 0.0),
        (False, "temperature", 0.3),
        (False, "top_k", 1),
    ],
)
def test_an_option_of_a_prior_changes_the_pictures(causal, option, value):
    before, after = sample(causal), sample(causal, **{option: value})
    assert before.shape != after.shape or np.abs(before - after).max() > 0.01


def test_another_temperature_runs_the_same_program(caplog):
    sample(temperature=0.5, top_k=3, top_p=0.8)
    with caplog.at_level("WARNING"), jax.log_compiles():
        sample(temperature=0.6, top_k=2, top_p=0.7)
    assert not [r for r in caplog.records if "Compiling step" in r.getMessage()]


def test_around_the_hole_pixels_stay_and_codes_are_seen():
    image = np.random.default_rng(0).uniform(-1, 1, (1, 8, 8, 3)).astype(np.float32)
    hole = np.zeros((1, 8, 8, 1), np.float32)
    hole[:, 5:, 5:] = 1
    for causal in (True, False):
        got = sample(causal, image=image, mask=hole)
        np.testing.assert_array_equal(got[:, :5], np.repeat(image, 2, 0)[:, :5])
        assert np.abs(got - image)[:, 5:, 5:].max() > 0.01
        assert np.abs(got - sample(causal, image=-image, mask=hole))[:, 5:, 5:].max() > 0.01
    image, hole = (np.concatenate([x, x], 2) for x in (image, hole))
    got = sample(image=image, mask=hole, image_size=(8, 16))
    np.testing.assert_array_equal(got[:, :5], np.repeat(image, 2, 0)[:, :5])


def test_pictures_lie_in_their_range():
    stage = model().first_stage
    conv = {
        "kernel": stage.params["decoder"]["conv_out"]["kernel"],
        "bias": jnp.array([9.0, -9, 0]),
    }
    params = {**stage.params, "decoder": {**stage.params["decoder"], "conv_out": conv}}
    loud = model().replace(first_stage=stage.replace(params=params))
    images = loud.sample(RNG, class_labels=[0, 2], mode="single")
    assert images.min() == -1 and images.max() == 1


def test_logits_of_codes_under_a_condition():
    one = model()
    codes = one.encode_to_indices(jnp.zeros((1, 8, 8, 3))).reshape(1, -1)
    logits = one.logits(codes, one.condition(class_labels=[1]))
    assert logits.shape == (1, 16, CODES)
    prior, asked, _ = prior_of()
    want = prior.logits(jnp.repeat(codes, 2, 0), asked)
    np.testing.assert_allclose(logits[0], want[0], atol=1e-5)


def test_conditions_of_another_number_of_examples_are_refused():
    """Two conditions before one sequence would be a sequence with two tokens in front."""
    one, codes = model(), jnp.zeros((1, 16), jnp.int32)
    two = one.condition(class_labels=[0, 1])
    maps = Conditioning(token_maps=jnp.zeros((2, 1, 1, 1), jnp.int32))
    context = Conditioning(tokens=two.tokens[:1], context=jnp.zeros((2, 3, 5)))
    for told in (two, maps, context):
        with pytest.raises(ValueError, match=r"^conditions of 2 examples don't fit codes of 1: "):
            one.logits(codes, told)
    with pytest.raises(ValueError, match=r"^conditions of 2 examples don't fit codes of 4: "):
        one.logits(jnp.zeros((4, 8), jnp.int32), two)


def test_maps_of_another_grid_are_not_cut_into_windows():
    prior, asked, null = prior_of(maps=True)
    with pytest.raises(ValueError, match=r"maps of 4×8 tokens can't be cut as .* 4×12 codes"):
        drawn(prior, asked, null, (4, 12), options())


BAD = [
    (
        {"sampler": "ddim"},
        "unknown option 'sampler' for a causal prior; known: guidance_scale, ",
    ),
    ({"num_steps": 3}, "unknown option 'num_steps' for a causal prior"),
    ({"top_p": 1.5}, r"top_p must lie in \(0, 1\], got 1.5"),
    ({"top_k": -1}, r"top_k must lie in \[1, inf\), got -1"),
    ({"negative_prompts": ["a"]}, "negative_prompts is for denoisers"),
    ({"z_T": np.zeros((2, 4, 4, 2))}, "z_T is for denoisers"),
    ({"progress": print}, "progress looks on .* of a denoiser: a prior draws its codes in one"),
    ({"preview": print}, "preview looks on between the evaluations of a denoiser"),
    ({"adapters": [(None, 1.0)]}, "adapters is for denoisers"),
    ({"negative_original_size": (4, 4)}, "negative_original_size is for denoisers"),
    ({"negative_crop_top_left": (0, 0)}, "negative_crop_top_left is for denoisers"),
    ({"negative_target_size": (4, 4)}, "negative_target_size is for denoisers"),
    ({"negative_aesthetic_score": 0.0}, "negative_aesthetic_score is for denoisers"),
    ({"image": np.zeros((1, 8, 8, 3))}, "image needs mask: a prior draws the codes of the hole"),
    ({"image_size": (4, 8)}, "a picture of 2×4 codes is smaller than the prior's window of 4×4"),
    ({"causal": False, "image_size": (8, 16)}, "a masked prior draws 4×4 codes, no 4×8"),
    ({"class_labels": [4]}, r"class_labels: 4 must lie in \[0, 4\)"),
]


@pytest.mark.parametrize(("given", "message"), BAD)
def test_bad_input_is_one_line(given, message):
    with pytest.raises(ValueError, match=message) as error:
        sample(**given)
    assert "\n" not in str(error.value)


MISFITS = [
    ({}, CLASSES, {"regularization": "kl"}, "a prior needs a first stage with a codebook"),
    ({"vocab_size": 6}, {}, {}, "the first stage has 7 codes, .* its table 6 .*vocab_size=6"),
    ({"num_codes": 9}, CLASSES, {}, "the first stage has 7 codes, the prior's logits 9"),
    ({"vocab_size": 10}, CLASSES, {}, "conditioners.class_token has tokens up to 10, .* table 10"),
    ({"causal": False, "vocab_size": 11}, CLASSES, {}, "tokens up to 10, the prior's table 10"),
]


@pytest.mark.parametrize(("sizes", "conditioners", "vq", "message"), MISFITS)
def test_parts_that_do_not_fit_are_named(sizes, conditioners, vq, message):
    with pytest.raises(ValueError, match=message):
        make_prior({**SIZES, **sizes}, conditioners, Autoencoder(**{**VQ, **vq}))


def test_guidance_needs_a_null_condition():
    fields = {"class_token": {"num_classes": 3, "offset": CODES}}
    prior = make_prior(SIZES, fields, Autoencoder(**VQ))
    without = model().replace(prior=prior.replace(params=model().prior.params))
    with pytest.raises(ValueError, match="guidance_scale=2 needs a null condition, and class_t"):
        without.sample(RNG, class_labels=[0], guidance_scale=2.0)
    boxes = {"vocab_size": 5, "max_length": 2, "offset": CODES}
    for has_null in (True, False):
        fields = {"layout_tokens": {**boxes, "has_null": has_null}}
        prior = make_prior(SIZES, fields, Autoencoder(**VQ))
        if has_null:
            check_null(prior.conditioner, "guidance_scale=2")
            continue
        with pytest.raises(ValueError, match=r"=2 needs .*, and layout_tokens .*field has_null\)"):
            check_null(prior.conditioner, "guidance_scale=2")
    start = make_prior(SIZES, {"start": {}}, Autoencoder(**VQ))
    with pytest.raises(ValueError, match="guidance_scale=2 needs a condition: this prior has none"):
        model().replace(prior=start).sample(RNG, guidance_scale=2.0)


def test_a_misspelt_default_is_named():
    made = model().replace(defaults={"temprature": 0.0, "num_steps": 3})  # of a masked prior, too
    with pytest.raises(ValueError, match="unknown option 'temprature' for a causal prior"):
        made.sample(RNG, class_labels=[0], mode="single")
