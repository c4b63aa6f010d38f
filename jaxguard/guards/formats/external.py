"""External guards, in their own prompt format and grammar: what jaxguard is compared with.

    example + question -> untrusted texts quoted -> the guard's chat template, or its text -> token ids
    answer -> POSITIVE, NEGATIVE, or UNPARSABLE for whatever is not exactly an answer of the format

A guard with categories of its own is prompted with those where the policy is of harm in general, as for its published scores.
Any other policy is put where the format takes one; where it takes none the request is refused (UnsupportedError).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from transformers import PreTrainedTokenizerBase

from jaxguard.config.base import find_yaml
from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import Dialogue, Mode
from jaxguard.data.format.template import TEMPLATE_KWARGS, token_ids
from jaxguard.data.policies import Category, Policy, Question, policy_for
from jaxguard.guards.baselines import BASELINES
from jaxguard.guards.formats.builtin import BEGIN_CATEGORIES, BUILT_IN_GUARDS, END_CATEGORIES
from jaxguard.guards.formats.custom import read_guard
from jaxguard.guards.formats.definition import ExternalGuard, Quoted, numbered
from jaxguard.guards.formats.schema import GUARD_FOLDER
from jaxguard.guards.protocol import DecisionPoint, Prompt, PromptFormat, Request, UnsupportedError
from jaxguard.utils.errors import JaxguardError

BUILT_IN: Final = ("jaxguard", *BUILT_IN_GUARDS, *BASELINES)
"""Every format that needs no file: the native one, the external guards of builtin.py, the baselines."""
GENERAL: Final = ("wildguard", "aegis2", "demo")
"""Policies of harm in general, by name."""
# Some templates write the day's date into the prompt; an answer would then change from one day to the next.
_DATED: Final = "{% macro strftime_now(format) %}2025-10-29{% endmacro %}"


def external_format(kind: str, tokenizer: PreTrainedTokenizerBase, policy: Policy) -> PromptFormat:
    """The PromptFormat of an external guard, tried once.

    Args:
        kind: a key of BUILT_IN_GUARDS, or a YAML file or its name in GUARD_FOLDER.
        tokenizer: of the guard's checkpoint, a fast one, with its chat template.
        policy: the run's.

    Raises:
        JaxguardError: a tokenizer that does not belong to such a guard; as `external_guard`.
    """
    guard = external_guard(kind)
    form = ExternalFormat(kind, guard, tokenizer, policy)
    question = guard.questions[0]
    plain = Policy("own", rules="Be kind.", asks=guard.questions) if guard.takes_policy else Policy(GENERAL[0])
    texts = Quoted("bread", None if question == "prompt_harm" else "bread", plain)
    request = Request(Example("a trial", kind, texts.prompt, texts.response), (question,), guard.modes[0])
    if not isinstance(guard.turn(texts, request), str) and not tokenizer.chat_template:
        raise JaxguardError(f"{form}: its tokenizer has no chat template; take all files of the checkpoint")
    if not form.stop_ids:
        raise JaxguardError(f"{form}: its tokenizer has no token that ends an answer ({', '.join(guard.ends)})")
    form.rendered(texts, request)
    return form


def external_guard(kind: str) -> ExternalGuard:
    """The definition of a format: a built-in one, or what its file says.

    Raises:
        JaxguardError: there is neither; a file that is no format.
    """
    return BUILT_IN_GUARDS[kind] if kind in BUILT_IN_GUARDS else read_guard(format_file(kind))


def format_file(kind: str) -> Path:
    """The file of a format that is not built in.

    Raises:
        JaxguardError: there is none; names the formats.
    """
    return find_yaml(kind, GUARD_FOLDER, f"guard format: neither {', '.join(BUILT_IN)}, nor a file")


@dataclass(frozen=True)
class ExternalFormat:
    """The PromptFormat of an external guard; every prompt answers one question, or all of a guard that answers together."""

    kind: str
    guard: ExternalGuard
    tokenizer: PreTrainedTokenizerBase
    policy: Policy

    def __str__(self) -> str:
        return f"format {self.kind} ({self.guard.name})"

    def split(self, request: Request, /) -> Sequence[Request]:
        """See PromptFormat: questions with the same prompt share it."""
        if len(request.questions) == 1:
            return (request,)
        groups: dict[tuple[int, ...], tuple[Question, ...]] = {}
        for question in request.questions:
            ids = self.prompt(request.only(question)).ids
            groups[ids] = (*groups.get(ids, ()), question)
        return [replace(request, questions=questions) for questions in groups.values()]

    def prompt(self, request: Request, /) -> Prompt:
        """See PromptFormat. Nothing is cut: a text that is too long for the model is for the backend to refuse."""
        return Prompt(tuple(self._prompt(request.only(request.questions[0]))[0]))

    def text(self, ids: Sequence[int], /) -> str:
        """Special tokens stay visible: one inside an answer makes it unparsable."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def parse(self, request: Request, text: str, /) -> dict[Question, int]:
        """See PromptFormat."""
        return {question: self.guard.parse(request.only(question), text) for question in request.questions}

    def close_reasoning(self, request: Request, text: str, /) -> str | None:
        """See PromptFormat."""
        closed = (self.guard.close_reasoning(request.only(question), text) for question in request.questions)
        return next((text for text in closed if text is not None), None)

    def tokens(self, text: str, /) -> list[int]:
        """See PromptFormat."""
        return token_ids(self.tokenizer, text)

    def decision_points(self, request: Request, text: str, /) -> list[DecisionPoint]:
        """See PromptFormat: a tree for each question, of the words of an answer up to its verdict.

        Where several words are positive, each is compared with the negative one. What follows are then not quite exclusive
        decisions, so the probability is a little above that of the words together.
        """
        points: list[DecisionPoint] = []
        for question in request.questions:
            points += self._tree(request.only(question), text, len(points))
        return points

    def _tree(self, request: Request, text: str, offset: int) -> list[DecisionPoint]:
        """The decision points of one question; `offset` is the index of the first."""
        start = self.guard.start(request, text)
        if start is None:
            return []
        prompt, ends_open = self._prompt(request)
        start += self.guard.opening if ends_open else ""
        [question] = request.questions
        points: list[DecisionPoint] = []
        paths: list[tuple[str, tuple[tuple[int, bool], ...]]] = [("", ())]
        for step in self.guard.steps(request):
            decides = question if step.question == question else None
            following = []
            for before, earlier in paths:
                taken, forks = earlier, list[tuple[list[int], int, int]]()
                for word in (step.positive, *step.also):
                    fork = self._fork(start + before + step.lead, word, step.negative)
                    if fork is None:
                        return []
                    if fork in forks:  # "Yes" and "Yes."
                        continue
                    forks.append(fork)
                    shared, positive, negative = fork
                    points.append(DecisionPoint((*prompt, *shared), positive, negative, decides, taken))
                    index = offset + len(points) - 1
                    following.append((before + step.lead + word, (*taken, (index, True))))
                    taken = (*taken, (index, False))
                following.append((before + step.lead + step.negative, taken))
            paths = following
        return points

    def _fork(self, before: str, positive: str, negative: str) -> tuple[list[int], int, int] | None:
        """(tokens that both answers share, the first that differs in each); None if one begins with the other."""
        a, b = self.tokens(before + positive), self.tokens(before + negative)
        at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
        return None if at is None else (a[:at], a[at], b[at])

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """See PromptFormat."""
        vocabulary = self.tokenizer.get_vocab()
        ids = [vocabulary[token] for token in self.guard.ends if token in vocabulary]
        return tuple(
            dict.fromkeys([*ids, *([] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id])])
        )

    @property
    def reasoning_modes(self) -> frozenset[Mode]:
        """See PromptFormat."""
        return frozenset() if self.guard.reasoning is None else self.guard.reasoning.modes

    def rendered(self, texts: Quoted, request: Request) -> str:
        """The prompt as text, special tokens included."""
        turn = self.guard.turn(texts, request)
        text = turn if isinstance(turn, str) else self._templated(*turn)
        if self.guard.takes_policy and self.guard.own_categories and texts.policy.name not in GENERAL:
            before, begin, rest = text.partition(BEGIN_CATEGORIES)
            _, end, after = rest.partition(END_CATEGORIES)
            if not end:
                raise JaxguardError(f"{self}: its chat template has no section of categories: another model's?")
            text = f"{before}{begin}\n{numbered(texts.policy)}\n{end}{after}"
        return text

    def _templated(self, messages: list[dict[str, str]], options: dict[str, Any]) -> str:
        """What the checkpoint's chat template makes of the messages: contents are text, or parts where it knows images."""
        contents = [message["content"] for message in messages] + list(options.values())
        parts: list[Any] = [
            {**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages
        ]
        problem = "it does not show all of the request; another model's?"
        for chat in (list[Any](messages), parts):
            try:
                text = self.tokenizer.apply_chat_template(
                    chat,
                    chat_template=self._template,
                    tokenize=False,
                    add_generation_prompt=True,
                    **TEMPLATE_KWARGS,
                    **options,
                )
            except Exception as error:  # jinja's errors, and what templates raise themselves
                problem = str(error)
                continue
            if all(content in str(text) for content in contents):
                return str(text)
        raise JaxguardError(f"{self}: its chat template does not render the request: {problem}")

    @cached_property
    def _template(self) -> str:
        return _DATED + self.tokenizer.get_chat_template()

    def _prompt(self, request: Request) -> tuple[list[int], bool]:
        """(token ids, whether the text ends without a line break) for a request with one question."""
        guard, example, [question] = self.guard, request.example, request.questions
        if question not in guard.questions:
            raise UnsupportedError(
                f"example {example.id!r}: {self} does not answer {question}, but only {', '.join(guard.questions)}; "
                "leave the benchmark out for it"
            )
        if question != "prompt_harm" and example.response is None:
            raise JaxguardError(f"example {example.id!r}: {question} is asked, but there is no response")
        policy = policy_for(example, self.policy)
        if not guard.takes_policy and policy.name not in GENERAL:
            raise UnsupportedError(
                f"example {example.id!r}: {self} judges by its own categories only and cannot take policy "
                f"{policy.name!r}; leave benchmarks with such policies out for it"
            )
        response = self.quote(example.response or "") if guard.shows_response(request) else None
        texts = Quoted(self.quote(example.prompt), response, self._quoted(policy))
        text = self.rendered(texts, request)
        ids = self.tokens(text)
        self._check(request, texts, ids)
        return ids, not text.endswith("\n")

    def _check(self, request: Request, texts: Quoted, ids: Sequence[int]) -> None:
        """Refuse a text that became a special token: those must be as many as with harmless texts."""
        key = (request.questions, request.mode, texts.response is None)
        if key not in self._expected:
            plain = replace(texts, prompt="bread", response=None if texts.response is None else "bread")
            self._expected[key] = self._reserved_in(self.tokens(self.rendered(plain, request)))
        if self._reserved_in(ids) != self._expected[key]:
            raise JaxguardError(
                f"example {request.example.id!r}: its text spells a special token of {self} in a way that jaxguard does not "
                "know. Leave the example out and report it"
            )

    def quote(self, text: str) -> str:
        """Untrusted text with every string broken that could act as part of the format or as a special token."""
        text, broken = self._dialogue.quote(text), 1
        while broken:  # a mark may overlap itself
            text, broken = self._loose.subn(lambda match: f"{match[0][:-1]}\\{match[0][-1]}", text)
        return text

    def _quoted(self, policy: Policy) -> Policy:
        categories = tuple(Category(self.quote(c.name), self.quote(c.description)) for c in policy.categories)
        return replace(
            policy,
            categories=categories,
            rules=self.quote(policy.rules),
            instruction=self.quote(policy.instruction),
            allowed=tuple(map(self.quote, policy.allowed)),
        )

    @cached_property
    def _expected(self) -> dict[tuple[tuple[Question, ...], Mode, bool], list[int]]:
        return {}

    def _reserved_in(self, ids: Sequence[int]) -> list[int]:
        return [i for i in ids if i in self._reserved]

    @cached_property
    def _reserved(self) -> dict[int, str]:
        return {
            i: token.content
            for i, token in self.tokenizer.added_tokens_decoder.items()
            if token.special or any(c.isalnum() for c in token.content)
        }

    @cached_property
    def _dialogue(self) -> Dialogue:
        tokens = {*self._reserved.values(), *self.guard.tags, *self.guard.ends}
        return Dialogue(special_tokens=tuple(sorted(token for token in tokens if len(token.strip()) > 1)))

    @cached_property
    def _loose(self) -> re.Pattern[str]:
        def spaced(text: str) -> str:
            return r"[\s\u2581]{1,4}".join(map(re.escape, text.split()))

        headings = (rf"^[\s\u2581>*_#-]{{0,8}}{spaced(heading)}[\s\u2581*_]{{0,4}}:" for heading in self.guard.headings)
        marks = [*map(spaced, self.guard.tags), *headings]
        return re.compile("|".join(marks) if marks else "(?!)", re.IGNORECASE | re.MULTILINE)
