"""The public class `Guard`: a guard model, loaded once, that checks prompts and responses against a policy."""

import asyncio
import re
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Self, TypeAlias, TypeVar

from jaxguard.config import Config
from jaxguard.config import load as load_config
from jaxguard.config.evaluate import EvaluateConfig, GuardConfig
from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import Mode, single_message
from jaxguard.data.guard_files import export_or, read_guard_files
from jaxguard.data.policies import Policy, Question, load_policy, policy_for
from jaxguard.data.questions import NOT_RECORDED, QuestionSet
from jaxguard.guards import loading
from jaxguard.guards.cascade import cascade
from jaxguard.guards.formats.native import split_request
from jaxguard.guards.growing import Answered, Kept, keep, known
from jaxguard.guards.modes import AUTO, MODES, AnyMode
from jaxguard.guards.operating_points import (
    F1,
    POINTS,
    WORDS,
    Asked,
    AutoThresholds,
    OperatingPoints,
    Points,
    read_points,
)
from jaxguard.guards.protocol import LocalBackend, Request, applicable
from jaxguard.guards.result import CheckResult, join
from jaxguard.utils import hub
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.parse import nearest
from jaxguard.utils.secrets import Masked
from jaxguard.utils.threads import LoopThread

Exchange: TypeAlias = Example | tuple[str, str | None] | str
"""An example, a (prompt, response) pair, or a prompt."""
AnyPolicy: TypeAlias = Policy | str | Path
"""A policy, or the name of one in configs/policies, or a YAML file."""

Result = TypeVar("Result")


def _known_mode(mode: str | Mode) -> AnyMode:
    if mode not in MODES:
        raise JaxguardError(f"mode {str(mode)!r}: {nearest(str(mode), map(str, MODES))}expected {' or '.join(MODES)}")
    return AUTO if mode == AUTO else Mode(mode)


def _known_policy(policy: AnyPolicy) -> Policy:
    return policy if isinstance(policy, Policy) else load_policy(str(policy))


