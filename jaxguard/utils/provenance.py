"""What something was made of, compared with what it would be made of now."""

from collections.abc import Mapping
from typing import Any

from jaxguard.utils.errors import ProvenanceError


def differences(old: Any, new: Any, field: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted field -> (old, new) for every leaf that differs between two plain trees; None where it is absent."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        pairs = {str(k): (old.get(k), new.get(k)) for k in [*old, *(k for k in new if k not in old)]}
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = {str(i): pair for i, pair in enumerate(zip(old, new, strict=True))}
    else:
        return {} if old == new else {field: (old, new)}
    found: dict[str, tuple[Any, Any]] = {}
    for key, (a, b) in pairs.items():
        found |= differences(a, b, f"{field}.{key}" if field else key)
    return found


def refuse_others(changes: Mapping[str, tuple[Any, Any]], holds: str, remedy: str) -> None:
    """Nothing may be mixed with what was made of other inputs.

    Args:
        changes: as from `differences`.
        holds: what is there, for the message's first line.
        remedy: what to do, for its last.

    Raises:
        ProvenanceError: something changed.
    """
    if changes:
        lines = (f"  {field}: {old!r} there, {new!r} now" for field, (old, new) in changes.items())
        raise ProvenanceError("\n".join([holds, *lines, remedy]))
