"""Read a checkpoint's chat template and tokenizer: the text around one user turn and one answer."""

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from jaxguard.data.format import chat_template
from jaxguard.utils import parse
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.hub import load_pretrained

TEMPLATE_KWARGS: Final[dict[str, Any]] = {"date_string": "26 Jul 2024"}
"""Passed to every chat template. Llama's writes today's date into the prompt unless one is passed; this is the default
date of Llama 3.1's. When serving, pass the same `chat_template_kwargs`, or the prompt differs from the trained one."""

# The text-only Gemma 3 1B shares its tokenizer with the multimodal sizes: this token's id is just beyond its
# vocabulary, and no text chat produces it.
_IMAGE: Final = "<image_soft_token>"

BASE_TEMPLATE: Final = "chat_template.base.jinja"
"""In an export, the base's chat template, by which it was trained; chat_template.jinja is the guard's."""
_PATIENCE: Final = 60
"""Seconds that a process may wait for a busy machine."""
_PROMPT, _ANSWER = "jaxguardprompt", "jaxguardanswer"


@dataclass(frozen=True)
class Template:
    """A chat template as text: before + user turn + after + answer + end.

    Attributes:
        reasoning_start: the end of `after` if it opens a think block, as in DeepSeek's distilled models; else "".
        end, end_id: up to and including the end-of-turn token, and its id.
        reserved: id -> token that untrusted text must not contain: every added token that is not white space.
    """

    before: str
    after: str
    reasoning_start: str
    end: str
    end_id: int
    reserved: dict[int, str]

    def reserved_in(self, ids: Iterable[int]) -> tuple[int, ...]:
        """Return the reserved ids among `ids`, in order."""
        return tuple(i for i in ids if i in self.reserved)


