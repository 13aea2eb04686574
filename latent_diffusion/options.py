"""Options as fields of a frozen dataclass: default, type, range, effect and help, written once.

Checks, the flags of commands and the tables of the docs are made of them. This module needs
nothing but Python, so that a command can explain its flags at once.
"""

import dataclasses
import math
import numbers
from collections.abc import Iterable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Option:
    """One option.

    kind: the type of a value, or of each of several values; `object` for a function. count: how
    many values there are; None means one, or a list of any length. traced: whether a compiled
    program takes the value as its input, so that another value runs the same program. range: of
    numbers, such as "(0, 1]". off: the value that asks for nothing. needs: the argument without
    which the option has no meaning. flag: whether commands have a flag for it.
    """

    default: Any
    kind: type
    help: str
    count: int | None = 1
    traced: bool = False
    range: str = ""
    off: float | None = None
    needs: str = ""
    flag: bool = True

    def checked(self, name: str, value: Any) -> Any:
        """The value with the option's type; ValueError for a wrong type, number or length."""
        if self.count == 1 or (self.count is None and isinstance(value, numbers.Real)):
            return self._checked_entry(name, value)
        if not isinstance(value, Iterable) or isinstance(value, str):
            raise ValueError(f"{name}={value!r} must be a list of numbers")
        values = tuple(self._checked_entry(name, entry) for entry in value)
        if len(values) != (self.count or max(len(values), 1)):
            raise ValueError(f"{name} has {len(values)} values, expected {self.count or 'some'}")
        return values

    def _checked_entry(self, name: str, value: Any) -> Any:
        wanted: dict[type, tuple[Any, str]] = {
            bool: (bool, "true or false"),
            int: (numbers.Integral, "an integer"),
            float: (numbers.Real, "a number"),
            str: (str, "a text"),
            object: (object, "a function"),
        }
        if getattr(value, "ndim", None) == 0:  # a scalar of NumPy or JAX
            value = value.item()
        allowed, words = wanted[self.kind]
        if not isinstance(value, allowed) or isinstance(value, bool) != (self.kind is bool):
            raise ValueError(f"{name}={value!r} must be {words}")
        if self.kind not in (int, float):
            return value
        value = self.kind(value)
        if value != self.off and not in_range(value, self.range):
            raise ValueError(f"{name} must lie in {self.range or 'the reals'}, got {value:g}")
        return value


def in_range(value: float | int, range: str) -> bool:
    """Whether a finite number lies in a range such as "[0, 1)"; the empty text has no bounds."""
    if not math.isfinite(value):
        return False
    if not range:
        return True
    low, high = (float(bound) for bound in range[1:-1].split(","))
    above = low <= value if range[0] == "[" else low < value
    return above and (value <= high if range[-1] == "]" else value < high)


def option(default: Any, kind: type, help: str, **fields: Any) -> Any:
    """A field of a dataclass of options; `fields` are further ones of `Option`."""
    made = Option(default, kind, help, **fields)
    return dataclasses.field(default=default, metadata={"option": made})


def options_of(cls: Any) -> dict[str, Option]:
    """The options of a dataclass, by name."""
    return {field.name: field.metadata["option"] for field in dataclasses.fields(cls)}


def markdown(cls: Any) -> str:
    """The options of a dataclass as a table."""
    rows = ["| option | default | allowed | another value | meaning |", "|---|---|---|---|---|"]
    words = {bool: "true, false", int: "integer", float: "number", str: "name", object: "function"}
    for name, made in options_of(cls).items():
        default = "–" if made.default is None else f"`{made.default}`"
        allowed = made.range or words[made.kind]
        effect = "same program" if made.traced else "compiles"
        rows.append(f"| `{name}` | {default} | {allowed} | {effect} | {made.help} |")
    return "\n".join(rows) + "\n"
