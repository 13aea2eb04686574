"""Tables that map our parameter paths to tensor names in other libraries' files, and back.

In all tables, "ours" is a path of our parameters or modules, "theirs" a name in the other library.
A rule pairs the path of a module (a regular expression) with the name of the library's module; its
kind lists the arrays of the layer and the layout of each array. Matching the rules against a
parameter tree gives `Pair`s, by which tensors are read and written.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from latent_diffusion.files.tensor import Tensor, is_float


class Layout(NamedTuple):
    """read: makes our array from theirs. write: makes their arrays from ours, the exact inverse.

    Both take arrays of NumPy and of JAX. name: differs from that of any other layout, so that it
    stands for the functions in the descriptions of stored programs (`runtime.programs`).
    """

    name: str
    read: Callable[..., Any]
    write: Callable[[Any], tuple[Any, ...]]

    def __repr__(self) -> str:
        return f"Layout({self.name})"


def _one(name: str, read: Callable, write: Callable) -> Layout:
    return Layout(name, read, lambda x: (write(x),))


SAME = _one("same", lambda w: w, lambda k: k)
# OIHW, HWIO
CONV = _one("conv", lambda w: w.transpose(2, 3, 1, 0), lambda k: k.transpose(3, 2, 0, 1))
LINEAR = _one("linear", lambda w: w.T, lambda k: k.T)  # [out in], [in out]
# A linear map that is stored as a convolution over one position, in two or one dimensions.
LINEAR_2D = _one("linear_2d", lambda w: w[:, :, 0, 0].T, lambda k: k.T[:, :, None, None])
LINEAR_1D = _one("linear_1d", lambda w: w[:, :, 0].T, lambda k: k.T[:, :, None])


@functools.cache  # layouts are in the keys of compiled programs: equal ones must be identical
def _joint(num_heads: int, interleaved: bool) -> Layout:
    """Our array has q, k and v in its last axis (see `joint_qkv`); the library has three arrays."""
    axis = -2 if interleaved else -3

    def read(*parts: Any) -> Any:
        split = [p.T.reshape(*p.shape[1:], num_heads, -1) for p in parts]
        joint = (np if isinstance(parts[0], np.ndarray) else jnp).stack(split, axis)
        return joint.reshape(*joint.shape[:-3], -1)

    def write(joint: Any) -> tuple[Any, ...]:
        heads = (num_heads, 3, -1) if interleaved else (3, num_heads, -1)
        split = joint.reshape(*joint.shape[:-1], *heads)
        parts = [split.take(i, axis) for i in range(3)]
        return tuple(p.reshape(*p.shape[:-2], -1).T for p in parts)

    return Layout(f"joint, {num_heads} heads, interleaved: {interleaved}", read, write)


class Leaf(NamedTuple):
    """The name of our array in its layer, the ends of the names in files, and the layout.

    Files have several arrays where ours joins them.
    """

    ours: str
    theirs: tuple[str, ...]
    layout: Layout


def _layer(kernel: str, layout: Layout) -> tuple[Leaf, ...]:
    return Leaf(kernel, (".weight",), layout), Leaf("bias", (".bias",), SAME)


Kind = tuple[Leaf, ...]
KINDS: dict[str, Kind] = {
    "conv": _layer("kernel", CONV),
    "linear": _layer("kernel", LINEAR),
    "linear_2d": _layer("kernel", LINEAR_2D),
    "linear_1d": _layer("kernel", LINEAR_1D),
    "norm": _layer("scale", SAME),
    "embedding": (Leaf("embedding", (".weight",), SAME),),
}


def joint_qkv(names: Sequence[str], num_heads: int, interleaved: bool) -> Kind:
    """The kind of a joint map to q, k and v that files separate into three linear maps `names`.

    interleaved: our outputs are [head 0: q k v, head 1: q k v …], else all of q, then k, then v.
    """
    layout = _joint(num_heads, interleaved)
    return tuple(
        Leaf(ours, tuple(f".{name}.{theirs}" for name in names), layout)
        for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
    )


class Rule(NamedTuple):
    """Pairs modules of ours with modules in files.

    ours: a regular expression for paths of our modules. theirs: the template of the names in files,
    which may refer to groups of `ours`. kind: that of the layer, or its name in KINDS.
    """

    ours: str
    theirs: str
    kind: str | Kind


Table = Sequence[Rule]


def inside(blocks: Iterable[tuple[str, str]], modules: Table) -> list[Rule]:
    """The rules `modules` inside each of the blocks (ours, theirs)."""
    return [
        Rule(f"{ours}/{rule.ours}", f"{theirs}.{rule.theirs}", rule.kind)
        for ours, theirs in blocks
        for rule in modules
    ]


def prefixed(table: Table, prefix: str) -> list[Rule]:
    """The same rules for files in which all names begin with `prefix`."""
    return [rule._replace(theirs=prefix + rule.theirs) for rule in table]


def within(source: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, by the rest of their names."""
    return {name[len(prefix) :]: t for name, t in source.items() if name.startswith(prefix)}


