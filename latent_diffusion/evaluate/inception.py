"""InceptionV3 as FID means it: the network of "Rethinking the Inception Architecture" (Szegedy et
al., CVPR 2016) with the departures of the frozen TensorFlow graph of 2015-12-05 that Heusel et al.
(NeurIPS 2017) scored with:

- 1008 classes, not 1000; the Inception score leaves out the bias of the last layer;
- average pooling inside a block divides by the pixels it saw, not by nine;
- the last block pools by the maximum;
- pixels are (level - 128) / 128.

Batch normalisation is folded into the convolutions when the weights are read.
"""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from latent_diffusion.files.tensors import open_tensors
from latent_diffusion.nets.convolution import conv2d
from latent_diffusion.types import Array, Float, Params

SIZE = 299
NUM_CLASSES = 1008
BN_EPSILON = 1e-3
WEIGHTS_FILE = "pt_inception-2015-12-05-6726825d.pth"

# A convolution is (name, channels, rows, columns, stride, "same" padding or none).
Layer = tuple[str, int, int, int, int, bool]


def _conv(name: str, channels: int, kernel: str, stride: int = 1) -> Layer:
    """kernel: "3x1" (rows × columns); with stride 2 nothing is padded."""
    rows, columns = map(int, kernel.split("x"))
    return name, channels, rows, columns, stride, stride == 1


# A block is (branches, pool, channels). A branch is a chain; where it ends in two convolutions,
# they stand side by side. The pooled input, convolved where it gets `channels`, is the last branch.
Branch = tuple[Any, ...]  # of Layer, or of a pair of Layers
Block = tuple[tuple[Branch, ...], str, int]


def _block_35(pool_channels: int) -> Block:
    branches: tuple[Branch, ...] = (
        (_conv("branch1x1", 64, "1x1"),),
        (_conv("branch5x5_1", 48, "1x1"), _conv("branch5x5_2", 64, "5x5")),
        (
            _conv("branch3x3dbl_1", 64, "1x1"),
            _conv("branch3x3dbl_2", 96, "3x3"),
            _conv("branch3x3dbl_3", 96, "3x3"),
        ),
    )
    return branches, "average", pool_channels


def _block_17(width: int) -> Block:
    branches: tuple[Branch, ...] = (
        (_conv("branch1x1", 192, "1x1"),),
        (
            _conv("branch7x7_1", width, "1x1"),
            _conv("branch7x7_2", width, "1x7"),
            _conv("branch7x7_3", 192, "7x1"),
        ),
        (
            _conv("branch7x7dbl_1", width, "1x1"),
            _conv("branch7x7dbl_2", width, "7x1"),
            _conv("branch7x7dbl_3", width, "1x7"),
            _conv("branch7x7dbl_4", width, "7x1"),
            _conv("branch7x7dbl_5", 192, "1x7"),
        ),
    )
    return branches, "average", 192


def _block_8(pool: str) -> Block:
    branches: tuple[Branch, ...] = (
        (_conv("branch1x1", 320, "1x1"),),
        (
            _conv("branch3x3_1", 384, "1x1"),
            (_conv("branch3x3_2a", 384, "1x3"), _conv("branch3x3_2b", 384, "3x1")),
        ),
        (
            _conv("branch3x3dbl_1", 448, "1x1"),
            _conv("branch3x3dbl_2", 384, "3x3"),
            (_conv("branch3x3dbl_3a", 384, "1x3"), _conv("branch3x3dbl_3b", 384, "3x1")),
        ),
    )
    return branches, pool, 192


SHRINK_35: Block = (
    (
        (_conv("branch3x3", 384, "3x3", 2),),
        (
            _conv("branch3x3dbl_1", 64, "1x1"),
            _conv("branch3x3dbl_2", 96, "3x3"),
            _conv("branch3x3dbl_3", 96, "3x3", 2),
        ),
    ),
    "shrink",
    0,
)
SHRINK_17: Block = (
    (
        (_conv("branch3x3_1", 192, "1x1"), _conv("branch3x3_2", 320, "3x3", 2)),
        (
            _conv("branch7x7x3_1", 192, "1x1"),
            _conv("branch7x7x3_2", 192, "1x7"),
            _conv("branch7x7x3_3", 192, "7x1"),
            _conv("branch7x7x3_4", 192, "3x3", 2),
        ),
    ),
    "shrink",
    0,
)
BLOCKS: dict[str, Block] = {
    "Mixed_5b": _block_35(32),
    "Mixed_5c": _block_35(64),
    "Mixed_5d": _block_35(64),
    "Mixed_6a": SHRINK_35,
    "Mixed_6b": _block_17(128),
    "Mixed_6c": _block_17(160),
    "Mixed_6d": _block_17(160),
    "Mixed_6e": _block_17(192),
    "Mixed_7a": SHRINK_17,
    "Mixed_7b": _block_8("average"),
    "Mixed_7c": _block_8("max"),
}


