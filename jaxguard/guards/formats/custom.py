"""A guard's format as a user writes it in YAML (schema.py), made into an ExternalGuard.

    quoted texts -> the template -> the user message of the checkpoint's chat template, or the whole text

No text under judgement may spell what the rendered prompt holds besides the texts: sections, headings, labels, reasoning tags.
"""

import re
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Final

from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxguard.config.base import read_yaml, validate
from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.policies import Category, Policy, Question
from jaxguard.guards.formats.definition import Chat, ExternalGuard, Quoted, numbered, reasoning_tags
from jaxguard.guards.formats.schema import GuardFormatDefinition
from jaxguard.guards.protocol import Request
from jaxguard.utils.errors import JaxguardError

# As in transformers; a name that the template makes up is an error.
_JINJA: Final = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
)
# Stand for the texts when a template is tried.
_MARK: Final = "jaxguard"
_PROMPT, _RESPONSE = f"{_MARK}prompt", f"{_MARK}response"
_PARTS: Final = tuple(f"{_MARK}{part}" for part in ("category", "description", "rules", "allowed"))
_POLICY: Final = Policy("trial", (Category(_PARTS[0], _PARTS[1]),), _PARTS[2], allowed=_PARTS[3:])


def read_guard(path: Path) -> ExternalGuard:
    """The format that a file describes, tried in every way in which it can be prompted.

    Raises:
        JaxguardError: unknown, missing or ill-typed field; a template that does not render, or leaves a text out.
    """
    form = validate(GuardFormatDefinition, read_yaml(path), str(path))
    where = f"{path}: {'chat' if form.text is None else 'text'}"
    trials = list(_trials(form, where))
    policies = {tuple(mark in text for mark in _PARTS) for question, text in trials if question != "response_refusal"}
    if not any(policies <= {(whole,) * len(_PARTS)} for whole in (True, False)):
        raise JaxguardError(
            f"{where}: must show, for every question about harm, either all of a policy (categories with their "
            "descriptions, rules, allowed; {{ policy }} holds them all), or nothing of it"
        )
    reasoning_marks = () if form.reasoning is None else (form.reasoning.open.strip(), form.reasoning.close.strip())
    tags = tuple(sorted({*reasoning_marks, *(tag for _, text in trials for tag in _tags(text))}))
    labels = (line.label for line in form.verdicts if line.label)
    headings = {*labels, *(heading for _, text in trials for heading in _headings(text))}
    clash = next((tag for tag in tags if "\\" in tag or len(tag) < 2), None)
    if clash is not None:
        raise JaxguardError(f"{path}: texts cannot be told from {clash!r}: use a longer mark without a backslash")
    takes_policy = all(map(all, policies))
    return ExternalGuard(
        name=form.name,
        verdicts=form.verdicts,
        together=form.together,
        turn=partial(_turn, form, where),
        own_categories=not takes_policy,
        takes_policy=takes_policy,
        ends=form.ends,
        tags=tags,
        headings=tuple(sorted(headings)),
        modes=tuple(Mode(mode) for mode in form.modes),
        reasoning=None
        if form.reasoning is None
        else reasoning_tags(form.reasoning.open, form.reasoning.close, strict=False),
        prompt_alone=form.prompt_alone,
    )


def _turn(form: GuardFormatDefinition, where: str, texts: Quoted, request: Request) -> str | Chat:
    """The text or messages of a request with one question.

    Raises:
        JaxguardError: the template does not render.
    """
    policy, [question] = texts.policy, request.questions
    try:
        text = _JINJA.from_string(form.chat or form.text or "").render(
            prompt=texts.prompt,
            response=texts.response,
            question=question,
            mode=str(request.mode),
            policy=numbered(policy),
            categories=[{"name": category.name, "description": category.description} for category in policy.categories],
            rules=policy.rules,
            allowed=list(policy.allowed),
        )
    except Exception as error:  # jinja's errors, and whatever the template's expressions raise
        raise JaxguardError(f"{where}: does not render: {error}") from None
    return text if form.chat is None else ([{"role": "user", "content": text.strip()}], {})


def _trials(form: GuardFormatDefinition, where: str) -> Iterator[tuple[Question, str]]:
    """Question and prompt, in every way in which it can be prompted, with marks in place of the texts."""
    for question in (line.question for line in form.verdicts):
        alone = (None,) if form.prompt_alone else (None, _RESPONSE)
        for response in alone if question == "prompt_harm" else (_RESPONSE,):
            for mode in form.modes:
                request = Request(Example("a trial", "trial", _PROMPT, response), (question,), Mode(mode))
                turn = _turn(form, where, Quoted(_PROMPT, response, _POLICY), request)
                text = turn if isinstance(turn, str) else turn[0][0]["content"]
                for name, mark in (("prompt", _PROMPT), ("response", response)):
                    if mark is not None and mark not in text:
                        raise JaxguardError(
                            f"{where}: does not show {{{{ {name} }}}} as it is where question is {question}"
                        )
                yield question, text


_SECTION = re.compile(r"<[^<>\n]{1,80}>|\[[^\[\]\n]{1,80}\]")
_HEADING = re.compile(r"[\W_]*([^\W_][^:]{0,80}?)\s*:")


def _tags(text: str) -> Iterator[str]:
    """Marks such as <END> and [/INST], and lines that open like a mark: `# Policy`, `---`."""
    candidates: Iterable[str] = chain(_SECTION.findall(text), text.split("\n"))
    for tag in (candidate.strip() for candidate in candidates):
        if len(tag) > 2 and not tag[0].isalnum() and tag[-1] != ":" and _MARK not in tag:
            yield tag


def _headings(text: str) -> Iterator[str]:
    """What lines open with, before a colon."""
    for line in text.split("\n"):
        heading = _HEADING.match(line)
        if heading and _MARK not in heading[1]:
            yield heading[1]
