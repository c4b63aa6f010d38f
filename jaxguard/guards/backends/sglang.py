"""SGLang: a server in a process of its own, and the backend behind one, by its own /generate: token ids in, token ids out.

Nothing that a server says is used before it is checked; utils/client.py says what is tried again. By default a server samples as
it likes; with --enable-deterministic-inference the run's seed decides.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final

import httpx2
from pydantic import BeforeValidator, Field

from jaxguard.config.evaluate import EvaluateConfig, ServerConfig
from jaxguard.guards.protocol import Completion, sample_digest
from jaxguard.utils.client import (
    API_KEY,
    Client,
    Limiter,
    Models,
    NotFoundError,
    RefusedError,
    RetryableError,
    connect,
    gather,
)
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.parse import Fields, TokenId
from jaxguard.utils.secrets import Masked, revealed

_IMPOSSIBLE: Final = -1e30
"""Stands for minus infinity, so that differences are numbers."""
_HOST = "127.0.0.1"

# Asks the kernel for SIGKILL at the parent's death, since SGLang lets SIGTERM wait for its requests, and becomes the command.
# A process of its own does this: code between fork and exec is unsafe beside JAX's threads.
_DIE_WITH_PARENT = (
    "import ctypes, os, sys; parent = int(sys.argv[1]); ctypes.CDLL(None).prctl(1, 9); "
    "os.getppid() == parent and os.execv(sys.argv[2], sys.argv[2:])"
)


@dataclass(frozen=True)
class Reason:
    """Why an answer ended, and at which token or text."""

    type: str
    matched: object = None


@dataclass(frozen=True)
class Span:
    """The weights of some of an answer's tokens."""

    version: str


@dataclass(frozen=True)
class Meta:
    """What is said of an answer; an entry of these log-probabilities begins with one and its token's id."""

    finish_reason: Reason | None = None
    weight_version: str | None = None
    weight_versions: list[Span] | None = None
    output_token_ids_logprobs: list[list[tuple[float, TokenId, object]]] | None = None
    output_token_logprobs: list[tuple[float, TokenId, object]] | None = None


@dataclass(frozen=True)
class Answer:
    """One answer of /generate, as far as it is used."""

    meta_info: Meta
    output_ids: list[TokenId] | None = None


Answers = Annotated[
    list[Answer], BeforeValidator(lambda response: response if isinstance(response, list) else [response])
]
"""One comes as it is, several in a list."""


@dataclass(frozen=True)
class _Weights:
    """The response of /get_model_info."""

    model_path: Annotated[str, Field(pattern=r"^[^\x00]*$")]
    weight_version: str | None = None


@dataclass(frozen=True)
class _Swap:
    """The response of /update_weights_from_disk."""

    success: bool
    message: str = ""


