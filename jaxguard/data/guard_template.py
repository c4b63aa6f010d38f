"""The chat template of an export: with it a server renders what training rendered, or gets an error.

It is format/guard.j2 behind constants: the prompt around a conversation as the encoder renders it, and what the format quotes.
Jinja has no regular expressions. But every mark of ours ends in a character that it holds once (`:`, `>`, `]`), or is one word:
texts are split there, and each part is compared from its end. All marks are broken at once, which is what quoting.quote arrives
at where none overlaps another; where one could, the template refuses the text.
"""

import json
import re
import shutil
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, Final

from jaxguard.data.encoding import Encoder
from jaxguard.data.format.dialogue import PRINTED, Mode, transcript
from jaxguard.data.format.quoting import GAP, LETTERED, NAMED, NUMBERED, WILDCARD, fold
from jaxguard.data.format.template import BASE_TEMPLATE
from jaxguard.data.policies import Policy, Question
from jaxguard.data.questions import QuestionSet, ask, unasked

_SOURCE: Final = Path(__file__).parent / "format" / "guard.j2"
_ASCII: Final = frozenset(map(chr, range(32, 127))) | {"\n"}
_SANITIZED: Final = ("\U000f0000", "\U000f0001")
"""What transformers' sanitize_control_tokens puts around tokens in a text; training's ids are other ones."""
_POLICY, _PROMPT, _RESPONSE = "jaxguardpolicy", "jaxguardprompt", "jaxguardresponse"


