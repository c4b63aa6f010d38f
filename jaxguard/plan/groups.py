"""Which devices take part in a collective, and along which axis of the mesh they lie."""

import math
import re
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np


def groups_of(attributes: str, devices: int) -> list[tuple[int, ...]]:
    """Positions in the mesh of the devices of each group."""
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        sides = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        return _along(sides, re.findall(r"'(\w+)'", named[2]))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        order = np.arange(math.prod(map(int, iota[3].split(",")))).reshape([int(n) for n in iota[3].split(",")])
        order = order.transpose([int(n) for n in iota[4].split(",")]) if iota[4] else order
        return [tuple(map(int, group)) for group in order.reshape(int(iota[1]), int(iota[2]))]
    if listed := re.search(r"replica_groups=\{((?:\{[\d,]+\},?)+)\}", attributes):
        return [tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)+)\}", attributes):
        return [tuple(map(int, pair.split(","))) for pair in re.findall(r"\{([\d,]+)\}", pairs[1])]
    return [tuple(range(devices))]


def _along(sides: Mapping[str, int], names: Sequence[str]) -> list[tuple[int, ...]]:
    """Groups of devices that differ in the named axes only."""
    grid = np.arange(math.prod(sides.values())).reshape(list(sides.values()))
    moved = [list(sides).index(name) for name in names]
    grid = np.moveaxis(grid, moved, range(-len(moved), 0))
    return [tuple(map(int, group)) for group in grid.reshape(-1, math.prod(sides[name] for name in names))]


def axes_of(groups: Sequence[tuple[int, ...]], mesh: Mapping[str, int]) -> str:
    """The mesh axes whose devices the groups are, `?` if there are none such."""
    wanted = {frozenset(group) for group in groups}
    names = [name for name, size in mesh.items() if size > 1]
    for count in range(1, len(names) + 1):
        for chosen in combinations(names, count):
            along = {frozenset(group) for group in _along(mesh, chosen)}
            if wanted == along or all(any(group <= one for one in along) for group in wanted):
                return "+".join(chosen)
    return "?"
