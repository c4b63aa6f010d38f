"""/v1/completions as vLLM, llama.cpp's server and TGI have it, misbehaving as it is told."""

from dataclasses import dataclass
from typing import Any

from faulty_sglang import FaultySglang

NAME = "guard"


@dataclass
class FaultyOpenAI(FaultySglang):
    """Answers as `style` does: `vllm` and `text` (which names tokens by their texts), `llama.cpp`, `tgi`.

    Attributes:
        likely: id (or text) -> log-probability of the next token; -20 of others, up to as many as are asked for.
        most: of which it gives log-probabilities; a request for more is refused.
        ids: it takes them as a prompt, else only text.
        count: the number of tokens of a text.
    """

    route: str = "/v1/completions"
    style: str = "vllm"
    said: str = "unharmful"
    reason: str = "stop"
    likely: Any = None
    most: int = 20
    ids: bool = True
    count: Any = len

    async def _answer(self, fault, request, writer):
        refused = (request.get("logprobs") or 0) > self.most or not (self.ids or isinstance(request["prompt"], str))
        return await super()._answer("400" if refused and not fault else fault, request, writer)

    def fewer(self, body):
        return body | {"choices": []}

    def good(self, request):
        limit = request["max_tokens"]
        usage = {"prompt_tokens": self.count(request["prompt"]), "completion_tokens": min(limit, 3)}
        choice = {"index": 0, "text": self.said, "finish_reason": "length" if limit == 1 else self.reason}
        if (most := request.get("logprobs")) and self.style != "tgi":
            choice["logprobs"] = listed(self.style, self.likely or {}, most)
        return {"model": NAME, "choices": [choice], "usage": usage, "object": "text_completion"}


def listed(style: str, likely: dict[Any, float], count: int) -> dict[str, Any]:
    """The `count` likeliest tokens."""
    filled = likely | {(f"other{i}" if style == "text" else 10_000 + i): -20.0 for i in range(count - len(likely))}
    if style == "llama.cpp":
        top = [{"id": token, "token": "?", "bytes": [], "logprob": value} for token, value in filled.items()]
        return {"content": [{"id": 1, "token": "?", "bytes": [], "logprob": -1.0, "top_logprobs": top}]}
    named = filled if style == "text" else {f"token_id:{token}": value for token, value in filled.items()}
    return {"tokens": ["?"], "token_logprobs": [-1.0], "top_logprobs": [named], "text_offset": [0]}
