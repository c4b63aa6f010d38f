"""Texts that hold secrets, such as addresses with passwords and command lines with keys, and how they are shown."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from pydantic import Secret

MASK = "***"

_URL = re.compile(r"""://[^\s"'<>]*""")
_NAMED = re.compile(
    r"""((?:[a-z0-9]{0,20}[-_]){0,4}(?:api_?key|key|token|password|passwd|secret|credentials?)["']?(?:=|\s?:\s?(?=["']))["']?)"""
    r"""[^\s"',;&]+""",
    re.IGNORECASE,
)
_FLAG = re.compile(
    r"(--(?:[a-z0-9]{1,20}[-_]){0,4}(?:api_?key|key|token|password|passwd|secret|credentials?)[\s\"',]{1,4})[^\s\"',]+",
    re.IGNORECASE,
)
_HEADER = re.compile(r"(authorization[\"']?\s?[:=]\s?[\"']?[a-z]{1,20} )[^\s\"',]+", re.IGNORECASE)


def mask(text: str) -> str:
    """Replace secrets in a text by ***: user and query of an address, and values that are named key, token, password or secret."""
    text = _URL.sub(_masked_address, text)
    for pattern in (_NAMED, _FLAG, _HEADER):
        text = pattern.sub(rf"\1{MASK}", text)
    return text


def _masked_address(match: re.Match[str]) -> str:
    user, _, rest = match[0][3:].rpartition("@")
    place, question, query = rest.partition("?")
    return f"://{MASK + '@' if user else ''}{place}{question}{MASK if query else ''}"


class Masked(Secret[str]):
    """An address or an argument of a command: shown, and written as JSON or YAML, without its secrets.

    `get_secret_value()` is the whole text, for whoever it is meant for.
    """

    def _display(self) -> str:
        text = self.get_secret_value()
        name, equals, _ = text.partition("=")
        return f"{name}={MASK}" if equals and is_secret(name) else mask(text)


def is_secret(flag: str) -> bool:
    """Whether a flag such as --api-key is followed by a secret."""
    return flag.startswith("--") and "=" not in flag and mask(f"{flag}=x") != f"{flag}=x"


def revealed(text: str | Masked) -> str:
    """Return the whole text."""
    return text.get_secret_value() if isinstance(text, Masked) else text


def published(tree: Any) -> Any:
    """Return a plain tree, or a text, as it may be given to others: secrets masked, absolute paths cut.

    A path in the current folder becomes relative to it; another keeps its last part.
    """
    match tree:
        case Mapping():
            return {published(key): published(value) for key, value in tree.items()}
        case list() | tuple():
            return [published(value) for value in tree]
        case str() if tree.startswith(("/", "~")) and tree.count("/") > 1:  # /think is no path
            path = Path(tree)
            return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name
        case str():
            return mask(tree)
        case _:
            return tree


def password(address: str) -> str:
    """Return the password in an address, or a user that has none; empty where there is neither."""
    user = re.match(r"\w{1,20}://([^/?#]*)@", address)
    return unquote(user[1].partition(":")[2] or user[1]) if user else ""


def without(text: str, secrets: Iterable[str]) -> str:
    """Replace known secrets in a text that a server wrote, which may repeat them."""
    for secret in secrets:
        text = text.replace(secret, MASK)
    return text
