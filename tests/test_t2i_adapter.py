"""T2I-Adapters: sizes, files of both kinds, features once a call."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict
from PIL import Image
from test_control import HINTS, plain, random_control, sampled

from latent_diffusion.convert.adapters import T2IWeights, read_adapter, write_t2i
from latent_diffusion.generation.controls import entries
from latent_diffusion.nets.t2i_adapter import T2IAdapter, _unshuffled
from latent_diffusion.nets.unet import UNet
from latent_diffusion.runtime.metrics import to_uint8

XL = {"channel_mult": (1, 2, 4), "attention_resolutions": (2, 4)}
# (kind, its fields, the U-Net, the places of its features, the number of its parameters)
RELEASED = [
    ("full", {}, {}, (2, 5, 8, 11), 77_369_280),
    ("full_xl", {"downscale": 16}, XL, (3, 5, 8, 9), 79_028_160),
    ("light", {"num_res_blocks": 4}, {}, (2, 5, 8, 11), 18_689_200),
]


def random_adapter(kind="full", side=8, **fields):
    net = T2IAdapter(kind, **fields)
    hint = jax.ShapeDtypeStruct((1, side, side, 3), "float32")
    tree = jax.eval_shape(net.init, jax.random.key(0), hint)["params"]
    rng = np.random.default_rng(3)
    params = {
        path: (0.3 * rng.normal(size=x.shape)).astype(np.float32)
        for path, x in flatten_dict(tree, sep="/").items()
    }
    return T2IWeights(path="net", params=params, fields=FrozenDict({"kind": kind, **fields}))


@pytest.mark.parametrize(("kind", "fields", "unet", "places", "count"), RELEASED)
def test_released_sizes_and_places(kind, fields, unet, places, count):
    net = T2IAdapter(kind, **fields)
    hint = jax.ShapeDtypeStruct((1, 128, 128, 3), "float32")
    tree = jax.eval_shape(net.init, jax.random.key(0), hint)["params"]
    assert sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree)) == count
    adapter = T2IWeights(path="net", params={}, fields=FrozenDict({"kind": kind, **fields}))
    assert adapter.places(UNet(**unet), 8) == places
    with pytest.raises(ValueError, match=r"^net: features 0 have .* it is another one's"):
        adapter.places(UNet(**unet), 4)


@functools.cache
def small():
    return random_adapter(channels=(8,), num_res_blocks=1, downscale=1)


def test_features_are_made_once_a_call_and_weights_are_traced(caplog, monkeypatch):
    net, seen, apply = small(), [], T2IAdapter.apply

    def counted(self, variables, hint):
        jax.debug.callback(lambda x: seen.append(x.shape), hint)
        return apply(self, variables, hint)

    monkeypatch.setattr(T2IAdapter, "apply", counted)
    want = sampled([(net, HINTS, 1.0)])
    jax.effects_barrier()
    assert seen == [(1, 8, 8, 3)] * 2  # of two batches, each of two steps with guidance
    assert np.abs(want - plain()).max() > 0.01
    with caplog.at_level("WARNING"), jax.log_compiles():
        caplog.clear()
        np.testing.assert_allclose(sampled([(net, HINTS, 0.0)]), plain(), atol=1e-4)
        beside = sampled([(net, HINTS, [0.5], {"null": False})])
    assert not [r for r in caplog.records if "Compiling" in r.getMessage()]
    assert np.abs(beside - want).max() > 1e-3
    both = sampled([(random_control(), HINTS, 0.0), (net, HINTS, 1.0)])
    np.testing.assert_allclose(both, want, atol=1e-4)
    halves = sampled([(net, HINTS, 0.75), (net, HINTS, 0.25)])  # features of several add up
    np.testing.assert_allclose(halves, want, atol=1e-4)
    with pytest.raises(ValueError, match="net: end is a setting of control nets"):
        sampled([(net, HINTS, 1.0, {"end": 0.5})])
    with pytest.raises(ValueError, match="tile_size doesn't go with a T2I-Adapter"):
        sampled([(net, HINTS, 1.0)], tile_size=8)


def test_a_hint_whose_sides_do_not_halve_to_the_last_features_is_refused():
    adapter = T2IWeights(path="net", params={}, fields=FrozenDict(kind="full_xl", downscale=16))
    for side in (48, 72):
        with pytest.raises(ValueError, match=f"^net: hint of 64×{side}: .* be multiples of 32$"):
            entries([(adapter, np.zeros((64, side, 3)), 1.0)], (64, side), 1)
    assert entries([(adapter, np.zeros((64, 96, 3)), 1.0)], (64, 96), 1)["hint_0"].shape[2] == 96


def test_a_net_of_one_channel_sees_the_brightness_as_pillow_has_it():
    net = T2IAdapter("full", (8,), 1, 1, in_channels=1)
    grey = np.asarray(Image.fromarray(to_uint8(2 * HINTS[0] - 1)).convert("L")) / np.float32(255)
    hints = jnp.stack([HINTS[0], np.stack([grey] * 3, -1), HINTS[0, ..., ::-1]])
    ((seen, want, turned),), _ = net.init_with_output(jax.random.key(0), hints)
    np.testing.assert_allclose(seen, want, atol=0.02)
    assert np.abs(turned - seen).max() > 0.05


def test_squares_of_pixels_become_channels_in_the_order_of_torch():
    """torch.nn.PixelUnshuffle: channel c·s² + i·s + j has the pixels (i, j) of channel c."""
    x, side = np.arange(2.0 * 4 * 6 * 3).reshape(2, 4, 6, 3), 2
    got = np.asarray(_unshuffled(jnp.asarray(x), side))
    assert got.shape == (2, 2, 3, 12)
    for c, i, j in np.ndindex(3, side, side):
        np.testing.assert_array_equal(got[..., c * 4 + i * 2 + j], x[:, i::2, j::2, c])


@pytest.mark.parametrize("kind", ["full", "full_xl", "light"])
def test_both_formats_are_read_and_written_bitwise(kind, tmp_path):
    downscale = 16 if kind == "full_xl" else 2
    own = {"channels": (8, 16, 16), "num_res_blocks": 2, "downscale": downscale}
    own["in_channels"] = 3 if kind == "full" else 1
    adapter = random_adapter(kind, 64, **own)
    write_t2i(adapter, tmp_path / "folder", "diffusers")
    write_t2i(adapter, tmp_path / "net.safetensors", "compvis")
    for path in (tmp_path / "folder", tmp_path / "net.safetensors"):
        read = read_adapter(path)
        assert {**read.fields} == {**adapter.fields}
        for name, array in adapter.params.items():
            np.testing.assert_array_equal(read.params[name], array)


def test_what_no_file_says_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^net has num_res_blocks=1, .* save it as diffusers"):
        write_t2i(small(), tmp_path / "net.safetensors", "compvis")
    write_t2i(small(), tmp_path / "net", "diffusers")
    config = tmp_path / "net" / "config.json"
    config.write_text(config.read_text().replace("T2IAdapter", "ControlNetUnionModel"))
    with pytest.raises(ValueError, match="unknown adapter 'ControlNetUnionModel'; known: Control"):
        read_adapter(tmp_path / "net")
