"""Starting and ending a server: a small stand-in for SGLang that answers its health check, or does not."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

import sglang_server
from jaxguard.config import load
from jaxguard.config.evaluate import ServerConfig
from jaxguard.guards.backends.sglang import serve
from jaxguard.utils.errors import JaxguardError

STAND_IN = """\
import http.server, os, subprocess, sys, time
print(*sys.argv[1:], flush=True)
if "--crash" in sys.argv:
    sys.exit("no such weights")
child = subprocess.Popen(["sleep", "600"])
print("pids", os.getpid(), child.pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503 if "--never" in sys.argv else 200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""
OUTER = """\
import sys
from pathlib import Path
from jaxguard.guards.backends.sglang import serve
from jaxguard.config.evaluate import ServerConfig
with serve(Path("weights"), "guard", Path(sys.argv[1]), ServerConfig(python=sys.argv[2])):
    print("up", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def python(tmp_path):
    """An interpreter that has the stand-in."""
    package = tmp_path / "packages" / "sglang"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "launch_server.py").write_text(STAND_IN)
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\nPYTHONPATH={package.parent} exec {sys.executable} "$@"\n')
    wrapper.chmod(0o755)
    return str(wrapper)


def run(python, log, *arguments, **settings):
    return serve(Path("weights"), "guard", log, ServerConfig(python=python, arguments=arguments, **settings))


def pids(log):
    return [int(pid) for pid in log.read_text().split("pids ")[1].split()[:2]]


def alive(pid):
    """Not even a zombie counts."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(*gone):
    end = time.monotonic() + 10
    while any(map(alive, gone)) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(map(alive, gone))


def test_a_server_lives_as_long_as_the_block(python, tmp_path):
    log = tmp_path / "logs" / "server.log"
    with run(python, log, "--tp-size=8") as url:
        assert urllib.request.urlopen(url + "/health_generate", timeout=10).status == 200
        port = url.rsplit(":", 1)[1]
        words = f"--model-path weights --served-model-name guard --host 127.0.0.1 --port {port} --tp-size=8"
        assert log.read_text().splitlines()[0] == words
        assert all(map(alive, pids(log)))
        assert os.getpgid(pids(log)[0]) != os.getpgid(0)
    assert wait_until_gone(*pids(log))


def test_an_error_in_the_block_ends_it_too(python, tmp_path):
    with pytest.raises(ZeroDivisionError), run(python, tmp_path / "log"):
        raise ZeroDivisionError
    assert wait_until_gone(*pids(tmp_path / "log"))


def test_it_dies_with_a_parent_that_was_killed(python, tmp_path):
    log = tmp_path / "log"
    command = [sys.executable, "-c", OUTER, str(log), python]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as outer:
        assert outer.stdout.readline() == b"up\n"
        server, child = pids(log)
        outer.send_signal(signal.SIGKILL)
    assert wait_until_gone(server)
    os.kill(child, signal.SIGKILL)  # SGLang's own children look after themselves; this one does not


def test_a_server_that_ends_shows_why(python, tmp_path):
    with pytest.raises(JaxguardError, match=r"ended with code 1; the end of .*log:\n(.*\n)*no such weights"):
        run(python, tmp_path / "log", "--crash").__enter__()


def test_a_server_that_is_never_ready_is_ended(python, tmp_path):
    with pytest.raises(JaxguardError, match=r"not ready in 1 s; the end of .*log:\n.*--never"):
        run(python, tmp_path / "log", "--never", ready_seconds=1).__enter__()
    assert wait_until_gone(*pids(tmp_path / "log"))


def test_an_interpreter_without_sglang_is_an_error_that_says_what_to_install(tmp_path):
    with pytest.raises(JaxguardError, match=r"has no SGLang\. Install it .*`make sglang-cpu`"):
        run(sys.executable, tmp_path / "log").__enter__()
    with pytest.raises(JaxguardError, match=r"server\.python: '/no/python' is no interpreter"):
        run("/no/python", tmp_path / "log").__enter__()


def test_the_overrides_for_a_cpu_are_those_of_the_tool(monkeypatch, capsys):
    monkeypatch.chdir(sglang_server.ROOT)
    monkeypatch.setattr(sys, "argv", ["sglang_server.py", "--overrides"])
    assert sglang_server.main() == 0
    config = load("tiny", capsys.readouterr().out.split())
    assert tuple(map(str, config.evaluate.server.arguments)) == sglang_server.CPU_ARGUMENTS
    assert Path(config.evaluate.server.python).resolve() == sglang_server.CPU_PYTHON
    assert os.access(sglang_server.CPU_PYTHON, os.X_OK)
