"""A server in the place of a folder: its address, and where its tokenizer comes from."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from jaxguard.guards.guard import Guard
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.secrets import Masked


def opened(guard, *arguments, **options):
    """The GuardConfig and the config that the fake guard was opened with."""
    with Guard.load(*arguments, **options):
        return guard.opened[-1][:2]


@pytest.fixture
def serving():
    """serving(path): the address of a server that says that it serves the model at `path`."""
    servers = []

    def serve(path, key=None):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                known = key is None or self.headers["Authorization"] == f"Bearer {key}"
                self.send_response((200 if known else 401) if self.path == "/get_model_info" else 404)
                self.end_headers()
                self.wfile.write(json.dumps({"model_path": str(path)}).encode())

            def log_message(self, *args):
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_address[1]}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_local_server_says_what_it_serves(serving, run, guard):
    url = serving(run / "export")
    server, config = opened(guard, f"{url}/")
    assert (str(server.endpoint), server.checkpoint) == (url, str(run / "export"))
    assert config.data.direct_marker == "/verdict"


def test_a_server_that_wants_a_key_gets_it(serving, run, guard, monkeypatch):
    url = serving(run / "export", key="k")
    monkeypatch.delenv("JAXGUARD_API_KEY", raising=False)
    with pytest.raises(JaxguardError, match="set JAXGUARD_API_KEY"):
        Guard.load(url)
    monkeypatch.setenv("JAXGUARD_API_KEY", "k")
    assert opened(guard, url)[0].endpoint == Masked(url)


def test_a_model_elsewhere_needs_its_tokenizer_named(serving, run, guard):
    with pytest.raises(JaxguardError, match=r"/nowhere/at/all, which is no folder on this machine.*--tokenizer"):
        Guard.load(serving("/nowhere/at/all"))
    # Nothing is downloaded because a server says so.
    with pytest.raises(JaxguardError, match="no folder on this machine"):
        Guard.load(serving("owner/name"))
    assert opened(guard, serving("owner/name"), tokenizer=run)[0].checkpoint == str(run / "export")


def test_no_server(run):
    with pytest.raises(JaxguardError, match="does not say what it serves"):
        Guard.load("http://127.0.0.1:9")
