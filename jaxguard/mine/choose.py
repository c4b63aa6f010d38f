"""From a guard's answers to the examples that are worth a second round."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from jaxguard.config.evaluate import MineConfig
from jaxguard.data.examples import Example
from jaxguard.data.format.answer import parse
from jaxguard.data.format.dialogue import ABSENT, Mode, answers, questions
from jaxguard.data.policies import Policy, Question, policy_for
from jaxguard.data.prepare import subset

NO_CATEGORY = "(none)"


@dataclass(frozen=True)
class Outcome:
    """A training example and the guard's answers to it.

    Attributes:
        example, mode: as trained.
        labels: question by question: "prompt_harm harmful, response_harm unharmful".
        texts: the answers.
        right: how many of them agree with every label.
        unparsable: how many of the others are unparsable.
    """

    example: Example
    mode: Mode
    labels: str
    texts: tuple[str, ...]
    right: int
    unparsable: int


def labels_of(example: Example, policy: Policy) -> dict[Question, str]:
    """The labels of an example, of all that its policy asks; a response that is not there is no label."""
    known = answers(example, questions(example, policy_for(example, policy)))
    return {question: word for question, word in known if word != ABSENT}


def outcome_of(example: Example, mode: Mode, policy: Policy, texts: Sequence[str]) -> Outcome:
    """Compare a guard's answers with the labels.

    An answer has a verdict line for each label. It is right if all of them are; an unparsable one never is.
    """
    labels = labels_of(example, policy)
    verdicts = [parse(text, labels, mode, example.response is not None) for text in texts]
    parsable = [verdict for verdict in verdicts if not verdict.problems]
    right = sum(all(getattr(verdict, q) == word for q, word in labels.items()) for verdict in parsable)
    joined = ", ".join(f"{question} {word}" for question, word in labels.items())
    return Outcome(example, mode, joined, tuple(texts), right, len(verdicts) - len(parsable))


def hard_of(outcomes: Sequence[Outcome], config: MineConfig) -> list[Outcome]:
    """The examples whose number of right answers makes them hard."""
    return [outcome for outcome in outcomes if outcome.right in config.hard]


def choose(hard: Sequence[Outcome], config: MineConfig, seed: int) -> list[Outcome]:
    """As many of the hard examples as `balance` and `most` allow, in the order of a hash of (seed, id).

    Balanced, each class gives as many as the smallest has. The classes take turns, so that `most` cuts them evenly.
    """
    by_id = {outcome.example.id: outcome for outcome in hard}
    ranked = [by_id[example.id] for example in subset([outcome.example for outcome in hard], len(hard), seed)]
    if config.balance == "none":
        return ranked[: config.most]
    groups: dict[str, list[Outcome]] = {}
    for outcome, name in zip(ranked, classes(ranked, config), strict=True):
        groups.setdefault(name, []).append(outcome)
    smallest = min(map(len, groups.values()), default=0)
    turns = [groups[name][i] for i in range(smallest) for name in sorted(groups)]
    return turns[: config.most]


def classes(outcomes: Sequence[Outcome], config: MineConfig) -> list[str]:
    """The class of each: its labels, or its category; an example of several categories counts for the rarest of them."""
    if config.balance != "category":
        return [outcome.labels for outcome in outcomes]
    counts = Counter(category for outcome in outcomes for category in categories(outcome.example))
    return [min(categories(outcome.example), key=lambda name: (counts[name], name)) for outcome in outcomes]


def categories(example: Example) -> tuple[str, ...]:
    """Its categories, each once; having none is a category."""
    return tuple(dict.fromkeys(example.categories)) or (NO_CATEGORY,)
