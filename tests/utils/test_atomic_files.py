"""Files that survive a kill, folders with one writer."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import lock_folder, write_atomically


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
