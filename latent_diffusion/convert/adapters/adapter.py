"""The classes that `load_adapter` returns: changes of a model, apart from its parameters.

Every kind of adapter is a pytree, of a subclass of `Adapter`. The class names the argument of
`Model.sample` that takes it. Those for the argument `adapters` have `changes(bundle)`, which lists
the parameters that they change. LoRA and its variants share a class, since a file may mix them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict, unflatten_dict

from latent_diffusion.convert.adapters.names import Place, is_idle, places
from latent_diffusion.convert.bundle import Bundle, Part
from latent_diffusion.core.types import Params
from latent_diffusion.nets.eight_bits import layer_params
from latent_diffusion.optimisation.deltas import Array, Factors, delta, kind_of

Weight = float | int | Mapping[str, float | int]  # of a whole adapter, or by prefixes of modules


class Adapter(flax.struct.PyTreeNode):
    """path: the file; messages begin with it. argument: the one of `Model.sample` that takes it."""

    argument: ClassVar[str] = "adapters"
    path: str = flax.struct.field(pytree_node=False)

    def changes(self, bundle: Bundle) -> dict[str, Any]:
        """The changes, by path in the parameters of a `Denoiser`; ValueError if they don't fit."""
        raise ValueError(f"{self.path}: give this adapter as {self.argument}=")


def arrays_of(part: Part) -> dict[str, np.ndarray]:
    """The parameters of a part by path, read as float32 arrays."""
    return {path: np.asarray(t.astype(np.float32).read()) for path, t in part.params.items()}


