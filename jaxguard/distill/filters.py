"""What makes a trace unfit to learn from: one named check each, with its threshold in the config.

The paper (arXiv 2505.20087) names repetition, leaked labels and overthinking, but no patterns and thresholds: those here and in
`FilterConfig` are our choice, and tests/distill/test_filters.py has examples of each.
"""

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any

from jaxguard.config.data import FilterConfig
from jaxguard.data.format.answer import parse
from jaxguard.data.format.dialogue import Answers, Dialogue, Mode
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.versions import install

CHECKS = (
    "cut", "empty", "too_long", "over_budget", "verdict_missing", "verdict_differs", "labels_leaked", "overthinking",
    "repetition", "forged", "language",
)  # fmt: skip
"""In the order in which reports show them."""
_WORD = 100
"""Characters of the longest word, on average: what is longer has too many, and is not looked at."""
_SURE = 0.9
"""Least probability of another language to reject a trace: it rejects one of 4,000 English answers of over 60 characters."""


@dataclass(frozen=True)
class Candidate:
    """One completion of the teacher, and what it is compared with: people's verdict, and the most sentences of the trace."""

    trace: str
    answer: str
    finish_reason: str
    labels: Answers
    budget: int | None = None


@dataclass(frozen=True)
class Filters:
    """Every check, with its thresholds and the student's format, which no trace may forge."""

    config: FilterConfig
    dialogue: Dialogue

    def __post_init__(self) -> None:
        language = self.config.language
        if language is not None and language not in _identifier().labels:
            known = ", ".join(sorted(_identifier().labels))
            raise JaxguardError(f"distill.filter.language={language!r} is none of: {known}")

    def failures(self, candidate: Candidate) -> dict[str, str]:
        """Name of each check that the candidate fails -> what is wrong. Empty for a trace to keep."""
        config, trace = self.config, candidate.trace
        if len(trace) > _WORD * config.max_words:
            return {"too_long": f"{len(trace):,} characters; at most {config.max_words} words are wanted"}
        tokens = words(trace)
        verdict = parse(candidate.answer, [question for question, _ in candidate.labels], Mode.DIRECT)
        malformed = {problem.partition(":")[0] for problem in verdict.problems}
        verdicts = [(question, getattr(verdict, question) or "None", label) for question, label in candidate.labels]
        differing = [(q, word, label) for q, word, label in verdicts if q not in malformed and word != label]
        sentences = len(split_sentences(trace)) if candidate.budget is not None else 0
        hesitations = [match[0] for match in _HESITATION.finditer(trace)]
        leak, repeats = _LEAK.search(trace), repeated_share(tokens, config.ngram)
        problems = {
            "cut": candidate.finish_reason != "stop"
            and f"finish_reason is {candidate.finish_reason!r}: the text may lack its end",
            "empty": len(tokens) < config.min_words and f"{len(tokens)} words; at least {config.min_words} are wanted",
            "too_long": len(tokens) > config.max_words
            and f"{len(tokens)} words; at most {config.max_words} are wanted",
            "over_budget": sentences > (candidate.budget or 0)
            and f"{sentences} sentences; at most {candidate.budget} were asked for",
            "verdict_missing": "; ".join(verdict.problems),
            "verdict_differs": "; ".join(f"{q}: {word}, not {label}" for q, word, label in differing),
            "labels_leaked": leak and f"says {_quoted(leak[0])}",
            "overthinking": len(hesitations) > config.max_hesitations
            and f"hesitates {len(hesitations)} times ({_quoted(hesitations[0])}, …); "
            f"at most {config.max_hesitations} are wanted",
            "repetition": repeats > config.max_repeated_share
            and f"{repeats:.0%} of its runs of {config.ngram} words are repeats; "
            f"at most {config.max_repeated_share:.0%} are wanted",
            "forged": self.dialogue.quote(trace) != trace.strip()
            and "holds a verdict line, think tag, marker, header or special token of the student's format",
            "language": self._foreign(trace),
        }
        return {check: problem for check, problem in problems.items() if problem}

    def _foreign(self, trace: str) -> str | None:
        """Say what is not in the config's script or language, if anything."""
        letters = [character for character in trace if character.isalpha()]
        script = sum(unicodedata.name(letter, "").startswith(self.config.script) for letter in letters)
        inside = script / len(letters) if letters else 1.0
        if inside < self.config.min_script_share:
            wanted = f"at least {self.config.min_script_share:.0%} are wanted"
            return f"{inside:.0%} of its letters are {self.config.script}; {wanted}"
        if self.config.language is None:
            return None
        language, probability = _identifier().classify(trace)
        if language == self.config.language or probability < _SURE:
            return None
        return f"is written in {language!r}, not {self.config.language!r}"


