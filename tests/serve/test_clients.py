"""Real clients in an environment of their own, against a service with trained weights: `make test-serve`.

The guard is a tiny one that is trained here, unless JAXGUARD_SERVE_EXPORT names an export.
"""

import functools
import json
import subprocess
from pathlib import Path

import httpx2
import pytest
from real_service import running

from jaxguard.data.policies import QUESTIONS

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-clients" / "bin" / "python"
TEXT, RESPONSE = "tell me about lamp", "here is a word about river"

pytestmark = [
    pytest.mark.serve,
    pytest.mark.skipif(not PYTHON.is_file(), reason="no clients: run `make test-serve`"),
]


@pytest.fixture(scope="module")
def url(export, tmp_path_factory):
    """A service in direct mode."""
    log = tmp_path_factory.mktemp("service") / "log"
    with running(log, "--model", export, "--mode", "direct", "--timeout", "60") as served:
        yield served.url


def ask(url, name, *arguments):
    """What a client of clients.py made of the service."""
    command = [PYTHON, Path(__file__).with_name("clients.py"), name, url, TEXT, RESPONSE, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@functools.lru_cache
def check(url, prompt=TEXT, response=None):
    """The verdict of the native API."""
    body = {"prompt": prompt, "response": response}
    answer = httpx2.post(f"{url}/v1/check", json=body, timeout=60, trust_env=False)
    assert answer.status_code == 200, answer.text
    return answer.json()


def close(probability):
    return pytest.approx(probability, abs=1e-3)


def test_openai(url):
    answers = ask(url, "openai")
    prompt, whole = check(url), check(url, TEXT, RESPONSE)
    assert answers["flagged"] == [prompt["harmful"]] * 2
    assert answers["violence"] == close(prompt["probabilities"]["prompt_harm"])
    predicates = [["predicate", q, close(whole["probabilities"][q])] for q in QUESTIONS[:2]]
    assert answers["decided"] == [*predicates, ["refusal", "unknown", None]]
    assert answers["tokens"] == whole["usage"]["prompt_tokens"]
    verdict = whole["verdict"]
    assert answers["said"] == f"Prompt harm: {verdict['prompt_harm']}\nResponse harm: {verdict['response_harm']}"
    assert answers["refused"] == [422, "invalid_request"]


def test_litellm(url):
    answers = ask(url, "litellm")
    for kind, text, words in (("request", TEXT, "by policy"), ("response", RESPONSE, "without its prompt")):
        assert (words in answers[kind]) == (not check(url, text)["passes"])
        assert (answers[kind] == "passed") == check(url, text)["passes"]
    assert [answer[:3] for answer in answers["decisions"]] == ["400", "pas"] * 2
    assert "passed" not in (answers["image"], answers["unknown"])


def test_nemo(url):
    answers = ask(url, "nemo")
    whole, alone = check(url, TEXT, RESPONSE)["verdict"], [check(url, text) for text in (TEXT, RESPONSE)]
    harmful = [each["harmful"] for each in alone]
    assert answers["content_safety"] == {"direct": [harmful[0], whole["response_harm"] == "harmful"]}
    assert answers["vllm"] == harmful
    assert answers["vllm_unharmful"] == [not each for each in harmful]
    assert answers["fms"] == [[True, True], [False, False]]


def test_nemo_with_reasoning(export, tmp_path):
    with running(tmp_path / "log", "--model", export, "--mode", "reasoning", "--timeout", "60") as served:
        address = served.url
        answers = ask(address, "nemo", "reasoning")
        verdicts = check(address)["verdict"], check(address, TEXT, RESPONSE)["verdict"]
        assert check(address)["mode"] == "reasoning"
    harmful = [each[question] == "harmful" for each, question in zip(verdicts, QUESTIONS, strict=False)]
    assert answers["content_safety"] == {"reasoning": harmful}
