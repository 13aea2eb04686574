import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion.core.rng import init_key
from latent_diffusion.nets.quantizer import (
    GumbelQuantizer,
    VectorQuantizer,
    to_all,
    to_used,
    with_moved_codes,
)

NUM_CODES, DIM = 5, 2
SHAPE = (8, 3, 2, DIM)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def codebook(**options):
    """A quantiser and its variables, with codes of the latents' scale."""
    embedding = normal(9, NUM_CODES, DIM)
    variables = {"params": {"embedding": embedding}}
    if options.get("ema_decay"):
        stats = {"embedding": embedding, "uses": jnp.ones(NUM_CODES), "total": embedding}
        variables["codebook"] = stats
    return VectorQuantizer(NUM_CODES, DIM, **options), variables


def moving(vq, variables, z, key=None):
    """A training call, and the variables with the codes it moved."""
    out, moved = vq.apply(variables, z, train=True, key=key, mutable=["codebook"])
    params = with_moved_codes(variables["params"], moved["codebook"])
    return out, {"params": params, **moved}


def test_nearest_code_by_brute_force_and_its_statistics():
    vq, variables = codebook()
    z, embedding = np.asarray(normal(0, *SHAPE)), np.asarray(variables["params"]["embedding"])
    out = jax.jit(vq.apply)(variables, z)
    expected = np.linalg.norm(z[..., None, :] - embedding, axis=-1).argmin(-1)
    np.testing.assert_array_equal(out.indices, expected)
    np.testing.assert_allclose(out.codes, embedding[expected], atol=1e-6)
    looked_up = vq.apply(variables, out.indices, method="lookup")
    np.testing.assert_array_equal(looked_up, embedding[expected])
    p = np.bincount(expected.ravel(), minlength=NUM_CODES) / expected.size
    p = p[p > 0]
    np.testing.assert_allclose(out.perplexity, np.prod(p**-p), rtol=1e-5)
    assert out.usage == len(p)


def test_uniform_use_has_perplexity_num_codes():
    vq, variables = codebook()
    z = jnp.tile(variables["params"]["embedding"], (2, 1)).reshape(2, NUM_CODES, 1, DIM)
    out = jax.jit(vq.apply)(variables, z)
    np.testing.assert_allclose([out.perplexity, out.usage, out.loss], [5, 5, 0], rtol=1e-5)


@pytest.mark.parametrize("legacy", [True, False])
def test_gradients_are_straight_through_and_beta_is_where_it_belongs(legacy):
    """d codes/d z is the identity; the loss pulls z and e together with weights 1 and beta."""
    beta = 0.25
    vq, variables = codebook(legacy=legacy, beta=beta)
    z, cotangent = normal(0, *SHAPE), normal(1, *SHAPE)

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(of, embedding, z):
        return jax.grad(lambda e, z: of(vq.apply({"params": {"embedding": e}}, z)), (0, 1))(
            embedding, z
        )

    embedding = variables["params"]["embedding"]
    to_embedding, to_z = gradients(lambda out: jnp.sum(out.codes * cotangent), embedding, z)
    np.testing.assert_array_equal(to_embedding, 0.0)
    np.testing.assert_allclose(to_z, cotangent, rtol=1e-6)

    to_embedding, to_z = gradients(lambda out: out.loss, embedding, z)
    out = jax.jit(vq.apply)(variables, z)
    indices = np.asarray(out.indices)
    pull = 2 * (np.asarray(embedding)[indices] - z) / z.size  # d mean((e − z)²) / d e
    on_codes = np.zeros_like(embedding)
    np.add.at(on_codes, indices, pull)
    on_commitment, on_codebook = (1, beta) if legacy else (beta, 1)
    np.testing.assert_allclose(to_z, -on_commitment * pull, atol=1e-7)
    np.testing.assert_allclose(to_embedding, on_codebook * on_codes, atol=1e-7)
    value = np.mean(np.square(np.asarray(embedding)[indices] - z)) * (1 + beta)
    np.testing.assert_allclose(out.loss, value, rtol=1e-5)


