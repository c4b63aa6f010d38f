"""A guard's chat template beside what training renders, for tests."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from jaxguard.data.encoding import Encoder
from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import Mode, transcript
from jaxguard.data.policies import Question

Messages = Sequence[dict[str, Any]]


def conversation(*roles: str, text: str = "How do I bake bread?") -> list[dict[str, Any]]:
    return [{"role": role, "content": text} for role in roles]


def rendered(tokenizer: PreTrainedTokenizerBase, messages: Messages, **options: Any) -> Any:
    return tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False, **options)


@dataclass(frozen=True)
class Rendering:
    """An encoder, and the template of a guard that it trained."""

    encoder: Encoder
    template: str

    def ids(self, messages: Messages, **options: Any) -> Any:
        options = {"add_generation_prompt": True, "return_dict": False, "chat_template": self.template, **options}
        return self.encoder.tokenizer.apply_chat_template(list(messages), **options)

    def text(self, messages: Messages, **options: Any) -> str:
        return str(rendered(self.encoder.tokenizer, messages, chat_template=self.template, **options))

    def trained(
        self, messages: Messages, mode: Mode, policy: str | None = None, asks: tuple[Question, ...] | None = None
    ) -> list[int]:
        """What the encoder renders for the same conversation."""
        *turns, last = messages
        response = None
        if last["role"] == "assistant":
            response, [*turns, last] = last["content"], turns
        prompt = transcript(turns, last["content"], "a conversation") or ""
        return self.encoder.prompt(Example("1", "test", prompt, response, policy=policy), mode, asks=asks).ids
