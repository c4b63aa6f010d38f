"""Render a chat template with limits on time and memory: the program of a process of its own, which template.py starts.

A template is a program that somebody else wrote. It is rendered in the environment that transformers documents for it, from a JSON
object on standard input, {"template": ..., "variables": {...}}, to one on standard output, {"text": ...} or {"error": ...}.
It imports nothing of jaxguard, so that it starts in a tenth of a second.
"""

import json
import resource
import sys
from datetime import datetime
from typing import Any, Final, NoReturn

from jinja2 import Environment, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Scope
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS: Final = 2
"""Of CPU time; templates take milliseconds."""
MEMORY: Final = 2**30
"""Bytes of address space."""
CHARACTERS: Final = 2**20
"""Of the rendered text."""


class _Generation(Extension):
    """{% generation %}...{% endgeneration %} marks what is trained; here it stands for its contents."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: Parser) -> Scope:
        line = next(parser.stream).lineno
        return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)  # the template's own clock
    return environment


def main() -> None:
    """Answer one request."""
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    request = json.load(sys.stdin)
    try:
        text = _environment().from_string(request["template"]).render(request["variables"])
        if len(text) > CHARACTERS:
            raise TemplateError(f"it renders more than {CHARACTERS:,} characters")
        reply = {"text": text}
    except Exception as error:  # a template's expressions raise anything
        reply = {"error": str(error)[:1000] or type(error).__name__}
    json.dump(reply, sys.stdout)


if __name__ == "__main__":
    main()
