"""Guards, opened: whoever a config names becomes a Judge that can be asked."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from jaxguard.config import Config
from jaxguard.data.dialogue import Mode
from jaxguard.evaluate.judging import Judge
from jaxguard.evaluate_sections import EvaluateConfig, GuardConfig


def modes_of(guard: GuardConfig, config: Config) -> tuple[Mode, ...]:
    """In which modes a guard is asked: its own choice, else those that data.mode trains; other formats have one."""
    raise NotImplementedError


@asynccontextmanager
async def open_guard(guard: GuardConfig, config: Config, settings: EvaluateConfig) -> AsyncIterator[Judge]:
    """Load a guard, or connect to it, or start its server; everything is closed at the end.

    Raises:
        JaxguardError: no such checkpoint, a server that does not answer or serves another model.
    """
    raise NotImplementedError
    yield
