"""Train, evaluate and use safety guard models in JAX.

Names are imported when they are first used: `import jaxguard` is quick, and loads neither JAX nor transformers.
"""

import importlib
import logging
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxguard.api import build_data, distill, evaluate, mine, plan, reinforce, train
    from jaxguard.config import Config
    from jaxguard.config import load as load_config
    from jaxguard.data.examples import Example
    from jaxguard.data.policies import Policy, load_policy
    from jaxguard.guards.guard import Guard
    from jaxguard.utils.errors import JaxguardError

__version__ = "0.1.0"
__all__ = [
    "Config", "Example", "Guard", "JaxguardError", "Policy", "build_data", "distill",
    "evaluate", "load_config", "load_policy", "mine", "plan", "reinforce", "train",
]  # fmt: skip

_SOURCES = {
    "Config": "jaxguard.config.Config",
    "Example": "jaxguard.data.examples.Example",
    "Guard": "jaxguard.guards.guard.Guard",
    "JaxguardError": "jaxguard.utils.errors.JaxguardError",
    "Policy": "jaxguard.data.policies.Policy",
    "build_data": "jaxguard.api.build_data",
    "load_config": "jaxguard.config.load",
    "load_policy": "jaxguard.data.policies.load_policy",
}


class _Stage(ModuleType):
    """A stage's package, which can also be called as its function in jaxguard.api.

    `import jaxguard.train.loop` sets the attribute `jaxguard.train` to the package, so this must be callable.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from jaxguard import api

        return getattr(api, self.__name__.rpartition(".")[2])(*args, **kwargs)


# transformers says at every start that its models need PyTorch; jaxguard takes its tokenizers and configs alone.
logging.getLogger("transformers").addFilter(lambda record: "PyTorch was not found" not in record.getMessage())

for _stage in ("distill", "evaluate", "mine", "plan", "reinforce", "train"):
    importlib.import_module(f"jaxguard.{_stage}").__class__ = _Stage


def __getattr__(name: str) -> Any:
    if name not in _SOURCES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _SOURCES[name].rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
