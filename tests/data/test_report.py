"""The report of `python -m jaxguard.data`."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console

from jaxguard.config import load
from jaxguard.data.__main__ import main
from jaxguard.data.encoding import Encoder
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.packing import Schedule
from jaxguard.data.prepare import encode_selection, select
from jaxguard.data.report import packing, render_mask, report
from jaxguard.report.text import visible
from jaxguard.utils.errors import JaxguardError

SECRET = "unspeakable"


@pytest.fixture
def tree(tmp_path, tiny_tokenizer_folder):
    """A config's tree over 24 examples, one of them skipped."""
    rows = [
        {
            "id": str(i),
            "source": "made[bold]up",
            "prompt": f"{SECRET} \x1b[31m question {i} " + "and more " * (i % 5),
            "response": f"{SECRET} answer" if i % 2 else None,
            "prompt_label": "harmful" if i % 4 == 0 else "unharmful",
            "response_label": "unharmful" if i % 2 else None,
            "trace": f"{SECRET} trace",
        }
        for i in range(23)
    ]
    rows.append({"id": "bare", "prompt": "no label"})
    (tmp_path / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    (tmp_path / "short.yaml").write_text("name: short\nrules: Be kind.\n", encoding="utf-8")
    return {
        "name": "t",
        "model": {"checkpoint": str(tiny_tokenizer_folder)},
        "data": {
            "train": [{"kind": "jsonl", "path": str(tmp_path / "train.jsonl")}],
            "policy": str(tmp_path / "short.yaml"),
            "validation_size": 3,
            "max_seq_len": 512,
        },
        "train": {"batch_size": 4, "epochs": 2},
    }


@pytest.fixture
def made(tree, tiny_tokenizer_folder):
    """(config, selection, prepared, encoder)."""
    config = load(tree)
    encoder, selection = Encoder.load(tiny_tokenizer_folder, config.data), select(config)
    return config, selection, encode_selection(config, selection, encoder), encoder


def shown(made, **options):
    console = Console(file=io.StringIO(), width=200, force_terminal=options.pop("colour", False))
    console.print(report(*made, **options))
    return console.file.getvalue()


def test_the_report_holds_what_it_promises(made):
    text = shown(made)
    for words in (
        "train.jsonl",
        "1 no label",
        "in reasoning mode",
        "20",
        "made[bold]up",
        "harmful (",
        "longest",
        "padding",
    ):
        assert words in text, words
    harmful = made[2].manifest["train"]["labels"]["prompt_label"]["harmful"]
    assert f"{harmful} harmful" in text


def test_questions_that_are_not_labelled_together_are_said_before_training(tree, made, tiny_tokenizer_folder):
    assert "Questions trained together" in shown(made)
    assert "will be judged by" not in shown(made)
    path = tree["data"]["train"][0]["path"]
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row["prompt_label"] = row.get("prompt_label") if row.get("response") is None else None
    Path(path).write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    config = load(tree)
    encoder, selection = Encoder.load(tiny_tokenizer_folder, config.data), select(config)
    text = " ".join(shown((config, selection, encode_selection(config, selection, encoder), encoder)).split())
    assert "will be judged by 2 prompts (prompt_harm without the response; response_harm)" in text


def test_untrusted_text_is_hidden_unless_asked_for(made):
    hidden, open_ = shown(made), shown(made, show_text=True)
    assert SECRET not in hidden
    assert "(prompt: " in hidden
    assert "(trace: " in hidden
    assert open_.count(SECRET) >= 2
    assert "(prompt: " not in open_


def test_text_cannot_steer_the_terminal(made):
    assert "\x1b" not in shown(made, show_text=True)
    assert visible("a\x1b[31m\u202eb\n\tc\x00") == "a\ufffd[31m\ufffdb\n\tc\ufffd"


def test_the_trained_tokens_are_highlighted(made):
    _, _, prepared, encoder = made
    sequence = prepared.train[0]
    text = render_mask(sequence, encoder.tokenizer)
    (trained,) = [text.plain[span.start : span.end] for span in text.spans]
    assert trained.startswith("⟦<think>")
    assert trained.endswith("<|eot_id|>⟧")
    completion = encoder.tokenizer.decode(sequence.tokens[sequence.loss_mask].tolist())
    assert trained == f"⟦{visible(completion)}⟧"
    assert "\x1b[30;42m" in shown(made, colour=True)


def test_packing_agrees_with_counting_every_batch(made):
    config, _, prepared, _ = made
    packed = packing(config, prepared.train)
    assert packed["steps"] == 20 * 2 // 4
    # Each epoch sees each example once, and two whole epochs are ten batches: no sampling is involved.
    whole = 2 * sum(len(s.tokens) for s in prepared.train)
    batches = list(Schedule(prepared.train, 4, 10, 512, 1, config.seed).read(0, prefetch=1))
    held, size = sum(len(b.valid_positions) for b in batches), sum(b.tokens_BT.size for b in batches)
    assert packed["rows"] == np.mean([len(b.tokens_BT) for b in batches])
    assert packed["tokens"] == np.mean([b.tokens_BT.shape[1] for b in batches])
    assert packed["padding"] == pytest.approx(1 - held / size)
    assert packed["shared"] == pytest.approx(1 - held / whole)
    assert packed["computed"] == pytest.approx(held / (10 * 4))
    assert packed["shared"] > 0.2


def test_too_few_examples_for_one_batch(made):
    config, _, prepared, _ = made
    short = config.model_copy(update={"train": config.train.model_copy(update={"epochs": 0.1})})
    with pytest.raises(JaxguardError, match=r"epochs=0\.1"):
        packing(short, prepared.train)


def test_one_length_for_all_examples_still_has_a_histogram(tree, made):
    config, selection, prepared, encoder = made
    same = [s for s in prepared.train if len(s.tokens) == len(prepared.train[0].tokens)]
    prepared = prepared._replace(train=same * 4)
    assert np.ptp([len(s.tokens) for s in prepared.train]) == 0
    assert "█" in shown((config, selection, prepared, encoder))


@pytest.mark.parametrize("mode", ["direct", "dual"])
def test_other_modes(tree, tiny_tokenizer_folder, mode):
    tree["data"]["mode"] = mode
    config = load(tree)
    encoder, selection = Encoder.load(tiny_tokenizer_folder, config.data), select(config)
    text = shown((config, selection, encode_selection(config, selection, encoder), encoder))
    assert "in direct mode" in text
    assert ("in reasoning mode" in text) == (mode == "dual")
    assert re.search(rf"{Mode.REASONING if mode == 'dual' else Mode.DIRECT} mode, \d+ tokens", text)


def test_the_command(tree, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    assert main(["--config", str(path)]) == 0
    assert "Label balance" in capsys.readouterr().out
    assert main(["--config", str(path), "data.train.0.path=absent.jsonl"]) == 2
    assert "absent.jsonl" in capsys.readouterr().err


def test_help_says_what_it_is_for(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert "--show-text" in text
    assert "jaxguard data --config gemma4b_5k" in text
