"""Guards, opened: whoever a config names becomes a Judge that can be asked."""

import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from jaxguard import hub
from jaxguard.config import Config
from jaxguard.data.dialogue import Mode
from jaxguard.data.encode import TOKENIZER_FILES, Encoder
from jaxguard.data.files import file_digest
from jaxguard.data.policies import load_policy
from jaxguard.data.prepare import load_sources
from jaxguard.data.template import load_tokenizer
from jaxguard.errors import JaxguardError
from jaxguard.evaluate.floors import fit_floor
from jaxguard.evaluate.foreign import foreign_format
from jaxguard.evaluate.judging import Ask, Engine, Format, Judge, judge
from jaxguard.evaluate.ours import OurFormat, context_tokens
from jaxguard.evaluate_sections import EvaluateConfig, GuardConfig

FLOORS: Final = ("tfidf", "majority")


def modes_of(guard: GuardConfig, config: Config) -> tuple[Mode, ...]:
    """In which modes a guard is asked: its own choice, else those that data.mode trains; other formats have one.

    Raises:
        JaxguardError: a format that cannot be asked in that mode.
    """
    if guard.format in ("jaxguard", "nemotron_reasoning"):
        default = ("reasoning", "direct") if config.data.mode == "dual" else (config.data.mode,)
        return tuple(Mode(mode) for mode in guard.modes or default)
    only = Mode.REASONING if guard.format == "gpt_oss_safeguard" else Mode.DIRECT
    if set(guard.modes) - {str(only)}:
        raise JaxguardError(f"guard {guard.name!r}: format {guard.format} answers in {only} mode only; leave modes out")
    return (only,)


def checkpoint_of(guard: GuardConfig, config: Config) -> str:
    """The folder or repository that holds a guard's weights and tokenizer.

    Raises:
        JaxguardError: this run has no export yet.
    """
    if guard.checkpoint is None:
        export = config.folder / "export"
        if not (export / "README.md").is_file():  # the trainer writes it last
            raise JaxguardError(
                f"guard {guard.name!r} is this run's export, but {export} is not there: train it first, "
                f"python -m jaxguard.train with the same config, or name the guard's checkpoint"
            )
        return str(export)
    inside = Path(guard.checkpoint).expanduser() / "export"
    return str(inside) if inside.is_dir() else guard.checkpoint


def identity(guard: GuardConfig, config: Config) -> dict[str, Any]:
    """What tells a guard's answers from another's, for the heads of files; JSON."""
    if guard.format in FLOORS:
        return {"format": guard.format, "fitted_to": [one.model_dump(mode="json") for one in config.data.train]}
    checkpoint = checkpoint_of(guard, config)
    known: dict[str, Any] = {"format": guard.format, "checkpoint": checkpoint, "revision": guard.revision}
    if guard.endpoint is not None and not guard.swap:
        return {**known, "served_as": guard.model}
    return {**known, "weights": weights_digest(Path(checkpoint).expanduser())}


def weights_digest(folder: Path) -> str | None:
    """Hash of a folder's weights; None where there are none."""
    files = sorted(folder.glob("*.safetensors"))
    stats = [(path, path.stat()) for path in files]
    digests = [_digest(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    return hashlib.sha256("".join(digests).encode()).hexdigest() if digests else None


@lru_cache
def _digest(path: Path, _size: int, _changed: int) -> str:
    return file_digest(path)


@asynccontextmanager
async def open_guard(guard: GuardConfig, config: Config, settings: EvaluateConfig) -> AsyncIterator[Judge]:
    """Load a guard, or connect to it, or start its server; everything is closed at the end.

    Raises:
        JaxguardError: no such checkpoint, a server that does not answer or serves another model.
    """
    if guard.format in FLOORS:
        examples, _ = load_sources(config.data.train, "train")
        yield fit_floor(guard.format, examples, config.seed)
        return
    remote = guard.endpoint is not None and not guard.swap
    folder = hub.fetch(checkpoint_of(guard, config), guard.revision, TOKENIZER_FILES if remote else None)
    form = _format(guard, folder, config, settings)
    async with _engine(guard, folder, config, settings) as engine:

        def judged(asks: Sequence[Ask]) -> AsyncIterator[Any]:
            return judge(asks, form, engine, settings)

        yield judged


def _format(guard: GuardConfig, folder: Path, config: Config, settings: EvaluateConfig) -> Format:
    policy = load_policy(config.data.policy)
    if guard.format == "jaxguard":
        whole = config.data.model_copy(update={"row_tokens": context_tokens(folder)})
        return OurFormat.of(Encoder.load(folder, whole, policy), settings)
    return foreign_format(guard.format, load_tokenizer(folder, chat=False), policy)


@asynccontextmanager
async def _engine(guard: GuardConfig, folder: Path, config: Config, settings: EvaluateConfig) -> AsyncIterator[Engine]:
    if guard.endpoint is None and settings.backend == "jax":
        from jaxguard.evaluate.jax_engine import load_engine  # JAX is loaded only where it computes

        yield load_engine(folder, config, settings)
        return
    from jaxguard.evaluate.sglang_engine import open_sglang, swap_weights  # its client is an extra

    with ExitStack() as stack:
        url, model, version = guard.endpoint, guard.model, None
        if url is None:
            from jaxguard.evaluate.server import serve

            log = config.folder / "evaluate" / f"{guard.name}.server.log"
            model = model or guard.name
            url = stack.enter_context(serve(folder, model, log, settings.server))
        elif guard.swap:
            version = str(weights_digest(folder))[:16]
            await swap_weights(url, folder, version)
            model = None  # it is called by the folder from now on
        async with open_sglang(url, model, settings, version) as engine:
            yield engine
