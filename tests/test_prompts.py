"""Prompts with weights, in chunks: the syntax, the tokens, and what the encoder makes of them."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_model import RNG, model
from test_model import sample as sample_words
from test_tokenizers import make

from latent_diffusion.data.tokenizers import with_words
from latent_diffusion.data.tokenizers.weights import parse
from latent_diffusion.nets.conditioners import make_conditioner

TOKENIZER = make("clip")  # four tokens a chunk, between start and end
FIELDS = {"vocab_size": TOKENIZER.vocab_size, "max_length": 6, "width": 6, "depth": 1}
FIELDS |= {"num_heads": 2, "empty": TOKENIZER.empty, "pad_id": TOKENIZER.pad_id}


@pytest.mark.parametrize(
    ("prompt", "sections"),
    [
        ("", [[]]),
        ("a cat: 1.5", [[("a cat: 1.5", 1)]]),
        ("(cat)", [[("cat", 1.1)]]),
        ("[cat]", [[("cat", 1 / 1.1)]]),
        ("a (red cat:1.3), sat", [[("a ", 1), ("red cat", 1.3), (", sat", 1)]]),
        ("((a:.5) b: -2)", [[("a", -1.0), (" b", -2)]]),
        ("([a] b) c", [[("a", 1), (" b", 1.1), (" c", 1)]]),
        ("(((a)) b", [[("a", 1.1**3), (" b", 1.1)]]),
        ("a) b] c:2)", [[("a) b] c:2)", 1)]]),
        (r"\(a\) \[b\] \\ (\(c\):2)", [[(r"(a) [b] \ ", 1), ("(c)", 2)]]),
        ("(a:b) (c:)", [[("a:b", 1.1), (" ", 1), ("c:", 1.1)]]),
        ("a BREAK (b BREAK c:2) BREAKER", [[("a", 1)], [("b", 2)], [("c", 2), (" BREAKER", 1)]]),
    ],
)
def test_brackets_and_their_weights(prompt, sections):
    got = parse(prompt)
    assert [[text for text, _ in s] for s in got] == [[text for text, _ in s] for s in sections]
    weights = [weight for section in got for _, weight in section]
    assert weights == pytest.approx([weight for section in sections for _, weight in section])


def test_long_prompts_and_sections_are_chunks():
    """Tokens as without weights; start, end and padding weigh 1; short prompts get empty chunks."""
    start, end = TOKENIZER.empty
    cat, dog = (TOKENIZER([word])[0] for word in ("cat", "a"))
    tokens, weights = TOKENIZER.weighted(["(cat:2) a BREAK (a)", "cat"], 3)
    assert tokens.shape == weights.shape == (2, 18)
    empty = TOKENIZER([""])[0]
    np.testing.assert_array_equal(tokens[0, :6], TOKENIZER(["cat a"])[0])
    np.testing.assert_array_equal(tokens[0, 6:], [*dog, *empty])
    np.testing.assert_array_equal(tokens[1], [*cat, *empty, *empty])
    np.testing.assert_allclose(weights[0], [1, 2, 1, 1, 1, 1, 1, 1.1, *[1] * 10], rtol=1e-6)
    assert (weights[1] == 1).all()
    long = " ".join(["cat"] * 9)
    assert [len(chunk) for chunk in TOKENIZER.chunks(long)] == [4, 4, 1]
    tokens, _ = TOKENIZER.weighted([long], 3)
    assert tokens.reshape(3, 6)[:, 0].tolist() == [start] * 3 and tokens[0, 5] == end


def test_added_words_have_weights():
    tokens, weights = with_words(TOKENIZER, {"<it>": [600, 601]}).weighted(["(a <it>:2)"], 1)
    a = TOKENIZER(["a"])[0, 1]
    assert tokens[0, 1:5].tolist() == [a, 600, 601, TOKENIZER.empty[1]]
    assert weights[0].tolist() == [1, 2, 2, 2, 1, 1]


@functools.cache
def encoder(**fields):
    conditioner = make_conditioner({"clip_text": {**FIELDS, **fields}})
    tokens = {"tokens": jnp.asarray(TOKENIZER([""]))}
    params = conditioner.init(RNG, tokens, jnp.zeros(1, bool))["params"]
    draw = np.random.default_rng(0).normal
    params = jax.tree.map(lambda x: jnp.asarray(0.5 * draw(size=x.shape), jnp.float32), params)
    return conditioner, params


def encoded(prompts, num_chunks=None, drop=False):
    conditioner, params = encoder()
    batch = {"tokens": TOKENIZER(prompts)}
    if num_chunks:
        batch["tokens"], batch["tokens_weights"] = TOKENIZER.weighted(prompts, num_chunks)
    batch = {key: jnp.asarray(rows) for key, rows in batch.items()}
    told = conditioner.apply({"params": params}, batch, jnp.full(len(prompts), drop))
    return np.asarray(told.context)


def test_each_chunk_is_encoded_alone_and_a_weight_scales_the_distance_to_the_empty_prompt():
    (plain,), (empty,), (other,) = (encoded([text]) for text in ("cat a", "", "a"))
    close = functools.partial(np.testing.assert_allclose, atol=1e-5)
    close(encoded(["cat a", "a"], 1), [plain, other])
    close(encoded(["cat a BREAK a"], 3)[0], np.concatenate([plain, other, empty]))
    weights = np.array([1, 2.5, 0.5, 1, 1, 1])[:, None]
    close(encoded(["(cat:2.5) (a:0.5)"], 1)[0], empty + weights * (plain - empty))
    close(encoded(["(cat:3)", "cat a BREAK a"], 2, drop=True), [np.concatenate([empty, empty])] * 2)
    assert np.abs(plain - empty)[1].max() > 0.1


def test_the_vector_of_a_prompt_is_that_of_its_first_chunk():
    conditioner, params = encoder(projection_dim=5)
    tokens, weights = TOKENIZER.weighted(["cat a BREAK a", "a"], 3)
    plain = {"tokens": jnp.asarray(TOKENIZER(["cat a", "a"]))}
    longer = {"tokens": jnp.asarray(tokens), "tokens_weights": jnp.asarray(weights)}
    want, got = (
        np.asarray(conditioner.apply({"params": params}, batch, jnp.zeros(2, bool)).vector)
        for batch in (plain, longer)
    )
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.abs(got[0] - got[1]).max() > 0.1


def clip_model():
    conditioner, params = encoder()
    made = model()
    params = {**made.denoiser.params, "conditioner": params}
    denoiser = made.denoiser.replace(conditioner=conditioner, params=params)
    return made.replace(denoiser=denoiser, tokenizer=TOKENIZER)


def sample(prompts, **options):
    given = {"prompt_weights": True, "mode": "single", **options}
    return clip_model().sample(RNG, prompts, **given)


def test_weights_reach_the_pictures_and_plain_prompts_stay_as_they_are():
    close = functools.partial(np.testing.assert_allclose, atol=2e-4)
    plain = sample(["cat", "a"], prompt_weights=False)
    close(sample(["cat", "(a:1)"]), plain)
    close(sample(["cat", "a"], negative_prompts=[""]), plain)
    assert np.abs(sample(["(cat:3)", "a"])[0] - plain[0]).max() > 0.003
    literal = sample(["(cat:3)", "a"], prompt_weights=False)
    assert np.abs(sample(["(cat:3)", "a"])[0] - literal[0]).max() > 0.003
    # The other texts of a call have weights, too, and may be the longest ones.
    for name, value in (
        ("negative_prompts", lambda text: ["a", text]),
        ("more_prompts", lambda text: [(text, 0.5)]),
    ):
        texts = ("(cat:1) BREAK a", "(cat:3) BREAK a")
        light, heavy = (sample(["cat", "a"], **{name: value(text)}) for text in texts)
        assert np.abs(light[1] - heavy[1]).max() > 0.003, name


def test_a_condition_has_the_weights():
    made = clip_model()
    context = made.condition(["(cat:2) BREAK a"], prompt_weights=True).context
    np.testing.assert_allclose(context, encoded(["(cat:2) BREAK a"], 2), atol=1e-5)


def test_weights_need_clip():
    with pytest.raises(ValueError, match="prompt_weights needs a model with CLIP's text encoder"):
        sample_words(prompt_weights=True)


def test_thousands_of_brackets_take_a_time_that_grows_with_their_number():
    def operations(prompt):
        count = 0

        def counted(frame, event, arg):
            nonlocal count
            count += event == "line"
            return counted

        sys.settrace(counted)
        try:
            parse(prompt)
        finally:
            sys.settrace(None)
        return count

    for bracket in ("(", "(a ", "((a) "):
        assert operations(bracket * 800) < 2.2 * operations(bracket * 400)
