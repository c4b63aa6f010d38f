"""Which guard to load and how to prompt it: a Config put together from a model, a policy and a mode.

How a model was trained to be prompted (its markers, its modes) is in the config of its run, a file of the export.
"""

import asyncio
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from jaxguard.config import Config, load
from jaxguard.config.base import nearest
from jaxguard.config.evaluate import EvaluateConfig, GuardConfig
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.guard_files import read_guard_files
from jaxguard.data.policies import Policy, load_policy
from jaxguard.utils import hub
from jaxguard.utils.client import API_KEY
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.threads import outside_event_loop

_FILES: Final = ("*.json", "*.jinja", "tokenizer*", "*.yaml")


@dataclass(frozen=True)
class Setup:
    """Everything that decides how a guard is loaded and prompted, before anything heavy is loaded.

    Attributes:
        guard, config, settings: for open_guard.
        policy: what is judged by.
        trained: the mode that it was trained in, or "dual"; "dual" also where that is unknown.
        mode: how it answers by default.
    """

    guard: GuardConfig
    config: Config
    settings: EvaluateConfig
    policy: Policy
    trained: str
    mode: Mode

    def resolve_mode(self, mode: str | Mode | None) -> Mode:
        """The mode of a check; None takes the guard's own.

        Raises:
            JaxguardError: no such mode.
        """
        return self.mode if mode is None else _known_mode(mode)

    @property
    def warning(self) -> str:
        """What a user should know; empty if nothing."""
        trained = self.trained in ("dual", self.mode)
        return "" if trained else f"this model was trained to answer in {self.trained} mode only"


def set_up(
    model: str | Path,
    policy: str | Path | None = None,
    mode: str | Mode | None = None,
    tokenizer: str | Path | None = None,
    config: str | Path | None = None,
) -> Setup:
    """See `Guard.load` for the arguments and errors."""
    endpoint = str(model).rstrip("/") if re.match(r"https?://", str(model)) else None
    if endpoint is None and tokenizer is not None:
        raise JaxguardError("tokenizer goes with a server's address; a folder or repository brings its own")
    chosen = None if mode is None else _known_mode(mode)
    if policy is not None:
        load_policy(str(policy))  # before anything is downloaded
    checkpoint = _checkpoint(str(tokenizer or _served_path(endpoint)) if endpoint else str(model))
    export = read_guard_files(hub.fetch(checkpoint, only=_FILES))
    run = load(str(config)) if config is not None else None if export is None else export.config
    if policy is None:
        if run is None:
            raise JaxguardError("which policy? What this model was trained on is not known: name one, such as aegis2")
        policy = run.data.policy if export is None or config is not None else export.policy
    trained = "dual" if run is None else run.data.mode
    default = chosen or (Mode.DIRECT if trained == "direct" else Mode.REASONING)
    guard = GuardConfig(checkpoint=checkpoint, endpoint=endpoint, modes=(default.value,))
    settings = EvaluateConfig(guards=(guard,), generations=1, temperature=0.0, top_p=1.0)
    resolved = _config(checkpoint, str(policy), run, settings)
    return Setup(guard, resolved, settings, load_policy(str(policy)), trained, default)


def _config(checkpoint: str, policy: str, run: Config | None, settings: EvaluateConfig) -> Config:
    """A run that is never trained; what matters is how texts are rendered and computed. The mesh is this machine's."""
    if run is None:
        model: dict[str, Any] = {}
        data: dict[str, Any] = {"train": [{"kind": "jsonl", "path": "none"}]}
    else:
        model, data = run.model.model_dump(), run.data.model_dump()
    # Attention and dtype were chosen for the machine that trained; auto fits this one.
    model |= {"checkpoint": checkpoint, "revision": None, "attention": "auto"}
    data |= {"policy": policy, "subset": None}
    return load({"name": "check", "model": model, "data": data, "evaluate": settings.model_dump()})


def _known_mode(mode: str | Mode) -> Mode:
    if mode not in tuple(Mode):
        raise JaxguardError(f"mode {str(mode)!r}: {nearest(str(mode), map(str, Mode))}expected {' or '.join(Mode)}")
    return Mode(mode)


def _checkpoint(name: str) -> str:
    """A run's folder stands for its export."""
    export = Path(name).expanduser() / "export"
    return str(export) if (export / "config.json").is_file() else name


def _served_path(endpoint: str) -> str:
    """Where the model that a server serves lies on this machine.

    Raises:
        JaxguardError: it does not answer, or serves a model that is elsewhere.
    """
    from jaxguard.guards.backends.sglang import served

    try:
        path = outside_event_loop(lambda: asyncio.run(served(endpoint))).get("model_path")
    except JaxguardError as error:
        raise JaxguardError(
            f"{endpoint} does not say what it serves ({error}): is it an SGLang server that is ready? If so, set {API_KEY} "
            "where it wants a key, or name the model's folder or repository with --tokenizer"
        ) from None
    if not isinstance(path, str) or not Path(path).is_dir():
        raise JaxguardError(
            f"{endpoint} serves {path!r}, which is no folder on this machine: name a folder or repository that has the "
            "model's tokenizer with --tokenizer"
        )
    return path
