"""What the teacher has to do: reason towards a verdict, or make a trace shorter."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from jaxguard.data.examples import Example
from jaxguard.data.format.answer import split_verdict
from jaxguard.data.format.dialogue import Answers, answers, questions
from jaxguard.data.policies import Policy, Question, policy_for
from jaxguard.distill.teacher import Reply


@dataclass(frozen=True)
class Task:
    """One example to get a trace for.

    Attributes:
        example: brings its trace where that is to be shortened.
        policy: of the example.
        labels: the verdict that the trace has to lead to.
        budget: most sentences that its trace is shortened to; None requests a trace of its own.
    """

    example: Example
    policy: Policy
    labels: Answers
    budget: int | None = None

    @property
    def questions(self) -> list[Question]:
        return [question for question, _ in self.labels]

    def split(self, reply: Reply) -> tuple[str, str]:
        """(trace, answer) of a reply.

        The reasoning is the trace. A teacher that does not separate its reasoning writes it before the verdict; so does one
        that shortens a trace, whose own reasoning is about the shortening.
        """
        if self.budget is None and reply.reasoning:
            return reply.reasoning, reply.answer
        return split_verdict(reply.answer)


def tasks_for(examples: Iterable[Example], policy: Policy) -> Iterator[Task]:
    """A task for each example that has a label for a question of its policy; the others are left out."""
    for example in examples:
        own = policy_for(example, policy)
        labelled = questions(example, own)
        if labelled:
            yield Task(example, own, answers(example, labelled))


def shortening(tasks: Iterable[Task], traces: dict[str, str], budget: int) -> Iterator[Task]:
    """A task for each example that has a trace: to shorten it to so many sentences."""
    for task in tasks:
        if task.example.id in traces:
            yield replace(task, example=replace(task.example, trace=traces[task.example.id]), budget=budget)
