"""Open the guards that a config names: checkpoint, prompt format and backend become a Predictor, whose predictions are stored."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from jaxguard.config import Config
from jaxguard.config.evaluate import EvaluateConfig, GuardConfig
from jaxguard.data.encoding import TOKENIZER_FILES, Encoder
from jaxguard.data.examples import Example
from jaxguard.data.files import file_digest, weights_digest
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.format.template import load_tokenizer
from jaxguard.data.guard_files import export_or, find_export, trained_together
from jaxguard.data.policies import Policy, load_policy, policy_for
from jaxguard.data.prepare import select
from jaxguard.data.sources import digest
from jaxguard.guards.backends.openai import open_openai
from jaxguard.guards.backends.sglang import open_sglang, serve, served, swap_weights
from jaxguard.guards.baselines import BASELINES, fit_baseline
from jaxguard.guards.formats.external import BUILT_IN, external_format, external_guard, format_file
from jaxguard.guards.formats.native import NativeFormat, context_tokens
from jaxguard.guards.protocol import Backend, Prediction, Predictor, PromptFormat, predict
from jaxguard.models.devices import explain_memory, guard_remedy
from jaxguard.utils import hub
from jaxguard.utils.client import API_KEY
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.secrets import Masked
from jaxguard.utils.store import Store, open_store, read_records
from jaxguard.utils.threads import outside_event_loop

_SAMPLING: Final = {"temperature", "top_p", "generations", "reasoning_tokens", "verdict_tokens", "ask", "seed"}
"""Settings that change a guard's predictions."""


def modes_of(guard: GuardConfig, config: Config) -> tuple[Mode, ...]:
    """The modes of a guard: its own, else those that data.mode trains, as far as its format has them.

    JaxguardError: no such format, or one without that mode.
    """
    if guard.format == "jaxguard":
        able = tuple(Mode)
    else:
        able = (Mode.DIRECT,) if guard.format in BASELINES else external_guard(guard.format).modes
    if not set(guard.modes) <= set(able):
        raise JaxguardError(
            f"guard {guard.name!r}: format {guard.format} answers in {able[0]} mode only; leave modes out"
        )
    trained = tuple(mode for mode in able if config.data.mode in ("dual", mode))
    return tuple(map(Mode, guard.modes)) or trained or able


def checkpoint_of(guard: GuardConfig, config: Config) -> str:
    """The folder or repository that holds a guard's weights and tokenizer; JaxguardError: this run has no export yet."""
    if guard.checkpoint is not None:
        return export_or(guard.checkpoint)
    try:
        return str(find_export(config.folder))
    except JaxguardError as error:
        raise JaxguardError(
            f"guard {guard.name!r} is this run's export. {error}; or name the guard's checkpoint"
        ) from None


def served_path(endpoint: str) -> str:
    """Where the model that a server serves lies on this machine; JaxguardError: it does not say, or not here."""
    try:
        path = outside_event_loop(lambda: asyncio.run(served(endpoint))).get("model_path")
    except JaxguardError as error:
        raise JaxguardError(
            f"{endpoint} does not say what it serves ({error}): is it a model server that is ready? If so, set {API_KEY} where it "
            "wants a key, or name the model's folder or repository with --tokenizer"
        ) from None
    if not isinstance(path, str) or not Path(path).is_dir():
        raise JaxguardError(
            f"{endpoint} serves {path or 'a model whose folder it does not name'}, which is no folder on this machine: name a "
            "folder or repository that has the model's tokenizer with --tokenizer"
        )
    return path


def trained_examples(config: Config) -> list[Example]:
    """What the run's own guard trains on: its sources without the held-out examples, its subset; baselines see no more."""
    return [example for example, _ in select(config).train]


@asynccontextmanager
async def open_guard(
    guard: GuardConfig,
    config: Config,
    settings: EvaluateConfig,
    policy: Policy | None = None,
    probabilities: bool = True,
    deadline: float | None = None,
    logprobs: bool = False,
) -> AsyncIterator[Predictor]:
    """Load a guard, or connect to it, or start its server; everything is closed at the end.

    The config is its run's, or that of the run that evaluates it; `policy` is by default the config's. For `probabilities`
    see protocol.predict, for `deadline` and `logprobs` open_sglang. JaxguardError: no such checkpoint, a server that does
    not answer or serves another model.
    """
    if guard.format in BASELINES:
        yield fit_baseline(guard.format, trained_examples(config), config.seed)
        return
    remote = guard.endpoint is not None and not guard.swap
    folder = hub.fetch(checkpoint_of(guard, config), guard.revision, TOKENIZER_FILES if remote else None)
    policy = policy or load_policy(config.data.policy)
    form: PromptFormat
    if guard.format == "jaxguard":
        data = config.data.model_copy(update={"max_seq_len": context_tokens(folder)})
        form = NativeFormat(encoder := Encoder.load(folder, data, policy), settings, trained_together(folder))
        tokenizer = encoder.tokenizer
    else:
        tokenizer = load_tokenizer(folder, chat=False)
        form = external_format(guard.format, tokenizer, policy, guard.ignore_policies)
    async with AsyncExitStack() as stack:
        backend: Backend
        if guard.endpoint is None and settings.backend == "jax":
            from jaxguard.guards.backends.jax import load_backend  # loads JAX

            with explain_memory(guard_remedy(settings)):
                backend = load_backend(folder, config, settings)
        else:
            url: str | Masked | None = guard.endpoint
            model, version, about = guard.model, None, dict[str, Any]()
            if url is None:
                log, model = config.folder / "evaluate" / f"{guard.name}.server.log", model or guard.name
                url = stack.enter_context(serve(folder, model, log, settings.server))
            elif guard.swap:
                version = str(weights_digest(folder))[:16]
                await swap_weights(url, folder, version, guard.api_key_env)
                model = None  # it is called by the folder from now on
            else:  # others may swap its weights meanwhile
                about = await served(url, guard.api_key_env)
                version = about.get("weight_version")
            if about.get("backend") == "openai":
                opened = open_openai(url, model, settings, tokenizer, guard.api_key_env, deadline)
                other = await stack.enter_async_context(opened)
                if other.likeliest is None and not settings.generations:
                    raise JaxguardError(f"{url} gives no log-probabilities: set evaluate.generations=1 or more")
                backend, probabilities = other, probabilities and other.likeliest is not None
            else:
                native = open_sglang(url, model, settings, version, guard.api_key_env, deadline, logprobs)
                backend = await stack.enter_async_context(native)
        yield partial(predict, form=form, backend=backend, settings=settings, score=probabilities)