def write_guard_template(folder: Path, encoder: Encoder, modes: Sequence[Mode], trained: Sequence[QuestionSet]) -> None:
    """Write the template into a folder with the base's files, and keep the base's own, with which jaxguard renders."""
    (folder / BASE_TEMPLATE).write_text(str(encoder.tokenizer.get_chat_template()), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(guard_template(encoder, modes, trained), encoding="utf-8")
    # The other places of a template, where a program could find the base's.
    (folder / "chat_template.json").unlink(missing_ok=True)
    shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if config.pop("chat_template", None):
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def guard_template(encoder: Encoder, modes: Sequence[Mode], trained: Sequence[QuestionSet]) -> str:
    """Return the chat template of a guard that was trained with this encoder, in these modes, on these sets of questions."""
    dialogue, policy = encoder.dialogue, encoder.policy
    start, head, *_ = _around(encoder, policy.asks, True, modes[0])
    own = encoder.prompt_text(dialogue.user_turn(_PROMPT, None, policy, policy.asks, modes[0]), modes[0])
    whole = transcript([{"role": "user", "content": _POLICY}], _PROMPT, "the template") or ""
    earlier, message = re.split(rf"\[user\] {_POLICY}|\[user\] {_PROMPT}", whole)[:2]
    titles = {title: [fold(word) for word in reversed(title.removesuffix(":").split())] for title in PRINTED}
    markers = ["".join(fold(marker).split()) for marker in (dialogue.reasoning_marker, dialogue.direct_marker)]
    alone = [marker for marker in markers if _breaks_alone(marker, markers)]
    overlapping = _overlapping(dialogue.special_tokens)
    constants = {
        "THINKS": Mode.REASONING in modes,
        "PROMPTS": {
            mode is Mode.REASONING: {answered: _prompts(encoder, mode, answered, trained) for answered in (False, True)}
            for mode in modes
        },
        "POLICY_NAME": policy.name,
        "OWN_POLICY": own.split(head)[0],
        "OTHER_POLICY": start,
        "EARLIER": earlier,
        "MESSAGE": message,
        "TITLES": list(titles.values()),
        "TRANSCRIPT_TITLES": [titles[earlier.strip()], titles[message.strip()]],
        "MARKERS": alone,
        "REFUSED": [*overlapping, *(marker for marker in markers if marker not in alone), *_SANITIZED],
        "THINK": fold("think"),
        "NAMED": {opening: [fold(name) for name in names] for opening, names in NAMED.items()},
        "LETTERED": [fold(name) for name in LETTERED],
        "NUMBERED": [fold(name) for name in NUMBERED],
        "WILDCARD": WILDCARD,
        "GAPS": "".join(sorted(character for character in _ASCII if re.fullmatch(GAP, character))),
        "BLANKS": "".join(sorted(filter(str.isspace, _ASCII))),
        "LETTERS": "abcdefghijklmnopqrstuvwxyz",
        "TOKENS": [token for token in dialogue.special_tokens if token not in overlapping],
        **_folding(_ASCII.union(*markers)),
    }
    # A literal of Python in ASCII is one of Jinja.
    return "".join(f"{{%- set {name} = {value!a} -%}}\n" for name, value in constants.items()) + _SOURCE.read_text(
        "utf-8"
    )


def _prompts(encoder: Encoder, mode: Mode, answered: bool, trained: Sequence[QuestionSet]) -> dict[str, Any]:
    """What Guard.check asks about a prompt alone, or one with an answer; `whole` is one prompt that asks all, if there is one."""
    policy = encoder.policy
    asked = tuple(q for q in policy.asks if answered or q == "prompt_harm")
    prompts = [
        {"questions": list(each.questions), "response": each.response, "texts": texts[1:]}
        for each in (ask(asked, policy.asks, answered, mode, trained) if asked else ())
        for texts in [_around(encoder, each.lines, each.response, mode)]
    ]
    judged = ("response_harm" if answered else "prompt_harm") in asked
    whole = judged and len(prompts) == 1 and not unasked(asked, answered, mode, trained)
    return {"prompts": prompts, "whole": prompts[0] if whole else None}


def _around(encoder: Encoder, lines: tuple[Question, ...], answered: bool, mode: Mode) -> list[str]:
    """Return the texts before, between and after a policy's rules, a prompt and, if there is one, a response."""
    rules = Policy("own", rules=_POLICY)
    turn = encoder.dialogue.user_turn(_PROMPT, _RESPONSE if answered else None, rules, lines, mode)
    return re.split(f"{_POLICY}|{_PROMPT}|{_RESPONSE}", encoder.prompt_text(turn, mode))


def _breaks_alone(marker: str, markers: Iterable[str]) -> bool:
    """Whether a marker can neither overlap another mark nor begin as the other marker does."""
    if not re.fullmatch("/[a-z_]+", marker):
        return False
    titles = ["".join(map(fold, title.split())) for title in PRINTED]
    tails = [tail for i in range(1, len(marker)) if (tail := marker[i:].replace("_", ""))]
    others = (other for other in markers if other != marker)
    return not any(t.startswith(tail) for t in titles for tail in tails) and not any(map(marker.startswith, others))


def _overlapping(tokens: Sequence[str]) -> list[str]:
    """The tokens of which the order of breaking matters: parts of others, those that share an end, those with a backslash."""
    starts = {token[:i] for token in tokens for i in range(1, len(token))}
    ends = {token[i:] for token in tokens for i in range(1, len(token))}
    inner = {token[i:j] for token in tokens for j in range(1, len(token)) for i in range(1, j)}
    meeting = starts & ends
    return [
        token
        for token in tokens
        if token in starts | ends | inner
        or "\\" in token
        or any(token[:i] in meeting or token[-i:] in meeting for i in range(1, len(token)))
    ]


@lru_cache(maxsize=4)
def _folding(needed: frozenset[str]) -> dict[str, Any]:
    """How characters look: those that look like needed ones, as one or several, and those that look like nothing."""
    codes = chain(range(0xD800), range(0xE000, 0x20000), range(0xE0000, 0xE1000))  # all whose looks are of use
    looks = {character: seen for character in map(chr, codes) if (seen := fold(character)) != character}
    single = {character: seen for character, seen in looks.items() if seen in needed}
    several = {ord(c): seen for c, seen in looks.items() if len(seen) > 1 and not needed.isdisjoint(seen)}
    unseen = "".join(character for character, seen in looks.items() if not seen)
    return {"LOOKING": "".join(single), "LIKE": "".join(single.values()), "UNSEEN": unseen, "SEVERAL": several}