def test_cosine_codes_lie_on_the_sphere_in_the_direction_of_largest_alignment():
    vq, variables = codebook(l2_normalize=True)
    z, embedding = normal(0, *SHAPE), np.asarray(variables["params"]["embedding"])
    out = jax.jit(vq.apply)(variables, z)
    directions = embedding / np.linalg.norm(embedding, axis=-1, keepdims=True)
    np.testing.assert_array_equal(out.indices, (z @ directions.T).argmax(-1))
    np.testing.assert_allclose(out.codes, directions[out.indices], atol=1e-6)
    np.testing.assert_array_equal(jax.jit(vq.apply)(variables, 7 * z).indices, out.indices)


def test_averaged_codes_converge_to_the_centroids_of_their_latents():
    """On one batch the fixed point is k-means: every code the mean of the latents nearest to it."""
    vq, variables = codebook(ema_decay=0.5)
    z = normal(0, *SHAPE)
    step = jax.jit(functools.partial(moving, vq, z=z))
    first, _ = step(variables)
    np.testing.assert_allclose(
        first.loss, 0.25 * jnp.square(first.codes - z).mean(), rtol=1e-5
    )  # commitment only
    for _ in range(60):
        out, variables = step(variables)
    assert out.loss < first.loss
    for code in np.unique(out.indices):
        centroid = z[out.indices == code].mean(0)
        np.testing.assert_allclose(
            variables["params"]["embedding"][code], centroid, rtol=1e-3, atol=1e-4
        )
    # Evaluation needs the parameter alone.
    evaluated = jax.jit(vq.apply)({"params": variables["params"]}, z)
    np.testing.assert_array_equal(evaluated.indices, out.indices)


def test_dead_codes_restart_from_latents_of_the_batch():
    vq, variables = codebook(ema_decay=0.5, restart_below=0.6)
    variables["params"]["embedding"] = variables["params"]["embedding"].at[3].set(1e3)
    z, key = normal(0, *SHAPE), jax.random.key(0)
    step = jax.jit(functools.partial(moving, vq, variables, z))
    out, moved = step(key)
    assert not (out.indices == 3).any()
    restarted = moved["params"]["embedding"][3]
    gap = np.abs(z.reshape(-1, DIM) - restarted).max(-1).min()
    assert gap < 1e-4  # Laplace smoothing moves it a little
    jax.tree.map(np.testing.assert_array_equal, step(key)[1], moved)
    assert not np.allclose(step(jax.random.key(1))[1]["params"]["embedding"][3], restarted)
    with pytest.raises(ValueError, match="needs a key"):
        vq.apply(variables, z, train=True, mutable=["codebook"])
    with pytest.raises(ValueError, match="needs ema_decay"):
        VectorQuantizer(NUM_CODES, DIM, restart_below=0.1).init(key, z)


def test_eight_devices_move_the_codebook_as_one_does():
    """Codes, restarts, perplexity and usage are those of the global batch."""
    vq, variables = codebook(ema_decay=0.9, restart_below=0.95)
    variables["params"]["embedding"] = variables["params"]["embedding"].at[3].set(1e3)
    z, key = normal(0, *SHAPE), jax.random.key(0)

    def step(vq, z):
        return vq.apply(variables, z, train=True, key=key, mutable=["codebook"])

    one, moved = jax.jit(functools.partial(step, vq))(z)
    many, moved_many = jax.pmap(functools.partial(step, vq.clone(axis_name="batch")), "batch")(
        z[:, None]
    )
    assert moved["codebook"]["uses"][3] == 1  # restarted
    for device in range(8):
        jax.tree.map(
            lambda a, b, d=device: np.testing.assert_allclose(a[d], b, rtol=1e-5),
            (moved_many, many.perplexity, many.usage),
            (moved, one.perplexity, one.usage),
        )
    np.testing.assert_array_equal(many.indices[:, 0], one.indices)


