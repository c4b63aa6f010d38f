"""The append-only store: killed, cut, flipped, mixed, and on a full disk."""

import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxguard.utils.errors import JaxguardError, ProvenanceError
from jaxguard.utils.parse import Fields
from jaxguard.utils.store import open_store, read_records, read_settings

SETTINGS = {"teacher": "r1", "template": "abc", "sampling": {"temperature": 0.6}}
RECORDS = [{"name": f"x{i}", "text": "some reasoning\u2028 \ud83d"} for i in range(3)]


def fill(path, records):
    with open_store(path, SETTINGS, "Take another name.") as store:
        for record in records:
            store.append(record)


def read(path):
    return list(read_records(path, Fields))


def test_records_come_back_over_several_starts(tmp_path):
    path = tmp_path / "some/folder/records.jsonl"
    assert read(path) == []
    fill(path, RECORDS[:2])
    fill(path, [])
    fill(path, RECORDS[2:])
    assert read(path) == RECORDS
    assert read_settings(path) == SETTINGS


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.text(), st.text() | st.integers() | st.none() | st.lists(st.booleans())))
def test_any_record_survives(tmp_path_factory, record):
    path = tmp_path_factory.mktemp("store") / "records.jsonl"
    fill(path, [record])
    assert read(path) == [record]


def test_any_cut_loses_only_what_was_cut(tmp_path, caplog):
    path = tmp_path / "records.jsonl"
    fill(path, RECORDS)
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        complete = max(sum(end <= size for end in ends) - 1, 0)
        if size >= ends[0]:
            assert read(path) == RECORDS[:complete], size
        fill(path, [{"name": "next"}])
        assert read(path) == [*RECORDS[:complete], {"name": "next"}], size
    assert "damaged" in caplog.text
    assert "cut off" in caplog.text


def test_any_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "records.jsonl"
    fill(path, RECORDS)
    whole = path.read_bytes()
    header = whole.index(b"\n") + 1
    for i in range(header, whole.index(b"\n", header)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 4]) + whole[i + 1 :])
        assert read(path) == RECORDS[1:], i
    fill(path, RECORDS[:1])
    assert read(path) == [*RECORDS[1:], RECORDS[0]]


def test_a_damaged_header_is_refused(tmp_path):
    path = tmp_path / "records.jsonl"
    fill(path, RECORDS)
    before = b"?" + path.read_bytes()[1:]
    path.write_bytes(before)
    with pytest.raises(JaxguardError, match=r"records\.jsonl"):
        fill(path, [])
    assert path.read_bytes() == before
    with pytest.raises(JaxguardError, match=r"absent\.jsonl"):
        read_settings(tmp_path / "absent.jsonl")


@dataclass
class Number:
    number: int


def test_what_cannot_be_parsed_is_skipped_and_counted(tmp_path, caplog):
    fill(tmp_path / "records.jsonl", [{"number": "1"}, {"number": "one"}, {}, {"number": None}])
    assert list(read_records(tmp_path / "records.jsonl", Number)) == [Number(1)]
    assert "3 damaged" in caplog.text


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"teacher": "other"}, "teacher.*'r1'.*'other'"),
        ({"sampling": {"temperature": 0.7}}, r"sampling\.temperature"),
        ({"budget": 3}, "budget.*None.*3"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path, changed, words):
    path = tmp_path / "records.jsonl"
    fill(path, RECORDS)
    with pytest.raises(ProvenanceError, match=words), open_store(path, SETTINGS | changed, "Take another name."):
        pass
    assert read(path) == RECORDS


def test_a_full_disk_keeps_what_is_there(tmp_path):
    path, limits = tmp_path / "records.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_store(path, SETTINGS, "Take another name.") as store:
        store.append(RECORDS[0])
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, limits[1]))
            with pytest.raises(JaxguardError, match=r"records\.jsonl"):
                store.append(RECORDS[1])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert read(path) == RECORDS[:1]
        store.append(RECORDS[2])  # there is room again
    assert read(path) == [RECORDS[0], RECORDS[2]]


WRITER = """
import sys
from pathlib import Path
from jaxguard.utils.parse import Fields
from jaxguard.utils.store import open_store, read_records
path = Path(sys.argv[1])
with open_store(path, {"a": 1}, "") as store:
    for i in range(len(list(read_records(path, Fields))), 100000):
        store.append({"i": i})
        print(i, flush=True)
"""


def test_a_kill_loses_nothing_that_was_appended(tmp_path):
    path, reported = tmp_path / "records.jsonl", -1
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    for lines in (1, 300, 50):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True, env=environment
        )
        for _ in range(lines):
            reported = int(process.stdout.readline())
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        numbers = [record["i"] for record in read(path)]
        assert numbers == list(range(len(numbers)))
        assert len(numbers) > reported
    assert json.loads(path.read_bytes().splitlines()[0])["settings"] == {"a": 1}
