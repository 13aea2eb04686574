"""The transformer over codes: what each position sees, with and without a cache; its size."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion.core.types import Conditioning
from latent_diffusion.nets.autoencoder import Autoencoder
from latent_diffusion.nets.conditioners import make_conditioner
from latent_diffusion.nets.prior import CodeTransformer, front_of

SIZES = {"vocab_size": 13, "num_codes": 13, "max_length": 9, "width": 16, "depth": 2}
SIZES |= {"num_heads": 2}
CODES = jnp.arange(12).reshape(2, 6) % 11
FRONT = np.array([[11, 2], [12, 5]], np.int32)
CONTEXT = np.random.default_rng(1).normal(size=(2, 3, 8)).astype(np.float32)


@functools.cache
def made(causal=True, context=False):
    """A transformer with random parameters, biases and norms included, and its condition."""
    module = CodeTransformer(**SIZES, causal=causal)
    told = Conditioning(tokens=jnp.array(FRONT), context=jnp.array(CONTEXT) if context else None)
    shapes = jax.eval_shape(module.init, jax.random.key(0), CODES, told)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) / 4, shapes)
    apply = jax.jit(lambda codes, told: module.apply({"params": params}, codes, told))
    return module, params, told, apply


def changed(causal, place):
    """The positions whose logits change where the code at `place` does."""
    *_, told, apply = made(causal)
    other = CODES.at[:, place].set((CODES[:, place] + 1) % 11)
    difference = np.abs(np.asarray(apply(CODES, told) - apply(other, told))).max((0, 2))
    return np.flatnonzero(difference > 1e-6).tolist()


@pytest.mark.parametrize("place", [0, 3, 5])
def test_causal_logits_depend_on_the_codes_before_them_alone(place):
    assert changed(True, place) == list(range(place + 1, 6))


@pytest.mark.parametrize("place", [0, 3, 5])
def test_masked_logits_depend_on_all_codes(place):
    assert changed(False, place) == list(range(6))


@pytest.mark.parametrize("causal", [True, False])
def test_logits_depend_on_the_tokens_in_front_and_on_the_context(causal):
    *_, told, apply = made(causal, context=True)
    logits = apply(CODES, told)
    assert logits.shape == (2, 6, 13)
    for other in (
        told.replace(tokens=told.tokens[::-1]),
        told.replace(context=told.context[:, ::-1] * 2),
    ):
        assert np.abs(np.asarray(logits - apply(CODES, other))).max((0, 2)).min() > 1e-3


@pytest.mark.parametrize("context", [False, True])
def test_cached_logits_are_those_without_a_cache(context):
    module, params, told, apply = made(context=context)
    want = apply(CODES, told)
    variables, front = {"params": params}, front_of(told, 2)
    extend = jax.jit(
        lambda tokens, start, cache: module.apply(
            variables, tokens, start, cache, told.context, method="extend"
        )
    )
    logits, cache = extend(front, 0, module.empty_cache(2, 7))
    np.testing.assert_allclose(logits, want[:, 0], atol=1e-5)
    for i in range(5):
        logits, cache = extend(CODES[:, i : i + 1], 2 + i, cache)
        np.testing.assert_allclose(logits, want[:, i + 1], atol=1e-5)


def test_one_position_alone_has_the_same_logits():
    module, params, told, apply = made()
    one = module.apply({"params": params}, CODES, told, at=jnp.array(4))
    np.testing.assert_allclose(one[:, 0], apply(CODES, told)[:, 4], atol=1e-5)


def test_golden_logits():
    """Those of mingpt's code for these parameters: test_logits_equal_mingpt in tests/parity."""
    *_, told, apply = made()
    got = np.asarray(apply(CODES, told))
    np.testing.assert_allclose(got[0, 0, :3], GOLDEN_FIRST, atol=2e-5)
    np.testing.assert_allclose(got[1, 5, :3], GOLDEN_LAST, atol=2e-5)


GOLDEN_FIRST = [0.28736076, 0.16607939, -0.06050742]
GOLDEN_LAST = [0.32580242, -0.03609893, -0.16979903]
# Esser et al. 2021: width, depth, vocabulary, positions, and the parameters of mingpt's code.
RELEASED = {
    "FacesHQ, S-FLCKR, D-RIN": (1024, 24, 1024, 512, 304_932_864),
    "COCO": (1408, 40, 8192, 348, 975_876_352),
    "OpenImages": (1536, 36, 8192, 348, 1_045_638_144),
    "cIN": (1536, 48, 16384, 256, 1_410_640_896),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_have_their_number_of_parameters(name):
    width, depth, vocabulary, positions, count = RELEASED[name]
    module = CodeTransformer(vocabulary, vocabulary, positions, width, depth)
    token = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), token, Conditioning(tokens=token))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


def test_dropout_and_recomputation_change_training_alone():
    module, params, told, apply = made()
    dropping = module.clone(dropout=0.5, remat=True)
    variables, rngs = {"params": params}, {"dropout": jax.random.key(0)}
    np.testing.assert_allclose(
        dropping.apply(variables, CODES, told), apply(CODES, told), atol=1e-6
    )
    trained = dropping.apply(variables, CODES, told, True, rngs=rngs)
    assert np.abs(np.asarray(trained - apply(CODES, told))).max() > 0.1
    # The first code sees itself alone however much attention drops: causality holds in training.
    other = jnp.where(jnp.arange(6) < 3, CODES, (CODES + 1) % 11)
    same = np.abs(np.asarray(trained - dropping.apply(variables, other, told, True, rngs=rngs)))
    assert same[:, :4].max() == 0 < same[:, 4:].max()
    # Of a masked prior every position sees all codes, in training, too.
    masked = dropping.clone(causal=False)
    seen = [masked.apply(variables, codes, told, True, rngs=rngs) for codes in (CODES, other)]
    assert np.abs(np.asarray(seen[0] - seen[1]))[:, 0].max() > 1e-3