@dataclass(frozen=True)
class SglangBackend:
    """A server as a Backend; see protocol.py and `open_sglang`. It makes its own batches, so `group` is one example.

    `version` is SGLang's weight_version that every response must carry; None takes any. `seeded`: samples depend on a seed alone.
    `logprobs`: ask for those of sampled tokens, which SGLang gives after the temperature.
    """

    settings: EvaluateConfig
    client: Client
    version: str | None = None
    seeded: bool = False
    group: int = 1
    logprobs: bool = False

    @property
    def workers(self) -> int:
        return self.settings.batch

    async def sample(
        self, prompts: Sequence[Sequence[int]], n: int, max_tokens: int, stop_ids: tuple[int, ...], /
    ) -> list[list[Completion]]:
        sampling = {
            "temperature": self.settings.temperature,
            "top_p": self.settings.top_p,
            "max_new_tokens": max_tokens,
            "stop_token_ids": list(stop_ids),
            "skip_special_tokens": False,
        }

        def parse(response: list[Answer], url: str) -> list[Completion]:
            answers = _answers(response, url, n, self.version)
            return [_completion(answer, url, max_tokens, stop_ids, self.logprobs) for answer in answers]

        def request(prompt: list[int]) -> Awaitable[list[Completion]]:
            body: dict[str, Any] = {"input_ids": prompt, "sampling_params": {**sampling, "n": n}}
            if self.seeded:  # n of one seed would be the same answer n times
                digests = [sample_digest(self.settings.seed, prompt, i) for i in range(n)]
                seeds = [int.from_bytes(digest[:4], "big") >> 1 for digest in digests]
                each = [{**sampling, "sampling_seed": seed} for seed in seeds]
                body = {"input_ids": [prompt] * n, "sampling_params": each}
            if self.logprobs:
                body |= {"return_logprob": True}
            return self.client.request("/generate", body, Answers, parse, tokens=n * len(prompt))

        return await gather(request(list(map(int, prompt))) for prompt in prompts)  # numpy's integers are no JSON

    async def log_odds(self, prefixes: Sequence[Sequence[int]], pairs: Sequence[tuple[int, int]], /) -> list[float]:
        def request(prefix: list[int], pair: list[int]) -> Awaitable[float]:
            def parse(response: list[Answer], url: str) -> float:
                [answer] = _answers(response, url, 1, self.version)
                entries = answer.meta_info.output_token_ids_logprobs or []
                if [[token for _, token, *_ in each] for each in entries] != [pair]:
                    raise RetryableError(f"{url} sent log-probabilities of other tokens than {pair}")
                positive, negative = (entry[0] for entry in entries[0])
                return log_odds_of(positive, negative, pair, url)

            body = {
                "input_ids": prefix,
                # SGLang's log-probabilities are those after temperature.
                "sampling_params": {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 1},
                "return_logprob": True,
                "token_ids_logprob": pair,
            }
            return self.client.request("/generate", body, Answers, parse, tokens=len(prefix))

        requests = zip(prefixes, pairs, strict=True)
        return await gather(request(list(map(int, prefix)), list(map(int, pair))) for prefix, pair in requests)

    async def declare(self, beginnings: Sequence[Sequence[int]], /) -> None:
        """Nothing to do: a server caches what it computes."""


@asynccontextmanager
async def open_sglang(
    url: str | Masked,
    model: str | None,
    settings: EvaluateConfig,
    version: str | None = None,
    api_key_env: str = API_KEY,
    deadline: float | None = None,
    logprobs: bool = False,
) -> AsyncIterator[SglangBackend]:
    """Connect to a server that runs. The environment variable `api_key_env` holds the key, if it wants one.

    A service gives a `deadline` in seconds, and may give several addresses with commas between them; see utils/client.py.

    The server must serve `model`, unless that is None; after `swap_weights` SGLang calls it by the new folder. The settings say
    how to sample, and how many requests may be under way; for `version` see SglangBackend. JaxguardError: it does not answer,
    or serves another model.
    """
    async with connect_server(url, settings.batch, api_key_env, deadline) as (client, server):
        for each in client.endpoints:
            await served_name(client, each, model)
        seeded = False
        with suppress(JaxguardError):  # a router, or an older server, has no such path
            info = await client.request("/server_info", None, Fields, lambda body, _: body, server)
            seeded = info.get("enable_deterministic_inference") is True
        if deadline is not None:
            client.canary = partial(_probe, client, version)
        yield SglangBackend(settings, client, version, seeded, logprobs=logprobs)


async def served(url: str | Masked, api_key_env: str = API_KEY) -> dict[str, Any]:
    """What a server says of its model: `model_path` and `weight_version` of SGLang.

    Any other has the `backend` openai and `models`, their names, and vLLM of a single one also `model_path`. JaxguardError: it does
    not answer.
    """
    async with connect_server(url, 1, api_key_env) as (client, server):
        for path in ("/get_model_info", "/model_info"):  # older servers know the first, newer ones will drop it
            try:
                return await client.request(path, None, _Weights, lambda body, _: asdict(body), server)
            except NotFoundError:
                continue
        models = await client.request("/v1/models", None, Models, lambda body, _: body.data, server)
    root = models[0].root if len(models) == 1 else None
    path_known = {"model_path": root} if root and Path(root).is_absolute() else {}
    return {"backend": "openai", "models": [model.id for model in models], **path_known}


