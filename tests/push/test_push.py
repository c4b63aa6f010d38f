"""Uploads to a hub of this machine, by the real client: what arrives there, and what is said where it refuses."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from jaxguard.cli import main

CARD = '---\nlicense: mit\n---\n\n```python\nMODEL = "tiny"\n```\n\n## Benchmarks\n\nNone.\n'


class Hub(BaseHTTPRequestHandler):
    """Just enough of the hub: a repository is made, files are sent within the commit."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"] or 0))
        server = self.server
        server.requests.append((self.path, self.headers.get("authorization"), body))
        answer = {"url": f"{server.url}/me/my-guard"}
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        elif "/commit/" in self.path:
            answer = {"commitUrl": f"{server.url}/me/my-guard/commit/1", "commitOid": "1" * 40, "hookOutput": ""}
        self.send_response(server.status)
        text = json.dumps(answer if server.status == 200 else {"error": "no"}).encode()
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url, server.requests, server.status = f"http://127.0.0.1:{server.server_port}", [], 200
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(tmp_path):
    """A finished run's folder, as far as it is uploaded."""
    export = tmp_path / "runs/tiny/export"
    (export / "additional_chat_templates").mkdir(parents=True)
    for name in ("model.safetensors", "config.json", "guard.json", "additional_chat_templates/x.jinja", ".hidden"):
        (export / name).write_text(name)
    (export / "README.md").write_text(CARD)
    (tmp_path / "secret").write_text("a file of this machine")
    (export / "LICENSE").symlink_to(tmp_path / "secret")
    (export / "jaxguard.json").write_text('{"name": "tiny"}')
    return export.parent


def push(url, *arguments, token="hf_secret", offline="0"):
    env = {**os.environ, "HF_ENDPOINT": url, "HF_HUB_OFFLINE": offline, "HF_HOME": "/nonexistent", "HF_TOKEN": token}
    command = [sys.executable, "-m", "jaxguard.push", *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_the_export_is_uploaded_in_one_commit(hub, run):
    done = push(hub.url, "--model", run, "--to", "me/my-guard")
    assert done.returncode == 0, done.stderr
    assert f"{hub.url}/me/my-guard/commit/1" in done.stdout
    created = json.loads(next(body for path, _, body in hub.requests if path == "/api/repos/create"))
    assert "my-guard" in json.dumps(created), created
    assert created.get("private") or created.get("visibility") == "private"
    (commit,) = (body for path, _, body in hub.requests if "/commit/main" in path)
    lines = [json.loads(line) for line in commit.splitlines()]
    files = {x["value"]["path"]: base64.b64decode(x["value"]["content"]) for x in lines if x["key"] == "file"}
    assert set(files) == {
        "README.md", "jaxguard.json", "guard.json", "model.safetensors", "config.json", "additional_chat_templates/x.jinja",
    }  # fmt: skip
    assert files["README.md"].decode() == CARD.replace('"tiny"', '"me/my-guard"')
    assert {key for _, key, _ in hub.requests} == {"Bearer hf_secret"}
    assert "hf_secret" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "hf auth login"), (403, "hf auth login"), (500, "refused me/my-guard"), (409, "me/my-guard")],
)
def test_refusals_are_explained(hub, run, status, words):
    hub.status = status
    done = push(hub.url, "--model", run, "--to", "me/my-guard")
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("to", "options", "words"),
    [
        ("me/my guard", {}, "'me/my guard'"),
        ("me/my-guard", {"offline": "1"}, "offline"),
    ],
)
def test_mistakes(hub, run, to, options, words):
    done = push(hub.url, "--model", run, "--to", to, **options)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_no_server(run):
    done = push("http://127.0.0.1:9", "--model", run, "--to", "me/my-guard")
    assert done.returncode == 2
    assert "cannot upload to me/my-guard" in done.stderr


def test_what_is_no_export_is_refused(tmp_path, capsys):
    assert main(["push", "--model", str(tmp_path), "--to", "me/my-guard"]) == 2
    assert str(tmp_path) in capsys.readouterr().err
