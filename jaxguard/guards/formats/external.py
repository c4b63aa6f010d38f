"""External guards, in their own prompt format and grammar: what jaxguard is compared with.

    example + question -> untrusted texts quoted -> the guard's chat template, or its text -> token ids
    answer -> POSITIVE, NEGATIVE, or UNPARSABLE for whatever is not exactly an answer of the format

A guard with categories of its own is prompted with those where the policy is of harm in general, as for its published scores.
Any other policy is put where the format takes one; where it takes none the request is refused (UnsupportedError).
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from transformers import PreTrainedTokenizerBase

from jaxguard.config.base import find_yaml
from jaxguard.data.encoding import SpecialTokenError, common_length
from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import Dialogue
from jaxguard.data.format.quoting import compiled, opening, rule, spaced
from jaxguard.data.format.template import TEMPLATE_KWARGS, render_chat, reserved_tokens, spelled_markers, token_ids
from jaxguard.data.policies import Category, Policy, Question, policy_for
from jaxguard.guards.baselines import BASELINES
from jaxguard.guards.formats.builtin import BUILT_IN_GUARDS
from jaxguard.guards.formats.definition import GENERAL, ExternalGuard, numbered, policy_items, read_guard
from jaxguard.guards.formats.grammar import decision_tree
from jaxguard.guards.protocol import DecisionPoint, Prompt, Request, UnsupportedError
from jaxguard.utils.errors import JaxguardError

GUARD_FOLDER: Final = Path("configs/guards")
BUILT_IN: Final = ("jaxguard", *BUILT_IN_GUARDS, *BASELINES)
"""Every format that needs no file: the native one, the external guards of builtin.py, the baselines."""
# Some templates write the day's date into the prompt; an answer would then change from one day to the next.
_DATED: Final = "{% macro strftime_now(format) %}2025-10-29{% endmacro %}"


def format_file(kind: str) -> Path:
    """The file of a format that is not built in; JaxguardError: there is none."""
    return find_yaml(kind, GUARD_FOLDER, f"guard format: neither {', '.join(BUILT_IN)}, nor a file")


def external_guard(kind: str) -> ExternalGuard:
    """The definition of a format: a built-in one, or what its file says; JaxguardError: neither, or a file that is no format."""
    return BUILT_IN_GUARDS[kind] if kind in BUILT_IN_GUARDS else read_guard(format_file(kind))


def external_format(
    kind: str, tokenizer: PreTrainedTokenizerBase, policy: Policy, ignore_policies: bool = False
) -> "ExternalFormat":
    """The PromptFormat of an external guard, tried once; `ignore_policies`: one that takes none is asked without them.

    The kind is a key of BUILT_IN_GUARDS, or a YAML file or its name in GUARD_FOLDER; the tokenizer that of the guard's
    checkpoint, a fast one, with its chat template. JaxguardError: a tokenizer that does not belong to such a guard; as
    `external_guard`.
    """
    guard = external_guard(kind)
    form = ExternalFormat(kind, guard, tokenizer, policy, ignore_policies and not guard.takes_policy)
    question = guard.questions[0]
    example = Example("a trial", kind, "bread", None if question == "prompt_harm" else "bread")
    request = Request(example, (question,), guard.modes[0])
    trial = Policy("own", rules="Be kind.", asks=guard.questions) if guard.takes_policy else Policy(GENERAL[0])
    if not isinstance(guard.turn(request, trial), str) and not tokenizer.chat_template:
        raise JaxguardError(f"{form}: its tokenizer has no chat template; take all files of the checkpoint")
    if not form.stop_ids:
        raise JaxguardError(f"{form}: its tokenizer has no token that ends an answer ({', '.join(guard.ends)})")
    text = form.rendered(request, trial)
    reserved = reserved_tokens(tokenizer)
    spelled = [marker for marker in spelled_markers(text, reserved) if marker.startswith("<|")]
    # WildGuard's own markers are text behind a token.
    if not set(spelled) <= set(guard.tags) or (spelled and not any(token in text for token in reserved.values())):
        raise JaxguardError(
            f"{form}: its tokenizer spells {', '.join(map(repr, spelled))} of the prompt as text: they must be added_tokens of "
            "tokenizer.json; take that file of the checkpoint"
        )
    return form


@dataclass(frozen=True)
class ExternalFormat:
    """The PromptFormat of an external guard: prompts that are the same for several questions ask all of them."""

    kind: str
    guard: ExternalGuard
    tokenizer: PreTrainedTokenizerBase
    policy: Policy
    ignore_policies: bool = False
    _expected: dict[tuple[object, ...], list[int]] = field(default_factory=dict, init=False, compare=False)
    _beginnings: dict[tuple[object, ...], list[int]] = field(default_factory=dict, init=False, compare=False)

    def __str__(self) -> str:
        return f"format {self.kind} ({self.guard.name})"

    def split(self, request: Request, /) -> Sequence[Request]:
        groups: dict[tuple[int, ...], tuple[Question, ...]] = {}
        for question in request.questions if len(request.questions) > 1 else ():
            ids = self.prompt(request.only(question)).ids
            groups[ids] = (*groups.get(ids, ()), question)
        return [replace(request, questions=questions) for questions in groups.values()] or [request]

    def prompt(self, request: Request, /) -> Prompt:
        """See PromptFormat. Nothing is cut: a text that is too long for the model is for the backend to refuse."""
        request = request.only(request.questions[0])
        guard, example = self.guard, request.example
        if request.question not in guard.questions:
            raise UnsupportedError(
                f"example {example.id!r}: {self} does not answer {request.question}, but only "
                f"{', '.join(guard.questions)}; leave the benchmark out for it"
            )
        if request.question != "prompt_harm" and example.response is None:
            raise JaxguardError(f"example {example.id!r}: {request.question} is asked, but there is no response")
        policy = Policy(GENERAL[0]) if self.ignore_policies else policy_for(example, request.policy or self.policy)
        if not guard.takes_policy and policy.name not in GENERAL:
            raise UnsupportedError(
                f"example {example.id!r}: {self} judges by its own categories only and cannot take policy "
                f"{policy.name!r}; leave benchmarks with such policies out for it"
            )
        response = self.quote(example.response or "") if guard.shows_response(request) else None
        dialogue, marks = self._marks
        prompt = dialogue.quote_prompt(example.prompt, marks)
        ids = self._tokens(request, prompt, response, _mapped(self.quote, policy))
        # A text that became a special token is refused: there must be as many as with harmless texts.
        shape = (len(policy.categories), bool(policy.rules), len(policy.allowed), policy.name in GENERAL)
        key = (request.questions, request.mode, response is None, shape)
        if key not in self._expected:
            bread = _mapped(lambda text: "bread" if text else "", policy)
            harmless = self._tokens(request, "bread", None if response is None else "bread", bread)
            self._expected[key] = [i for i in harmless if i in self._reserved]
        if [i for i in ids if i in self._reserved] != self._expected[key]:
            raise SpecialTokenError(
                f"example {example.id!r}: its text spells a special token of {self} in a way that jaxguard does not know. "
                "Leave the example out and report it"
            )
        begins = (request.questions, request.mode, response is None, policy)
        if begins not in self._beginnings:
            a, b = (self._tokens(request, text, response and text, _mapped(self.quote, policy)) for text in "ab")
            self._beginnings[begins] = a[: common_length(a, b)]
        return Prompt(tuple(ids), shared=common_length(self._beginnings[begins], ids))

    def text(self, ids: Sequence[int], /) -> str:
        """Special tokens stay visible: one inside an answer makes it unparsable."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def tokens(self, text: str, /) -> list[int]:
        return token_ids(self.tokenizer, text)

    def parse(self, request: Request, text: str, /) -> dict[Question, int]:
        names = self._policy_names(request)
        return {question: self.guard.parse(request.only(question), text, names) for question in request.questions}

    def close_reasoning(self, request: Request, text: str, /) -> str | None:
        names = self._policy_names(request)
        closed = (self.guard.close_reasoning(request.only(question), text, names) for question in request.questions)
        return next((text for text in closed if text is not None), None)

    def decision_points(self, request: Request, text: str, /) -> list[DecisionPoint]:
        """See PromptFormat: one tree where a guard answers all questions together, else one for each."""
        points: list[DecisionPoint] = []
        prompt, names = self.prompt(request).ids, self._policy_names(request)
        opening = "" if self.text(prompt[-1:]).endswith("\n") else self.guard.opening
        for part in (request,) if self.guard.together else map(request.only, request.questions):
            for start, lines in self.guard.decided(part, text, names):
                points += decision_tree(
                    prompt, start + opening, lines, part.questions, self.tokens, layout=self.guard.layout
                )
        return points

    def answers(self, _request: Request, /) -> Sequence[str]:
        """None: most go on after their verdict."""
        return ()

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        vocabulary, own = self.tokenizer.get_vocab(), self.tokenizer.eos_token_id
        ids = [vocabulary[token] for token in self.guard.ends if token in vocabulary]
        return tuple(dict.fromkeys(ids if own is None else [*ids, own]))

    @cached_property
    def verdict_tokens(self) -> int | None:
        layout, counts = self.guard.layout, [0]
        for line in self.guard.verdicts if self.guard.explains else ():
            for word in (*line.positive, *line.negative):
                before, after = layout.around(line.label)
                counts.append(len(self.tokens(f"{layout.opening}{before}{word}{after}{layout.closing}")))
        return max(counts) or None

    def _policy_names(self, request: Request) -> tuple[str, ...]:
        """What an answer may call the categories of the policy that was shown."""
        if not self.guard.takes_policy:
            return ()
        return tuple(name for name, _ in policy_items(policy_for(request.example, request.policy or self.policy)))

    def rendered(self, request: Request, policy: Policy) -> str:
        """The prompt as text, special tokens included, of a request and a policy whose texts are quoted."""
        turn, categories = self.guard.turn(request, policy), self.guard.categories
        text = turn if isinstance(turn, str) else self._templated(*turn)
        if categories is not None and policy.name not in GENERAL:
            before, begin, rest = text.partition(categories[0])
            _, end, after = rest.partition(categories[1])
            if not end:
                raise JaxguardError(f"{self}: its chat template has no section of categories: another model's?")
            text = f"{before}{begin}\n{numbered(policy)}\n{end}{after}"
        return text

    def _templated(self, messages: list[dict[str, str]], options: dict[str, Any]) -> str:
        """What the checkpoint's chat template makes of the messages: contents are text, or parts where it knows images.

        It renders placeholders; the texts, which somebody else wrote, take their places in the result.
        """
        texts: dict[str, str] = {}

        def placed(text: str) -> str:
            place = f"jaxguardtext{len(texts)}x" if text else ""
            texts[place] = text
            return place

        def option(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: option(inner) for key, inner in value.items()}
            return placed(value) if isinstance(value, str) and " " in value else value  # a word is a setting

        chat = [{**message, "content": placed(message["content"])} for message in messages]
        parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in chat]
        settings = {"chat_template": _DATED + self.tokenizer.get_chat_template(), **TEMPLATE_KWARGS, **option(options)}
        problem = "it does not show all of the request; another model's?"
        for each in (chat, parts):
            try:
                text = render_chat(self.tokenizer, each, add_generation_prompt=True, **settings)
            except JaxguardError as error:
                problem = str(error)
                continue
            if all(place in text for place in texts):
                return re.sub(r"jaxguardtext\d+x", lambda match: texts.get(match[0], match[0]), text)
        raise JaxguardError(f"{self}: its chat template does not render the request: {problem}")

    def _tokens(self, request: Request, prompt: str, response: str | None, policy: Policy) -> list[int]:
        """The prompt of a request with these quoted texts in place of the example's."""
        example = Example(request.example.id, request.example.source, prompt, response)
        return self.tokens(self.rendered(replace(request, example=example), policy))

    def quote(self, text: str) -> str:
        """Untrusted text with every string broken that could act as part of the format or as a special token."""
        dialogue, marks = self._marks
        return dialogue.quote(text, marks)

    @cached_property
    def _reserved(self) -> dict[int, str]:
        return reserved_tokens(self.tokenizer)

    @cached_property
    def _marks(self) -> tuple[Dialogue, re.Pattern[str]]:
        """What is broken as in the native format, and tags and headings whatever their spacing and case."""
        tokens = {*self._reserved.values(), *self.guard.ends}
        dialogue = Dialogue(special_tokens=tuple(sorted(token for token in tokens if len(token.strip()) > 1)))
        tags = (rule(tag[0]) if set(tag) == {tag[0]} else spaced(tag) for tag in self.guard.tags)  # as ---
        headings = (rf"{opening(heading)}[\s*_]*+:" for heading in self.guard.headings)
        return dialogue, compiled([*tags, *headings])


def _mapped(change: Callable[[str], str], policy: Policy) -> Policy:
    """A policy with all its texts changed; names, descriptions and exceptions are one line each."""

    def one_line(text: str) -> str:
        return change(" ".join(text.split()))

    return replace(
        policy,
        categories=tuple(Category(one_line(c.name), one_line(c.description)) for c in policy.categories),
        rules=change(policy.rules),
        instruction=change(policy.instruction),
        allowed=tuple(map(one_line, policy.allowed)),
    )