def load_tokenizer(folder: Path, *, chat: bool = True) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint, a fast one of the model's size; with `chat` it must have a chat template."""
    known = ("tokenizer.json", "tokenizer.model")
    if not any((folder / name).is_file() for name in known):
        raise JaxguardError(f"{folder} has no tokenizer ({' or '.join(known)}): copy it from the model's repository")
    tokenizer: PreTrainedTokenizerBase = load_pretrained(AutoTokenizer, folder, "tokenizer")
    if not tokenizer.is_fast:
        raise JaxguardError(f"{folder}: only fast tokenizers are supported; add the model's tokenizer.json")
    if (folder / BASE_TEMPLATE).is_file():
        tokenizer.chat_template = parse.read_text(folder / BASE_TEMPLATE)
    if chat and not tokenizer.chat_template:
        raise JaxguardError(
            f"{folder}: its tokenizer has no chat template (chat_template.jinja, or in tokenizer_config.json): use an "
            "instruction-tuned checkpoint, or copy the template of one"
        )
    check_vocabulary(tokenizer, folder)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Refuse a tokenizer with ids for which the checkpoint in `folder` has no embedding; nothing to check without its config."""
    try:
        size = load_pretrained(AutoConfig, folder, "config.json").get_text_config().vocab_size
    except (JaxguardError, AttributeError):  # a server's tokenizer, or a model that jaxguard does not compute
        return
    beyond = {
        token: i
        for token, i in tokenizer.get_vocab().items()
        if isinstance(size, int) and i >= size and token != _IMAGE
    }
    if beyond:
        token = min(beyond, key=beyond.__getitem__)
        raise JaxguardError(
            f"{folder}: {len(beyond)} of the tokenizer's tokens have ids beyond the model's vocabulary of {size} (config.json), "
            f"first {token!r} = {beyond[token]}: resize the model's embeddings, or use the tokenizer that belongs to it"
        )


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
    """Render a tokenizer's chat template, as `apply_chat_template` does, within limits on time, memory and size.

    Messages are ours: texts of others take the place of placeholders afterwards, so that nothing in them can set a template off.
    The same messages are rendered once.

    Raises:
        JaxguardError: the template fails, or exceeds a limit.
    """
    variables = {"chat_template": None, "tools": None, "documents": None, **tokenizer.special_tokens_map, **variables}
    template = variables.pop("chat_template") or tokenizer.get_chat_template()
    return _rendered(json.dumps({"template": template, "variables": {**variables, "messages": messages}}, default=str))


@lru_cache(maxsize=256)
def _rendered(request: str) -> str:
    try:
        command = [sys.executable, "-P", chat_template.__file__]
        process = subprocess.run(  # noqa: S603 (a program of ours)
            command, input=request.encode(), capture_output=True, timeout=_PATIENCE, check=True
        )
    except subprocess.SubprocessError:
        raise JaxguardError(
            f"it takes more than {chat_template.SECONDS} s or {chat_template.MEMORY >> 20} MiB to render"
        ) from None
    reply = json.loads(process.stdout)
    if "text" not in reply:
        raise JaxguardError(reply["error"])
    return str(reply["text"])


def render(tokenizer: PreTrainedTokenizerBase, turn: str, answer: str | None = None) -> str:
    """Render a user turn up to the start of generation, or with an answer and its end of turn."""
    messages = [{"role": "user", "content": turn}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return render_chat(tokenizer, messages, add_generation_prompt=answer is None, **TEMPLATE_KWARGS)


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenize text that already contains its special tokens."""
    ids: list[int] = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def reserved_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Id -> token that untrusted text must not contain: every added token that is not white space."""
    added = tokenizer.added_tokens_decoder.items()
    return {i: token.content for i, token in added if token.special or any(c.isalnum() for c in token.content)}


def spelled_markers(text: str, reserved: Mapping[int, str]) -> list[str]:
    """What looks like a control token, such as `<|im_start|>`, in the text around a conversation, and is none."""
    markers = dict.fromkeys(re.findall(r"<[^<>\s]+>", text))
    return [marker for marker in markers if marker not in {*reserved.values(), "<think>", "</think>"}]


def read_template(tokenizer: PreTrainedTokenizerBase, folder: Path) -> Template:
    """Derive a Template by rendering the chat template.

    It is an error if it changes or repeats the text, writes reasoning, or ends the answer where generation does not stop.
    """
    try:
        prompt, full = render(tokenizer, _PROMPT), render(tokenizer, _PROMPT, _ANSWER)
    except (JaxguardError, ValueError) as error:  # several templates, and none is the default
        raise JaxguardError(f"{folder}: its chat template does not render one user turn: {error}") from None
    reasoning_start = "".join(re.findall(r"<think>\s*\Z", prompt))
    # Templates strip reasoning from earlier answers, so the opening tag appears for generation only. Qwen 3's puts an empty
    # block before an answer without reasoning, where generation starts without one: answers are trained as they are generated.
    head, _, tail = full.partition(_ANSWER)
    if not reasoning_start:
        head = re.sub(r"<think>\s*</think>\s*\Z", "", head)
    if prompt.count(_PROMPT) != 1 or head not in (prompt, prompt.removesuffix(reasoning_start)):
        raise JaxguardError(
            f"{folder}: its chat template does not put the answer where generation starts; it renders {full!r}"
        )
    before, after = prompt.split(_PROMPT)
    reserved = reserved_tokens(tokenizer)
    spelled = spelled_markers(before + after + tail, reserved)
    if spelled:
        raise JaxguardError(
            f"{folder}: its tokenizer spells {', '.join(map(repr, spelled))} of its chat template as text, as a conversation "
            "could: they must be added_tokens of tokenizer.json; copy that file from the model's repository"
        )
    if "<think" in after.removesuffix(reasoning_start).lower():
        raise JaxguardError(f"{folder}: its chat template writes reasoning itself; the guard writes its own")
    # The first special token after an answer; of several that start there, the longest.
    ends = [(tail.find(token), -len(token), i) for i, token in reserved.items() if token in tail]
    if not ends:
        raise JaxguardError(
            f"{folder}: its chat template does not end an answer with a special token, but with {tail!r}"
        )
    start, length, end_id = min(ends)
    files = ("generation_config.json", "config.json")
    configured = [tokenizer.eos_token_id, *(read_json(folder / name).get("eos_token_id") for name in files)]
    stops = {i for ids in configured for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)}
    if end_id not in stops:
        raise JaxguardError(
            f"{folder}: its chat template ends an answer with {reserved[end_id]!r} ({end_id}), where generation does "
            f"not stop; add it to eos_token_id in generation_config.json (now {sorted(stops)})"
        )
    return Template(before, after, reasoning_start, tail[: start - length], end_id, reserved)


def read_json(path: Path) -> dict[str, Any]:
    """The fields of one of a checkpoint's files; none where it is absent."""
    if not path.is_file():
        return {}
    return parse.read_json(path, parse.Fields)
