"""Conditions and slices of one row."""

import pytest

from jaxguard.data.benchmarks.schema import Condition, Slice


def test_slices_of_lists_and_truths():
    assert Slice(name="s", column="c").values({"c": ["a", " b ", ""]}) == ["a", "b"]
    assert Slice(name="s", column="c").values({"c": False}) == ["no"]
    assert Slice(name="s", column="c").values({"c": 0}) == ["0"]
    assert Slice(name="s", when=Condition(column="c", equals=1)).values({"c": None}) == []


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        ({"column": "a", "equals": True}, True),
        ({"column": "a", "equals": ["no", 1]}, True),
        ({"column": "t", "equals": "bread"}, True),
        ({"column": "n", "equals": ""}, True),
        ({"column": "n", "equals": 0}, False),
        ({"column": "n", "not_equals": "x"}, True),
        ({"column": "n", "empty": True}, True),
        ({"column": "t", "empty": True}, False),
        ({"columns": ["a", "b", "n"], "equals": 1}, True),
        ({"columns": ["a", "b", "n"], "equals": 1, "at_least": 2}, False),
        ({"columns": ["a", "b", "n"], "equals": 1, "at_most": 0}, False),
        ({"columns": ["b", "n"], "equals": 1, "at_most": 0}, True),
        ({"always": True}, True),
    ],
)
def test_conditions(condition, holds):
    assert Condition(**condition).holds({"a": True, "b": 0.0, "t": " Bread ", "n": None}) is holds