def test_initial_codes_and_wrong_width():
    key = init_key(0)
    params = VectorQuantizer(64, 16).init(key, jnp.zeros((1, 1, 1, 16)))["params"]
    assert 0.9 / 64 < jnp.abs(params["embedding"]).max() <= 1 / 64
    averaged, variables = codebook(ema_decay=0.99)
    initial = jax.eval_shape(averaged.init, jax.random.key(0), jnp.zeros(SHAPE))
    assert jax.tree.map(jnp.shape, initial) == jax.tree.map(jnp.shape, variables)
    with pytest.raises(ValueError, match="codes of width 16, got 3"):
        VectorQuantizer(64, 16).init(jax.random.key(0), jnp.zeros((1, 1, 1, 3)))


def gumbel(**options):
    quantizer = GumbelQuantizer(NUM_CODES, DIM, **options)
    params = {
        "embedding": normal(1, NUM_CODES, DIM),
        "proj": {"kernel": normal(2, 3, NUM_CODES), "bias": normal(3, NUM_CODES)},
    }
    return quantizer, {"params": params}


def test_gumbel_draws_codes_with_the_softmax_probabilities():
    quantizer, variables = gumbel()
    z, keys = normal(0, 1, 1, 1, 3), jax.random.split(jax.random.key(0), 20_000)
    out = jax.jit(quantizer.apply)(variables, jnp.tile(z, (20_000, 1, 1, 1)), keys)
    proj = variables["params"]["proj"]
    logits = np.asarray(z[0, 0, 0] @ proj["kernel"] + proj["bias"], np.float64)
    p = np.exp(logits) / np.exp(logits).sum()
    frequencies = np.bincount(np.ravel(out.indices), minlength=NUM_CODES) / 20_000
    np.testing.assert_allclose(frequencies, p, atol=5 * 0.5 / 20_000**0.5)
    codes = np.asarray(variables["params"]["embedding"])[out.indices]
    np.testing.assert_allclose(out.codes, codes, atol=1e-6)
    kl = np.sum(p * np.log(p * NUM_CODES))
    np.testing.assert_allclose(out.loss, 5e-4 * kl, rtol=1e-5)
    # Without keys: the likeliest code, and no mixture, whatever training has.
    for straight_through in (True, False):
        quantizer, variables = gumbel(straight_through=straight_through)
        likeliest = jax.jit(quantizer.apply)(variables, z)
        np.testing.assert_array_equal(likeliest.indices, p.argmax())
        code = variables["params"]["embedding"][p.argmax()]
        np.testing.assert_allclose(likeliest.codes[0, 0, 0], code, atol=1e-6)


@pytest.mark.parametrize("straight_through", [True, False])
def test_gumbel_gradient_is_that_of_the_soft_mixture(straight_through):
    quantizer, variables = gumbel(straight_through=straight_through)
    z, keys, tau = normal(0, 1, 1, 1, 3), jax.random.split(jax.random.key(0), 1), 2.0
    noise = jax.random.gumbel(keys[0], (1, 1, NUM_CODES))

    @jax.jit
    def both(z):
        def soft(z):
            proj = variables["params"]["proj"]
            mixture = jax.nn.softmax((z @ proj["kernel"] + proj["bias"] + noise) / tau)
            return mixture @ variables["params"]["embedding"]

        ours, vjp = jax.vjp(lambda z: quantizer.apply(variables, z, keys, tau).codes, z)
        theirs, vjp_soft = jax.vjp(soft, z)
        return ours, theirs, vjp(theirs)[0], vjp_soft(theirs)[0]

    ours, theirs, gradient, gradient_soft = both(z)
    np.testing.assert_allclose(gradient, gradient_soft, rtol=1e-5)
    assert np.allclose(ours, theirs) != straight_through


def test_renumbering_the_used_codes_goes_there_and_back():
    used = jnp.array([2, 3, 7])
    indices = jnp.array([[7, 2], [3, 5]])
    np.testing.assert_array_equal(to_used(indices, used), [[2, 0], [1, 3]])
    np.testing.assert_array_equal(to_used(indices, used, unknown=1), [[2, 0], [1, 1]])
    np.testing.assert_array_equal(to_all(to_used(indices, used), used), [[7, 2], [3, 2]])
