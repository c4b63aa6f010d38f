"""Which guard is asked and how: a Config put together from a model, a policy and a mode.

How a model wants to be asked (its markers, its modes) is in the config of the run that trained it, a file of the export.
"""

import json
import os
import re
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from jaxguard.config import Config, load, validate
from jaxguard.config.evaluate import EvaluateConfig, GuardConfig
from jaxguard.config.lookup import nearest
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.guard_files import read_guard_files
from jaxguard.data.policies import Policy, load_policy
from jaxguard.utils import hub
from jaxguard.utils.client import API_KEY as KEY
from jaxguard.utils.errors import JaxguardError

_FILES: Final = ("*.json", "*.jinja", "tokenizer*", "*.yaml")
_SECONDS: Final = 10


@dataclass(frozen=True)
class Setup:
    """Everything that a check needs, before anything heavy is loaded.

    Attributes:
        guard, config, settings: for open_guard.
        policy: what is judged by.
        mode: how the guard answers.
        note: what the user should know; empty if nothing.
    """

    guard: GuardConfig
    config: Config
    settings: EvaluateConfig
    policy: Policy
    mode: Mode
    note: str = ""


def set_up(
    model: str | Path,
    policy: str | Path | None = None,
    mode: str | Mode | None = None,
    tokenizer: str | Path | None = None,
    config: str | Path | None = None,
) -> Setup:
    """See `jaxguard.check.check` for the arguments and errors."""
    endpoint = str(model).rstrip("/") if re.match(r"https?://", str(model)) else None
    if endpoint is None and tokenizer is not None:
        raise JaxguardError("tokenizer goes with a server's address; a folder or repository brings its own")
    if mode is not None and mode not in tuple(Mode):
        raise JaxguardError(f"mode {str(mode)!r}: {nearest(str(mode), map(str, Mode))}expected {' or '.join(Mode)}")
    if policy is not None:
        load_policy(str(policy))  # before anything is downloaded
    checkpoint = _checkpoint(str(tokenizer or _served_path(endpoint)) if endpoint else str(model))
    folder = hub.fetch(checkpoint, only=_FILES)
    export = read_guard_files(folder)
    run = load(str(config)) if config is not None else export.config if export is not None else None
    if policy is None and run is None:
        raise JaxguardError("which policy? What this model was trained on is not known: name one, such as aegis2")
    if policy is None and run is not None:
        policy = export.policy if export is not None and config is None else run.data.policy
    named = str(policy)
    trained = run.data.mode if run is not None else "dual"
    asked = Mode(mode) if mode is not None else Mode.DIRECT if trained == "direct" else Mode.REASONING
    guard = GuardConfig(checkpoint=checkpoint, endpoint=endpoint, modes=(asked.value,))
    settings = EvaluateConfig(guards=(guard,), generations=1, temperature=0.0, top_p=1.0)
    return Setup(
        guard=guard,
        config=_config(checkpoint, named, run, settings),
        settings=settings,
        policy=load_policy(named),
        mode=asked,
        note="" if trained in ("dual", asked) else f"this model was trained to answer in {trained} mode only",
    )


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
    return validate({"name": "check", "model": model, "data": data, "evaluate": settings.model_dump()}, "check")


def _checkpoint(named: str) -> str:
    """A run's folder stands for its export."""
    inside = Path(named).expanduser() / "export"
    return str(inside) if (inside / "config.json").is_file() else named


def _served_path(endpoint: str) -> str:
    """Where the model that a server serves lies on this machine."""
    request = urllib.request.Request(f"{endpoint}/get_model_info")  # noqa: S310 (http or https)
    if os.environ.get(KEY):
        request.add_unredirected_header("Authorization", f"Bearer {os.environ[KEY]}")
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS) as reply:  # noqa: S310 (as above)
            path = json.loads(reply.read()).get("model_path")
    except (OSError, urllib.error.URLError, ValueError, AttributeError) as error:
        raise JaxguardError(
            f"{endpoint} does not say what it serves ({error}): is it an SGLang server that is ready? If so, set {KEY} "
            "where it wants a key, or name the model's folder or repository with --tokenizer"
        ) from None
    if not isinstance(path, str) or not Path(path).is_dir():
        raise JaxguardError(
            f"{endpoint} serves {path!r}, which is no folder on this machine: name a folder or repository that has the "
            "model's tokenizer with --tokenizer"
        )
    return path
