import http.server
import json
import threading
from collections.abc import Iterator

import huggingface_hub
import pytest
from huggingface_hub import constants

from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.hub import HTTP_ERROR, fetch

COMMIT = "a" * 40
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"the same weights",
    "original/params.json": b"{}",
    "tokenizer.json": b"{}",
}


class FakeHub(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does, for owner/good, owner/gated and owner/broken; all else is absent."""

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        if path.startswith(("/api/models/owner/good", "/api/models/owner/gated")):
            if not path.endswith(("good", "gated", "main", COMMIT)):
                return self._send(404, {"X-Error-Code": "RevisionNotFound"})
            if "/tree/" in path:
                files = [{"type": "file", "path": n, "size": len(c), "oid": "b" * 40} for n, c in FILES.items()]
                return self._send(200, {}, json.dumps(files).encode(), body)
            siblings = [{"rfilename": name} for name in FILES]
            return self._send(
                200, {}, json.dumps({"id": "owner/x", "sha": COMMIT, "siblings": siblings}).encode(), body
            )
        if path.startswith("/owner/good/resolve/"):
            content = FILES[path.split(f"{COMMIT}/")[1]]
            return self._send(200, {"ETag": f'"{hash(content):x}"', "X-Repo-Commit": COMMIT}, content, body)
        if path.startswith("/owner/gated/resolve/"):
            return self._send(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        if "owner/broken" in path:
            return self._send(418, {})
        return self._send(404, {"X-Error-Code": "RepoNotFound"})

    def _send(self, code: int, headers: dict[str, str], content: bytes = b"", body: bool = True) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Keep quiet."""


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[str]:
    """A hub on this machine, with an empty cache."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    download = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda *args, **options: download(*args, endpoint=url, cache_dir=tmp_path / "cache", **options),
    )
    yield url
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_local_folder_is_itself(tmp_path):
    assert fetch(str(tmp_path), None) == tmp_path


def test_weights_are_downloaded_once_and_in_one_format(hub):
    folder = fetch("owner/good", "main")
    assert {path.name for path in folder.rglob("*") if path.is_file()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    only = fetch("owner/good", None, only=["*.bin"])
    assert (only / "pytorch_model.bin").is_file()


def test_an_offline_machine_uses_what_it_has(hub, monkeypatch):
    folder = fetch("owner/good")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch("owner/good") == folder
    with pytest.raises(JaxguardError, match=r"owner/other.*HF_HUB_OFFLINE"):
        fetch("owner/other")


@pytest.mark.parametrize(
    ("checkpoint", "revision", "message"),
    [
        (
            "owner/gated",
            None,
            r"owner/gated.*https://huggingface.co/owner/gated.*HF_TOKEN",
        ),
        ("owner/absent", None, r"'owner/absent'.*HF_TOKEN"),
        ("owner/good", "v9", r"owner/good.*'v9'"),
        ("owner/broken", None, "owner/broken"),
        ("owner/--bad--", None, "owner/--bad--"),
    ],
)
def test_refusals_say_what_to_do(hub, checkpoint, revision, message):
    with pytest.raises(JaxguardError, match=message):
        fetch(checkpoint, revision)


def test_a_download_that_breaks_off_says_to_run_again(hub, monkeypatch):
    def broken(*_, **__):
        raise HTTP_ERROR("peer closed connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    with pytest.raises(JaxguardError, match=r"owner/good broke off: peer closed connection; run again"):
        fetch("owner/good")


def test_what_is_neither_folder_nor_repository(tmp_path):
    for name in ("./absent", "/absent/folder", "~/absent-folder", "a/b/c", "gemma"):
        with pytest.raises(JaxguardError, match=rf"'{name}'.*owner/name"):
            fetch(name)
    file = tmp_path / "weights.gguf"
    file.touch()
    with pytest.raises(JaxguardError, match=r"tools/convert/gguf_to_hf\.py"):
        fetch(str(file))
    with pytest.raises(JaxguardError, match=r"weights\.safetensors"):
        fetch(str(file.rename(tmp_path / "weights.safetensors")))
