"""Metrics against the packages that papers score with, on random weights and random pictures."""

import importlib

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from latent_diffusion.evaluate import inception
from latent_diffusion.evaluate.resize import resize


def need(name):
    """Import what may be missing, or may not fit the torch that is installed."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"needs {name}: {error}")


def pictures(num, height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (num, height, width, 3)).astype(np.uint8)


# ---------------------------------------------------------------------------- Inception


@pytest.fixture(scope="module")
def networks():
    """torch-fidelity's graph with random weights and statistics, and ours with the same."""
    theirs = need("torch_fidelity.feature_extractor_inceptionv3")
    torch.manual_seed(0)

    class Net(theirs.FeatureExtractorInceptionV3):
        def __init__(self, state_path):
            super().__init__("inception", ["2048", "logits_unbiased"], state_path)

    # The constructor wants a file; an empty network is the way to one of the right shape.
    class Empty(Net):
        def load_state_dict(self, *args, **kwargs):
            return None

    original, torch.load = torch.load, lambda *args, **kwargs: {}
    try:
        net = Empty(__file__)
    finally:
        torch.load = original
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.8, 1.6)
            module.bias.data.normal_(0, 0.1)
        elif isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    return net.eval()


def test_inception_equals_torch_fidelitys_and_pytorch_fids_graph(networks, tmp_path):
    path = tmp_path / inception.WEIGHTS_FILE
    torch.save(networks.state_dict(), path)
    params = inception.load_inception_params(path)
    images = pictures(2, 40, 32)
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        features, logits = networks(x)

    @jax.jit
    def ours(params, levels):
        return inception.InceptionV3().apply({"params": params}, levels)

    resized = resize(jax.numpy.asarray(images, jax.numpy.float32), 299, "tensorflow")
    got, scores = ours(params, resized)
    scale = features.abs().max().item()
    np.testing.assert_allclose(got, features.numpy(), atol=1e-4 * scale)
    np.testing.assert_allclose(scores, logits.numpy(), atol=1e-4 * logits.abs().max().item())

    fid = need("pytorch_fid.inception")
    original, fid.load_state_dict_from_url = (
        fid.load_state_dict_from_url,
        lambda *a, **k: networks.state_dict(),
    )
    try:
        net = fid.InceptionV3([3], resize_input=True).eval()
    finally:
        fid.load_state_dict_from_url = original
    with torch.no_grad():
        expected = net(x.float() / 255)[0][:, :, 0, 0].numpy()
    resized = resize(jax.numpy.asarray(images, jax.numpy.float32), 299, "bilinear")
    # pytorch-fid maps bytes to [-1, 1] by 2·level/255 - 1, TensorFlow by (level - 128)/128.
    got, _ = ours(params, resized * (256 / 255))
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())


# ---------------------------------------------------------------------------- resizing


@pytest.mark.parametrize("shape", [(64, 64), (32, 48), (512, 400), (299, 20)])
def test_bicubic_equals_clean_fid(shape):
    clean = need("cleanfid.resize").build_resizer("clean")
    images = pictures(2, *shape)
    expected = np.stack([clean(image) for image in images])
    got = resize(jax.numpy.asarray(images, jax.numpy.float32), 299, "bicubic")
    np.testing.assert_allclose(got, expected, atol=1e-2)  # levels of 255


def test_bilinear_equals_torch_interpolate():
    images = pictures(2, 64, 37).astype(np.float32)
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    expected = torch.nn.functional.interpolate(x, (299, 299), mode="bilinear", align_corners=False)
    got = resize(jax.numpy.asarray(images), 299, "bilinear")
    np.testing.assert_allclose(got, expected.numpy().transpose(0, 2, 3, 1), atol=1e-2)


# ---------------------------------------------------------------------------- formulas


@pytest.fixture(scope="module")
def features():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 16)) + 0.3
    return x.astype(np.float32), rng.normal(size=(280, 16)).astype(np.float32)


@pytest.mark.filterwarnings("ignore:The `disp` argument:DeprecationWarning")  # pytorch-fid's
def test_frechet_distance_equals_torch_fidelitys_and_pytorch_fids(features):
    from latent_diffusion.evaluate.frechet import frechet_distance, gaussian

    a, b = map(gaussian, features)
    ours = frechet_distance(a, b)
    theirs = need("torch_fidelity.metric_fid").fid_statistics_to_metric(
        {"mu": a.mean, "sigma": a.covariance}, {"mu": b.mean, "sigma": b.covariance}, False
    )
    assert ours == pytest.approx(next(iter(theirs.values())), rel=1e-6)
    numbers = need("pytorch_fid.fid_score").calculate_frechet_distance(
        a.mean, a.covariance, b.mean, b.covariance
    )
    assert ours == pytest.approx(numbers, rel=1e-6)


def test_kernel_distance_equals_torch_fidelitys(features):
    from latent_diffusion.evaluate.kernel import kernel_distance

    theirs = need("torch_fidelity.metric_kid").kid_features_to_metric(
        *map(torch.from_numpy, (features[0][:280], features[1])),
        kid_subsets=1,
        kid_subset_size=280,
        verbose=False,
    )
    ours = kernel_distance(features[0][:280], features[1])
    assert float(ours) == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)


def test_inception_score_equals_torch_fidelitys():
    from latent_diffusion.evaluate.inception_score import inception_score

    logits = np.random.default_rng(0).normal(size=(50, 12)).astype(np.float32)
    theirs = need("torch_fidelity.metric_isc").isc_features_to_metric(
        torch.from_numpy(logits), splits=1, shuffle=False
    )
    assert inception_score(logits) == pytest.approx(theirs["inception_score_mean"], rel=1e-6)


def test_precision_and_recall_equal_torch_fidelitys(features):
    from latent_diffusion.evaluate.neighbours import measure_precision_recall

    fake, real = features
    theirs = need("torch_fidelity.metric_prc").prc_features_to_metric(
        torch.from_numpy(fake), torch.from_numpy(real), prc_neighborhood=3, verbose=False
    )
    ours = measure_precision_recall(fake, real)
    for name in ("precision", "recall"):
        assert ours[name].value == pytest.approx(theirs[name], abs=1e-6)


def test_psnr_and_ssim_equal_scikit_images():
    from latent_diffusion.nets.losses.similarity import psnr, ssim

    skimage = need("skimage.metrics")
    x, y = np.random.default_rng(0).uniform(-1, 1, (2, 3, 24, 31, 3)).astype(np.float32)
    y = (0.7 * x + 0.3 * y).astype(np.float32)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    for i in range(3):
        assert float(psnr(x, y)[i]) == pytest.approx(
            skimage.peak_signal_noise_ratio(x[i], y[i], data_range=2), rel=1e-5
        )
        expected = skimage.structural_similarity(
            x[i], y[i], data_range=2, channel_axis=-1, **options
        )
        assert float(ssim(x, y)[i]) == pytest.approx(expected, abs=1e-5)
