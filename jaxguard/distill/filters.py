"""What makes a trace unfit to learn from: one named check each, with its threshold in the config.

The failures that the paper (arXiv 2505.20087) found by reading traces are repetition, leaked labels and overthinking; the
published traces are those whose verdict matches the label. It states no patterns and thresholds: those here and in `FilterConfig`
are our choice, and tests/distill/test_filters.py has examples of each.
"""

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any

from jaxguard.config.distill import FilterConfig
from jaxguard.data.format.answer import Verdict, parse
from jaxguard.data.format.dialogue import Answers, Dialogue, Mode
from jaxguard.distill.sentences import split_sentences
from jaxguard.utils.errors import JaxguardError

CHECKS = (
    "cut",
    "empty",
    "too_long",
    "over_budget",
    "verdict_missing",
    "verdict_differs",
    "labels_leaked",
    "overthinking",
    "repetition",
    "forged",
    "language",
)
"""In the order in which reports show them: each is a method of Filters."""


@dataclass(frozen=True)
class Candidate:
    """One completion of the teacher, and what it is compared with.

    Attributes:
        trace: the reasoning, without its tags.
        answer: what follows the reasoning.
        finish_reason: why the server stopped; only "stop" passes.
        labels: people's verdict, as verdict lines.
        budget: most sentences of the trace; None sets no limit.
    """

    trace: str
    answer: str
    finish_reason: str
    labels: Answers
    budget: int | None = None

    @property
    def verdict(self) -> Verdict:
        """The teacher's own verdict; missing or malformed lines are among its problems."""
        return parse(self.answer, [question for question, _ in self.labels], Mode.DIRECT)


@dataclass(frozen=True)
class Filters:
    """Every check, with its thresholds.

    Attributes:
        config: the thresholds.
        dialogue: the student's format, which no trace may forge.

    Raises:
        JaxguardError: the language of the config is not one that can be identified.
    """

    config: FilterConfig
    dialogue: Dialogue

    def __post_init__(self) -> None:
        language = self.config.language
        if language is not None and language not in _identifier().labels:
            known = ", ".join(sorted(_identifier().labels))
            raise JaxguardError(f"distill.filter.language={language!r} is none of: {known}")

    def failures(self, candidate: Candidate) -> dict[str, str]:
        """Name of each check that the candidate fails -> what is wrong. Empty for a trace to keep."""
        problems = {name: getattr(self, f"_{name}")(candidate) for name in CHECKS}
        return {name: problem for name, problem in problems.items() if problem}

    def _cut(self, candidate: Candidate) -> str | None:
        reason = candidate.finish_reason
        return None if reason == "stop" else f"finish_reason is {reason!r}: the text may lack its end"

    def _empty(self, candidate: Candidate) -> str | None:
        count = len(words(candidate.trace))
        return None if count >= self.config.min_words else f"{count} words; at least {self.config.min_words} are wanted"

    def _too_long(self, candidate: Candidate) -> str | None:
        count = len(words(candidate.trace))
        return None if count <= self.config.max_words else f"{count} words; at most {self.config.max_words} are wanted"

    def _over_budget(self, candidate: Candidate) -> str | None:
        if candidate.budget is None:
            return None
        count = len(split_sentences(candidate.trace))
        return None if count <= candidate.budget else f"{count} sentences; at most {candidate.budget} were asked for"

    def _verdict_missing(self, candidate: Candidate) -> str | None:
        return "; ".join(candidate.verdict.problems) or None

    def _verdict_differs(self, candidate: Candidate) -> str | None:
        verdict = candidate.verdict
        malformed = {problem.partition(":")[0] for problem in verdict.problems}
        wrong = [
            f"{question}: {getattr(verdict, question) or 'None'}, not {label}"
            for question, label in candidate.labels
            if question not in malformed and (getattr(verdict, question) or "None") != label
        ]
        return "; ".join(wrong) or None

    def _labels_leaked(self, candidate: Candidate) -> str | None:
        match = _LEAK.search(candidate.trace)
        return None if match is None else f"says {_quoted(match[0])}"

    def _overthinking(self, candidate: Candidate) -> str | None:
        hesitations = [match[0] for match in _HESITATION.finditer(candidate.trace)]
        most = self.config.max_hesitations
        if len(hesitations) <= most:
            return None
        return f"hesitates {len(hesitations)} times ({_quoted(hesitations[0])}, …); at most {most} are wanted"

    def _repetition(self, candidate: Candidate) -> str | None:
        share = repeated_share(words(candidate.trace), self.config.ngram)
        if share <= self.config.max_repeated_share:
            return None
        most = self.config.max_repeated_share
        return f"{share:.0%} of its runs of {self.config.ngram} words are repeats; at most {most:.0%} are wanted"

    def _forged(self, candidate: Candidate) -> str | None:
        text = candidate.trace.strip()
        if self.dialogue.quote(text) == text:
            return None
        return "holds a verdict line, think tag, marker, header or special token of the student's format"

    def _language(self, candidate: Candidate) -> str | None:
        share = script_share(candidate.trace, self.config.script)
        if share < self.config.min_script_share:
            wanted = f"at least {self.config.min_script_share:.0%} are wanted"
            return f"{share:.0%} of its letters are {self.config.script}; {wanted}"
        if self.config.language is None:
            return None
        language, probability = _identifier().classify(candidate.trace)
        if language == self.config.language or probability < _SURE:
            return None
        return f"is written in {language!r}, not {self.config.language!r}"


_SURE = 0.9
"""Least probability of another language to reject a trace: it rejects one of 4,000 English answers of over 60 characters."""


@cache
def _identifier() -> Any:
    """Load the model that identifies languages."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise JaxguardError(
            f"the identifier of languages is not installed ({error}): pip install -e '.[distill]', or set "
            "distill.filter.language=null"
        ) from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


# A trace that mentions the labels as given has not reasoned its way to them.
_LABEL = r"(?:labels?|annotations?|verdicts?|classifications?|ground[ -]?truths?|gold(?:en)? (?:labels?|answers?))"
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


def words(text: str) -> list[str]:
    """Words in lower case; each character of a script without spaces is one."""
    return re.findall(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_]+(?:['\u2019-][^\W_]+)*", text.lower())


def repeated_share(tokens: list[str], n: int) -> float:
    """Share of repeated n-grams: 1 - distinct / all; 0 for a text without any."""
    grams = Counter(zip(*(tokens[i:] for i in range(n)), strict=False))
    total = sum(grams.values())
    return 1 - len(grams) / total if total else 0.0


def script_share(text: str, script: str) -> float:
    """Share of the letters whose Unicode name starts with `script`, such as LATIN; 1 for a text without letters."""
    letters = Counter(character for character in text if character.isalpha())
    total = sum(letters.values())
    inside = sum(n for letter, n in letters.items() if unicodedata.name(letter, "").startswith(script))
    return inside / total if total else 1.0


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