@cache
def _identifier() -> Any:
    """Load the model that identifies languages."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise JaxguardError(
            f"the identifier of languages is not installed ({error}): {install('distill')}, or set "
            "distill.filter.language=null"
        ) from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


# A trace that mentions the labels as given has not reasoned its way to them.
_LABEL = r"(?:labels?|annotations?|verdicts?|classifications?|ground[ -]?truths?|gold(?:en)? (?:labels?|answers?))"
_SAID = r"(?:un)?(?:harmful|safe)|refusal|compliance"
_LEAK = re.compile(
    "|".join(
        (
            r"\bground[ -]?truths?\b",
            r"\bgold(?:en)?[ -](?:standard|labels?|answers?|verdicts?)\b",
            rf"\b(?:given|provided|supplied|stated|expected|required|correct|official|reference|human|known|above)\s+{_LABEL}\b",
            rf"\b{_LABEL}\s+(?:(?:is|are|was|were|has been|have been|that (?:is|are|was|were))\s+)?(?:already\s+)?"
            r"(?:says?|tells?|indicates?|confirms?|marks?|lists?|(?:given|provided|supplied|known|stated)"
            r"(?=\s+(?:as|in|to|here|above|with|by)\b|\s*[.,;:)]|\s*$))",
            rf"\b(?:according to|consistent with|in line with|matches|agrees with|as per|per|based on|follows? from)\s+the\s+"
            rf"(?:\w+\s+)?{_LABEL}\b",
            r"\b(?:already|been|is|was|are|were)\s+(?:labell?ed|annotated|tagged|marked)\s+(?:as\s+)?(?:un)?(?:harmful|safe)\b",
            r"\b(?:I|we)(?:'ve| have| was| were|'m| am| are|'re)?\s+(?:been\s+)?(?:told|informed|given)\s+(?:that\s+)?"
            r"(?:the|this|it|both)\b[^.\n]{0,60}\b(?:un)?(?:harmful|safe|refusal|compliance)\b",
            rf"\b(?:the|these|those|this)\s+{_LABEL}\s+(?:must|should|need|needs|has|have)\s+(?:to\s+)?(?:be\s+)?(?:justif|explain|support)",
            r"\b(?:justify|explain|reach|arrive at|support)\s+(?:the|these|those)\s+(?:\w+\s+)?(?:labels?|ground[ -]?truths?)\b",
            # What the teacher's prompt says of them.
            r"\breviewers?(?:['\u2019]s?)?\s+(?:(?:have|has|had|already)\s+)*(?:settled|decided|agreed|concluded|judged|determined|said|say|verdicts?|"
            r"decisions?|conclusions?|labels?)\b",
            rf"\bsettled\s+(?:on\s+)?(?:(?:this|that|the|a|as)\s+)?(?:{_LABEL}|{_SAID})\b",
            r"\bwhere to arrive\b",
            rf"\b(?:need|have|had|must|supposed|told|asked|instructed|required|meant)\s+(?:to\s+)?(?:arrive\s+at|lead\s+(?:me\s+)?to|reach|end\s+"
            rf"(?:up\s+)?(?:at|with|in)|get\s+to)\s+(?:(?:the|this|that|a)\s+)?(?:\w+\s+)?(?:{_LABEL}|{_SAID})\b",
            r"\bmust\s+lead\s+there\b",
            rf"\b(?:given|told|handed|shown)\s+(?:(?:the|a|this|that|my)\s+)?(?:\w+\s+)?{_LABEL}(?=\s+(?:that|of|is|as|to|in|above|here|before)\b|"
            r"\s*[.,;:)]|\s*$)",
            rf"\b(?:not|n't|never|without|avoid)\s+(?:to\s+)?(?:mention|quot|hint|refer|reveal|let\s+on)\w*\s+(?:\S+\s+){{0,5}}?(?:{_LABEL}|reviewers?|"
            r"sections?|given)\b",
        )
    ),
    re.IGNORECASE,
)
_HESITATION = re.compile(
    r"\b(?:wait|hmm+|hold on|on second thoughts?|let me (?:re-?)?(?:think|check|read|consider|examine|evaluate)\w*"
    r"(?: (?:again|once more|about))?|alternatively|but then again|(?:am|was) I (?:missing|wrong)|I(?:'m| am) (?:not sure|unsure"
    r"|confused|torn)|going back and forth|double[- ]check|actually, (?:no|wait))\b",
    re.IGNORECASE,
)
_END = re.compile(
    r"""(?<![.!?\u2026])[.!?\u2026]++["'\u201d\u2019)\]*_]*+(?=\s|$)"""
    r"|[\u3002\uff01\uff1f]+"
    r"|\n\s*\n"
    r"|\n(?=\s*(?:[-*\u2022]|\d{1,2}[.)])\s)"
)
_ABBREVIATION = re.compile(
    r"(?:\b(?:e\.g|i\.e|etc|vs|cf|mr|mrs|ms|dr|prof|st|no|u\.s|approx)|(?:^|\s)[A-Za-z]|^\s*\d{1,2})\.$", re.IGNORECASE
)


_INK = re.compile(r"\S")
_LONGEST_ABBREVIATION = 12
"""Characters; at least one more than an abbreviation and its full stop have."""


def split_sentences(text: str) -> list[str]:
    """Return the sentences of a text that hold a letter or digit; a list item and a paragraph end one too."""
    sentences, start, first = [], 0, len(text) - len(text.lstrip())
    for end in _END.finditer(text):
        # The end alone tells, and a text of abbreviations is one sentence: whole ones would take quadratic time.
        tail = max(first, end.end() - _LONGEST_ABBREVIATION)
        if end[0] == "." and _ABBREVIATION.search(("" if tail == first else "x") + text[tail : end.end()]):
            continue
        sentences.append(text[start : end.end()].strip())
        start = end.end()
        first = next((match.start() for match in _INK.finditer(text, start)), len(text))
    return [sentence for sentence in [*sentences, text[start:].strip()] if re.search(r"\w", sentence)]


def words(text: str) -> list[str]:
    """Split into words in lower case; each character of a script without spaces is one."""
    return re.findall(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_]+(?:['\u2019-][^\W_]+)*", text.lower())


def repeated_share(tokens: list[str], n: int) -> float:
    """Return the share of repeated n-grams: 1 - distinct / all; 0 for a text without any."""
    grams = Counter(zip(*(tokens[i:] for i in range(n)), strict=False))
    total = sum(grams.values())
    return 1 - len(grams) / total if total else 0.0


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
