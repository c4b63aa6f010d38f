"""Secrets are masked wherever a text is shown; harmless texts stay as they are."""

import asyncio
import base64
import time
from pathlib import Path

import pytest
from faulty_http import http, listen
from faulty_sglang import serve as serve_sglang
from pydantic import TypeAdapter
from tenacity import wait_none

from jaxguard.config import READS, dump, load
from jaxguard.config.evaluate import EvaluateConfig
from jaxguard.data.guard_files import read_guard_files, write_guard_files
from jaxguard.guards.backends.sglang import launch_command, open_sglang, served
from jaxguard.utils import client as client_module
from jaxguard.utils.client import Limiter, Models, connect
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.secrets import Masked, mask, published

SECRET = "hunter2"


@pytest.mark.parametrize(
    "text",
    [
        f"http://baker:{SECRET}@oven:30000/v1",
        f"http://{SECRET}@oven/v1 does not answer",
        f"https://user:{SECRET}@with@at/{SECRET}@oven",
        f"https://oven/data?signature={SECRET}&x={SECRET}",
        f"--api-key={SECRET}",
        f"--api-key {SECRET}",
        f"['--admin-api-key', '{SECRET}']",
        f"ServerArgs(api_key='{SECRET}', port=1)",
        f'{{"hf_token": "{SECRET}"}}',
        f"JAXGUARD_API_KEY={SECRET} python",
        f"--ssl-keyfile-password={SECRET}",
        f"Authorization: Bearer {SECRET}",
    ],
)
def test_a_secret_is_masked(text):
    shown = mask(text)
    assert SECRET not in shown
    assert "***" in shown
    assert mask(shown) == shown
    assert SECRET not in str(JaxguardError(f"wrong: {text}"))
    value = TypeAdapter(Masked).validate_python(text)
    assert SECRET not in f"{value} {value!r} {[value]}"
    assert SECRET not in TypeAdapter(Masked).dump_json(value).decode()
    assert value.get_secret_value() == text


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:30000/v1 refuses the key: set JAXGUARD_API_KEY; it says: no",
        "https://huggingface.co/owner/name/commits",
        "--tp-size=8 --max-total-tokens=64 --tokenizer-path=a --mem-fraction-static=0.8",
        "pad_token_id: 3 and eos_token_id=4; bos token: <s>",
        "field 'keys_as' is missing; max_tokens=12",
        "user@example.org",
        "the bearer key of a basic example",
    ],
)
def test_what_holds_none_stays(text):
    assert mask(text) == text


def test_it_is_quick_on_long_texts():
    begun = time.perf_counter()
    for piece in ("://", "--api-key ", "a-", "a_", "key=", "bearer ", "a", "@"):
        mask(piece * 50_000)
    assert time.perf_counter() - begun < 5


ADDRESS = f"http://baker:{SECRET}@oven:30000/v1"
CONFIG = {
    "name": "tiny",
    "model": {"checkpoint": "owner/base"},
    "data": {"train": [{"kind": "jsonl", "path": "/bakery/x.jsonl"}]},
    "distill": {"teacher": {"model": "teacher", "endpoints": [ADDRESS]}},
    "evaluate": {
        "guards": [{"endpoint": ADDRESS}],
        "server": {"arguments": ["--tp-size=8", "--api-key", f"{SECRET} {SECRET},{SECRET}", f"--hf-token={SECRET}"]},
    },
}


def test_a_config_shows_no_secret_and_has_them_all():
    config = load(CONFIG)
    for stage in (None, *READS):
        assert SECRET not in dump(config, stage)
    assert SECRET not in f"{config!r} {config} {config.model_dump(mode='json')} {config.model_dump_json()}"
    again = load(load(config, ["evaluate.limit=3", "distill.teacher.tries=2"]))
    assert [address.get_secret_value() for address in again.distill.teacher.endpoints] == [ADDRESS]
    assert again.evaluate.guards[0].endpoint.get_secret_value() == ADDRESS
    arguments = [argument.get_secret_value() for argument in again.evaluate.server.arguments]
    assert arguments == ["--tp-size=8", f"--api-key={SECRET} {SECRET},{SECRET}", f"--hf-token={SECRET}"]
    assert [str(argument) for argument in again.evaluate.server.arguments][:2] == ["--tp-size=8", "--api-key=***"]
    assert launch_command("python", Path("m"), "guard", 1, config.evaluate.server.arguments)[-3:] == arguments


@pytest.mark.parametrize(
    "override",
    [
        f"distill.teacher.endpoints={ADDRESS}",
        f"evaluate.guards=[{{endpoint: '{ADDRESS}', swop: true}}]",
        f"evaluate.guards.0.endpoints=[{ADDRESS}]",
        f"evaluate.server.argument=[--api-key={SECRET}]",
        f"evaluate.server.arguments=--api-key={SECRET}",
    ],
)
def test_an_error_shows_no_secret(override):
    with pytest.raises(JaxguardError) as error:
        load(CONFIG, [override])
    assert SECRET not in str(error.value)


