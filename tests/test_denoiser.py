"""A whole sampling call on a small U-Net: what is computed once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion.conditioners import make_conditioner
from latent_diffusion.denoiser import Denoiser
from latent_diffusion.models.unet import UNet
from latent_diffusion.schedules import make_schedule
from latent_diffusion.types import Conditioning

SHAPE = (4, 4, 2)
SCHEDULE = make_schedule()


def random(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@functools.cache
def made(vector=False, **fields):
    """A U-Net whose every parameter is random, the zero-initialised too."""
    unet = UNet(2, 8, (1,), 1, (1,), num_heads=2, num_groups=4, **fields)
    null = Conditioning(
        concat=random(1, 3, 4, 4, 1),
        context=random(2, 3, 5, 6),
        vector=random(3, 3, 32) if vector else None,
    )
    init = jax.jit(unet.init)(jax.random.key(0), jnp.zeros((3, *SHAPE)), jnp.zeros(3), null)
    leaves, tree = jax.tree.flatten(init["params"])
    params = tree.unflatten([0.3 * random(i, *x.shape) for i, x in enumerate(leaves)])
    denoiser = Denoiser({"unet": params}, SCHEDULE, unet, make_conditioner({}), "v")
    conditioning = jax.tree.map(lambda x: x[::-1] + 0.5, null)
    return denoiser, conditioning, null


VARIANTS = {
    "context": {},
    "vector": {
        "vector": True,
        "use_scale_shift_norm": True,
        "disable_self_attentions": (True,),
        "remat": True,
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_computed_once_changes_nothing(name):
    """The network with prepared keys, values and embeddings is the network."""
    denoiser, conditioning, null = made(**VARIANTS[name])
    t = jnp.array([900.0, 300.5, 7.0])
    z_t = random(5, 6, *SHAPE)

    @jax.jit
    def both(now):
        network, prepared = denoiser.prepare(t, SHAPE, null, conditioning)
        two = jax.tree.map(lambda *x: jnp.concatenate(x), *prepared)
        plain = jax.tree.map(lambda *x: jnp.concatenate(x), null, conditioning)
        now = jnp.full(6, now)
        return network(z_t, now, two), denoiser.denoise(z_t, now, plain)

    for now in t:
        ours, expected = both(now)
        assert float(jnp.std(expected)) > 0.1
        np.testing.assert_allclose(ours, expected, atol=1e-5 * float(jnp.abs(expected).max()))
