"""The trace store: killed, cut, flipped, shared and mixed."""

import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxguard.distill import store as store_module
from jaxguard.distill.store import Attempt, open_store, read_attempts, read_settings, shards
from jaxguard.utils.errors import JaxguardError

SETTINGS = {"teacher": "r1", "template": "abc", "sampling": {"temperature": 0.6}}
ATTEMPT = Attempt(
    "x", 0, 0, "a thought\u2028 ", "Prompt harm: harmful", "stop", {"cut": "no end"}, 5, 7, 1.5, "2026-01-01T00:00:00Z"
)


def attempts(count: int) -> list[Attempt]:
    return [replace(ATTEMPT, example_id=f"x{i}", failures={}) for i in range(count)]


def fill(folder: Path, some: list[Attempt]) -> None:
    with open_store(folder, SETTINGS) as store:
        for attempt in some:
            store.append(attempt)


def test_what_is_appended_is_read_back_over_several_starts(tmp_path):
    some = [ATTEMPT, *attempts(4)]
    fill(tmp_path, some[:2])
    fill(tmp_path, [])
    fill(tmp_path, some[2:])
    assert list(read_attempts(tmp_path)) == some
    assert [a.accepted for a in some] == [False, True, True, True, True]
    assert len(shards(tmp_path)) == 2
    assert read_settings(tmp_path) == SETTINGS


def test_a_large_store_has_several_shards_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "SHARD_BYTES", 1000)
    fill(tmp_path, attempts(40))
    assert len(shards(tmp_path)) >= 10
    assert list(read_attempts(tmp_path)) == attempts(40)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(), st.text(), st.dictionaries(st.text(), st.text()))
def test_any_text_survives(tmp_path_factory, trace, answer, failures):
    folder = tmp_path_factory.mktemp("store")
    attempt = replace(ATTEMPT, trace=trace, answer=answer, failures=failures)
    fill(folder, [attempt])
    assert list(read_attempts(folder)) == [attempt]


def test_an_attempt_is_never_there_twice(tmp_path):
    fill(tmp_path, [ATTEMPT])
    with open_store(tmp_path, SETTINGS) as store:
        assert store.done == {("x", 0, 0)}
        with pytest.raises(JaxguardError, match="already"):
            store.append(replace(ATTEMPT, trace="another"))
        store.append(replace(ATTEMPT, candidate=1))
        store.append(replace(ATTEMPT, round=1))
    assert len(list(read_attempts(tmp_path))) == 3


@pytest.mark.parametrize("keep", range(0, 400, 37))
def test_a_cut_line_is_as_if_never_written(tmp_path, keep, caplog):
    fill(tmp_path, attempts(3))
    (path,) = shards(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + lines[2][: min(keep, len(lines[2]) - 1)])
    assert list(read_attempts(tmp_path)) == attempts(2)
    assert ("1 unreadable" in caplog.text) == (keep > 0)
    fill(tmp_path, attempts(3)[2:])  # it can be made again
    assert list(read_attempts(tmp_path)) == attempts(3)


def test_any_flipped_bit_is_noticed(tmp_path):
    fill(tmp_path, attempts(3))
    (path,) = shards(tmp_path)
    whole = path.read_bytes()
    start, stop = whole.index(b"\n") + 1, whole.index(b"\n", whole.index(b"\n") + 1)
    for place in range(start, stop):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        found = list(read_attempts(tmp_path))
        assert [a.example_id for a in found] == ["x0", "x2"], place


def test_two_writers_are_refused(tmp_path):
    code = f"from jaxguard.distill.store import *\nwith open_store(Path({str(tmp_path)!r}), {SETTINGS!r}): pass"
    with open_store(tmp_path, SETTINGS):
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "in use by another process" in other.stderr


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"teacher": "other"}, "teacher: 'r1' there, 'other' now"),
        ({"sampling": {"temperature": 0.7}}, "sampling"),
        ({"budget": 3}, "budget: None there, 3 now"),
    ],
)
def test_attempts_made_otherwise_are_not_mixed(tmp_path, changed, words):
    fill(tmp_path, attempts(1))
    with pytest.raises(JaxguardError, match=words), open_store(tmp_path, SETTINGS | changed):
        pass
    assert list(read_attempts(tmp_path)) == attempts(1)


def test_no_store_and_a_broken_one(tmp_path):
    with pytest.raises(JaxguardError, match="not a trace store"):
        read_settings(tmp_path)
    assert list(read_attempts(tmp_path)) == []
    fill(tmp_path, attempts(1))
    (tmp_path / "store.json").write_text("{")
    with pytest.raises(JaxguardError, match=r"store\.json cannot be read"), open_store(tmp_path, SETTINGS):
        pass
    (tmp_path / "store.json").unlink()
    with pytest.raises(JaxguardError, match="nobody knows whose"), open_store(tmp_path, SETTINGS):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(JaxguardError, match="cannot write to the trace store"), open_store(tmp_path / "file", SETTINGS):
        pass


def test_a_full_disk_keeps_what_is_there(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def until_full():
        with open_store(tmp_path, SETTINGS) as store:
            store.append(attempts(1)[0])
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
            for attempt in attempts(20)[1:]:
                store.append(attempt)

    try:
        with pytest.raises(JaxguardError, match="cannot write to the trace store"):
            until_full()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    found = [a.example_id for a in read_attempts(tmp_path)]
    assert found == [f"x{i}" for i in range(len(found))]
    assert 1 <= len(found) < 20


WRITER = """
import sys
from dataclasses import replace
from pathlib import Path
from jaxguard.distill.store import open_store
sys.path.insert(0, {tests!r})
from test_store import ATTEMPT, SETTINGS
with open_store(Path({folder!r}), SETTINGS) as store:
    for i in range(100000):
        if (f"x{{i}}", 0, 0) not in store.done:
            store.append(replace(ATTEMPT, example_id=f"x{{i}}"))
            print(i, flush=True)
"""


def test_kill_loses_nothing_that_was_reported(tmp_path):
    code = WRITER.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    reported = -1
    for lines in (1, 300, 50):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(lines):
            reported = int(process.stdout.readline())
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        found = [a.example_id for a in read_attempts(tmp_path)]
        assert found == [f"x{i}" for i in range(len(found))]
        assert len(found) > reported
    assert json.loads((tmp_path / "store.json").read_text()) == SETTINGS