def frozen(fields: Mapping[str, Any]) -> FrozenDict:
    """The fields as static data of a pytree, with tuples in the place of lists."""
    return FrozenDict({k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


class Change(flax.struct.PyTreeNode):
    """The change of one of our parameters, which may join several arrays of other libraries.

    factors: those of each of these arrays, or None. names: the modules of the arrays, in diffusers'
    names ("unet.mid_block…"). layout: how the parameter is made of them (see `convert.tables`).
    """

    factors: tuple[Factors | None, ...]
    names: tuple[str, ...] = flax.struct.field(pytree_node=False)
    layout: Any = flax.struct.field(pytree_node=False)

    def delta(self, parameter: Array, weights: Array) -> Array:
        """The array to add to the parameter. weights: [parts]."""
        theirs = self.layout.write(parameter)
        parts = [
            0 * base if factors is None else weights[i] * delta(base, factors)
            for i, (base, factors) in enumerate(zip(theirs, self.factors, strict=True))
        ]
        return self.layout.read(*parts)

    def added(self, result: Array, parameter: Array, weights: Array) -> Array:
        """`result` plus the change of `parameter`."""
        return result + self.delta(parameter, weights).astype(parameter.dtype)


class Rows(flax.struct.PyTreeNode):
    """Rows [n width] that are appended to one of our embedding tables, times their weight."""

    rows: Any
    names: tuple[str, ...] = flax.struct.field(pytree_node=False)

    def added(self, result: Array, parameter: Array, weights: Array) -> Array:
        """`result` with the rows behind it."""
        return jnp.concatenate([result, (weights[0] * self.rows).astype(result.dtype)])


class LowRank(Adapter):
    """A LoRA or a variant of it.

    modules: {name of the module in the file: {"weight" | "bias": factors}}; the factors are those
    of `optimisation.deltas`.
    """

    modules: Mapping[str, Mapping[str, Factors]]

    def changes(self, bundle: Bundle) -> dict[str, Any]:
        """See `Adapter`."""
        by_name = places(bundle)
        idle = {name for name in self.modules if name not in by_name and is_idle(bundle, name)}
        if unknown := [name for name in self.modules if name not in by_name and name not in idle]:
            some = ", ".join(unknown[:4]) + (" …" if len(unknown) > 4 else "")
            if any(name.startswith("lora_te") for name in unknown):
                some += "; lora_te_ is a model's only text encoder, lora_te1_ the first of two"
            raise ValueError(f"{self.path}: {len(unknown)} modules aren't in this model: {some}")
        factors_of: dict[str, dict[int, Any]] = {}
        place_of: dict[str, Place] = {}
        for name, arrays in self.modules.items():
            if name in idle:
                continue
            for array, factors in arrays.items():
                place = by_name[name].get(array)
                if place is None:
                    raise ValueError(f"{self.path}: {name} has no {array} in this model")
                layout = place_of.get(place.path, place).layout  # differs if q, k and v are joined
                if (
                    place.part in factors_of.setdefault(place.path, {})
                    or layout is not place.layout
                ):
                    raise ValueError(f"{self.path}: {place.names[place.part]} has two changes")
                _check(f"{self.path}: the {array} of {name}", place.shape, factors)
                factors_of[place.path][place.part] = factors
                place_of[place.path] = place
        return {
            path: Change(
                tuple(parts.get(i) for i in range(len(place_of[path].names))),
                place_of[path].names,
                place_of[path].layout,
            )
            for path, parts in factors_of.items()
        }


def _check(subject: str, shape: tuple[int, ...], factors: Factors) -> None:
    """Raise ValueError for factors that don't fit an array of this shape."""
    weight = jax.ShapeDtypeStruct(shape, np.float32)
    down = np.shape(factors.get("lora_down", ()))
    try:
        jax.eval_shape(delta, weight, dict(factors))
        fits = len(down) != len(shape) or "lora_mid" in factors or down[1:] == shape[1:]
    except (TypeError, ValueError, IndexError, ZeroDivisionError):  # the last for empty arrays
        fits = False
    if not fits:
        shapes = ", ".join(f"{name} {np.shape(x)}" for name, x in factors.items() if np.ndim(x))
        raise ValueError(f"{subject} is {shape}; {kind_of(factors)} doesn't fit it: {shapes}")


def weights_of(changes: Mapping[str, Any], weight: Weight, source: str) -> dict[str, np.ndarray]:
    """The weight of each part of each change; see `weight_of_names`."""
    names = [name for change in changes.values() for name in change.names]
    values = iter(weight_of_names(names, weight, source))
    return {
        path: np.asarray([next(values) for _ in change.names], np.float32)
        for path, change in changes.items()
    }


def weight_of_names(names: Sequence[str], weight: Weight, source: str) -> np.ndarray:
    """The weight of each name.

    weight: one number for all names, or numbers by prefixes of names ("unet.up_blocks",
    "text_encoder"), of which the longest counts; a name without a prefix gets the weight of "",
    by default 1. source: for messages. Raises ValueError for a prefix that no name begins with, and
    for a weight that is no finite number.
    """
    by_prefix = dict(weight) if isinstance(weight, Mapping) else {"": weight}
    for prefix, value in by_prefix.items():
        number = np.asarray(value)
        if number.ndim or number.dtype.kind not in "biuf" or not np.isfinite(number):
            raise ValueError(f"{source}: the weight {str(value)[:40]} isn't a finite number")
        if not any(_within(name, prefix) for name in names):
            blocks = sorted({".".join(name.split(".")[:3]) for name in names})
            raise ValueError(f"{source}: no module {prefix!r}; there are {', '.join(blocks)}")

    def of(name: str) -> float | int:
        prefixes = [prefix for prefix in by_prefix if _within(name, prefix)]
        return by_prefix[max(prefixes, key=len)] if prefixes else 1.0

    return np.asarray([of(name) for name in names], np.float32)


def _within(name: str, prefix: str) -> bool:
    return not prefix or name == prefix or name.startswith(f"{prefix}.")


def adapted(
    params: Params,
    changes: Sequence[Mapping[str, Any]],  # `Change`s and `Rows`
    weights: Sequence[Mapping[str, Array]],
) -> Params:
    """The parameters plus the sum of all changes, each of which is computed from `params` alone.

    `Rows` of a table have to come after its `Change`s.
    """
    base = flatten_dict(params, sep="/")
    for path in {path for each in changes for path in each}:
        base[path] = layer_params(base[path])
    result = dict(base)
    with jax.default_matmul_precision("highest"):
        for each, weight_of in zip(changes, weights, strict=True):
            for path, change in each.items():
                result[path] = change.added(result[path], base[path], weight_of[path])
    return unflatten_dict(result, sep="/")