class Guard:
    """A loaded guard. Close it, or use it in a `with` block, to free what it holds.

    It computes in a thread of its own, so it works in a script and inside a running event loop, such as a notebook's, and may
    be used from several threads; they take turns.

    Attributes:
        config: of a run that is never trained, whose evaluation names the guard.
        policy: what it judges by where neither the call nor the example names another policy.
        mode: how it answers by default; "auto": directly where guard.json certifies that, else by reasoning.
        warning: what a user should know of it; empty if nothing.
        trained: the sets of questions that it was trained on together; empty if that is not known.
        points: its operating points; empty without a guard.json for its weights.
        operating_point: whose thresholds decide where they apply, else the words of its answer; "words" for these always.
    """

    def __init__(
        self,
        config: Config,
        mode: AnyMode,
        policy: Policy,
        warning: str = "",
        trained: Sequence[QuestionSet] = (),
        folder: Path | None = None,
        operating_point: str | float | None = None,
        deadline: float | None = None,
    ) -> None:
        """Load the first guard of the config's evaluation, with guard.json of `folder`; see `load`."""
        self.config, self.mode, self.trained = config, mode, tuple(trained)
        self.points: Points = {}
        self._chosen, self._no_points = operating_point not in (None, WORDS), ""
        self.operating_point = F1 if operating_point is None else str(operating_point)
        self.policy = policy
        self._thread = LoopThread("jaxguard")
        self._open = AsyncExitStack()
        self._settings = config.evaluate or EvaluateConfig()
        opened = loading.open_guard(self._settings.guards[0], config, self._settings, policy=policy, deadline=deadline)
        try:
            unread = folder is None or (self.operating_point == WORDS and mode != AUTO)
            notes = [] if folder is None or unread else self._read_points(folder)
            self.warning = "; ".join(filter(None, (warning, *notes)))
            self._predict = self._submit(self._open.enter_async_context(opened)).result()
        except BaseException:
            self.close()
            raise

    @classmethod
    def load(
        cls,
        model: str | Path,
        policy: AnyPolicy | None = None,
        mode: str | Mode | None = None,
        tokenizer: str | Path | None = None,
        config: str | Path | None = None,
        operating_point: str | float | None = None,
        deadline: float | None = None,
    ) -> Self:
        """Load a guard in jaxguard's format, or connect to a server that has one.

        Args:
            model: an export, a run's folder, a repository on the hub, or the address of an SGLang or OpenAI-compatible server.
            policy: a `Policy`, a name in configs/policies or a YAML file; None takes what the model was trained on.
            mode: "reasoning", "direct" or "auto"; None takes how it was trained, reasoning where that is both or unknown.
            tokenizer: a folder or repository with the tokenizer, for a server whose model does not lie on this machine.
            config: a config of the run that trained it, for a model that is no export of jaxguard.
            operating_point: a name in the guard.json beside the weights: "f1", or a false-positive rate such as 0.01; "words" for
                the words of the guard's answer. None takes "f1" where there is one for this policy and mode, else "words".
            deadline: seconds after which a server's answer is of no use: it is asked once, and `model` may be several addresses
                with commas between them. None: it is asked again and again, as suits offline work.

        Raises:
            JaxguardError: no such model, policy, mode or operating point, or a server that does not answer; mode "auto" without
                thresholds for these weights and this policy.
        """
        endpoint = str(model).rstrip("/") if re.match(r"https?://", str(model)) else None
        if endpoint is None and tokenizer is not None:
            raise JaxguardError("tokenizer goes with a server's address; a folder or repository brings its own")
        chosen = None if mode is None else _known_mode(mode)
        chosen_policy = None if policy is None else _known_policy(policy)  # before anything is downloaded
        checkpoint = export_or(str(tokenizer or loading.served_path(endpoint)) if endpoint else str(model))
        folder = hub.fetch(checkpoint, only=("*.json", "*.jinja", "tokenizer*", "*.yaml"))
        export = read_guard_files(folder)
        run = load_config(str(config)) if config is not None else None if export is None else export.config
        if chosen_policy is None:
            if run is None:
                raise JaxguardError(
                    "which policy? The one that this model was trained on is not known: name one, such as aegis2"
                )
            chosen_policy = load_policy(run.data.policy if export is None or config is not None else str(export.policy))
        trained = "dual" if run is None else run.data.mode
        default = chosen or (Mode.DIRECT if trained == "direct" else Mode.REASONING)
        address = None if endpoint is None else Masked(endpoint)
        guard = GuardConfig(
            checkpoint=checkpoint, endpoint=address, modes=(default.value,) if isinstance(default, Mode) else ()
        )
        settings = EvaluateConfig(guards=(guard,), generations=1, temperature=0.0, top_p=1.0)
        own: dict[str, Any] = {"model": {}, "data": {"train": [{"kind": "jsonl", "path": "none"}]}}
        if run is not None:
            own = run.model_dump(include={"model", "data"})
        tree = {
            "name": "check",
            # The mesh, attention and dtype were chosen for the machine that trained; the defaults fit this one.
            "model": {**own["model"], "checkpoint": checkpoint, "revision": None, "attention": "auto"},
            "data": {**own["data"], "subset": None},
            "evaluate": settings.model_dump(),
        }
        together = () if export is None else export.manifest.trained_together
        warnings = []
        if trained not in ("dual", default):
            warnings.append(f"this model was trained to answer in {trained} mode only")
        if run is not None and not together:
            warnings.append(NOT_RECORDED)
        return cls(
            load_config(tree), default, chosen_policy, "; ".join(warnings), together, folder, operating_point, deadline
        )

    def _read_points(self, folder: Path) -> list[str]:
        """Take the operating points of a folder, and return notes. JaxguardError: guard.json is malformed."""
        known = {}
        if (folder / POINTS).is_file():
            known = self._submit(loading.fingerprint(self._settings.guards[0], self.config, self._settings)).result()
        self.points, self._no_points = read_points(folder, known.get("weights"))
        decided = self._check_mode(self.mode, self.policy)
        if not known or self._no_points:
            return [self._no_points] if known else []
        if other := {each.precision for each in self.points.values()} - {computed := loading.computed_in(known)}:
            decided.append(
                f"this guard computes in {computed}, and thresholds were chosen in {', '.join(sorted(other))}"
            )
        return decided

    def _check_mode(self, mode: AnyMode, policy: Policy) -> list[str]:
        """Notes on questions that no threshold decides. JaxguardError: none has the chosen operating point, or those of auto."""
        notes = []
        for each in Mode if mode == AUTO else (mode,):
            own = self._points_of(policy, policy.asks, each)
            words = [q for q, points in own.items() if points is None or points.threshold(self.operating_point) is None]
            if self._chosen and len(words) == len(own):
                has = "".join(f"\n  {points}" for points in self.points.values())
                none = f"{POINTS} has none of this name for one greedy answer by {policy.name} in {each} mode. It has:{has}"
                raise JaxguardError(f"operating_point={self.operating_point}: {self._no_points or none}")
            if words:
                notes.append(
                    f"{', '.join(words)}: the words of the answer decide; {POINTS} has no threshold for {each} mode"
                )
        autos = self._autos(policy, policy.asks) if mode == AUTO else {}
        if autos and not any(autos.values()):
            again = "evaluate in both modes, with evaluate.validation; or choose direct or reasoning"
            raise JaxguardError(
                f"mode=auto: {self._no_points or f'{POINTS} has no thresholds of auto by {policy.name}'}: {again}"
            )
        return notes + [
            f"{q}: {auto or 'auto always reasons'}"
            for q, auto in autos.items()
            if not (auto and auto.direct and auto.worth in (None, "dominates"))
        ]

    def _autos(self, policy: Policy, questions: Iterable[Question]) -> dict[Question, AutoThresholds | None]:
        points = self._points_of(policy, questions, Mode.DIRECT)
        return {q: None if own is None else own.auto for q, own in points.items()}

    def _points_of(
        self, policy: Policy, questions: Iterable[Question], mode: Mode
    ) -> dict[Question, OperatingPoints | None]:
        return {q: self.points.get(Asked.of(policy, q, mode, self._settings)) for q in questions}

    def check(
        self,
        prompt: str,
        response: str | None = None,
        mode: str | Mode | None = None,
        policy: AnyPolicy | None = None,
    ) -> CheckResult:
        """Check a prompt, with the response to it.

        Args:
            prompt: what the user wrote.
            response: what the assistant answered; None where it has not.
            mode: "reasoning", "direct" or "auto"; None is the guard's.
            policy: as in `load`; None is the guard's.

        Raises:
            JaxguardError: no such mode or policy, a policy that leaves no room for the text, or a server that fails.
        """
        [result] = self.check_many([(prompt, response)], mode, policy)
        return result

    def check_many(
        self, exchanges: Iterable[Exchange], mode: str | Mode | None = None, policy: AnyPolicy | None = None
    ) -> list[CheckResult]:
        """Check many exchanges in batches; results in the order of the exchanges. Labels of examples are not looked at."""
        return list(self.stream(exchanges, mode, policy))

    async def acheck(
        self,
        prompt: str,
        response: str | None = None,
        mode: str | Mode | None = None,
        policy: AnyPolicy | None = None,
    ) -> CheckResult:
        """As `check`, without blocking the event loop."""
        [result] = await self.acheck_many([(prompt, response)], mode, policy)
        return result

    async def acheck_many(
        self,
        exchanges: Iterable[Exchange],
        mode: str | Mode | None = None,
        policy: AnyPolicy | None = None,
        growing: Sequence[Answered] = (),
    ) -> list[CheckResult]:
        """As `check_many`, without blocking the event loop.

        `growing`: of each exchange what was answered so far, empty at first and updated; later ones have more of the same texts.
        """
        exchanges = list(exchanges)

        async def collect() -> list[CheckResult]:
            return [result async for result in self._checked(exchanges, mode, policy, growing)]

        return await asyncio.wrap_future(self._submit(collect()))

    async def asettle(self) -> None:
        """Wait until what was cancelled no longer computes: a pass that has begun is not interrupted."""
        await self._thread.settle()

    async def awarm_up(self) -> None:
        """Compile what the scores of a few exchanges need, after the policies that were judged by so far."""

        async def compile_programs() -> None:
            backend = self._predict.keywords["backend"] if isinstance(self._predict, partial) else None
            if isinstance(backend, LocalBackend):
                backend.warm_up()

        await asyncio.wrap_future(self._submit(compile_programs()))

    def stream(
        self, exchanges: Iterable[Exchange], mode: str | Mode | None = None, policy: AnyPolicy | None = None
    ) -> Iterator[CheckResult]:
        """As `check_many`, each result as soon as it and those before it are there."""
        exchanges, results = list(exchanges), SimpleQueue[CheckResult | None]()

        async def produce() -> None:
            try:
                async for result in self._checked(exchanges, mode, policy):
                    results.put(result)
            finally:
                results.put(None)

        produced = self._submit(produce())
        try:
            while (result := results.get()) is not None:
                yield result
            produced.result()
        finally:
            produced.cancel()

    def close(self) -> None:
        """Free the model, or the connection; closing twice does no harm."""
        if self._thread.closed:
            return
        try:
            self._submit(self._open.aclose()).exception()  # what is raised at the end was raised to a caller before
        finally:
            self._thread.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _submit(self, work: Coroutine[Any, Any, Result]) -> Future[Result]:
        if self._thread.closed:
            work.close()
            raise JaxguardError("this guard is closed: load it again")
        return self._thread.submit(work)

    async def _checked(
        self,
        exchanges: Iterable[Exchange],
        mode: str | Mode | None,
        policy: AnyPolicy | None,
        growing: Sequence[Answered] = (),
    ) -> AsyncIterator[CheckResult]:
        """The result of each exchange, in order, as soon as it and those before it are there."""
        mode, examples = self.mode if mode is None else _known_mode(mode), list[Example]()
        default = self.policy if policy is None else _known_policy(policy)
        self._check_mode(mode, default)
        for i, exchange in enumerate(exchanges):
            if not isinstance(exchange, Example):
                prompt, response = (exchange, None) if isinstance(exchange, str) else exchange
                exchange = Example(str(i + 1), "check", single_message(prompt), response)
            examples.append(exchange)
        answered = dict(zip(map(id, examples), growing, strict=True)) if growing else {}
        answer = partial(self._answered, default=default, growing=answered)
        if mode == AUTO:
            policies = [policy_for(example, default) for example in examples]
            autos = [self._autos(p, applicable(x, p)) for x, p in zip(examples, policies, strict=True)]
            results = cascade(examples, autos, answer)
        else:
            results = answer(examples, mode)
        async for result in results:
            yield result

    async def _answered(
        self, examples: Sequence[Example], mode: Mode, default: Policy, growing: Mapping[int, Answered]
    ) -> AsyncIterator[CheckResult]:
        """The answers in a mode, likewise; `growing` by the id() of the example."""
        parts, kept = list[list[Request]](), Kept()
        for i, example in enumerate(examples):
            policy, answered = policy_for(example, default), growing.get(id(example))
            request = Request(example, applicable(example, policy), mode, default, answered is not None)
            split = split_request(request, policy.asks, self.trained) if request.questions else []
            parts.append([replace(x, example=replace(x.example, id=f"{i}.{j}")) for j, (x, _) in enumerate(split)])
            if answered is not None:
                kept |= {part.example.id: (answered, j, part) for j, part in enumerate(parts[-1])}
        predictions = known(kept)
        done = 0

        def ready() -> Iterator[CheckResult]:
            nonlocal done
            while done < len(examples) and all(part.example.id in predictions for part in parts[done]):
                answers = [(part, predictions.pop(part.example.id)) for part in parts[done]]
                policy = policy_for(examples[done], default)
                points = self._points_of(policy, policy.asks, mode)
                yield join(examples[done], policy, mode, answers, self.trained, points, self.operating_point)
                done += 1

        async for prediction in self._predict([x for each in parts for x in each if x.example.id not in predictions]):
            predictions[prediction.example_id] = prediction
            keep(kept, prediction)
            for result in ready():
                yield result
        for result in ready():  # of which nothing is asked
            yield result
