"""API keys: hashes in a file, and what each may spend: checks, and tokens of reasoning."""

import hashlib
import hmac
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field

from jaxguard.config.base import Positive, Schema, first_repeated
from jaxguard.serve.errors import ServiceError
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.parse import PathPart, read_yaml


class KeyDefinition(Schema):
    """A key of the file."""

    name: PathPart
    """Stands in the audit log and in metrics."""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """Of the key, in hexadecimal digits."""
    checks_per_second: Annotated[float, Field(gt=0)] | None = None
    """Over longer times; null sets no limit."""
    burst: Positive = 20
    """Checks that may come at once."""
    reasoning_tokens_per_minute: Positive | None = None
    """Tokens that reasoning about this key's checks may take; null sets no limit."""


class KeyFile(Schema):
    """The YAML file with the keys."""

    keys: tuple[KeyDefinition, ...] = Field(min_length=1)


@dataclass
class Budget:
    """What comes in at `rate` a second, up to `most`. Who takes more than is left pays it off later."""

    rate: float
    most: float
    left: float = field(init=False)
    updated: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.left = self.most

    @classmethod
    def per_minute(cls, amount: int | None) -> Self | None:
        """A budget of so much a minute, all of it at once; None sets no limit."""
        return None if amount is None else cls(amount / 60, amount)

    def wait(self) -> float:
        """Seconds until something may be spent; 0 if it may now."""
        now = time.monotonic()
        self.left = min(self.most, self.left + self.rate * (now - self.updated))
        self.updated = now
        return max(0.0, (1 - self.left) / self.rate)

    def spend(self, amount: float) -> None:
        """Take an amount, or give it back if it is negative."""
        self.left -= amount


class Key:
    """A key with its budgets, None where it has no limit."""

    def __init__(self, definition: KeyDefinition) -> None:
        self.definition, rate = definition, definition.checks_per_second
        self.checks = None if rate is None else Budget(rate, definition.burst)
        self.reasoning = Budget.per_minute(definition.reasoning_tokens_per_minute)

    def spend(self, checks: int) -> None:
        """Take checks from the budget; ServiceError 429: nothing is left."""
        if self.checks is None:
            return
        if seconds := self.checks.wait():
            name, rate = self.definition.name, self.definition.checks_per_second
            raise ServiceError(429, "rate_limit", f"key {name!r} may check {rate:g} exchanges a second", seconds)
        self.checks.spend(checks)


class Keys:
    """The keys of a file; without a file, everybody may check."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._keys: list[Key] = []
        self.reload()

    def reload(self) -> None:
        """Read the file again, keeping budgets. JaxguardError: it is malformed; the keys stay as they were."""
        if self.path is None:
            return
        definitions = read_yaml(self.path, KeyFile).keys
        for attribute in ("name", "sha256"):
            if repeated := first_repeated([getattr(each, attribute) for each in definitions]):
                raise JaxguardError(f"{self.path}: keys: {attribute} {repeated!r} is given twice")
        known = {key.definition: key for key in self._keys}
        self._keys = [known.get(each) or Key(each) for each in definitions]

    def authenticate(self, headers: Mapping[str, str]) -> Key | None:
        """Return the key in `Authorization: Bearer` or `x-api-key`; None without a file. ServiceError 401: no such key.

        All hashes are compared, each in constant time.
        """
        if self.path is None:
            return None
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        presented = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        digest = hashlib.sha256(presented.encode("utf-8", "surrogateescape")).hexdigest()
        matches = [key for key in self._keys if hmac.compare_digest(key.definition.sha256, digest)]
        if not matches:
            raise ServiceError(401, "no_key", "send a valid key as `Authorization: Bearer KEY` or `x-api-key: KEY`")
        return matches[0]
