"""Other guards, asked in their own format and read in their own grammar: what jaxguard is compared with.

    example + question -> untrusted texts quoted -> the guard's chat template, or its text -> token ids
    answer -> POSITIVE, NEGATIVE, or UNPARSABLE for whatever is not exactly an answer of the format

A guard with categories of its own is asked by those where the policy is of harm in general, as published scores are. Any other
policy is put where the format takes one; where it takes none the guard is not asked (UnsupportedError).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from transformers import PreTrainedTokenizerBase

from jaxguard.config.lookup import find_yaml
from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import Dialogue, Mode
from jaxguard.data.format.template import TEMPLATE_KWARGS, token_ids
from jaxguard.data.policies import Category, Policy, Question, policy_for
from jaxguard.guards.baselines import BASELINES
from jaxguard.guards.formats.classifiers import (
    BEGIN_CATEGORIES,
    END_CATEGORIES,
    LLAMA_GUARD,
    QWEN,
    SHIELDGEMMA,
    WILDGUARD,
)
from jaxguard.guards.formats.reasoners import NEMOTRON, SAFEGUARD
from jaxguard.guards.formats.records import Guard, Quoted, numbered
from jaxguard.guards.formats.schema import GUARD_FOLDER
from jaxguard.guards.formats.written import read_guard
from jaxguard.guards.protocol import DecisionPoint, Prompt, PromptFormat, Request, UnsupportedError
from jaxguard.utils.errors import JaxguardError

GUARDS: Final = {
    "llama_guard": LLAMA_GUARD,
    "wildguard": WILDGUARD,
    "shieldgemma": SHIELDGEMMA,
    "qwen3guard": QWEN,
    "gpt_oss_safeguard": SAFEGUARD,
    "nemotron_reasoning": NEMOTRON,
}
"""By evaluate.guards.format; others are files."""
BUILT_IN: Final = ("jaxguard", *GUARDS, *BASELINES)
"""Every format that needs no file: ours, those here, the baselines."""
GENERAL: Final = ("wildguard", "aegis2", "demo")
"""Policies of harm in general, by name."""
# Some templates write the day's date into the prompt; an answer would then change from one day to the next.
_DATED: Final = "{% macro strftime_now(format) %}2025-10-29{% endmacro %}"


def external_format(kind: str, tokenizer: PreTrainedTokenizerBase, policy: Policy) -> PromptFormat:
    """How a guard of this kind is asked and read.

    Args:
        kind: a key of GUARDS, or a written format's file or its name in GUARD_FOLDER.
        tokenizer: of the guard's checkpoint, a fast one, with its chat template.
        policy: the run's.

    Raises:
        JaxguardError: a tokenizer that does not belong to such a guard; as `external_guard`.
    """
    guard = external_guard(kind)
    form = ExternalFormat(kind, guard, tokenizer, policy)
    question = guard.asks[0]
    plain = Policy("own", rules="Be kind.", asks=guard.asks) if guard.takes_policy else Policy(GENERAL[0])
    texts = Quoted("bread", None if question == "prompt_harm" else "bread", plain)
    ask = Request(Example("a trial", kind, texts.prompt, texts.response), question, guard.modes[0])
    if not isinstance(guard.turn(texts, ask), str) and not tokenizer.chat_template:
        raise JaxguardError(f"{form}: its tokenizer has no chat template; take all files of the checkpoint")
    if not form.stop_ids:
        raise JaxguardError(f"{form}: its tokenizer has no token that ends an answer ({', '.join(guard.ends)})")
    form.rendered(texts, ask)
    return form


def external_guard(kind: str) -> Guard:
    """The record of a format: a built-in one, or what its file says.

    Raises:
        JaxguardError: there is neither; a file that is no format.
    """
    return GUARDS[kind] if kind in GUARDS else read_guard(written_file(kind))


def written_file(kind: str) -> Path:
    """The file of a format that is not built in.

    Raises:
        JaxguardError: there is none; names the formats.
    """
    return find_yaml(kind, GUARD_FOLDER, f"guard format: neither {', '.join(BUILT_IN)}, nor a file")


@dataclass(frozen=True)
class ExternalFormat:
    """The PromptFormat of another guard."""

    kind: str
    guard: Guard
    tokenizer: PreTrainedTokenizerBase
    policy: Policy

    def __str__(self) -> str:
        return f"format {self.kind} ({self.guard.name})"

    def prompt(self, ask: Request, /) -> Prompt:
        """See PromptFormat. Nothing is cut: a text that is too long for the model is for the backend to refuse."""
        return Prompt(tuple(self._prompt(ask)[0]))

    def text(self, ids: Sequence[int], /) -> str:
        """Special tokens stay visible: one inside an answer makes it unreadable."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def read(self, ask: Request, text: str, /) -> int:
        """See PromptFormat."""
        return self.guard.read(ask, text)

    def closed(self, ask: Request, text: str, /) -> str | None:
        """See PromptFormat."""
        return self.guard.closed(ask, text)

    def tokens(self, text: str, /) -> list[int]:
        """See PromptFormat."""
        return token_ids(self.tokenizer, text)

    def choices(self, ask: Request, text: str, /) -> tuple[DecisionPoint, ...]:
        """A tree of two-way choices, one for each word of the answer up to the asked one.

        Where several words are positive, each is held against the negative one. What follows are then not quite exclusive
        choices, so the probability is a little above that of the words together.
        """
        start = self.guard.start(ask, text)
        if start is None:
            return ()
        prompt, ends_open = self._prompt(ask)
        steps = self.guard.steps(ask)
        found: list[DecisionPoint] = []
        paths: list[tuple[str, tuple[tuple[int, bool], ...]]] = [("", ())]
        for step in steps:
            final = step is steps[-1]
            # Llama Guard's answer opens with an empty line, where the template has not written it yet.
            lead = step.lead if step.lead.strip() or ends_open else ""
            following = []
            for before, earlier in paths:
                taken, forks = earlier, list[tuple[list[int], int, int]]()
                for word in (step.positive, *step.also):
                    fork = self._fork(start + before + lead, word, step.negative)
                    if fork is None:
                        return ()
                    if fork in forks:  # "Yes" and "Yes."
                        continue
                    forks.append(fork)
                    shared, positive, negative = fork
                    found.append(DecisionPoint((*prompt, *shared), positive, negative, taken, final))
                    following.append((before + lead + word, (*taken, (len(found) - 1, True))))
                    taken = (*taken, (len(found) - 1, False))
                following.append((before + lead + step.negative, taken))
            paths = following
        return tuple(found)

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
    def thinks(self) -> frozenset[Mode]:
        """See PromptFormat."""
        return self.guard.thinks

    def rendered(self, texts: Quoted, ask: Request) -> str:
        """The prompt as text, special tokens included."""
        turn = self.guard.turn(texts, ask)
        text = turn if isinstance(turn, str) else self._templated(*turn)
        if self.guard.takes_policy and self.guard.own_categories and texts.policy.name not in GENERAL:
            before, begin, rest = text.partition(BEGIN_CATEGORIES)
            _, end, after = rest.partition(END_CATEGORIES)
            if not end:
                raise JaxguardError(f"{self}: its chat template has no section of categories: another model's?")
            text = f"{before}{begin}\n{numbered(texts.policy)}\n{end}{after}"
        return text

    def _templated(self, messages: list[dict[str, str]], options: dict[str, Any]) -> str:
        """What the checkpoint's chat template makes of the messages: contents are text, or parts where images are known."""
        shown = [message["content"] for message in messages] + list(options.values())
        parts: list[Any] = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in messages]
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
            if all(one in str(text) for one in shown):
                return str(text)
        raise JaxguardError(f"{self}: its chat template does not render the request: {problem}")

    @cached_property
    def _template(self) -> str:
        return _DATED + self.tokenizer.get_chat_template()

    def _prompt(self, ask: Request) -> tuple[list[int], bool]:
        """(token ids, whether the text ends without a line break)."""
        guard, example = self.guard, ask.example
        if ask.question not in guard.asks:
            raise UnsupportedError(
                f"example {example.id!r}: {self} does not answer {ask.question}, but only {', '.join(guard.asks)}; "
                "leave the benchmark out for it"
            )
        if ask.question != "prompt_harm" and example.response is None:
            raise JaxguardError(f"example {example.id!r}: {ask.question} is asked, but there is no response")
        policy = policy_for(example, self.policy)
        if not guard.takes_policy and policy.name not in GENERAL:
            raise UnsupportedError(
                f"example {example.id!r}: {self} judges by its own categories only and cannot take policy "
                f"{policy.name!r}; leave benchmarks with such policies out for it"
            )
        alone = guard.judges_prompt_alone and ask.question == "prompt_harm"
        response = None if alone or example.response is None else self.quote(example.response)
        texts = Quoted(self.quote(example.prompt), response, self._quoted(policy))
        text = self.rendered(texts, ask)
        ids = self.tokens(text)
        self._check(ask, texts, ids)
        return ids, not text.endswith("\n")

    def _check(self, ask: Request, texts: Quoted, ids: Sequence[int]) -> None:
        """No text may have become a special token: those are as many as with texts that cannot have."""
        key = (ask.question, ask.mode, texts.response is None)
        if key not in self._expected:
            plain = replace(texts, prompt="bread", response=None if texts.response is None else "bread")
            self._expected[key] = self._reserved_in(self.tokens(self.rendered(plain, ask)))
        expected = self._expected[key]
        if self._reserved_in(ids) != expected:
            raise JaxguardError(
                f"example {ask.example.id!r}: its text spells a special token of {self} in a way that jaxguard does not "
                "know. Leave the example out and report it"
            )

    def quote(self, text: str) -> str:
        """Untrusted text with every string broken that could act as part of the format or as a special token."""
        text, found = self._dialogue.quote(text), 1
        while found:  # a mark may overlap itself
            text, found = self._loose.subn(lambda match: f"{match[0][:-1]}\\{match[0][-1]}", text)
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
    def _expected(self) -> dict[tuple[Question, Mode, bool], list[int]]:
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

        headings = (rf"^[\s\u2581>*_#-]{{0,8}}{spaced(one)}[\s\u2581*_]{{0,4}}:" for one in self.guard.headings)
        marks = [*map(spaced, self.guard.tags), *headings]
        return re.compile("|".join(marks) if marks else "(?!)", re.IGNORECASE | re.MULTILINE)
