"""What a guard answers about one exchange, joined from its answers to the parts of the request."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxguard.data.examples import Example
from jaxguard.data.format.answer import Verdict, parse, reasoning_of
from jaxguard.data.format.dialogue import CHOICES, FAIL_CLOSED, Mode
from jaxguard.data.policies import Policy, Question
from jaxguard.data.questions import QuestionSet, unasked
from jaxguard.guards.operating_points import WORDS, OperatingPoints
from jaxguard.guards.protocol import Prediction, Request, applicable


@dataclass(frozen=True)
class CheckResult:
    """What a guard answers about one prompt or exchange.

    Attributes:
        id: the example's, else its number.
        questions: those of the policy that apply and that the guard was trained on.
        verdict: an answer to each; None where a question does not apply or was not asked, harmful where the answer is unparsable.
        probabilities: of harmful (or of a refusal), for each question, calibrated where the guard's operating points apply; None
            where the guard gives none.
        operating_point: the one that was chosen; "words" where no threshold decided.
        thresholds: of each question, that a probability must exceed for the verdict harmful (or refusal); None where the words of
            the guard's answer decided.
        reasoning: what precedes the verdict, None in direct mode. Untrusted.
        problems: why the verdict cannot be relied on: an unparsable line, what no question judged, or a text too long to be read
            whole.
        text: the whole answer; several are joined by an empty line. Untrusted.
        seconds: that the answer took; of a batch, its share.
        prompt_tokens, completion_tokens: of all prompts that it took, and of all answers.
        decided_by: the mode of the answer that this is.
        direct_probabilities: in mode "auto", those of a direct answer that was not trusted, so that reasoning decided; else empty.
            Seconds and tokens are then those of both answers.
    """

    id: str
    questions: tuple[Question, ...]
    verdict: Verdict
    probabilities: dict[Question, float | None]
    reasoning: str | None
    problems: tuple[str, ...]
    text: str
    seconds: float
    operating_point: str
    thresholds: dict[Question, float | None]
    prompt_tokens: int
    completion_tokens: int
    decided_by: Mode
    direct_probabilities: dict[Question, float | None]

    @property
    def harmful(self) -> bool:
        """Prompt or response is harmful."""
        return "harmful" in (self.verdict.prompt_harm, self.verdict.response_harm)

    @property
    def passes(self) -> bool:
        """Nothing is harmful, and everything was judged and read."""
        return not self.harmful and not self.problems


def join(
    example: Example,
    policy: Policy,
    mode: Mode,
    answers: Sequence[tuple[Request, Prediction]],
    trained: Sequence[QuestionSet],
    points: Mapping[Question, OperatingPoints | None],
    operating_point: str,
) -> CheckResult:
    """Join a guard's answers to the parts of a request.

    `trained` and `operating_point` are the guard's, `points` those of each question by this policy in this mode.
    """
    has_response = example.response is not None
    words: dict[Question, str | None] = {}
    probabilities: dict[Question, float | None] = {}
    thresholds: dict[Question, float | None] = {}
    problems, texts = list[str](), [answer.texts[0] if answer.texts else "" for _, answer in answers]
    for (part, answer), text in zip(answers, texts, strict=True):
        verdict = parse(text, part.questions, mode, part.example.response is not None)
        problems += verdict.problems
        for question in part.questions:
            words[question], p = getattr(verdict, question), answer.probabilities[question]
            own = points.get(question)
            probabilities[question] = p = p if p is None or own is None else own.calibrated(p)
            unparsable = any(problem.startswith(f"{question}:") for problem in verdict.problems)
            threshold = None if own is None or unparsable else own.threshold(operating_point)
            thresholds[question] = threshold
            if threshold is not None and p is None:
                words[question] = FAIL_CLOSED[question]
                problems.append(f"{question}: the guard gives no probability, which the threshold decides by")
            elif threshold is not None and p is not None:
                words[question] = CHOICES[question][0 if p > threshold else 1]
    problems += [
        f"{question}: not asked, since this guard was not trained on it in {mode} mode"
        for question in unasked(applicable(example, policy), has_response, mode, trained)
    ]
    if ("response_harm" if has_response else "prompt_harm") not in policy.asks:
        judged, more = ("response", "") if has_response else ("prompt", "; give the response too")
        problems.append(f"the {judged} was not judged: policy {policy.name!r} asks {', '.join(policy.asks)}{more}")
    if any(answer.cut for _, answer in answers):
        problems.append("too long for the guard: the middle of the text was not read")
    reasonings = filter(None, map(reasoning_of, texts if mode is Mode.REASONING else ()))
    return CheckResult(
        id=example.id,
        questions=tuple(words),
        verdict=Verdict(**words, problems=tuple(problems)),
        probabilities=probabilities,
        reasoning="\n\n".join(reasonings) or None,
        problems=tuple(problems),
        text="\n\n".join(texts),
        seconds=sum(answer.seconds for _, answer in answers),
        decided_by=mode,
        direct_probabilities={},
        operating_point=WORDS if set(thresholds.values()) <= {None} else operating_point,
        thresholds=thresholds,
        prompt_tokens=sum(answer.prompt_tokens for _, answer in answers),
        completion_tokens=sum(answer.completion_tokens for _, answer in answers),
    )
