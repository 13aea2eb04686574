"""The keys of examples belong to the examples, wherever they lie."""

import jax
import numpy as np

from latent_diffusion.rng import bernoulli_per_example, example_keys


def test_an_example_has_its_key_on_whatever_device_it_lies():
    rng = jax.random.key(3)
    whole = jax.random.key_data(example_keys(rng, 16))
    assert len(np.unique(np.asarray(whole), axis=0)) == 16

    def part(_):
        return jax.random.key_data(example_keys(rng, 2, "batch"))

    parts = jax.pmap(part, "batch")(np.zeros(8))
    np.testing.assert_array_equal(np.asarray(parts).reshape(16, -1), whole)


def test_a_probability_is_that_of_true():
    share = bernoulli_per_example(example_keys(jax.random.key(0), 4000), 0.1).mean()
    assert abs(float(share) - 0.1) < 0.02
