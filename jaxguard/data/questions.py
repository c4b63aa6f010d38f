"""Which questions a guard was trained on together, and how it is asked accordingly.

A guard answers reliably what its training prompts asked. Where each example is labelled for one question only, it has never seen a
prompt that asks two about an exchange; such a request becomes two prompts. A question that no training prompt asks is not asked.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any, Final, NamedTuple

from jaxguard.config.base import Positive, Schema
from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.policies import Policy, Question
from jaxguard.report import Table

RARE: Final = 0.01
"""Share of a mode's training examples below which a set is asked only where no other holds its question."""
NOT_RECORDED: Final = (
    "which questions this model was trained on together is not recorded: one prompt asks all that the policy asks"
)


class QuestionSet(Schema):
    """The questions that some prompts of the training data ask together, in one mode."""

    mode: Mode
    response: bool
    """Whether these prompts show a response."""
    questions: tuple[Question, ...]
    examples: Positive


class Ask(NamedTuple):
    """One prompt of a request.

    Attributes:
        questions: those of the request that it answers.
        lines: the verdict lines that it asks for, as trained.
        response: whether it shows the response.
    """

    questions: tuple[Question, ...]
    lines: tuple[Question, ...]
    response: bool


def question_sets(prompts: Iterable[tuple[Example, Mode, tuple[Question, ...]]]) -> list[QuestionSet]:
    """Count the sets of questions of training prompts: (example, mode, questions asked)."""
    counts = Counter((mode, example.response is not None, questions) for example, mode, questions in prompts)
    return [
        QuestionSet(mode=mode, response=response, questions=questions, examples=count)
        for (mode, response, questions), count in sorted(counts.items())
    ]


def trained_together(manifest: Mapping[str, Any]) -> tuple[QuestionSet, ...]:
    """Return the sets of a data manifest's training prompts; () of one that does not list them."""
    return tuple(map(QuestionSet.model_validate, manifest.get("train", {}).get("questions", ())))


def table_of(trained: Iterable[QuestionSet]) -> Table:
    """Tabulate the sets, for reports."""
    table = Table(("mode", "prompts that ask", "about", "examples"), "Questions trained together", left=3)
    for each in trained:
        about = "an exchange" if each.response else "a prompt alone"
        table.add(str(each.mode), ", ".join(each.questions), about, each.examples)
    return table


def ask(
    questions: Sequence[Question],
    lines: tuple[Question, ...],
    response: bool,
    mode: Mode,
    trained: Sequence[QuestionSet],
    rare: float = RARE,
) -> list[Ask]:
    """Split questions about an exchange, or about a prompt without a `response`, into prompts as they were trained.

    Each prompt answers as many of the questions as possible; of equal ones it is that nearest to `lines`, which is asked where
    `trained` is empty. A question about the prompt that was trained without a response only is asked without it. Questions
    that no set holds are in no prompt. `rare` is the share of the mode's examples below which a set comes last.
    """
    if not trained:
        return [Ask(tuple(questions), lines, response)]
    own = [each for each in trained if each.mode is mode] or trained
    least, left, asks = rare * sum(each.examples for each in own), set(questions), list[Ask]()
    for last, shown in product((False, True), (response, not response)):
        sets = [each for each in own if each.response is shown and (each.examples < least) is last]
        while True:
            open_questions = left if shown is response else left & {"prompt_harm"}
            useful = [each for each in sets if open_questions.intersection(each.questions)]
            if not useful:
                break
            best = min(
                useful,
                key=lambda each: (
                    -len(open_questions.intersection(each.questions)),
                    len({*lines}.symmetric_difference(each.questions)),
                    -each.examples,
                ),
            )
            covered = open_questions.intersection(best.questions)
            asks.append(Ask(tuple(q for q in questions if q in covered), best.questions, response and shown))
            left = left - covered
    return sorted(asks, key=lambda each: questions.index(each.questions[0]))


def unasked(
    questions: Sequence[Question], response: bool, mode: Mode, trained: Sequence[QuestionSet]
) -> tuple[Question, ...]:
    """The questions that are not asked, since no set holds them."""
    asked = {q for each in ask(questions, tuple(questions), response, mode, trained) for q in each.questions}
    return tuple(q for q in questions if q not in asked)


def cautions(trained: Sequence[QuestionSet], policy: Policy) -> list[str]:
    """Say, before training, which questions of the run's policy the guard will not be asked, or not together."""
    texts = []
    for mode in dict.fromkeys(each.mode for each in trained):
        missing = unasked(policy.asks, True, mode, trained)
        if missing:
            texts.append(
                f"{', '.join(missing)}: policy {policy.name!r} asks this, but no example in {mode} mode is labelled for it. "
                "The guard will not be asked, and what it judges will not pass: add such examples, or take it out of "
                "the policy's asks"
            )
        asks = ask(policy.asks, policy.asks, True, mode, trained)
        if len(asks) > 1:
            prompts = (
                " and ".join(each.questions) + ("" if each.response else " without the response") for each in asks
            )
            texts.append(
                f"in {mode} mode an exchange will be judged by {len(asks)} prompts ({'; '.join(prompts)}), since too few "
                "examples have labels for these questions together"
            )
    return texts
