"""The trace store: what it holds, and who may write to it. tests/utils/test_store.py kills and damages its file."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from jaxguard.distill.store import Attempt, attempts_file, open_traces, read_attempts
from jaxguard.utils.errors import JaxguardError, ProvenanceError
from jaxguard.utils.store import read_settings

SETTINGS = {"teacher": "r1", "template": "abc", "sampling": {"temperature": 0.6}}
ATTEMPT = Attempt(
    "x", 0, 0, "reasoning\u2028 ", "Prompt harm: harmful", "stop", {"cut": "no end"}, 5, 7, 1.5, "2026-01-01T00:00:00Z"
)


def attempts(count: int) -> list[Attempt]:
    return [replace(ATTEMPT, example_id=f"x{i}", failures={}) for i in range(count)]


def fill(folder: Path, some: list[Attempt]) -> None:
    with open_traces(folder, SETTINGS, {}) as store:
        for attempt in some:
            store.append(attempt)


def test_what_is_appended_is_read_back_over_several_starts(tmp_path):
    some = [ATTEMPT, *attempts(4)]
    fill(tmp_path, some[:2])
    fill(tmp_path, [])
    fill(tmp_path, some[2:])
    assert list(read_attempts(tmp_path)) == some
    assert [a.accepted for a in some] == [False, True, True, True, True]
    assert read_settings(attempts_file(tmp_path)) == SETTINGS


def test_an_attempt_is_never_there_twice(tmp_path):
    fill(tmp_path, [ATTEMPT, *attempts(1)])
    with open_traces(tmp_path, SETTINGS, {}) as store:
        assert store.done == {("x", 0, 0), ("x0", 0, 0)}
        assert store.accepted == {"x0"}
        with pytest.raises(JaxguardError, match=r"\('x', 0, 0\)"):
            store.append(replace(ATTEMPT, trace="another"))
        store.append(replace(ATTEMPT, candidate=1))
        store.append(replace(ATTEMPT, round=1))
    assert len(list(read_attempts(tmp_path))) == 4


def test_a_cut_attempt_is_made_again(tmp_path):
    fill(tmp_path, attempts(3))
    path = attempts_file(tmp_path)
    path.write_bytes(path.read_bytes()[:-40])
    assert list(read_attempts(tmp_path)) == attempts(2)
    fill(tmp_path, attempts(3)[2:])
    assert list(read_attempts(tmp_path)) == attempts(3)


def test_two_writers_are_refused(tmp_path):
    code = f"from jaxguard.distill.store import *\nwith open_traces(Path({str(tmp_path)!r}), {SETTINGS!r}, {{}}): pass"
    with open_traces(tmp_path, SETTINGS, {}):
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "in use by another process" in other.stderr


def test_attempts_of_another_teacher_are_not_mixed(tmp_path):
    fill(tmp_path, attempts(1))
    with pytest.raises(ProvenanceError, match="teacher"), open_traces(tmp_path, SETTINGS | {"teacher": "other"}, {}):
        pass
    assert list(read_attempts(tmp_path)) == attempts(1)


def test_no_store(tmp_path):
    assert list(read_attempts(tmp_path)) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(JaxguardError, match=str(tmp_path / "file")), open_traces(tmp_path / "file", SETTINGS, {}):
        pass
