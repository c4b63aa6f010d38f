"""A guard's format as a user writes it in YAML, made into an ExternalGuard. See docs/guards.md.

No text under judgement may spell what the rendered prompt holds besides the texts: sections, headings, labels, reasoning tags.
"""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Final, Self

from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import Field, StringConstraints, model_validator

from jaxguard.config.base import Schema, first_repeated, read_yaml, validate
from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.policies import Category, Policy, Question
from jaxguard.guards.formats.definition import Chat, ExternalGuard, OneLine, VerdictLine, numbered, reasoning_tags
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
# Marks such as <END> and [/INST], and what a line opens with before a colon.
_SECTION = re.compile(r"<[^<>\n]{1,80}>|\[[^\[\]\n]{1,80}\]")
_HEADING = re.compile(r"[\W_]*([^\W_][^:]{0,80}?)\s*:")


class ReasoningTagsDefinition(Schema):
    """The tags around the reasoning."""

    open: OneLine
    """Before it."""
    close: Annotated[str, StringConstraints(pattern=r"\S")]
    """After it, with the white space up to the verdict. What follows its last occurrence is parsed."""


class GuardFormatDefinition(Schema):
    """A guard's format as written in YAML."""

    name: OneLine
    """Of the models that use it, for people."""
    description: str = ""
    """For people."""
    chat: str | None = None
    """Jinja template of the user message, which the checkpoint's chat template then renders; or"""
    text: str | None = None
    """of the whole text that the answer follows, special tokens included."""
    verdicts: tuple[VerdictLine, ...] = Field(min_length=1)
    """The questions it answers. Where labels differ, an answer has all these lines in this order; where they are the same or left
    out, it has only that of the question."""
    prompt_alone: bool = True
    """A question about the prompt is asked without the response."""
    modes: tuple[Mode, ...] = Field((Mode.DIRECT,), min_length=1)
    """In which it can be prompted."""
    reasoning: ReasoningTagsDefinition | None = None
    """Goes with mode reasoning."""
    ends: tuple[OneLine, ...] = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "</s>")
    """Tokens that end an answer, besides the tokenizer's own; those that it does not have do not count."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.chat is None) == (self.text is None):
            raise ValueError("give either chat or text")
        if (Mode.REASONING in self.modes) != (self.reasoning is not None):
            raise ValueError("mode reasoning and the tags in reasoning go together: give both or none")
        questions = [line.question for line in self.verdicts]
        if (repeated := first_repeated(questions)) is not None:
            raise ValueError(f"verdicts: question {repeated!r} is given twice")
        labels = self.labels
        if len(labels) not in (1, len(questions)) or (len(labels) > 1 and "" in labels):
            raise ValueError("verdicts: give every question a label of its own, or all the same, or none")
        return self

    @property
    def labels(self) -> set[str]:
        """Different ones, in lower case."""
        return {line.label.lower() for line in self.verdicts}


def read_guard(path: Path) -> ExternalGuard:
    """The format that a file describes, tried in every way in which it can be prompted.

    Raises:
        JaxguardError: unknown, missing or ill-typed field; a template that does not render, or leaves a text out.
    """
    form = validate(GuardFormatDefinition, read_yaml(path), str(path))
    where = f"{path}: {'chat' if form.text is None else 'text'}"
    trials = list(_trials(form, where))
    policies = {tuple(mark in text for mark in _PARTS) for question, text in trials if question != "response_refusal"}
    takes_policy = all(map(all, policies))
    if not takes_policy and any(map(any, policies)):
        raise JaxguardError(
            f"{where}: must show, for every question about harm, either all of a policy (categories with their "
            "descriptions, rules, allowed; {{ policy }} holds them all), or nothing of it"
        )
    reasoning, tags = None, set[str]()
    if form.reasoning is not None:
        reasoning = reasoning_tags(form.reasoning.open, form.reasoning.close, strict=False)
        tags = {form.reasoning.open.strip(), form.reasoning.close.strip()}
    headings = {line.label for line in form.verdicts if line.label}
    for _, text in trials:
        lines = text.split("\n")
        marks = (mark.strip() for mark in (*_SECTION.findall(text), *lines))  # and lines such as `# Policy` and `---`
        tags |= {
            mark for mark in marks if len(mark) > 2 and not mark[0].isalnum() and mark[-1] != ":" and _MARK not in mark
        }
        headings |= {opens[1] for line in lines if (opens := _HEADING.match(line)) and _MARK not in opens[1]}
    clash = next((tag for tag in sorted(tags) if "\\" in tag or len(tag) < 2), None)
    if clash is not None:
        raise JaxguardError(f"{path}: texts cannot be told from {clash!r}: use a longer mark without a backslash")
    return ExternalGuard(
        name=form.name,
        verdicts=form.verdicts,
        together=len(form.labels) > 1,
        turn=partial(_turn, form, where),
        takes_policy=takes_policy,
        ends=form.ends,
        tags=tuple(sorted(tags)),
        headings=tuple(sorted(headings)),
        modes=form.modes,
        reasoning=reasoning,
        prompt_alone=form.prompt_alone,
    )


def _turn(form: GuardFormatDefinition, where: str, request: Request, policy: Policy) -> str | Chat:
    """The text or messages of a request with one question; JaxguardError: the template does not render."""
    try:
        text = _JINJA.from_string(form.chat or form.text or "").render(
            prompt=request.example.prompt,
            response=request.example.response,
            question=request.question,
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
                request = Request(Example("a trial", "trial", _PROMPT, response), (question,), mode)
                turn = _turn(form, where, request, _POLICY)
                text = turn if isinstance(turn, str) else turn[0][0]["content"]
                for name, mark in (("prompt", _PROMPT), ("response", response)):
                    if mark is not None and mark not in text:
                        raise JaxguardError(
                            f"{where}: does not show {{{{ {name} }}}} as it is where question is {question}"
                        )
                yield question, text