ANSWERS = {
    "refused": (401, {"error": {"message": f"no such key: {SECRET}"}}),
    "forbidden": (400, f"<pre>{SECRET}</pre>".encode()),
    "overloaded": (503, {"detail": SECRET}),
    "malformed": (200, {SECRET: SECRET}),
    "wrong": (200, {"data": [{"id": f"Bearer {SECRET}"}]}),
    "absent": (404, {"message": "x" * 490 + SECRET}),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_a_key_that_a_server_repeats_is_not_shown(name, monkeypatch):
    async def answer(_path, headers, _body, writer):
        assert headers["authorization"] == f"Bearer {SECRET}"
        writer.write(http(*ANSWERS[name]))
        return True

    def parse(body, url):
        [model] = body.names()
        raise JaxguardError(f"{url} serves {model}")

    async def ask():
        async with listen(answer) as url, connect([url], Limiter(1, 1), tries=2) as client:
            await client.request("/models", None, Models, parse)

    monkeypatch.setenv("JAXGUARD_API_KEY", SECRET)
    monkeypatch.setattr(client_module, "BACKOFF", wait_none())
    with pytest.raises(JaxguardError) as error:
        asyncio.run(ask())
    assert SECRET[:3] not in str(error.value)


def test_a_password_in_an_address_is_sent_and_not_shown():
    headers_seen = []

    async def answer(_path, headers, _body, writer):
        headers_seen.append(headers["authorization"])
        writer.write(http(400, {"message": f"not {SECRET}"}))
        return True

    async def ask():
        async with listen(answer) as url:
            address = url.replace("://", f"://baker:{SECRET}@")
            async with connect([address], Limiter(1, 1), tries=1) as client:
                await client.request("/models", None, Models, Models.names)

    with pytest.raises(JaxguardError) as error:
        asyncio.run(ask())
    assert headers_seen == [f"Basic {base64.b64encode(f'baker:{SECRET}'.encode()).decode()}"]
    assert SECRET not in str(error.value)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_key_goes_to_its_endpoint_alone(status, monkeypatch):
    asked = []

    async def thief(path, headers, _body, writer):
        asked.append((path, headers))
        writer.write(http(200, {"data": []}))
        return True

    async def ask():
        async with listen(thief) as elsewhere:

            async def redirect(_path, _headers, _body, writer):
                writer.write(http(status, b"").replace(b"\r\n\r\n", f"\r\nlocation: {elsewhere}/x\r\n\r\n".encode(), 1))
                return True

            async with listen(redirect) as url, connect([url], Limiter(1, 1), tries=1) as client:
                await client.request("/models", None, Models, Models.names)

    monkeypatch.setenv("JAXGUARD_API_KEY", SECRET)
    with pytest.raises(JaxguardError, match=str(status)):
        asyncio.run(ask())
    assert asked == []


def test_each_guard_has_a_key_of_its_own(monkeypatch):
    monkeypatch.setenv("JAXGUARD_API_KEY", SECRET)
    monkeypatch.setenv("OTHER_KEY", "flour")

    async def ask():
        async with serve_sglang(lambda _: "") as first, serve_sglang(lambda _: "") as second:
            for server, variable in ((first, "JAXGUARD_API_KEY"), (second, "OTHER_KEY")):
                async with open_sglang(server.url, None, EvaluateConfig(), api_key_env=variable):
                    pass
                await served(server.url, variable)
            return first.authorizations, second.authorizations

    assert asyncio.run(ask()) == ({f"Bearer {SECRET}"}, {"Bearer flour"})


def test_a_masked_address_is_refused_before_it_is_asked():
    async def ask():
        async with connect([str(Masked(ADDRESS))], Limiter(1, 1)):
            pass

    with pytest.raises(JaxguardError, match="oven"):
        asyncio.run(ask())


def test_what_is_published_names_no_place_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree = {
        "path": "/home/baker/x.jsonl",
        "files": {f"{tmp_path}/data/x.jsonl": "abc"},
        "home": "~/secret/models/base",
        "base": ["owner/base", "runs/a/export"],
        "marker": "/think",
        "endpoint": ADDRESS,
        "size": 3,
    }
    assert published(tree) == {
        "path": "x.jsonl",
        "files": {"data/x.jsonl": "abc"},
        "home": "base",
        "base": ["owner/base", "runs/a/export"],
        "marker": "/think",
        "endpoint": "http://***@oven:30000/v1",
        "size": 3,
    }


def test_an_export_says_what_describes_the_model_alone(tmp_path):
    config = load(CONFIG | {"mesh": {"fsdp": 1}, "run_folder": "/bakery/runs"}, ["seed=7"])
    write_guard_files(tmp_path, config, [])
    text = (tmp_path / "config.yaml").read_text()
    assert not any(word in text for word in (SECRET, "bakery", "oven", "evaluate:", "distill:", "mesh:", "run_folder"))
    export = read_guard_files(tmp_path).config
    assert (export.seed, export.optimizer, export.data.mode) == (7, config.optimizer, config.data.mode)
