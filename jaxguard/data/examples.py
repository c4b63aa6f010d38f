"""The record type of all data: a labelled exchange."""

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.parse import shown

HarmLabel = Literal["harmful", "unharmful"]
RefusalLabel = Literal["refusal", "compliance"]
AnswerMode = Literal["reasoning", "direct"]
LABELS = ("prompt_label", "response_label", "refusal_label")


@dataclass(frozen=True, slots=True)
class Example:
    """A labelled exchange between a user and an assistant.

    Attributes:
        id: unique within its source.
        source: name of the source in reports.
        prompt, response: untrusted texts of the user and the assistant; the response is None if there is only a prompt.
        prompt_label, response_label: whether the prompt, the response is harmful; None if not labelled or absent.
        refusal_label: whether the response is a refusal; None likewise.
        categories: violated categories, as the source names them.
        policy: name of the policy to apply, or its rules as text; None for the run's policy.
        trace: a teacher's reasoning towards the labels, without verdict lines.
        adversarial: whether the prompt was written to mislead a model; None if unknown.
        rejected: an answer that is worse than the one that trace and labels make, for preference optimisation.
        sampled: token ids of that answer and of `rejected`, each with the end of turn, as a guard sampled them, or none.
        weight: of the example, or of its preference, in the loss; None is 1.
        mode: in a dual-mode set, whether the answer includes the trace; None leaves it to the run's seed.
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
    adversarial: bool | None = None
    rejected: str | None = None
    sampled: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    weight: float | None = None

    def __post_init__(self) -> None:
        for name, allowed in _ALLOWED.items():
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise JaxguardError(
                    f"example {self.id!r}: {name} is {shown(value)}; expected one of {', '.join(allowed)} or null"
                )
        if self.response is None and (self.response_label or self.refusal_label):
            raise JaxguardError(f"example {self.id!r}: a response is labelled, but there is no response")

    def to_json(self) -> dict[str, Any]:
        """Return the example as an object of our JSON-lines format."""
        row = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("adversarial", "rejected", "sampled", "weight"):
            if row[name] is None:
                del row[name]  # hashes of data that do not have it stay what they were
        return row


_ALLOWED: dict[str, tuple[str, ...]] = {
    "prompt_label": get_args(HarmLabel),
    "response_label": get_args(HarmLabel),
    "refusal_label": get_args(RefusalLabel),
    "mode": get_args(AnswerMode),
}