async def fingerprint(guard: GuardConfig, config: Config, settings: EvaluateConfig) -> dict[str, Any]:
    """What tells a guard's predictions from another guard's; JSON.

    A running server is known by what it serves, not by its address. JaxguardError: no such checkpoint or training data, or a
    server that does not answer.
    """
    if guard.format in BASELINES:
        return {"format": guard.format, "fitted_to": digest(trained_examples(config)), "seed": config.seed}
    checkpoint = checkpoint_of(guard, config)
    form = guard.format if guard.format in BUILT_IN else file_digest(format_file(guard.format))
    known: dict[str, Any] = {"format": form, "checkpoint": checkpoint, "revision": guard.revision, "backend": "sglang"}
    known |= {"ignore_policies": True} if guard.ignore_policies else {}
    if guard.format == "jaxguard":
        trained = trained_together(hub.fetch(checkpoint, guard.revision, TOKENIZER_FILES))
        sets = [each.model_dump(mode="json", exclude={"examples"}) for each in trained]
        known |= {"trained_together": sets} if sets else {}
    if guard.endpoint is not None and not guard.swap:
        model = await served(guard.endpoint, guard.api_key_env)
        if "model_path" in model:  # the path may be this machine's too
            model["weights"] = weights_digest(Path(model["model_path"]))
        return known | {"served_as": guard.model} | model
    known["weights"] = weights_digest(hub.fetch(checkpoint, guard.revision))
    if guard.endpoint is None and settings.backend == "jax":
        from jaxguard.guards.backends.jax import precision  # loads JAX

        known |= {"backend": "jax", "compute_dtype": precision(config)}
    elif guard.endpoint is None:
        known["arguments"] = list(map(str, settings.server.arguments))
    return known


def computed_in(known: Mapping[str, Any]) -> str:
    """What a fingerprint says that the predictions were computed in: JAX's type, or what else computed them."""
    return str(known.get("compute_dtype", known.get("backend", known["format"])))


async def cache_key(guard: GuardConfig, config: Config, settings: EvaluateConfig) -> dict[str, Any]:
    """What decides a guard's predictions, whatever the examples; JSON for the first line of a file. Raises as `fingerprint`."""
    return {
        "guard": await fingerprint(guard, config, settings),
        "format": config.data.model_dump(include={"reasoning_marker", "direct_marker", "answer_format"}),
        **settings.model_dump(mode="json", include=_SAMPLING),
    }


def examples_key(examples: Sequence[Example], policy: Policy) -> dict[str, str]:
    """What decides them besides: the examples, and every policy that one of them is judged by, by default `policy`."""
    policies: dict[str, list[tuple[str | None, str]]] = {}
    for written, example in {example.policy: example for example in examples}.items():
        own = policy_for(example, policy)
        policies.setdefault(f"policy {own.name}", []).append((written, own.digest))
    hashes = {name: hashlib.sha256(json.dumps(each).encode()).hexdigest() for name, each in policies.items()}
    return {"examples": digest(examples), **hashes}


@dataclass
class Predictions:
    """An open file of predictions; `answers` holds them by their example's id, without their completions."""

    answers: dict[str, Prediction]
    _store: Store
    _completions: bool

    def append(self, prediction: Prediction) -> None:
        """Add a prediction: once this returns, killing the process does not lose it. JaxguardError: it cannot be written."""
        without = replace(prediction, completions=())
        self._store.append(asdict(prediction if self._completions else without))
        self.answers[prediction.example_id] = without


@contextmanager
def open_predictions(path: Path, settings: Mapping[str, Any], completions: bool = False) -> Iterator[Predictions]:
    """Open a file of predictions to add to, with their completions or without, or begin it. The caller holds a lock on the folder.

    Its lines are checksummed; the first one holds `settings`, JSON that decides the predictions: guard, sampling, examples.
    JaxguardError: it was begun with other settings, or cannot be written.
    """
    remedy = "Take the old values back, give the guard or the run another name, or delete the file."
    with open_store(path, settings, remedy) as store:
        predictions = Predictions({}, store, completions)
        for prediction in read_records(path, Prediction):
            predictions.answers[prediction.example_id] = replace(prediction, completions=())
        yield predictions
