"""Files that survive a kill, folders with one writer."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import lock_folder, whole_folder, write_atomically


def test_write_atomically_leaves_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jaxguard.utils.files.os.fsync", full)
    with pytest.raises(JaxguardError, match=re.escape(str(path))):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_has_one_writer_for_as_long_as_it_lives(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from jaxguard.utils.files import lock_folder; "
        "lock_folder(Path(sys.argv[1]), 'store')"
    )
    with lock_folder(tmp_path, "store"):
        other = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
        assert "the store folder" in other.stderr
        assert "in use by another process (process" in other.stderr
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


WRITER = """
import sys, time
from pathlib import Path
from jaxguard.utils.files import whole_folder
with whole_folder(Path(sys.argv[1])) as folder:
    (folder / "model.safetensors").write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def write(output: Path, seconds: float) -> subprocess.Popen[str]:
    """A process that writes a folder for so long; the value comes once it has begun."""
    command = [sys.executable, "-c", WRITER, str(output), str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


def test_a_process_does_not_lock_a_folder_twice(tmp_path: Path) -> None:
    """As two cells of a notebook would; the system gives a process a lock that it holds already."""
    with lock_folder(tmp_path, "run"), pytest.raises(JaxguardError, match="in use by this process"):
        lock_folder(tmp_path, "run")
    with lock_folder(tmp_path, "run"):
        pass


def test_the_next_writer_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    output = tmp_path / "export"
    with write(output, 60) as killed:
        killed.send_signal(signal.SIGKILL)
    assert list(tmp_path.rglob("*.safetensors"))
    with whole_folder(output) as folder:
        assert list(folder.iterdir()) == []
        (folder / "a").write_text("whole")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["export", "export/a"]


def test_a_folder_that_another_process_writes_is_left_alone(tmp_path: Path) -> None:
    output = tmp_path / "export"
    with write(output, 60) as alive:
        with pytest.raises(JaxguardError, match=f"{alive.pid}"), whole_folder(output):
            pass
        assert [path.read_bytes() for path in tmp_path.rglob("*.safetensors")] == [b"half"]
        alive.kill()
    with write(output, 0) as first:
        assert first.wait() == 0
    with pytest.raises(JaxguardError, match="not empty"), whole_folder(output):
        pass
    assert list(tmp_path.iterdir()) == [output]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    output = tmp_path / "export"
    with pytest.raises(FileNotFoundError), whole_folder(output) as folder:
        (folder / "absent" / "a").write_text("half")
    assert list(tmp_path.iterdir()) == []
