"""Read the collectives, which cross the network, in compiled programs."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# "%x = f32[8]{0} all-reduce(%y), channel_id=1 ..."; of asynchronous ones, "-done" has the result
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-done)?\(")
_HEADER = re.compile(r"^\s*(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{\s*$")
_CALLED = re.compile(r"(body|condition|to_apply|calls|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)")
_TRIPS = re.compile(r"known_trip_count[^0-9]*(\d+)")
_SHAPE = re.compile(r"\b(?:pred|[a-z]+(\d+)[a-z0-9]*)\[([\d,]*)\]")  # the bits, but of pred


class Collective(NamedTuple):
    """One collective operation: its name, the bytes of its result, and how often a step runs it."""

    kind: str
    num_bytes: int
    times: int


def collectives(text: str) -> list[Collective]:
    """All collectives of a compiled program. text: `compiled.as_text()`."""
    computations, entry = _computations(text)
    operations: list[Collective] = []

    def walk(name: str, times: int) -> None:
        for line in computations.get(name, ()):
            if match := _COLLECTIVE.search(line):
                operations.append(Collective(match[2], sum(_sizes(match[1])), times))
            trips = _TRIPS.search(line)
            for role, names in _CALLED.findall(line):
                inner = times * int(trips[1]) if trips and role == "body" else times
                for called in re.findall(r"[\w.\-]+", names):
                    walk(called, inner)

    walk(entry, 1)
    return operations


def total_bytes(text: str) -> dict[str, int]:
    """Bytes of results on a device, by kind of collective, in one run of the program."""
    totals: dict[str, int] = {}
    for kind, num_bytes, times in collectives(text):
        totals[kind] = totals.get(kind, 0) + num_bytes * times
    return totals


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of every computation, and the name of the entry computation."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if match := _HEADER.match(line):
            lines = computations.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        else:
            lines.append(line)
    return computations, entry


def _sizes(shapes: str) -> Iterator[int]:
    """The bytes of each array in the text of a shape."""
    for bits, dims in _SHAPE.findall(shapes):
        yield math.prod(map(int, filter(None, dims.split(",")))) * int(bits or 8) // 8