class _ConvReLU(nn.Module):
    layer: Layer

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w F"]:
        _, channels, rows, columns, stride, same = self.layer
        shape = (rows, columns, x.shape[-1], channels)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        sides = ((rows - 1) // 2 * same, (columns - 1) // 2 * same)
        padding = ((sides[0], sides[0]), (sides[1], sides[1]))
        return nn.relu(conv2d(x, kernel, stride, padding) + bias)


class _Mixed(nn.Module):
    block: Block

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w F"]:
        branches, pool, pool_channels = self.block
        outputs = []
        for branch in branches:
            h = x
            for part in branch:
                parallel = (part,) if isinstance(part[0], str) else part
                h = jnp.concatenate([_ConvReLU(c, name=c[0])(h) for c in parallel], -1)
            outputs.append(h)
        pooled = _POOLS[pool](x)
        if pool_channels:
            pooled = _ConvReLU(_conv("branch_pool", pool_channels, "1x1"), name="branch_pool")(
                pooled
            )
        return jnp.concatenate([*outputs, pooled], -1)


_POOLS = {
    "average": lambda x: nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False),
    "max": lambda x: nn.max_pool(x, (3, 3), padding="SAME"),
    "shrink": lambda x: nn.max_pool(x, (3, 3), (2, 2)),
}


class InceptionV3(nn.Module):
    """The network from pixels to pooled features and class scores."""

    @nn.compact
    def __call__(
        self, levels: Float[Array, "B H W 3"]
    ) -> tuple[Float[Array, "B 2048"], Float[Array, "B 1008"]]:
        """levels: 0 ... 255, at least 75 a side (299 in every metric).

        Returns the last mean over positions, and the scores of the classes without their bias.
        """

        def conv(x: Array, name: str, channels: int, kernel: int, stride: int, same: bool) -> Array:
            return _ConvReLU((name, channels, kernel, kernel, stride, same), name=name)(x)

        x = (levels - 128.0) / 128.0
        x = conv(x, "Conv2d_1a_3x3", 32, 3, 2, False)
        x = conv(x, "Conv2d_2a_3x3", 32, 3, 1, False)
        x = conv(x, "Conv2d_2b_3x3", 64, 3, 1, True)
        x = _POOLS["shrink"](x)
        x = conv(x, "Conv2d_3b_1x1", 80, 1, 1, False)
        x = conv(x, "Conv2d_4a_3x3", 192, 3, 1, False)
        x = _POOLS["shrink"](x)
        for name, block in BLOCKS.items():
            x = _Mixed(block, name=name)(x)
        features = jnp.mean(x, (1, 2))
        return features, nn.Dense(NUM_CLASSES, use_bias=False, name="fc")(features)


def load_inception_params(path: str | Path | None) -> Params:
    """Read the parameters of `InceptionV3` from the usual file or its safetensors.

    Raises ValueError in one line where the file is missing or holds something else.
    """
    if not path or not Path(path).is_file():
        raise ValueError(
            f"no Inception weights at {str(path)!r}: FID, KID, IS and precision/recall need "
            f"{WEIGHTS_FILE} (a release asset of pytorch-fid and of torch-fidelity), or its "
            "safetensors; without it, choose other features"
        )
    given = {name: tensor.read() for name, tensor in open_tensors(path).tensors.items()}
    flat: dict[tuple[str, ...], np.ndarray] = {}
    for name, leaf in _leaves().items():
        array = _folded(given, name, path)
        if array.shape != leaf:
            raise ValueError(f"{path}: {'/'.join(name)} has shape {array.shape}, expected {leaf}")
        flat[name] = array
    return unflatten_dict(flat)


def _leaves() -> dict[tuple[str, ...], tuple[int, ...]]:
    image = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
    tree = jax.eval_shape(InceptionV3().init, jax.random.key(0), image)["params"]
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {tuple(key.key for key in path): leaf.shape for path, leaf in paths}


def _folded(given: dict[str, np.ndarray], name: tuple[str, ...], path: str | Path) -> np.ndarray:
    """The array for one of our leaves: a convolution with its batch normalisation folded in."""

    def get(*parts: str) -> np.ndarray:
        full = ".".join(parts)
        if full not in given:
            raise ValueError(f"{path} is not the FID InceptionV3: it has no {full!r}")
        return given[full].astype(np.float64)

    *module, leaf = name
    if module == ["fc"]:
        return get("fc", "weight").T.astype(np.float32)
    bn = [*module, "bn"]
    factor = get(*bn, "weight") / np.sqrt(get(*bn, "running_var") + BN_EPSILON)
    if leaf == "bias":
        return (get(*bn, "bias") - get(*bn, "running_mean") * factor).astype(np.float32)
    kernel = get(*module, "conv", "weight") * factor[:, None, None, None]
    return kernel.transpose(2, 3, 1, 0).astype(np.float32)
