import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion.nets.convolution import conv2d, upsample_nearest
from latent_diffusion.process.tiling import pad_to_multiple, tiled


def picture(height, width, channels=3):
    return np.random.default_rng(0).normal(size=(2, height, width, channels)).astype(np.float32)


def shrink(x):
    """Mean over 4×4 blocks: as local as a first stage with f=4 would ideally be."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 4, 4, w // 4, 4, c).mean((2, 4))


@pytest.mark.parametrize("shape", [(32, 32), (32, 72), (52, 16), (12, 8), (40, 44)])
@pytest.mark.parametrize("overlap", [0, 4, 12])
def test_a_local_map_is_the_same_in_tiles(shape, overlap):
    """Every output pixel is covered, in its place, with weights that sum to one."""
    x = jnp.asarray(picture(*shape))
    encoded = tiled(shrink, x, 16, overlap)
    np.testing.assert_allclose(encoded, shrink(x), atol=1e-6)
    decoded = tiled(lambda z: upsample_nearest(z, 4), encoded, 4, overlap // 4)
    np.testing.assert_allclose(decoded, upsample_nearest(encoded, 4), atol=1e-6)


def test_neighbours_fade_into_each_other():
    """Two tiles that answer 0 and 1 give a monotone slope as wide as their overlap, not a step."""

    def constant(part):
        return jnp.where(part[:, :1, :1] == 0, 0.0, 1.0) * jnp.ones_like(part)

    columns = jnp.tile(jnp.arange(24.0)[None, None, :, None], (1, 16, 1, 1))
    row = np.asarray(tiled(constant, columns, 16, 8))[0, 0, :, 0]
    np.testing.assert_array_equal(row[:8], 0.0)
    np.testing.assert_array_equal(row[16:], 1.0)
    np.testing.assert_allclose(np.diff(row[7:17]), 1 / 9, rtol=1e-5)
    # Four times as large, as a decoder makes them, the slope is four times as wide.
    large = tiled(lambda part: upsample_nearest(constant(part), 4), columns, 16, 8)
    np.testing.assert_allclose(np.diff(np.asarray(large)[0, 0, 31:65, 0]), 1 / 33, rtol=1e-4)


def test_only_one_tile_is_ever_in_the_network():
    """The compiled loop's temporary memory is set by the tile, not by the picture."""

    def wide(x):
        return conv2d(jnp.tanh(conv2d(x, jnp.ones((3, 3, 3, 32)), 1, 1)), jnp.ones((1, 1, 32, 3)))

    def temporary(size, **options):
        x = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
        run = jax.jit(lambda x: tiled(wide, x, **options))
        return run.lower(x).compile().memory_analysis().temp_size_in_bytes

    whole = temporary(256, tile=256, overlap=0)
    assert temporary(256, tile=64, overlap=0) < 0.3 * whole


def test_padding_and_bad_sizes():
    x = jnp.asarray(picture(5, 8))
    padded = pad_to_multiple(x, 4)
    assert padded.shape == (2, 8, 8, 3)
    np.testing.assert_array_equal(padded[:, 5:], jnp.repeat(x[:, 4:5], 3, 1))
    with pytest.raises(ValueError, match=r"overlap 16 must lie in \[0, tile size 16\)"):
        tiled(shrink, jnp.zeros((1, 32, 32, 3)), 16, 16)
    with pytest.raises(ValueError, match="tile size 16 and overlap 3 must be multiples of 4"):
        tiled(shrink, jnp.zeros((1, 32, 32, 3)), 16, 3)
