"""The gain of a cache of keys and values when a causal prior draws a grid of codes.

    python -m benchmarks.prior_cache

Draws 256 codes with the cache, and without it as pictures larger than the trained ones are drawn,
alternately; prints the median seconds of each, their ratio, and whether the codes are the same.
Seconds are the processor's, which other work on the machine hardly changes.
"""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.prepared_sampling import median_seconds
from latent_diffusion.core.rng import example_keys, init_key
from latent_diffusion.core.types import Conditioning
from latent_diffusion.models.prior import Prior
from latent_diffusion.nets.conditioners import make_conditioner
from latent_diffusion.nets.prior import CodeTransformer
from latent_diffusion.process.options import PriorOptions

SIDE, CODES, BATCH, RUNS = 16, 1024, 1, 3


def main() -> None:
    """Time both ways and print the medians."""
    module = CodeTransformer(
        num_codes=CODES, vocab_size=CODES + 1, max_length=SIDE**2, width=256, depth=4, num_heads=8
    )
    start_token = Conditioning(tokens=jnp.full((BATCH, 1), CODES, jnp.int32))
    codes, free = jnp.zeros((BATCH, SIDE**2), jnp.int32), jnp.zeros((BATCH, SIDE**2), bool)
    params = jax.jit(module.init)(init_key(0), codes, start_token)["params"]
    prior = Prior({"transformer": params}, module, make_conditioner({}))
    keys, options = (
        example_keys(jax.random.key(1), BATCH),
        PriorOptions(guidance_scale=None, top_k=None, top_p=None),
    )

    cached = jax.jit(lambda p: p._in_order(keys, start_token, options, (codes, free)))
    uncached = jax.jit(
        lambda p: p._in_windows(keys, start_token, options, (codes, free), (SIDE, SIDE), SIDE)
    )
    calls = {"with a cache": lambda: cached(prior), "without": lambda: uncached(prior)}
    drawn = [np.asarray(call()) for call in calls.values()]
    medians = median_seconds(calls, RUNS)
    for name, value in medians.items():
        print(f"{name:14s} {value:8.3f} s")
    same = (drawn[0] == drawn[1]).mean()
    print(f"{medians['without'] / medians['with a cache']:.1f} times; {same:.1%} of codes equal")


if __name__ == "__main__":
    main()
