"""From a guard's answers to the examples that are worth a second round."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from jaxguard.config.mine import MineConfig
from jaxguard.data.examples import Example
from jaxguard.data.format.answer import parse
from jaxguard.data.format.dialogue import ABSENT, Mode, answers, questions
from jaxguard.data.policies import Policy, Question, policy_for
from jaxguard.data.prepare import subset

NO_CATEGORY = "(none)"


@dataclass(frozen=True)
class Tried:
    """A training example and how the guard fared on it.

    Attributes:
        example, mode: as trained.
        labels: what people say of it, question by question: "prompt_harm harmful, response_harm unharmful".
        texts: what the guard answered.
        right: how many answers agree with every label.
        unreadable: how many of the others could not be read.
    """

    example: Example
    mode: Mode
    labels: str
    texts: tuple[str, ...]
    right: int
    unreadable: int


def labels_of(example: Example, policy: Policy) -> dict[Question, str]:
    """What people say of an example, of all that its policy asks; a response that is not there is no label."""
    known = answers(example, questions(example, policy_for(example, policy)))
    return {question: word for question, word in known if word != ABSENT}


def tried(example: Example, mode: Mode, policy: Policy, texts: Sequence[str]) -> Tried:
    """Hold a guard's answers against the labels.

    One answer has a verdict line for each label. It is right if all of them are; one that cannot be read never is.
    """
    labels = labels_of(example, policy)
    verdicts = [parse(text, labels, mode, example.response is not None) for text in texts]
    readable = [verdict for verdict in verdicts if not verdict.problems]
    right = sum(all(getattr(verdict, q) == word for q, word in labels.items()) for verdict in readable)
    said = ", ".join(f"{question} {word}" for question, word in labels.items())
    return Tried(example, mode, said, tuple(texts), right, len(verdicts) - len(readable))


def difficult(found: Sequence[Tried], config: MineConfig) -> list[Tried]:
    """The examples whose number of right answers makes them difficult."""
    return [one for one in found if one.right in config.difficult]


def choose(candidates: Sequence[Tried], config: MineConfig, seed: int) -> list[Tried]:
    """As many of the difficult ones as `balance` and `most` allow, in the order of a hash of (seed, id).

    Balanced, each class gives as many as the smallest has. The classes take turns, so that `most` cuts them evenly.
    """
    drawn = subset([one.example for one in candidates], len(candidates), seed)
    by_id = {one.example.id: one for one in candidates}
    ranked = [by_id[example.id] for example in drawn]
    if config.balance == "none":
        return ranked[: config.most]
    groups: dict[str, list[Tried]] = {}
    for one, name in zip(ranked, classes(ranked, config), strict=True):
        groups.setdefault(name, []).append(one)
    smallest = min(map(len, groups.values()), default=0)
    turns = [groups[name][i] for i in range(smallest) for name in sorted(groups)]
    return turns[: config.most]


def classes(some: Sequence[Tried], config: MineConfig) -> list[str]:
    """The class of each: its labels, or its category; an example of several categories counts for the rarest of them."""
    if config.balance != "category":
        return [one.labels for one in some]
    counts = Counter(category for one in some for category in categories(one.example))
    return [min(categories(one.example), key=lambda name: (counts[name], name)) for one in some]


def categories(example: Example) -> tuple[str, ...]:
    """Its categories, each once; none is one by itself."""
    return tuple(dict.fromkeys(example.categories)) or (NO_CATEGORY,)
