"""Changes of a weight that are computed from small factors: LoRA and its variants.

A weight is [out in …], with the positions of a convolution last, and so are all factors. The
formulas are those of LyCORIS (Yeh et al. 2024; github.com/KohakuBlueleaf/LyCORIS); they use only
operators, so that they accept NumPy arrays and traced arrays.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Array = Any  # a NumPy or a JAX array
Factors = Mapping[str, Any]  # arrays by their names in KINDS; "scale" []; "magnitude" for DoRA

_TINY = 1e-14  # keeps the norm of a row of zeros, and its gradient, finite


def delta(weight: Array, factors: Factors) -> Array:
    """The change to add to `weight` [out in …].

    With a "magnitude" (DoRA, Liu et al. 2024) of each output, or "magnitude_in" of each input, the
    sum is rescaled to have these norms. Raises ValueError or TypeError for factors that don't fit
    the weight.
    """
    change = KINDS[kind_of(factors)].change(weight, factors)
    if len(change) != len(weight):
        raise ValueError(f"a change of {len(change)} outputs for a weight of {len(weight)}")
    change = factors["scale"] * change.reshape(weight.shape)
    if "magnitude" in factors:
        return _rescaled(weight + change, factors["magnitude"], (1, 2)) - weight
    if "magnitude_in" in factors:
        return _rescaled(weight + change, factors["magnitude_in"], (0, 2)) - weight
    return change


def kind_of(factors: Mapping[str, Any]) -> str:
    """The name of the kind in KINDS; ValueError for factors of no kind and for missing factors."""
    for name, kind in KINDS.items():
        if present := [factor for factor in factors if factor in kind.names]:
            for choice in kind.choices:
                if not any(set(names) <= factors.keys() for names in choice):
                    lacking = " or ".join(" and ".join(names) for names in choice)
                    raise ValueError(f"{name} with {', '.join(present)} lacks {lacking}")
            return name
    raise ValueError(f"no change of a weight: {', '.join(factors)}")


def rank_of(factors: Mapping[str, Any]) -> int | None:
    """The rank r by which α is divided; None for kinds without rank."""
    for name, axis in (("lora_down", 0), ("hada_w1_b", 0), ("b2", 0)):
        if name in factors:
            return factors[name].shape[axis]
    for name in ("lokr_w1_b", "lokr_w2_b"):
        if name in factors:
            return factors[name].shape[0]
    return None


def norms(weight: Array) -> Array:
    """The norm [out] of each output's weights, the initial magnitude of a DoRA."""
    return ((weight.reshape(len(weight), -1) ** 2).sum(1) + _TINY) ** 0.5


def _rescaled(weight: Array, magnitude: Array, axes: tuple[int, int]) -> Array:
    flat = weight.reshape(*weight.shape[:2], -1)
    norm = ((flat * flat).sum(axes, keepdims=True) + _TINY) ** 0.5
    return (flat * (magnitude.reshape(norm.shape) / norm)).reshape(weight.shape)


def _product(up: Array, down: Array) -> Array:
    return up.reshape(len(up), -1) @ down.reshape(len(down), -1)


def _tucker(core: Array, up: Array, down: Array) -> Array:
    """[out in …] from a core [i j …], up [out i] and down [j in]."""
    i, j, *positions = core.shape
    halfway = (up.reshape(-1, i) @ core.reshape(i, -1)).reshape(-1, j, *positions)
    return down.reshape(j, -1).T @ halfway.reshape(len(halfway), j, -1)


def _lora(weight: Array, f: Factors) -> Array:
    """B·A, or with a convolution's core between them (LoCon with Tucker decomposition)."""
    up, down = f["lora_up"], f["lora_down"]
    return _tucker(f["lora_mid"], up, down) if "lora_mid" in f else _product(up, down)


def _loha(weight: Array, f: Factors) -> Array:
    """The element-wise product of two products (Hyeon-Woo et al. 2022)."""

    def half(n: int) -> Array:
        up, down = f[f"hada_w{n}_a"], f[f"hada_w{n}_b"]
        return _tucker(f[f"hada_t{n}"], up.T, down) if f"hada_t{n}" in f else _product(up, down)

    return half(1) * half(2)


def _lokr(weight: Array, f: Factors) -> Array:
    """The Kronecker product of two matrices, each of which may be a product of two factors."""
    left = f["lokr_w1"] if "lokr_w1" in f else f["lokr_w1_a"] @ f["lokr_w1_b"]
    if "lokr_w2" in f:
        right = f["lokr_w2"]
    elif "lokr_t2" in f:
        right = _tucker(f["lokr_t2"], f["lokr_w2_a"].T, f["lokr_w2_b"])
    else:
        right = _product(f["lokr_w2_a"], f["lokr_w2_b"])
    right = right.reshape(len(right), -1)
    product = left[:, None, :, None] * right[None, :, None, :]
    return product.reshape(len(left) * len(right), -1)


def _glora(weight: Array, f: Factors) -> Array:
    """B₁·B₂ + W·A₁·A₂ (Chavan et al. 2023)."""
    flat = weight.reshape(*weight.shape[:2], -1)
    through = _matrix(f["a2"]).T @ (_matrix(f["a1"]).T @ flat)
    return _product(f["b1"], f["b2"]).reshape(flat.shape) + through


def _matrix(factor: Array) -> Array:
    return factor.reshape(factor.shape[:2])


def _full(weight: Array, f: Factors) -> Array:
    return f["diff"]


Choice = tuple[tuple[str, ...], ...]  # groups of names; all names of a group must be present


class Kind(NamedTuple):
    """A formula, the factors that it needs (one group of each choice), and optional factors."""

    change: Callable[[Array, Factors], Array]
    choices: tuple[Choice, ...]
    optional: tuple[str, ...] = ()

    @property
    def names(self) -> set[str]:
        """All factors of this kind."""
        groups = (names for choice in self.choices for names in choice)
        return {name for group in groups for name in group} | set(self.optional)


def _needed(*names: str) -> tuple[Choice, ...]:
    return tuple(((name,),) for name in names)


KINDS = {
    "LoRA": Kind(_lora, _needed("lora_down", "lora_up"), ("lora_mid",)),
    "LoHa": Kind(
        _loha,
        (*_needed("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),),
        ("hada_t1", "hada_t2"),
    ),
    "LoKr": Kind(
        _lokr,
        (
            (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b")),
            (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b")),
        ),
        ("lokr_t2",),
    ),
    "GLoRA": Kind(_glora, _needed("a1", "a2", "b1", "b2")),
    "full": Kind(_full, _needed("diff")),
}
