"""How conditions are brought to the size of the latent, against torch's interpolation."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from latent_diffusion.nets.conditioners.pictures import pick_nearest
from latent_diffusion.nets.convolution import average_pool
from latent_diffusion.nets.resize import cubic

X = np.random.default_rng(0).normal(size=(2, 24, 36, 3)).astype(np.float32)
THEIRS = torch.from_numpy(X).permute(0, 3, 1, 2)


@pytest.mark.parametrize("size", [(6, 9), (48, 30), (7, 5)])
def test_sizes(size):
    nearest = F.interpolate(THEIRS, size=size, mode="nearest").permute(0, 2, 3, 1)
    np.testing.assert_array_equal(pick_nearest(jnp.asarray(X), size), nearest)
    bicubic = F.interpolate(THEIRS, size=size, mode="bicubic").permute(0, 2, 3, 1)
    ours = np.einsum("ih,bhwc,jw->bijc", cubic(24, size[0]), X, cubic(36, size[1]))
    np.testing.assert_allclose(ours, bicubic, atol=3e-5)


def test_half_the_size():
    half = F.interpolate(THEIRS, scale_factor=0.5, mode="bilinear").permute(0, 2, 3, 1)
    np.testing.assert_allclose(average_pool(jnp.asarray(X)), half, atol=1e-6)
