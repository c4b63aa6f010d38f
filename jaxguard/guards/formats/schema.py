"""A guard's format as written in YAML: its prompt as a Jinja template, and the words of its answer. See docs/guards.md."""

from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from jaxguard.config.base import Schema
from jaxguard.data.policies import Question

GUARD_FOLDER: Final = Path("configs/guards")


def _no_boolean(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("put the word in quotes: YAML reads yes and no as true and false")
    return value


Line = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, pattern=r"^[^\n]+$")]
Word = Annotated[Line, BeforeValidator(_no_boolean)]


class VerdictDefinition(Schema):
    """The answer to one question."""

    question: Question
    """What it answers."""
    label: Annotated[str, StringConstraints(strip_whitespace=True, pattern=r"^[^\n:]*$")] = ""
    """What its line begins with, before a colon; without one the line is the word alone."""
    positive: tuple[Word, ...] = Field(min_length=1)
    """Words for harmful, or for a refusal. Case matters for the probability, not for parsing."""
    negative: tuple[Word, ...] = Field(min_length=1)
    """Words for unharmful, or for compliance; the probability holds the positive ones against the first."""
    absent: tuple[Word, ...] = ()
    """What the line says where no response is shown; without, there is no such line then."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        words = [word.lower() for word in (*self.positive, *self.negative, *self.absent)]
        twice = next((word for word in words if words.count(word) > 1), None)
        if twice is not None:
            raise ValueError(f"{self.question}: {twice!r} is given twice (case does not tell words apart)")
        first = self.negative[0]
        if any(word.startswith(first) or first.startswith(word) for word in self.positive):
            raise ValueError(f"{self.question}: one of {first!r} and {self.positive} begins with the other")
        if self.absent and self.question == "prompt_harm":
            raise ValueError("absent is for questions about the response")
        return self


class ReasoningTagsDefinition(Schema):
    """The tags around the reasoning."""

    open: Line
    """Before it."""
    close: Annotated[str, StringConstraints(pattern=r"\S")]
    """After it, with the white space up to the verdict. What follows its last occurrence is parsed."""


class GuardFormatDefinition(Schema):
    """A guard's format as written in YAML."""

    name: Line
    """Of the models that use it, for people."""
    description: str = ""
    """For people."""
    chat: str | None = None
    """Jinja template of the user message, which the checkpoint's chat template then renders; or"""
    text: str | None = None
    """of the whole text that the answer follows, special tokens included."""
    verdicts: tuple[VerdictDefinition, ...] = Field(min_length=1)
    """The questions it answers. Where labels differ, an answer has all these lines in this order; where they are the same or left
    out, it has only that of the question."""
    prompt_alone: bool = True
    """A question about the prompt is asked without the response."""
    modes: tuple[Literal["reasoning", "direct"], ...] = Field(("direct",), min_length=1)
    """In which it can be prompted."""
    reasoning: ReasoningTagsDefinition | None = None
    """Goes with mode reasoning."""
    ends: tuple[Line, ...] = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "</s>")
    """Tokens that end an answer, besides the tokenizer's own; those that it does not have do not count."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.chat is None) == (self.text is None):
            raise ValueError("give either chat or text")
        if ("reasoning" in self.modes) != (self.reasoning is not None):
            raise ValueError("mode reasoning and the tags in reasoning go together: give both or none")
        questions = [one.question for one in self.verdicts]
        twice = next((question for question in questions if questions.count(question) > 1), None)
        if twice is not None:
            raise ValueError(f"verdicts: question {twice!r} is given twice")
        labels = {one.label.lower() for one in self.verdicts}
        if len(labels) not in (1, len(questions)) or (self.together and "" in labels):
            raise ValueError("verdicts: give every question a label of its own, or all the same, or none")
        return self

    @property
    def together(self) -> bool:
        """Whether all questions are answered at once."""
        return len({one.label.lower() for one in self.verdicts}) > 1
