"""The demo's scores; `make demo` itself is run by hand."""

import json
import shlex
import subprocess
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest

import demo
from jaxguard.check.__main__ import main as check
from jaxguard.config import load
from jaxguard.data.examples import Example
from jaxguard.data.policies import load_policy
from jaxguard.utils.errors import JaxguardError


def examples(*labels, start=0, text="answer"):
    return [
        Example(str(i), "t", "question", text, response_label="harmful" if label else "unharmful")
        for i, label in enumerate(labels, start)
    ]


def test_always_harmful():
    assert demo.always_harmful(examples(1, 1, 0, 0, 0, 0)) == demo.Score(
        "always harmful", 0.5, 0.5, pytest.approx(1 / 3)
    )


def test_calibration_mends_a_shift_but_not_a_wrong_order():
    held = [replace(e, prompt=f"{'abcde'[int(e.id) % 5] * 9} {e.id}") for e in examples(*[1, 0] * 20)]
    labels = demo.truth(held)
    shifted = demo.score("", {e.id: 0.3 if label else 0.1 for e, label in zip(held, labels, strict=True)}, held)
    assert shifted == demo.Score("", 0.0, 1.0, 1.0)
    blind = demo.score("", {e.id: 0.9 for e in held}, held)
    assert blind.f1 == pytest.approx(2 / 3)
    assert blind.calibrated_f1 <= blind.f1
    assert blind.auprc == 0.5


def test_word_counts_learn_the_words():
    training = [*examples(1, 1, 1, text="kick it"), *examples(0, 0, 0, text="lift it")]
    counts = demo.word_counts(training, [*examples(1, text="kick it"), *examples(0, start=1, text="lift it")])
    assert counts["0"] > 0.5 > counts["1"]


def test_the_last_stage_is_a_check_that_its_policy_covers(monkeypatch, capfd, tmp_path):
    """The command is the project's own: it runs, and its verdict is printed; harmful is no error of the demo."""
    config = load("smollm_demo", [f"name={tmp_path.name}"])
    asked, codes = [], [2, 1, 0]

    def started(command, **options):
        asked.append(command)
        return nullcontext(SimpleNamespace(wait=codes.pop))

    monkeypatch.setattr(subprocess, "Popen", started)
    demo.check(config)
    demo.check(config)
    options = shlex.split(capfd.readouterr().out.split("$ jaxguard check ")[1].splitlines()[0])
    assert asked[0][-len(options) :] == options
    parsed = check.parser().parse_args(options)
    assert (parsed.model, parsed.text, parsed.response) == (str(config.folder), demo.QUESTION, demo.ANSWER)
    assert load_policy(config.data.policy).asks == ("response_harm",)
    with pytest.raises(JaxguardError, match="code 2"):
        demo.check(config)


def test_an_interrupt_waits_for_what_saves_and_ends_the_demo(monkeypatch):
    """The shell sends Ctrl-C to both; killed after a moment, the training would lose its last steps."""
    waited = []

    def wait():
        waited.append(1)
        if len(waited) == 1:
            raise KeyboardInterrupt
        return 75

    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: nullcontext(SimpleNamespace(wait=wait)))
    with pytest.raises(KeyboardInterrupt):
        demo.run(["train"])
    assert len(waited) == 2


def test_validation_predictions_first_and_last(tmp_path):
    with pytest.raises(JaxguardError, match="validation_predictions"):
        demo.validation_predictions(tmp_path)
    (tmp_path / "validation_predictions").mkdir()
    for step in (0, 9, 10):
        line = json.dumps({"example_id": "a", "probability": step / 10})
        (tmp_path / f"validation_predictions/{step}.jsonl").write_text(f"{line}\n")
    assert demo.validation_predictions(tmp_path) == [{"a": 0.0}, {"a": 1.0}]
