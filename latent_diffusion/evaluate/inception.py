"""The InceptionV3 of FID: the network of "Rethinking the Inception Architecture" (Szegedy et al.,
CVPR 2016) with the deviations of the TensorFlow graph of 2015-12-05 that Heusel et al. (NeurIPS
2017) used:

- 1008 classes, not 1000; the Inception score leaves out the bias of the last layer;
- average pooling inside a block divides by the number of pixels in the window, not by nine;
- the last block pools by the maximum;
- pixels are (level - 128) / 128.

Batch normalisation is folded into the convolutions when the weights are read.
"""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from latent_diffusion.core.types import Array, Float, Params
from latent_diffusion.files.arrays import check_finite
from latent_diffusion.files.tensors import open_tensors
from latent_diffusion.nets.convolution import conv2d

SIZE = 299
NUM_CLASSES = 1008
BN_EPSILON = 1e-3
WEIGHTS_FILE = "pt_inception-2015-12-05-6726825d.pth"

Layer = tuple[int, int, int]  # channels, rows and columns of the kernel
PAIR: Layer = (384, 0, 0)  # two layers side by side, with kernels of 1×3 and 3×1
# A block is (branches, pool, channels). The layers of a branch run in sequence. The last branch is
# the pooled input, convolved to `channels` unless that is 0. If the pool is "shrink", the last
# layer of every branch has stride 2 and no padding.
Block = tuple[dict[str, tuple[Layer, ...]], str, int]


def _block_35(pool_channels: int) -> Block:
    branches: dict[str, tuple[Layer, ...]] = {
        "branch1x1": ((64, 1, 1),),
        "branch5x5": ((48, 1, 1), (64, 5, 5)),
        "branch3x3dbl": ((64, 1, 1), (96, 3, 3), (96, 3, 3)),
    }
    return branches, "average", pool_channels


def _block_17(width: int) -> Block:
    point, row, column = (width, 1, 1), (width, 1, 7), (width, 7, 1)
    branches: dict[str, tuple[Layer, ...]] = {
        "branch1x1": ((192, 1, 1),),
        "branch7x7": (point, row, (192, 7, 1)),
        "branch7x7dbl": (point, column, row, column, (192, 1, 7)),
    }
    return branches, "average", 192


def _block_8(pool: str) -> Block:
    branches: dict[str, tuple[Layer, ...]] = {
        "branch1x1": ((320, 1, 1),),
        "branch3x3": ((384, 1, 1), PAIR),
        "branch3x3dbl": ((448, 1, 1), (384, 3, 3), PAIR),
    }
    return branches, pool, 192


SHRINK_35: Block = (
    {
        "branch3x3": ((384, 3, 3),),
        "branch3x3dbl": ((64, 1, 1), (96, 3, 3), (96, 3, 3)),
    },
    "shrink",
    0,
)
SHRINK_17: Block = (
    {
        "branch3x3": ((192, 1, 1), (320, 3, 3)),
        "branch7x7x3": ((192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3)),
    },
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
    channels: int
    rows: int
    columns: int
    stride: int = 1
    padded: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w F"]:
        shape = (self.rows, self.columns, x.shape[-1], self.channels)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.channels,))
        above, left = ((size - 1) // 2 * self.padded for size in shape[:2])
        return nn.relu(conv2d(x, kernel, self.stride, ((above, above), (left, left))) + bias)


class _Mixed(nn.Module):
    """The block in `BLOCKS` with the module's name."""

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w F"]:
        branches, pool, pool_channels = BLOCKS[str(self.name)]
        outputs = []
        for branch, layers in branches.items():
            h = x
            for i, layer in enumerate(layers, 1):
                name = f"{branch}_{i}" if len(layers) > 1 else branch
                if layer == PAIR:
                    pair = (384, 1, 3, f"{name}a"), (384, 3, 1, f"{name}b")
                    h = jnp.concatenate([_ConvReLU(*p[:3], name=p[3])(h) for p in pair], -1)
                else:
                    shrinks = pool == "shrink" and i == len(layers)
                    stride, padded = (2, False) if shrinks else (1, True)
                    h = _ConvReLU(*layer, stride, padded, name=name)(h)
            outputs.append(h)
        pooled = _POOLS[pool](x)
        if pool_channels:
            pooled = _ConvReLU(pool_channels, 1, 1, name="branch_pool")(pooled)
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
        """levels: 0 ... 255, at least 75 pixels a side (299 in every metric).

        Returns the means of the last block over positions, and the class scores without bias.
        """
        x = (levels - 128.0) / 128.0
        x = _ConvReLU(32, 3, 3, 2, False, name="Conv2d_1a_3x3")(x)
        x = _ConvReLU(32, 3, 3, 1, False, name="Conv2d_2a_3x3")(x)
        x = _ConvReLU(64, 3, 3, name="Conv2d_2b_3x3")(x)
        x = _POOLS["shrink"](x)
        x = _ConvReLU(80, 1, 1, name="Conv2d_3b_1x1")(x)
        x = _ConvReLU(192, 3, 3, 1, False, name="Conv2d_4a_3x3")(x)
        x = _POOLS["shrink"](x)
        for name in BLOCKS:
            x = _Mixed(name=name)(x)
        features = jnp.mean(x, (1, 2))
        return features, nn.Dense(NUM_CLASSES, use_bias=False, name="fc")(features)


def load_inception_params(path: str | Path | None) -> Params:
    """Read the parameters of `InceptionV3` from the usual file or its safetensors.

    Raises ValueError, in one line, if the file is missing or has other contents.
    """
    if not path or not Path(path).is_file():
        raise ValueError(
            f"no Inception weights{f' at {path}' if path else ''}: fid, kid, is, pr and dc need "
            f"--features_path={WEIGHTS_FILE} (a release asset of pytorch-fid and of "
            "torch-fidelity), or its safetensors; or choose --features=alexnet"
        )
    tensors = {name: tensor.read() for name, tensor in open_tensors(path).tensors.items()}
    flat: dict[tuple[str, ...], np.ndarray] = {}
    for name, leaf in _leaves().items():
        array = _folded(tensors, name, path)
        if array.shape != leaf:
            raise ValueError(f"{path}: {'/'.join(name)} has shape {array.shape}, expected {leaf}")
        check_finite(path, {"/".join(name): array})
        flat[name] = array
    return unflatten_dict(flat)


def _leaves() -> dict[tuple[str, ...], tuple[int, ...]]:
    image = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
    tree = jax.eval_shape(InceptionV3().init, jax.random.key(0), image)["params"]
    return {name: leaf.shape for name, leaf in flatten_dict(tree).items()}


def _folded(tensors: dict[str, np.ndarray], name: tuple[str, ...], path: str | Path) -> np.ndarray:
    """The array for a leaf of `InceptionV3`: batch normalisation is folded into its convolution."""

    def get(*parts: str) -> np.ndarray:
        full = ".".join(parts)
        if full not in tensors:
            raise ValueError(f"{path} is not the FID InceptionV3: it has no {full!r}")
        return tensors[full].astype(np.float64)

    *module, leaf = name
    if module == ["fc"]:
        return get("fc", "weight").T.astype(np.float32)
    bn = [*module, "bn"]
    factor = get(*bn, "weight") / np.sqrt(get(*bn, "running_var") + BN_EPSILON)
    if leaf == "bias":
        return (get(*bn, "bias") - get(*bn, "running_mean") * factor).astype(np.float32)
    kernel = get(*module, "conv", "weight") * factor[:, None, None, None]
    return kernel.transpose(2, 3, 1, 0).astype(np.float32)
