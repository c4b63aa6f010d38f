"""A guard that judges bread, and a run that was trained on it. `python bakery.py CONFIG` mines slowly, to be killed."""

import asyncio
import json
import re
import sys
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache

import yaml

from jaxguard.data.format.dialogue import CHOICES, Mode, answers, questions
from jaxguard.data.policies import load_policy
from jaxguard.guards.protocol import Completion, Prediction

GENERATIONS = 4
POLICY = "aegis2"


@cache
def _policy():
    return load_policy(POLICY)


def number(example):
    return int(re.search(r"\d+", example.id)[0])


def row(i, **more):
    """Loaf i: every third is harmful, every fourth has a response."""
    answered = {"response": f"Bake it {i} minutes.", "response_label": "unharmful"} if i % 4 == 0 else {}
    return {
        "id": f"x{i}", "source": "baker", "prompt": f"How do I bake loaf number {i}?", "trace": f"Loaf {i} is a loaf.",
        "prompt_label": "harmful" if i % 3 == 0 else "unharmful", "categories": ["rye", "salt"][: i % 3], **answered, **more,
    }  # fmt: skip


def text(example, mode, right=True):
    """An answer whose lines all agree with the labels, or all but the last."""
    known = answers(example, questions(example, _policy()))
    labelled = [(question, word) for question, word in known if word != "None"]
    lines = dict(labelled)
    if not right:
        question, word = labelled[-1]
        lines[question] = next(other for other in CHOICES[question] if other != word)
    verdict = "\n".join(f"{question.replace('_', ' ').capitalize()}: {word}" for question, word in lines.items())
    return f"<think>\nBread.\n</think>\n\n{verdict}" if mode is Mode.REASONING else verdict


def sampled(text):
    return Completion(tuple(map(ord, text)), stopped=True, stop_id=0, logprobs=(-0.5,) * (len(text) + 1))


@dataclass
class Baker:
    """Is right in as many answers as the example's number says, modulo 5; notes what it is asked.

    Attributes:
        fails_after: so many answers, then it is interrupted.
        seconds: that an answer takes.
        says_tokens: its completions are known; a character is a token.
    """

    asked: list = field(default_factory=list)
    settings: object = None
    opened: int = 0
    fails_after: int | None = None
    seconds: float = 0.0
    says_tokens: bool = True

    def right(self, example):
        return number(example) % (GENERATIONS + 1)

    @asynccontextmanager
    async def open(self, guard, config, settings, probabilities, logprobs):
        self.opened += 1
        self.settings = settings
        yield self.judge

    async def judge(self, asks):
        for ask in asks:
            if len(self.asked) == self.fails_after:
                raise KeyboardInterrupt
            await asyncio.sleep(self.seconds)
            self.asked.append(ask)
            right = self.right(ask.example)
            texts = tuple(text(ask.example, ask.mode, g < right) for g in range(self.settings.generations))
            yield Prediction(
                ask.example.id,
                {q: tuple(1 for _ in texts) for q in ask.questions},
                dict.fromkeys(ask.questions),
                texts,
                completions=tuple(sampled(text) if self.says_tokens else None for text in texts),
            )


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_config(path, **sections):
    """A run's config over data.jsonl beside it."""
    data = {
        "train": [{"kind": "jsonl", "path": "data.jsonl"}],
        "policy": POLICY,
        "mode": "direct",
        "validation_size": 5,
    }
    tree = {"model": {"checkpoint": "unused"}, "train": {"batch_size": 2}, **sections}
    tree["data"] = {**data, **sections.get("data", {})}
    path.write_text(yaml.safe_dump(tree))
    return path


if __name__ == "__main__":
    import jaxguard.mine.run
    from jaxguard.mine.__main__ import main

    jaxguard.mine.run.open_guard = Baker(seconds=0.05).open
    sys.exit(main(["--config", sys.argv[1]]))
