"""Seeded mutations: of plain trees, whose values take hostile ones, and of bytes."""

import json
import random
import re
from typing import Any

RAW = (
    "NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 400, "9" * 5000, "-0", "0.5", "1e308", str(2**63), str(2**31),
    "[" * 3000 + "]" * 3000, '{"a":' * 500 + "1" + "}" * 500, '"\\ud800"', '"\\u0000"',
)  # fmt: skip
"""What JSON can spell and Python's trees or json.dumps cannot hold."""
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31 - 1, 2**31, 2**53 + 1, -(2**63), 0.5, -1.5, 1e300, "", " ", "x", "1", "-1", "true", "null",
    "../x", "/etc/passwd", "a\0b", "a\nb", "$\\frac{x$", "é" * 300, "y" * 100_000, "\u202e\u2028", [], [[]], [None], ["x"], [1, 2],
    {}, {"a": 1}, {"": None}, [{}], {"role": 1}, [[[[[1]]]]],
)  # fmt: skip
_MARK = "\ue000raw{}\ue001"


def mutated(tree: Any, rng: random.Random) -> Any:
    """A copy with one to three changes: a value replaced, a field gone, renamed or new, a list longer or empty."""
    tree = json.loads(json.dumps(tree))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(tree))
        if not places:
            return hostile(rng)
        parent, key = rng.choice(places)
        what = rng.random()
        if what < 0.7:
            parent[key] = hostile(rng)
        elif what < 0.85:
            del parent[key]
        elif isinstance(parent, dict):
            parent[f"{key}{rng.choice(('_', 'x', chr(0), '$'))}"] = (
                parent.pop(key) if rng.random() < 0.5 else hostile(rng)
            )
        else:
            parent[:] = parent * rng.choice((0, 2, 50))
    return hostile(rng) if rng.random() < 0.03 else tree


def hostile(rng: random.Random) -> Any:
    """A value that is rarely expected; some stand for what only `spelled` can write."""
    return _MARK.format(rng.randrange(len(RAW))) if rng.random() < 0.3 else rng.choice(VALUES)


def spelled(tree: Any) -> str:
    """Write a mutated tree as JSON."""
    text = json.dumps(tree, ensure_ascii=False)
    return re.sub('"\ue000raw(\\d+)\ue001"', lambda match: RAW[int(match[1])], text)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Bytes with a change: cut, flipped, doubled, moved, filled, or followed by others."""
    if not data:
        return rng.randbytes(8)
    at, size = rng.randrange(len(data)), rng.choice((1, 1, 4, 64, 1000))
    kind = rng.randrange(8)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    if kind == 2:
        return data[:at] + rng.randbytes(size) + data[at + size :]
    if kind == 3:
        return data[:at] + data[at : at + size] * 2 + data[at + size :]
    if kind == 4:
        return data[:at] + data[at + size :]
    if kind == 5:
        return data[:at] + b"\0" * size + data[at + size :]
    if kind == 6:
        return (
            data[:at]
            + rng.choice((b"\xff", b"\xed\xa0\x80", b"[" * 5000, b"\n", b'"', b"{", b"---\n", b"&a [*a]"))
            + data[at:]
        )
    return data + rng.choice((data, b"\0" * 100, b"x", b"\n\n{"))


def _places(tree: Any) -> Any:
    """Yield (parent, key) of every value below the root."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items):
        yield tree, key
        yield from _places(value)
