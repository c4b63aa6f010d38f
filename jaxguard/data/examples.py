"""The one record type: a labelled conversation."""

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from jaxguard.utils.errors import JaxguardError

HarmLabel = Literal["harmful", "unharmful"]
RefusalLabel = Literal["refusal", "compliance"]
AnswerMode = Literal["reasoning", "direct"]


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation under judgement, with what humans said of it.

    Attributes:
        id: unique within its source.
        source: where it comes from, as shown in reports.
        prompt: what the user wrote. Untrusted.
        response: what the assistant answered, or None when only the prompt is judged. Untrusted.
        prompt_label: is the prompt harmful; None when nobody said.
        response_label: is the response harmful; None when there is no response or nobody said.
        refusal_label: did the response refuse; None as above.
        categories: violated categories, in the source's own words.
        policy: the policy that this example is judged by, as a policy's name or as its rules in plain text;
            None means the run's policy.
        trace: a teacher's reasoning that leads to the labels, without its verdict lines.
        mode: in a dual-mode set, whether the answer carries the trace; None leaves it to the run's seed.
    """

    id: str
    source: str
    prompt: str
    response: str | None = None
    prompt_label: HarmLabel | None = None
    response_label: HarmLabel | None = None
    refusal_label: RefusalLabel | None = None
    categories: tuple[str, ...] = ()
    policy: str | None = None
    trace: str | None = None
    mode: AnswerMode | None = None

    def __post_init__(self) -> None:
        for name, allowed in _ALLOWED.items():
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise JaxguardError(
                    f"example {self.id!r}: {name} is {value!r}; expected one of {', '.join(allowed)} or null"
                )
        if self.response is None and (self.response_label or self.refusal_label):
            raise JaxguardError(f"example {self.id!r}: a response is labelled, but there is no response")

    def to_json(self) -> dict[str, Any]:
        """The example as one JSON object, our JSON-lines format."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


_ALLOWED: dict[str, tuple[str, ...]] = {
    "prompt_label": get_args(HarmLabel),
    "response_label": get_args(HarmLabel),
    "refusal_label": get_args(RefusalLabel),
    "mode": get_args(AnswerMode),
}
