"""The keys of examples belong to the examples, wherever they lie."""

import jax
import numpy as np
import pytest

from latent_diffusion.core.rng import (
    bernoulli_per_example,
    example_keys,
    init_key,
    normal_per_example,
    seed_key,
)


def test_an_example_has_its_key_on_whatever_device_it_lies():
    rng = jax.random.key(3)
    whole = jax.random.key_data(example_keys(rng, 16))
    assert len(np.unique(np.asarray(whole), axis=0)) == 16

    def part(_):
        return jax.random.key_data(example_keys(rng, 2, "batch"))

    parts = jax.pmap(part, "batch")(np.zeros(8))
    np.testing.assert_array_equal(np.asarray(parts).reshape(16, -1), whole)


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_an_example_draws_alone_by_any_generator_of_jax(impl):
    """Under vmap the generator `rbg` would draw by the first key for all."""
    keys = example_keys(jax.random.key(3, impl=impl), 4)
    want = example_keys(jax.random.key(3), 4)
    np.testing.assert_array_equal(*map(jax.random.key_data, (keys, want)))
    noise = normal_per_example(keys, (2,))
    np.testing.assert_array_equal(normal_per_example(keys[2:], (2,)), noise[2:])


def test_a_probability_is_that_of_true():
    share = bernoulli_per_example(example_keys(jax.random.key(0), 4000), 0.1).mean()
    assert abs(float(share) - 0.1) < 0.02


def test_keys_of_networks_draw_like_random_numbers():
    keys = jax.random.split(init_key(7), (200, 10))
    folded = jax.vmap(jax.random.fold_in, (None, 0))(init_key(7), np.arange(10_000))
    data = np.concatenate([jax.random.key_data(k).reshape(-1, 2) for k in (keys, folded)])
    assert len(np.unique(data[2000:], axis=0)) == 10_000
    assert not np.array_equal(data[0], jax.random.key_data(init_key(8)))

    draws = np.asarray(jax.vmap(lambda key: jax.random.normal(key, (64, 64)))(keys.reshape(-1)))
    draws = draws.reshape(2000, 4096)
    assert abs(draws.mean()) < 5 / np.sqrt(draws.size)
    assert abs(draws.var() - 1) < 5 * np.sqrt(2 / draws.size)
    assert abs((draws**4).mean() - 3) < 5 * np.sqrt(96 / draws.size)
    across_keys = np.corrcoef(draws[:100])  # of arrays, and below of neighbours in an array
    assert abs(across_keys - np.eye(100)).max() < 6 / np.sqrt(4096)
    for lag in (1, 2, 64, 1024):
        neighbours = (draws[:, lag:] * draws[:, :-lag]).mean()
        assert abs(neighbours) < 5 / np.sqrt(draws.size)


def test_all_64_bits_of_a_seed_count():
    seeds = (5, 2**32 + 5, 2**33 + 5, 2**63 + 5, 2**64 - 1)
    for key_of in (seed_key, init_key):
        keys = [jax.random.key_data(key_of(seed)).tolist() for seed in seeds]
        assert len({*map(tuple, keys)}) == len(seeds)
        for seed in (-1, 2**64):
            with pytest.raises(ValueError, match=rf"^seed={seed} must lie in \[0, 2\^64\)$"):
                key_of(seed)
    assert jax.random.key_data(seed_key(5)).tolist() == [0, 5]  # as of `jax.random.key`


def test_bits_of_every_width_are_balanced():
    for dtype in (np.uint8, np.uint16, np.uint32):
        bits = np.asarray(jax.random.bits(init_key(0), (50_000,), dtype))
        ones = np.unpackbits(bits.view(np.uint8).reshape(-1, bits.itemsize), axis=1).mean(axis=0)
        assert abs(ones - 0.5).max() < 5 * 0.5 / np.sqrt(50_000)
