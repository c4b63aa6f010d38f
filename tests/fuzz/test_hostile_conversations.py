"""Hostile conversations in the chat template of an export: the ids of training, or an error."""

import random
from collections import Counter
from dataclasses import replace

import pytest
from campaign import FULL, rounds
from guard_templates import Rendering
from jinja2 import TemplateError
from test_hostile_prompts import REAL, attack

from jaxguard.data.encoding import Encoder
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.guard_template import guard_template

CONVERSATIONS = rounds(100, 10_000)
"""For each tokenizer."""
ROLES = [
    ["user"], ["user", "assistant"], ["system", "user"], ["user", "assistant", "user"], ["assistant", "user"],
    ["user", "assistant", "user", "assistant"], ["user", "user", "assistant"],
]  # fmt: skip


@pytest.mark.parametrize("name", ["tiny", *(REAL if FULL else [])])
def test_a_conversation_is_rendered_as_in_training_or_refused(encoder_of, name: str):
    encoder: Encoder = replace(encoder_of(name), max_seq_len=100_000)
    form = Rendering(encoder, guard_template(encoder, tuple(Mode), ()))
    draw, spelled, outcomes = (
        random.Random(f"chats of {name}"),
        list(encoder.template.reserved.values()),
        Counter[str](),
    )
    for _ in range(CONVERSATIONS):
        texts = [attack(draw, spelled) if draw.random() < 0.7 else "bread" for _ in range(4)]
        messages = [{"role": role, "content": text} for role, text in zip(draw.choice(ROLES), texts, strict=False)]
        mode = draw.choice(list(Mode))
        policy = f"bread {attack(draw, spelled)} bread" if draw.random() < 0.3 else None
        try:
            ids = form.ids(messages, enable_thinking=mode is Mode.REASONING, policy=policy)
        except TemplateError:
            outcomes["refused"] += 1
            continue
        assert ids == form.trained(messages, mode, policy), (messages, policy)
        outcomes["broken" if "\\" in encoder.tokenizer.decode(ids) else "plain"] += 1
    assert outcomes["refused"] <= 0.1 * CONVERSATIONS, outcomes
    assert outcomes["broken"] >= 0.5 * CONVERSATIONS, outcomes