async def swap_weights(url: str | Masked, folder: Path, version: str, api_key_env: str = API_KEY) -> None:
    """Have a server, not a router, load a folder with a checkpoint of the same shape that it can read.

    Its responses must have this weight_version from then on. JaxguardError: it refuses, or still answers with other weights.
    """

    def check(body: _Swap, url: str) -> None:
        if not body.success:
            raise JaxguardError(f"{url} did not load the weights: {body.message}")

    async with connect_server(url, 1, api_key_env) as (client, server):
        weights = {"model_path": str(folder.resolve()), "weight_version": version}
        await client.request("/update_weights_from_disk", weights, _Swap, check, server)
        await _probe(client, version, server)


async def _probe(client: Client, version: str | None, server: Masked) -> None:
    """Have a server generate a token. JaxguardError: it does not, or with other weights."""

    def check(answers: list[Answer], url: str) -> None:
        if not all(answer.output_ids for answer in _answers(answers, url, 1, version)):
            raise RetryableError(f"{url} generated nothing")

    probe = {"input_ids": [0], "sampling_params": {"temperature": 0, "max_new_tokens": 1}}
    await client.request("/generate", probe, Answers, check, server)


@asynccontextmanager
async def connect_server(
    url: str | Masked, requests: int, api_key_env: str, deadline: float | None = None
) -> AsyncIterator[tuple[Client, Masked]]:
    """A client of a server, or of several with commas between, and the first one's address.

    `requests` may be under way at a time; of a service, which has a `deadline`, as many as it admits.
    """
    limiter = Limiter(start=requests, most=requests if deadline is None else sys.maxsize)
    async with connect(addresses(url), limiter, api_key_env=api_key_env, deadline=deadline) as client:
        yield client, client.endpoints[0]


def addresses(url: str | Masked) -> list[str]:
    """Return the base addresses in an address, or several with commas between."""
    return [re.sub(r"(/v1)?/*$", "", each.strip()) for each in re.split(r",(?=\s*https?://)", revealed(url))]


async def served_name(client: Client, server: Masked, model: str | None) -> str:
    """What a server calls its model, the first one unless `model` names another. JaxguardError: it does not serve that."""
    names = await client.request("/v1/models", None, Models, Models.names, server)
    if not names or model not in (None, *names):
        raise JaxguardError(
            f"{server} serves {', '.join(names) or 'nothing'}, not {model!r}; set the guard's model, or start the server with "
            "--served-model-name"
        )
    return names[0] if model is None else model


def log_odds_of(positive: float, negative: float, pair: Sequence[int], url: str) -> float:
    """The difference of two tokens' log-probabilities that a server sent."""
    if not (positive < 1e-3 and negative < 1e-3):  # NaN is not, either
        raise RetryableError(f"{url} sent {positive} and {negative}, which are no log-probabilities")
    if max(positive, negative) <= _IMPOSSIBLE:
        raise JaxguardError(
            f"{url} gives neither of the tokens {list(pair)} any probability: are its weights or activations finite?"
        )
    return max(positive, _IMPOSSIBLE) - max(negative, _IMPOSSIBLE)


def _answers(answers: list[Answer], url: str, count: int, version: str | None) -> list[Answer]:
    """Check how many answers came, and of which weights."""
    if len(answers) != count:
        raise RetryableError(f"{url} sent {len(answers)} answers, not {count}")
    for answer in answers:
        meta = answer.meta_info
        versions = {meta.weight_version, *(span.version for span in meta.weight_versions or ())}
        if version is not None and versions != {version}:
            text = " and ".join(sorted(map(repr, versions)))
            raise JaxguardError(f"{url} answered with weights {text}, not {version!r}")
    return answers


