"""Whole first stages against diffusers' AutoencoderKL and VQModel, random weights copied over.

float32; everything agrees to 1e-4 of the output's scale, gradients with respect to the image too.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_convert import KL, VQ, close, draw, randomised, to_numpy, to_torch

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import latent_diffusion as ldm
from latent_diffusion.nets.posterior import DiagonalGaussian

THREE = {
    "block_out_channels": (32, 32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 2,
}
MODELS = {
    "kl-f2": lambda: diffusers.AutoencoderKL(**KL),
    "kl-f4": lambda: diffusers.AutoencoderKL(**{**KL, **THREE}),
    "kl-f4-noattn": lambda: diffusers.AutoencoderKL(
        **{**KL, **THREE}, mid_block_add_attention=False
    ),
    "vq-f2": lambda: diffusers.VQModel(**VQ),
    "vq-f4": lambda: diffusers.VQModel(**{**VQ, **THREE}),
}
SIDES = (16, 24)


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    """(theirs, our module, its parameters)."""
    torch.manual_seed(1)
    theirs = randomised(MODELS[request.param]())
    if isinstance(theirs, diffusers.VQModel):  # codes as far apart as the latents are
        with torch.no_grad():
            theirs.quantize.embedding.weight.normal_()
    folder = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(folder)
    first_stage = ldm.load(folder).first_stage
    return theirs, first_stage.module, first_stage.params


IMAGE = np.asarray(jnp.clip(draw(0, 2, *SIDES, 3), -1, 1))


def test_moments_are_equal(pair):
    theirs, module, params = pair
    moments = jax.jit(lambda p, x: module.apply({"params": p}, x, method="encode"))(params, IMAGE)
    with torch.no_grad():
        encoded = theirs.encode(to_torch(IMAGE))
    if module.regularization == "kl":
        close(moments, to_numpy(encoded.latent_dist.parameters))
        posterior = DiagonalGaussian.from_moments(moments)
        close(posterior.std, to_numpy(encoded.latent_dist.std))
        close(posterior.kl(), encoded.latent_dist.kl().numpy())
    else:
        close(moments, to_numpy(encoded.latents))


def test_forward_and_its_gradient_are_equal(pair):
    theirs, module, params = pair
    weights = np.asarray(draw(2, 2, *SIDES, 3))

    @jax.jit
    def ours(params, x):
        x_rec, vjp = jax.vjp(lambda x: module.apply({"params": params}, x).x, x)
        return x_rec, vjp(jnp.asarray(weights))[0]

    x_rec, gradient = ours(params, IMAGE)
    x = to_torch(IMAGE).requires_grad_()
    expected = theirs(x).sample
    (expected * to_torch(weights)).sum().backward()
    close(x_rec, to_numpy(expected))
    close(gradient, to_numpy(x.grad))


def test_codes_are_equal(pair):
    theirs, module, params = pair
    if module.regularization == "kl":
        pytest.skip("has no codes")
    indices = jax.jit(lambda p, x: module.apply({"params": p}, x, method="encode_to_indices"))(
        params, IMAGE
    )
    with torch.no_grad():
        _, _, (_, _, expected) = theirs.quantize(theirs.encode(to_torch(IMAGE)).latents)
    assert len(np.unique(indices)) > 4
    np.testing.assert_array_equal(indices.ravel(), expected.numpy().ravel())
    for legacy in (True, False):
        theirs.quantize.legacy = legacy
        with torch.no_grad():
            loss = theirs.quantize(theirs.encode(to_torch(IMAGE)).latents)[1]
        ours = module.clone(codebook_legacy=legacy)
        reg = jax.jit(lambda p, x, ours=ours: ours.apply({"params": p}, x).regularization)
        np.testing.assert_allclose(reg(params, IMAGE), loss, rtol=1e-4)
