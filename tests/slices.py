"""Slices of TPUs as libtpu describes them, for machines without it."""

import dataclasses
import itertools


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a mesh sees of a device that isn't there."""

    id: int
    process_index: int


SLICES = ["v5e:2x2", "v5e:4x4", "v5e:4x8", "v5e:8x8", "v5p:2x2x1", "v5p:2x2x4", "v5p:4x4x4"]
SLICES += ["v6e:2x4", "v6e:4x4"]


def chips_of(topology):
    """As libtpu describes them: chips and hosts are numbered along x, then y, then z; a host has
    2 × 2 × 1 chips."""
    width, height, depth = [*map(int, topology.partition(":")[2].split("x")), 1][:3]
    return [
        Chip(x + width * (y + height * z), x // 2 + width // 2 * (y // 2 + height // 2 * z))
        for z, y, x in itertools.product(range(depth), range(height), range(width))
    ]