def _completion(
    answer: Answer, url: str, max_tokens: int, stop_ids: tuple[int, ...], with_logprobs: bool = False
) -> Completion:
    ids, reason = answer.output_ids, answer.meta_info.finish_reason
    if ids is None or reason is None or len(ids) > max_tokens:
        raise RetryableError(f"{url} sent no completion of at most {max_tokens} tokens")
    end = next((i for i, token in enumerate(ids) if token in stop_ids), None)
    if end is None and reason.type == "stop" and ids and reason.matched == ids[-1]:
        end = len(ids) - 1  # an end that only the model's files name
    count, logprobs = len(ids) if end is None else end + 1, tuple[float, ...]()
    if with_logprobs:
        entries = (answer.meta_info.output_token_logprobs or [])[:count]
        logprobs = tuple(logprob for logprob, _, _ in entries)
        if [token for _, token, _ in entries] != ids[:count] or not all(logprob < 1e-3 for logprob in logprobs):
            raise RetryableError(f"{url} sent no log-probability of each of its tokens")
    if end is not None:
        return Completion(tuple(ids[:end]), stopped=True, stop_id=ids[end], logprobs=logprobs)
    if reason.type != "length":
        raise RetryableError(f"{url} ended an answer by {reason}")
    if len(ids) < max_tokens:
        raise RefusedError(
            f"{url} ended an answer after {len(ids)} tokens of {max_tokens}: it has no room for more in one request. Lower "
            "evaluate.reasoning_tokens, or start it with a larger --max-total-tokens or --mem-fraction-static"
        )
    return Completion(tuple(ids), stopped=False, logprobs=logprobs)


@contextmanager
def serve(checkpoint: Path, name: str, log: Path, settings: ServerConfig) -> Iterator[str]:
    """Serve a Hugging Face folder under a name with the SGLang of `settings.python`; the value is the server's address.

    JaxguardError: no such interpreter, no SGLang in it, or the server does not come up.
    """
    python, port = shutil.which(str(Path(settings.python).expanduser())), free_port()
    if python is None:
        raise JaxguardError(f"evaluate.server.python: {settings.python!r} is no interpreter")
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('sglang') is None)"
    check = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)  # noqa: S603 (the user's own)
    if check.returncode:
        last = check.stderr.strip().splitlines()[-1:]
        raise JaxguardError(
            f"evaluate.server.python: {settings.python!r} has no SGLang{f' ({last[0]})' if last else ''}. Install it into an "
            "environment of its own, `python -m venv .venv-sglang && .venv-sglang/bin/pip install sglang`, and name that "
            "environment's python; on a CPU run `make sglang-cpu`, and take what `python tools/sglang_server.py --overrides` "
            "prints"
        )
    command = launch_command(python, checkpoint, name, port, settings.arguments)
    with started(command, f"http://{_HOST}:{port}/health_generate", log, settings.ready_seconds):
        yield f"http://{_HOST}:{port}"


def launch_command(python: str, checkpoint: Path, name: str, port: int, arguments: Sequence[str | Masked]) -> list[str]:
    """The command that starts an SGLang server on this machine."""
    flags = {"--model-path": checkpoint, "--served-model-name": name, "--host": _HOST, "--port": port}
    words = [str(word) for flag in flags.items() for word in flag]
    return [python, "-m", "sglang.launch_server", *words, *map(revealed, arguments)]


def free_port() -> int:
    """A port that nothing listens on at the moment."""
    with socket.socket() as listener:
        listener.bind((_HOST, 0))
        return int(listener.getsockname()[1])


@contextmanager
def started(
    command: Sequence[str], health: str, log: Path, seconds: float, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server in a process group of its own, from its first healthy answer to the end of the block.

    It dies with the thread that started it, even where that is killed. It is ready when the address `health` answers 200, for
    which it has so many seconds; `environment` holds variables besides the inherited ones. JaxguardError: it ends early, or is
    not healthy in time; shows the end of the log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    no_proxy = ",".join(filter(None, (os.environ.get("NO_PROXY"), _HOST)))  # servers also ask themselves how they are
    log.unlink(missing_ok=True)
    log.touch(mode=0o600)  # a server may write its arguments, a key among them
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 (the caller's own command)
            [sys.executable, "-c", _DIE_WITH_PARENT, str(os.getpid()), *command],
            env={**os.environ, "NO_PROXY": no_proxy, **(environment or {})},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        end = time.monotonic() + seconds
        while True:
            with suppress(httpx2.RequestError):
                if httpx2.get(health, timeout=30, trust_env=False).is_success:  # whatever proxy there is
                    break
            problem = "" if time.monotonic() < end else f"was not ready in {seconds:g} s"
            if process.poll() is not None:
                problem = f"ended with code {process.returncode}"
            if problem:
                tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
                raise JaxguardError(f"the server {problem}; the end of {log}:\n{tail}")
            time.sleep(0.5)
        yield process
    finally:
        # End the whole group: a server that crashed may leave processes.
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, number)
                process.wait(timeout=10)