def below(source: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The same as `within`, or all tensors if no name begins with `prefix`."""
    return within(source, prefix) or dict(source)


def matching(patterns: Sequence[str], source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose whole name matches one of the regular expressions."""
    return {n: t for n, t in source.items() if any(re.fullmatch(p, n) for p in patterns)}


def count(names: Iterable[str], prefix: str) -> int:
    """The number of different words (up to the next dot) that follow `prefix` in the names."""
    return len({name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix)})


class Pair(NamedTuple):
    """The path of one of our parameters, the names of its tensors in a file, and the layout."""

    ours: str
    theirs: tuple[str, ...]
    layout: Layout


def pairs(table: Table, paths: Iterable[str], partly: bool = False) -> list[Pair]:
    """Pair each of our parameters with its tensors in files.

    Raises a ValueError that lists the parameters without a rule in `table`, unless `partly`.
    """
    compiled = [(re.compile(rule.ours), rule) for rule in table]
    matched = {path: _pair(compiled, path) for path in paths}
    nameless = [path for path, pair in matched.items() if pair is None]
    if nameless and not partly:
        raise ValueError(f"this format has no name for {', '.join(nameless)}")
    return [pair for pair in matched.values() if pair is not None]


def _pair(rules: list[tuple[re.Pattern, Rule]], path: str) -> Pair | None:
    module, _, name = path.rpartition("/")
    for pattern, rule in rules:
        if match := pattern.fullmatch(module):
            for leaf in KINDS[rule.kind] if isinstance(rule.kind, str) else rule.kind:
                if leaf.ours == name:
                    start = match.expand(rule.theirs)
                    return Pair(path, tuple(start + end for end in leaf.theirs), leaf.layout)
    return None


def read_tensors(
    table: Table,
    shapes: Mapping[str, tuple[int, ...]],
    source: Mapping[str, Tensor],
    file: str,
    ignored: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Return our parameters, not yet read, from the tensors of a file.

    shapes: of all parameters that must result, by path. file: its name, for messages. ignored:
    regular expressions for names that may be left over. Raises one ValueError that lists the
    tensors that are missing, left over, of another shape or not floating-point, by both names.
    """
    missing, wrong, integers, ours = [], [], [], {}
    left = set(source)
    for pair in pairs(table, shapes):
        left -= set(pair.theirs)
        if absent := [name for name in pair.theirs if name not in source]:
            missing.append(f"{pair.ours} ← {', '.join(absent)}")
            continue
        parts = [source[name] for name in pair.theirs]
        shape = _shape(pair.layout.read, parts)
        if shape != shapes[pair.ours]:
            theirs = " + ".join(f"{name} {source[name].shape}" for name in pair.theirs)
            wrong.append(f"{pair.ours} {shapes[pair.ours]} ← {theirs}")
        elif not all(is_float(part.dtype) for part in parts):
            integers.append(f"{pair.ours} ← {pair.theirs[0]} {parts[0].dtype}")
        else:
            ours[pair.ours] = _derived(pair.layout.read, parts, shape)
    problems = {
        "missing": missing,
        "of another shape": wrong,
        "not floating-point": integers,
        "left over": sorted(left - matching(ignored, source).keys()),
    }
    lists = [f"{len(names)} {kind}: {_some(names)}" for kind, names in problems.items() if names]
    if lists:
        raise ValueError(f"{file} does not fit: {'; '.join(lists)}")
    return ours


def write_tensors(table: Table, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors for a file, not yet read, from our parameters."""
    theirs = {}
    for pair in pairs(table, ours):
        source = ours[pair.ours]
        for i, name in enumerate(pair.theirs):

            def part(x: np.ndarray, pair: Pair = pair, i: int = i) -> np.ndarray:
                return pair.layout.write(x)[i]

            shape = _shape(part, [source])
            if shape is None:
                raise ValueError(f"{pair.ours} {source.shape} can't be laid out as {name}")
            theirs[name] = _derived(part, [source], shape)
    return theirs


def _derived(function: Callable, parts: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    return Tensor(shape, parts[0].dtype, lambda: function(*(part.read() for part in parts)))


def _shape(function: Callable, parts: list[Tensor]) -> tuple[int, ...] | None:
    """The shape of a function's result, computed with stand-ins that take almost no memory."""
    try:
        return function(*(np.broadcast_to(np.int8(0), part.shape) for part in parts)).shape
    except (ValueError, IndexError):
        return None


def _some(names: Sequence[str], most: int = 6) -> str:
    rest = f" … and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
