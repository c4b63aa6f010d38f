"""Classifiers and detectors: `POST /classify` of vLLM, and `POST /api/v1/text/{contents,chat,generation}` of FMS and TrustyAI.

NeMo Guardrails calls them by `hf_classifier` with the engines `vllm` and `fms`.
"""

from typing import Annotated, Any

from pydantic import Field

from jaxguard.config.base import Share
from jaxguard.serve.adapters.common import (
    HARM,
    MOST_TEXTS,
    Body,
    Messages,
    Text,
    as_text,
    certain,
    exchange,
    probability,
)
from jaxguard.serve.app import Api, Caller
from jaxguard.serve.errors import ServiceError
from jaxguard.serve.service import CheckAnswer, CheckRequest

LABELS = "unharmful", "harmful"


class ClassifyRequest(Body):
    """A text, or several."""

    input: Text | Annotated[tuple[Text, ...], Field(min_length=1, max_length=MOST_TEXTS)]


class DetectorParams(Body):
    """A threshold in place of the service's own."""

    threshold: Share | None = None


class Detect(Body):
    """What all detectors take."""

    detector_params: DetectorParams = DetectorParams()


class ContentsRequest(Detect):
    """Texts of unknown origin."""

    contents: Annotated[tuple[Text, ...], Field(min_length=1, max_length=MOST_TEXTS)]


class ChatDetectRequest(Detect):
    """A conversation."""

    messages: Messages


class GenerationRequest(Detect):
    """A prompt and its response."""

    prompt: Text
    generated_text: str


def _error(error: ServiceError) -> dict[str, Any]:
    return {"code": error.status, "message": error.message}


def add_routes(api: Api) -> None:
    """Register classifier and detectors."""

    @api.post("/classify", ClassifyRequest)
    async def classify(body: ClassifyRequest, caller: Caller) -> dict[str, Any]:
        """Classify texts (vLLM)."""
        texts = (body.input,) if isinstance(body.input, str) else body.input
        answers = await caller.check([as_text(text) for text in texts])
        rows = []
        for index, answer in enumerate(answers):
            p = probability(answer)
            label = LABELS[answer.result.harmful]
            rows.append({"index": index, "label": label, "probs": [1 - p, p], "num_classes": len(LABELS)})
        first = answers[0]
        return {
            "id": first.result.id,
            "object": "list",
            "model": first.model["name"],
            "data": rows,
            "usage": {"prompt_tokens": sum(answer.result.prompt_tokens for answer in answers)},
        }

    @api.post("/api/v1/text/contents", ContentsRequest, _error)
    async def contents(body: ContentsRequest, caller: Caller) -> list[Any]:
        """Detect harm in texts (FMS)."""
        answers = await caller.check([as_text(text) for text in body.contents])
        return [
            [{"start": 0, "end": len(text), "text": text, **row} for row in _detections(answer, body)]
            for text, answer in zip(body.contents, answers, strict=True)
        ]

    @api.post("/api/v1/text/chat", ChatDetectRequest, _error)
    async def chat(body: ChatDetectRequest, caller: Caller) -> list[Any]:
        """Detect harm in a conversation's last message (FMS)."""
        [answer] = await caller.check([exchange(body.messages)])
        return _detections(answer, body)

    @api.post("/api/v1/text/generation", GenerationRequest, _error)
    async def generation(body: GenerationRequest, caller: Caller) -> list[Any]:
        """Detect harm in a response (FMS)."""
        [answer] = await caller.check([CheckRequest(prompt=body.prompt, response=body.generated_text)])
        return _detections(answer, body)


def _detections(answer: CheckAnswer, body: Detect) -> list[dict[str, Any]]:
    """Each question by which something is harmful, at the threshold of the request if it has one."""
    rows, threshold = [], body.detector_params.threshold
    certain(answer)
    for question in filter(HARM.__contains__, answer.result.questions):
        p = probability(answer, question)
        harmful = getattr(answer.result.verdict, question) == LABELS[1] if threshold is None else p >= threshold
        if harmful:
            about = {"policy": answer.policy_name, "digest": answer.policy.digest}
            found = {"detection": LABELS[1], "detection_type": question, "score": p}
            rows.append({**found, "evidence": [], "metadata": about})
    return rows