def test_bad_input_is_one_line():
    module, params, told, _ = made()
    variables = {"params": params}
    with pytest.raises(
        ValueError, match=r"2 tokens of conditions and 9 codes exceed .*max_length=9"
    ):
        module.apply(variables, jnp.zeros((2, 9), jnp.int32), told)
    with pytest.raises(ValueError, match=r"causal prior reads a token before .*conditioners.start"):
        module.apply(variables, CODES, Conditioning())
    with pytest.raises(ValueError, match=r"transformer.width=16 .* num_heads=3"):
        module.clone(num_heads=3).apply(variables, CODES, told)


# ------------------------------------------------------------------------------- their conditions

LABELS = jnp.array([[[0, 0, 2, 2], [0, 1, 2, 1], [1, 1, 0, 2], [1, 1, 2, 2]]])
TINY = {"channels": 4, "channel_mult": (1, 2), "num_res_blocks": 1, "num_groups": 2}
TINY |= {"z_channels": 2, "embed_dim": 2, "regularization": "vq", "num_codes": 5}
MAPS = {
    "key": "segmentation",
    "offset": 20,
    "null": 7,
    "autoencoder": {**TINY, "image_channels": 3},
}
# conditioner -> its fields, what it reads, its tokens, those of the null condition
CONDITIONS = {
    "start": ({"token": 3}, {}, [3], [3]),
    "class_token": ({"num_classes": 4, "offset": 5, "null": 9}, {"class_label": [2]}, [7], [9]),
    "layout_tokens": (
        {"vocab_size": 8, "max_length": 3, "offset": 10},
        *({"layout": [[1, 2, 3]]}, [11, 12, 13], [17, 17, 17]),
    ),
    "segmentation_tokens": (
        {"num_classes": 3, "factor": 2, "offset": 5, "null": 8},
        *({"segmentation": LABELS}, [5, 7, 6, 7], [8] * 4),
    ),
}


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_condition_becomes_tokens_in_front(name):
    fields, batch, tokens, null = CONDITIONS[name]
    conditioner = make_conditioner({name: fields})
    batch = {key: jnp.array(value, jnp.int32) for key, value in batch.items()}
    for drop, want in ((False, tokens), (True, null)):
        told = conditioner.apply({}, batch, jnp.full(1, drop))
        assert front_of(told, 1).tolist() == [want]
    assert max(tokens + null) < conditioner.parts()[0].end


def test_tokens_stand_before_maps():
    both = {name: CONDITIONS[name][0] for name in ("segmentation_tokens", "start")}
    told = make_conditioner(both).apply({}, {"segmentation": LABELS}, jnp.zeros(1, bool))
    assert front_of(told, 1).tolist() == [[3, 5, 7, 6, 7]]


def test_coordinates_are_places_in_reading_order():
    conditioner = make_conditioner({"coordinates": {"num_places": 64, "factor": 2}})
    batch = conditioner.prepare({}, None, (2, 4), None)
    told = conditioner.apply({}, batch, jnp.zeros(2, bool))
    # Pixels 0, 1, 8, 9 of 32 have the mean 4.5: 64 · 4.5 / 32 = 9.
    assert told.token_maps.tolist() == [[[[9, 13, 17, 21], [41, 45, 49, 53]]]] * 2


@pytest.mark.parametrize("key", ["segmentation", "depth"])
def test_a_map_becomes_the_codes_of_its_own_first_stage(key):
    channels = 3 if key == "segmentation" else 1
    fields = {**MAPS, "key": key, "autoencoder": {**TINY, "image_channels": channels}}
    conditioner = make_conditioner({"code_map": fields})
    depth = jnp.linspace(2, 9, 16).reshape(1, 4, 4, 1)
    batch, keep = {"segmentation": LABELS, "depth": depth}, jnp.zeros(1, bool)
    told, variables = jax.jit(conditioner.init_with_output)(jax.random.key(0), batch, keep)
    params = variables["params"]["code_map"]["autoencoder"]
    assert {"encoder", "decoder", "quantize"} <= params.keys()

    pictures = jax.nn.one_hot(LABELS, 3) if channels == 3 else 2 * (depth - 2) / 7 - 1
    want = Autoencoder(**fields["autoencoder"]).apply(
        {"params": params}, pictures, method="encode_to_indices"
    )
    np.testing.assert_array_equal(told.token_maps[:, 0], 20 + want)
    dropped = conditioner.apply(variables, batch, ~keep)
    assert np.unique(dropped.token_maps).tolist() == [7]
    assert conditioner.parts()[0].keys == (key,)


def test_a_depth_map_of_any_size_has_the_codes_of_its_picture():
    """A smaller one would be fewer tokens in front, and so move all codes that follow."""
    fields = {**MAPS, "key": "depth", "autoencoder": {**TINY, "image_channels": 1}}
    conditioner = make_conditioner({"code_map": fields})
    stage = SimpleNamespace(module=Autoencoder(channel_mult=(1, 1)))
    rows = np.linspace(0, 1, 8, dtype=np.float32)
    small = np.broadcast_to(rows[:, None], (8, 6)).reshape(1, 8, 6, 1)
    told = conditioner.prepare({"depth": jnp.asarray(small)}, stage, (4, 4), None)["depth"]
    assert told.shape == (1, 8, 8, 1)
    np.testing.assert_allclose(told[0, ..., 0], np.tile(rows[:, None], 8), atol=1e-6)
