"""Preference pairs of stored answers: which answers, of which guards, and what is written of them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from bakery import Baker, number, row, write

from jaxguard.cli import PROVENANCE_CHANGED
from jaxguard.config.data import SourceConfig
from jaxguard.config.evaluate import MineConfig
from jaxguard.data.examples import Example
from jaxguard.data.files import file_digest
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.policies import Policy
from jaxguard.data.sources import load_examples
from jaxguard.mine.__main__ import main
from jaxguard.mine.pairs import preference_pairs
from jaxguard.mine.run import outcome_of

POLICY = Policy("bread", rules="Speak of bread only.", asks=("prompt_harm", "response_harm", "response_refusal"))
LOAF = Example("loaf", "baker", "How?", "Like this.", prompt_label="harmful", response_label="unharmful")
RIGHT, WRONG = (f"Prompt harm: {word}\nResponse harm: unharmful" for word in ("harmful", "unharmful"))


def thought(words: int, verdict: str) -> str:
    return f"<think>{'loaf ' * words}</think>\n\n{verdict}"


def rows(outcomes, **settings):
    return [pair.to_json() for pair in preference_pairs(outcomes, MineConfig(**settings), seed=0)]


@pytest.mark.parametrize(
    ("how", "chosen", "rejected"), [("length", 3, 4), ("longest", 9, 40), ("random", {3, 9}, {4, 40})]
)
def test_a_pair_is_a_right_and_a_wrong_answer(how, chosen, rejected):
    texts = [thought(9, RIGHT), thought(40, WRONG), thought(3, RIGHT), thought(4, WRONG), thought(50, "Loaf.")]
    outcome = outcome_of(LOAF, Mode.REASONING, POLICY, texts)
    [pair] = rows([outcome], pairs=how)
    assert [pair] == rows([outcome], pairs=how)
    counts = pair["trace"].count("loaf"), pair["rejected"].count("loaf")
    for count, wanted in zip(counts, (chosen, rejected), strict=True):
        assert count in (wanted if isinstance(wanted, set) else {wanted})
    assert pair["weight"] == 1
    assert pair["id"] == "loaf"
    assert pair["mode"] == "reasoning"


def test_what_was_mostly_wrong_weighs_more():
    def weight(right, wrong):
        outcome = outcome_of(LOAF, Mode.DIRECT, POLICY, [RIGHT] * right + [WRONG] * wrong)
        return [pair["weight"] for pair in rows([outcome])]

    assert weight(1, 3) == [pytest.approx(1.2)]
    assert weight(2, 2) == [1]
    assert weight(3, 1) == [pytest.approx(0.8)]
    assert weight(4, 0) == weight(0, 4) == []


def test_balanced_pairs_are_equally_many_of_each_label():
    examples = [replace(LOAF, id=f"x{i}", prompt_label="unharmful" if i < 5 else "harmful") for i in range(7)]
    outcomes = [outcome_of(example, Mode.DIRECT, POLICY, [RIGHT, WRONG]) for example in examples]
    assert [pair["id"] for pair in rows(outcomes)] == [example.id for example in examples]
    for most, each in ((None, 2), (2, 1)):
        counts = Counter(pair["prompt_label"] for pair in rows(outcomes, balance="class", most=most))
        assert counts == {"unharmful": each, "harmful": each}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def paired(mined):
    """paired(*overrides): mines, and makes pairs; returns the folder."""

    def pairs(*overrides):
        folder = mined()
        assert main(["pairs", "--config", "first.yaml", *overrides]) == 0
        return folder

    return pairs


def test_stored_answers_become_pairs_with_their_tokens(paired, baker, capsys):
    folder = paired()
    mixed = {f"x{i}" for i in range(60) if i % 5 in (1, 2, 3)}
    trained = {each["id"] for each in lines(folder / "train.jsonl")}
    pairs = lines(folder / "pairs.jsonl")
    assert {pair["id"] for pair in pairs} == mixed & trained
    assert all("".join(map(chr, pair["sampled"][1][:-1])) == pair["rejected"] for pair in pairs)
    assert all(ids[-1] == 0 for pair in pairs for ids in pair["sampled"])
    assert {pair["weight"] for pair in pairs if int(pair["id"][1:]) % 5 == 1} == {1.2}
    examples = load_examples(SourceConfig(kind="jsonl", path=str(folder / "pairs.jsonl")))
    assert all(example.sampled and example.rejected for example in examples)
    manifest = json.loads((folder / "pairs.json").read_text())
    assert manifest["sha256"] == file_digest(folder / "pairs.jsonl")
    assert set(map(Path, manifest["inputs"])) == {
        Path("runs/first/mine", n) for n in ("examples.jsonl", "answers/direct.jsonl")
    }
    assert all(file_digest(Path(path)) == digest for path, digest in manifest["inputs"].items())
    assert (manifest["examples"], manifest["pairs"]) == (55, len(pairs))
    only = [sum(int(name[1:]) % 5 == rest for name in trained) for rest in (4, 0)]
    assert manifest["without"] == {"only right answers": only[0], "only wrong answers": only[1], "none parsable": 0}
    page = (folder / "pairs.md").read_text()
    assert f"| 55 | {len(pairs)} | {only[0]} | {only[1]} | 0 |" in page
    assert "loaf" not in page
    assert f"{len(pairs)} preference pairs" in capsys.readouterr().out
    before = len(baker.asked)
    assert main(["pairs", "--config", "first.yaml", "mine.pairs=longest", "mine.pair_weights=0"]) == 0
    assert len(baker.asked) == before
    assert {pair["weight"] for pair in lines(folder / "pairs.jsonl")} == {1}


def test_answers_without_tokens_become_pairs_of_texts(paired, baker):
    baker.says_tokens = False
    pairs = lines(paired() / "pairs.jsonl")
    assert pairs
    assert not any("sampled" in pair for pair in pairs)


class Opposite(Baker):
    """Is right where the other one is wrong."""

    def right(self, example):
        return 4 - number(example) % 5


def other_run(run, monkeypatch, *overrides):
    """Mine with another guard in a run of its own."""
    shutil.copytree(run / "runs/first/export", run / "runs/other/export")
    (run / "runs/other/export/model.safetensors").write_bytes(b"others")
    monkeypatch.setattr("jaxguard.mine.run.open_guard", Opposite().open)
    assert main(["--config", "first.yaml", "name=other", *overrides]) == 0
    return "mine.ensemble=[runs/first/mine,runs/other/mine]"


def test_answers_of_several_guards_are_pooled(run, mined, paired, monkeypatch):
    mined()
    ensemble = other_run(run, monkeypatch)
    folder = paired(ensemble)
    pairs = lines(folder / "pairs.jsonl")
    assert len(pairs) == 55  # also where one guard is always wrong, and the other always right
    assert {pair["weight"] for pair in pairs} == {1}  # 4 of 8 are right
    manifest = json.loads((folder / "pairs.json").read_text())
    assert len(manifest["inputs"]) == 4
    assert len({settings["guard"]["weights"] for settings in manifest["answered"].values()}) == 2


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        ([row(i) for i in range(59)], "was mined in runs/first/mine only"),
        ([row(i, **({"prompt": "What?"} if i == 7 else {})) for i in range(60)], "'x7' of runs/other/mine is another"),
        ([row(i, **({"prompt_label": "harmful"} if i == 7 else {})) for i in range(60)], "prompt_label: 'unharmful'"),
    ],
)
def test_guards_that_answered_other_examples_are_refused(run, mined, monkeypatch, capsys, rows, error):
    mined()
    write(run / "data.jsonl", rows)
    ensemble = other_run(run, monkeypatch)
    assert main(["pairs", "--config", "first.yaml", ensemble]) in (2, PROVENANCE_CHANGED)
    assert error in " ".join(capsys.readouterr().err.split())
    assert not (run / "runs/first/mine/pairs.jsonl").exists()


def test_what_was_not_mined_has_no_pairs(run, mined, capsys):
    def refused(*overrides):
        assert main(["pairs", "--config", "first.yaml", *overrides]) in (2, PROVENANCE_CHANGED)
        return " ".join(capsys.readouterr().err.split())

    assert "runs/first/mine/examples.jsonl is not there: run `jaxguard mine`" in refused()
    folder = mined()
    assert "mine.ensemble.0: no file or folder 'runs/other/mine'" in refused("mine.ensemble=[runs/other/mine]")
    assert "policy" in refused("data.policy=demo")
    store = folder / "answers/direct.jsonl"
    last = lines(store)[-1]["record"]["example_id"]
    store.write_text("".join(store.read_text().splitlines(keepends=True)[:-1]))
    assert f"no answer to example {last!r}" in refused()


def test_killed_at_any_moment_no_file_is_half_written(run, paired):
    folder = paired()
    whole = {path.name: path.read_bytes() for path in folder.glob("pairs.*")}
    path = os.pathsep.join([str(Path(__file__).resolve().parents[2])])
    command = [sys.executable, "-m", "jaxguard.mine", "pairs", "--config", "first.yaml"]
    for seconds in (0.0, 0.01, 0.02):
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.DEVNULL)
        seen = (folder / "pairs.jsonl").stat().st_mtime_ns
        deadline = time.monotonic() + 120
        while (
            (folder / "pairs.jsonl").stat().st_mtime_ns == seen
            and process.poll() is None
            and time.monotonic() < deadline
        ):
            time.sleep(0.001)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert {name: (folder / name).read_bytes() for name in ("pairs.jsonl", "pairs.md")} == {
            name: whole[name] for name in ("pairs.jsonl", "pairs.md")
        }
        assert json.loads((folder / "pairs.json").read_text())["sha256"] == file_digest(folder / "pairs.jsonl")
