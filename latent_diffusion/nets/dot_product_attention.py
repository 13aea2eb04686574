"""softmax(q kᵀ / √D) v by the implementation that is best for a machine, a dtype and the sizes."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from latent_diffusion.core.types import Array, Bool, Float, lookup
from latent_diffusion.nets.blockwise_attention import blockwise_attention
from latent_diffusion.nets.splash_attention import splash_attention
from latent_diffusion.runtime.parallel import on_rows

LONG_ON_CPU = 400  # with this many tokens, blocks make a CPU faster
LONG_ON_TPU = 4096  # XLA computes shorter sequences; others who measured both chose this limit, too
LARGE = 4096**2  # scores of a head: 64 MB in float32, which no machine should store
CUDNN_MULTIPLE = 8  # tokens (some lengths fail backwards) and channels are padded to multiples


class Machine(NamedTuple):
    """A kind of device. platform: "cpu", "gpu" or "tpu"; capability: NVIDIA's, else (0, 0)."""

    platform: str
    capability: tuple[int, int] = (0, 0)


@functools.cache
def this_machine() -> Machine:
    """The machine of JAX's default devices."""
    version = getattr(jax.local_devices()[0], "compute_capability", None)
    is_number = isinstance(version, str) and version.replace(".", "").isdigit()
    capability = tuple(map(int, version.split("."))) if version and is_number else (0, 0)
    return Machine(jax.default_backend(), capability[:2])  # type: ignore[arg-type]


_traced_for: list[Machine] = []


@contextlib.contextmanager
def traced_for(machine: Machine) -> Iterator[None]:
    """Make "auto" choose for `machine`, on which the functions traced inside will run."""
    _traced_for.append(machine)
    try:
        yield
    finally:
        _traced_for.pop()


def choose(
    machine: Machine,
    dtype: Any,
    length: int,
    keys: int,
    width: int,
    causal: bool = False,
    masked: bool = False,
) -> str:
    """The name in `IMPLEMENTATIONS` by which "auto" attends `length` queries to `keys` keys.

    width: channels of a head. Masked sequences (texts) are short; XLA computes them on any machine.

    cuDNN takes 16-bit numbers and heads of at most 128 numbers, 256 on Hopper and later: all of
    Stable Diffusion's on an H100, and on an A100 all but the 160-wide ones of its 256 and 64
    positions. Splash pads a head to a multiple of 128 numbers, which only pays for long
    self-attention. On CPUs the axis of heads comes before that of tokens, as in matrix products,
    and long sequences go by blocks: up to twice as fast, and 5 times at 1,024 tokens.
    """
    platform, capability = machine
    if masked:
        return "xla"
    widest = 256 if capability >= (9, 0) else 128 if capability >= (8, 0) else 0
    if platform == "gpu" and jnp.dtype(dtype).itemsize == 2 and width <= widest:
        return "cudnn"
    if causal:
        return "xla"
    if platform == "cpu":
        if min(length, keys) >= LONG_ON_CPU:
            return "blocks"
        return "heads_first" if jnp.dtype(dtype) == jnp.float32 else "xla"
    if platform == "tpu" and min(length, keys) >= LONG_ON_TPU:
        return "splash"
    return "blocks" if length * keys >= LARGE else "xla"


def attend(
    q: Float[Array, "B L N D"],
    k: Float[Array, "B S N D"],
    v: Float[Array, "B S N D"],
    implementation: str = "auto",
    *,
    causal: bool = False,
    mask: Bool[Array, "#B S"] | None = None,
) -> Float[Array, "B L N D"]:
    """softmax(q kᵀ / √D) v for N heads; the softmax runs in float32.

    causal: position i attends to positions up to i. mask: false for positions to ignore.
    implementation: "auto" (see `choose`) or a name in `IMPLEMENTATIONS`; XLA computes masked
    attention in any case, and causal attention where cuDNN doesn't.
    """
    machine = _traced_for[-1] if _traced_for else this_machine()
    if q.dtype == jnp.float16 and machine.platform != "gpu":  # JAX multiplies float16 on GPUs only
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        return attend(q, k, v, implementation, causal=causal, mask=mask).astype(jnp.float16)
    masked = mask is not None
    if implementation == "auto":
        sizes = q.shape[1], k.shape[1], q.shape[3]
        implementation = choose(machine, q.dtype, *sizes, causal=causal, masked=masked)
    function = lookup(IMPLEMENTATIONS, implementation, "attention implementation")
    kind = {"splash": "tpu", "cudnn": "gpu"}.get(implementation, machine.platform)
    if kind != machine.platform:
        raise ValueError(
            f"attention={implementation!r} is for {kind.upper()}s, this is a {machine.platform}; "
            "use 'auto'"
        )
    if masked or (causal and implementation != "cudnn"):
        mask = None if mask is None else mask[:, None, None, :]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal)
    if implementation == "cudnn":
        function = functools.partial(_cudnn, causal=causal)
    if implementation == "blocks" and machine.platform != "cpu":
        function = functools.partial(function, scores=LARGE // 4)
    if implementation in ("xla", "heads_first"):
        return function(q, k, v)
    return on_rows(function, _xla)(q, k, v)


def _xla(q: Array, k: Array, v: Array) -> Array:
    return jax.nn.dot_product_attention(q, k, v, implementation="xla")


def _heads_first(q: Array, k: Array, v: Array) -> Array:
    """The definition, in matrix products of [B N L D]."""
    q, k, v = (x.swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
    return (nn.softmax(q @ k.swapaxes(2, 3)) @ v).swapaxes(1, 2)


def _cudnn(q: Array, k: Array, v: Array, causal: bool = False) -> Array:
    """cuDNN's kernel, for padded tokens and channels; it ignores the keys of the padding."""
    batch, length, _, width = q.shape
    keys = k.shape[1]

    def padded(x: Array) -> Array:
        added = (-x.shape[1] % CUDNN_MULTIPLE, -width % CUDNN_MULTIPLE)
        return jnp.pad(x, ((0, 0), (0, added[0]), (0, 0), (0, added[1]))) if any(added) else x

    q, k, v = map(padded, (q, k, v))
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=width**-0.5,
        is_causal=causal,
        key_value_seq_lengths=jnp.full(batch, keys, jnp.int32) if keys < k.shape[1] else None,
        implementation="cudnn",
    )
    return out[:, :length, :, :width]


IMPLEMENTATIONS: dict[str, Callable[[Array, Array, Array], Array]] = {
    "xla": _xla,
    "heads_first": _heads_first,
    "blocks": blockwise_attention,
    "cudnn": _cudnn,
    "splash": splash_attention,
}
