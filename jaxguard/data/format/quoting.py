"""Break strings of untrusted text that a model could take for a part of its prompt.

Special tokens are what the tokenizer spells, to the letter. All other marks are sought in the text as a reader sees it, by patterns
over `fold(text)`: whatever their case, look-alikes, blanks and invisible characters.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Final

from jaxguard.utils.errors import JaxguardError

# Breaking a string can complete another one, whose end it was; more passes are rare.
_MAX_PASSES: Final = 64
_LINE_ENDS: Final = "\n\v\f\r\x1c\x1d\x1e\x85\u2028\u2029"
# SentencePiece tokenizers such as Gemma's write a space as U+2581; the others are letters and symbols without ink.
_BLANKS: Final = "\t\x1f\u2581\u2800\u115f\u1160\u3164\uffa0"
# As in https://www.unicode.org/Public/security/latest/confusables.txt, of what marks are made of. Capitals that differ from their
# small letters come first. l, I and 1 look alike, as do o and 0.
_LOOK_ALIKES: Final = {
    "a": "\u0430\u03b1\u0251\u237a\u1d00\u13aa",
    "b": "\u0432\u044c\u0412\u0392\u03b2\u0299\u13f4",
    "c": "\u0441\u03f2\u1d04\u13df",
    "d": "\u0501\u0257\u1d05\u13a0",
    "e": "\u0435\u0454\u04bd\u212e\u0395\u03b5\u1d07\u13ac",
    "f": "\u03dd\ua730\u0192",
    "g": "\u0261\u0581\u0262\u13c0",
    "h": "\u04bb\u0570\u0397\u041d\u043d\u029c\u13bb",
    "i": "l1\u0131\u0456\u0269\u03b9\u026a\u04cf\u029f\u13a5\u13de",
    "j": "\u0458\u03f3\u1d0a\u13ab",
    "k": "\u043a\u03ba\u1d0b\u13e6",
    "m": "\u043c\u039c\u03bc\u1d0d\u13b7",
    "n": "\u0578\u03b7\u039d\u0274",
    "o": "0\u043e\u03bf\u0585\u1d0f\u00f8",
    "p": "\u0440\u03c1\u1d18\u13e2",
    "r": "\u0433\u0280\u13a1",
    "s": "\u0455\ua731\u13da",
    "t": "\u0442\u03c4\u1d1b\u13a2",
    "u": "\u057d\u03c5\u1d1c",
    "v": "\u0475\u03bd\u1d20\u13d9",
    "w": "\u051d\u0461\u0561\u1d21\u13b3",
    "x": "\u0445\u03c7",
    "y": "\u0443\u04af\u03b3\u03a5\u028f\u13cd",
    "z": "\u03b6\u1d22\u13c3",
    ":": "\u02d0\u02f8\u0589\u05c3\u2236\ua789\ua4fd\u205a",
    "/": "\u2044\u2215\u2571\u29f8",
    "<": "\u2039\u276e\u02c2\u3008\u27e8\u2329\u1438",
    ">": "\u203a\u276f\u02c3\u3009\u27e9\u232a\u1433",
    "-": "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\u2043\u2500\u2501",
    "=": "\u2550",
    "|": "\u01c0\u2223\u23d0\u2502\u2503\u2758",
}
_SEEN: Final = {alike: seen for seen, alikes in _LOOK_ALIKES.items() for alike in alikes}


def _seen(character: str) -> Iterator[str]:
    """Yield how a character of a compatibility decomposition looks."""
    if character in _LINE_ENDS:
        yield "\n"
    elif character.isspace() or character in _BLANKS:
        yield " "
    elif character in _SEEN:
        yield _SEEN[character]
    elif unicodedata.category(character) not in {"Mn", "Me", "Cf", "Cc"}:
        yield from (_SEEN.get(folded, folded) for folded in character.casefold())


class _Folding(dict[int, str]):
    """Code point -> how it looks."""

    def __missing__(self, code: int) -> str:
        self[code] = "".join(seen for part in unicodedata.normalize("NFKD", chr(code)) for seen in _seen(part))
        return self[code]


_FOLDING: Final = _Folding()


def fold(text: str) -> str:
    """Return a text as it looks: lower case, look-alikes as one letter, only line feeds and spaces as blanks, nothing invisible."""
    return text.translate(_FOLDING)


GAP: Final = r"[\s*_`~-]"
"""Blanks and decoration between the words of a title, in folded text."""


def spaced(text: str) -> str:
    """Return a pattern over folded text: these words with any blanks between them."""
    return r"\s++".join(re.escape(fold(word)) for word in text.split())


def opening(text: str) -> str:
    """Return a pattern over folded text: these words where a line begins, after any marks of lists, quotations and emphasis."""
    return rf"^[ >*_#-]*{spaced(text)}"


def rule(character: str) -> str:
    """Return a pattern over folded text: a line that consists of this character, three times or more."""
    one = re.escape(fold(character))
    return rf"^ *(?:{one} *){{2,}}{one}(?= *$)"


def compiled(patterns: Iterable[str]) -> re.Pattern[str]:
    """Compile patterns over folded text into one."""
    return re.compile("|".join(patterns) or "(?!)", re.MULTILINE)


WILDCARD: Final = 64
"""Most characters between the bars of a token such as <|im_start|>."""
NAMED: Final[Mapping[str, tuple[str, ...]]] = {
    "<<": ("SYS",),
    "[": ("INST", "SYSTEM_PROMPT", "AVAILABLE_TOOLS", "TOOL_CALLS", "TOOL_RESULTS", "THINK", "multimodal"),
    "<": (
        *("s", "bos", "eos", "pad", "unk", "mask", "tool_call", "tool_response"),
        *("start_of_turn", "end_of_turn", "start_of_image", "end_of_image", "image_soft_token"),
        # Of models of code, as SmolLM2.
        *("repo_name", "reponame", "file_sep", "filename", "gh_stars", "empty_output"),
    ),
}
"""Opening bracket -> names of tokens, as in <bos>, </s>, [INST]."""
LETTERED: Final = ("issue", "jupyter", "fim", "commit")
"""Begin names that end in a word, as in <fim_prefix>."""
NUMBERED: Final = ("extra_id", "special", "unused", "reserved")
"""Begin names that end in a number, as in <unused42>."""


def _any_of(names: Iterable[str]) -> str:
    return f"(?:{'|'.join(map(fold, names))})"


def _named(opening: str, names: Iterable[str]) -> str:
    closing = opening.translate({ord("<"): ">", ord("["): "]"})
    return rf"{re.escape(opening)}\s*+/?\s*+{_any_of(names)}\s*+{re.escape(closing)}"


FAMILY_MARKERS: Final = (
    # <|im_start|> of ChatML, Llama 3 and gpt-oss; DeepSeek's with full-width bars; with one bar as in Gemma 4.
    rf"<\|[^<>\n\\]{{1,{WILDCARD}}}>",
    rf"<[^<>|\n\\]{{1,{WILDCARD}}}\|>",
    rf"\[\|[^\[\]\n\\]{{1,{WILDCARD}}}\|\]",
    *(_named(opening, names) for opening, names in NAMED.items()),
    rf"<\s*+{_any_of(LETTERED)}_[a-z]{{1,16}}\s*+>",
    rf"<\s*+{_any_of(NUMBERED)}_?[\doi]{{1,6}}\s*+>",
)
"""Patterns over folded text: the special tokens of common chat models, whichever of them reads the text."""


def quote(text: str, tokens: re.Pattern[str], *marks: re.Pattern[str]) -> str:
    """Put a backslash before the last character of each token and each mark, until none is left.

    `tokens` match the text, `marks` the folded text. Lone surrogates, which JSON can hold and tokenizers reject, are replaced.
    JaxguardError: a token or mark that a backslash does not break.
    """
    text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    for _ in range(_MAX_PASSES):
        before = text
        text = tokens.sub(lambda match: f"{match[0][:-1]}\\{match[0][-1]}", text)
        for pattern in marks:
            text = _break(text, pattern)
        if text == before:
            return text
    raise JaxguardError(f"a reserved string cannot be broken in {text[:80]!r}...: choose markers without backslashes")


def _break(text: str, pattern: re.Pattern[str]) -> str:
    """Put a backslash before the last character of each match in the folded text."""
    ends = [match.end() for match in pattern.finditer(fold(text))]
    if not ends:
        return text
    source = [i for i, character in enumerate(text) for _ in _FOLDING[ord(character)]]
    return "\\".join(text[start:end] for start, end in pairwise([0, *(source[end - 1] for end in ends), len(text)]))
