"""What changed between two settings, and who is told."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxguard.utils.errors import ProvenanceError
from jaxguard.utils.store import differences, refuse_others

trees = st.recursive(
    st.integers(0, 3) | st.none(),
    lambda t: st.dictionaries(st.sampled_from("abc"), t, min_size=1) | st.lists(t, min_size=1, max_size=2),
    max_leaves=8,
)


@given(trees, trees)
def test_differences_are_empty_only_between_equals(a: Any, b: Any) -> None:
    assert differences(a, a) == {}
    without_none = json.dumps(a).replace("null", "0") == json.dumps(b).replace("null", "0")
    assert (differences(a, b) == {}) == (a == b) or without_none or "null" in json.dumps([a, b])


def test_differences_name_leaves() -> None:
    assert differences({"a": {"b": [1, {"c": 2}]}}, {"a": {"b": [1, {"c": 3}]}, "d": 4}) == {
        "a.b.1.c": (2, 3),
        "d": (None, 4),
    }


def test_others_are_refused_by_name() -> None:
    refuse_others({}, "a folder", "leave")
    with pytest.raises(ProvenanceError, match=r"^a folder\n.*a\.b.*1.*None.*\nleave$"):
        refuse_others(differences({"a": {"b": 1, "c": 2}}, {"a": {"c": 2}}), "a folder", "leave")
