"""Compare the provenance of existing output with that of new output."""

from collections.abc import Mapping
from typing import Any

from jaxguard.utils.errors import ProvenanceError


def differences(old: Any, new: Any, field: str = "") -> dict[str, tuple[Any, Any]]:
    """Return dotted field -> (old, new) for every leaf that differs between two plain trees; None where it is absent."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        pairs = {str(k): (old.get(k), new.get(k)) for k in [*old, *(k for k in new if k not in old)]}
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = {str(i): pair for i, pair in enumerate(zip(old, new, strict=True))}
    else:
        return {} if old == new else {field: (old, new)}
    changes: dict[str, tuple[Any, Any]] = {}
    for key, (a, b) in pairs.items():
        changes |= differences(a, b, f"{field}.{key}" if field else key)
    return changes


def refuse_others(changes: Mapping[str, tuple[Any, Any]], holds: str, remedy: str) -> None:
    """Refuse to mix new output with output of other provenance.

    Args:
        changes: as from `differences`.
        holds: the message's first line: what exists already.
        remedy: its last line: what to do.

    Raises:
        ProvenanceError: something changed.
    """
    if changes:
        lines = (f"  {field}: {old!r} there, {new!r} now" for field, (old, new) in changes.items())
        raise ProvenanceError("\n".join([holds, *lines, remedy]))
