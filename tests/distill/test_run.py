"""The distillation's command against a server that always answers."""

import asyncio
import json

import pytest
import yaml
from faulty_server import REASONING, completion, serve

from jaxguard.cli import PROVENANCE_CHANGED
from jaxguard.config.data import SourceConfig
from jaxguard.data.sources import load_examples
from jaxguard.distill.__main__ import main
from jaxguard.distill.store import read_attempts

WRONG = json.dumps(completion(1, content=f"{REASONING}Prompt harm: harmful\nResponse harm: None"))
RIGHT = json.dumps(completion(1, content=f"{REASONING}Prompt harm: unharmful\nResponse harm: None"))


@pytest.fixture
def config(tmp_path, tiny_tokenizer_folder):
    rows = [
        {"id": f"x{i}", "prompt": f"How do I bake bread number {i}?", "prompt_label": "unharmful"} for i in range(6)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"id": "nobody knows", "prompt": "hello"}]))
    tree = {
        "run_folder": str(tmp_path / "runs"),
        "model": {"checkpoint": str(tiny_tokenizer_folder)},
        "data": {"train": [{"kind": "jsonl", "path": str(data)}], "policy": "aegis2"},
        "distill": {"teacher": {"model": "teacher"}, "rounds": 2},
    }
    path = tmp_path / "traces.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def distilled(config, script, *overrides):
    async def run():
        async with serve(script) as server:
            arguments = ["--config", str(config), f"distill.teacher.endpoints=[{server.url}]", *overrides]
            return await asyncio.to_thread(main, arguments), server

    return asyncio.run(run())


def test_a_training_file_comes_out(config, capsys):
    code, server = distilled(config, lambda i: WRONG if i == 0 else RIGHT, "distill.teacher.concurrency=1")
    assert code == 0
    assert server.count == 7
    folder = config.parent / "runs/traces"
    examples = load_examples(SourceConfig(kind="jsonl", path=str(folder / "traces.jsonl")))
    assert [example.id for example in examples] == [f"x{i}" for i in range(6)]
    assert all(example.trace.startswith("The user asks about bread") for example in examples)
    assert len(list(read_attempts(folder / "traces"))) == 7
    output = capsys.readouterr().out
    assert "failed verdict_differs" in output
    assert "6 examples with traces" in output


def test_a_second_run_requests_nothing(config):
    distilled(config, lambda i: RIGHT)
    before = (config.parent / "runs/traces/traces.jsonl").read_bytes()
    code, server = distilled(config, lambda i: "500")
    assert (code, server.count) == (0, 0)
    assert (config.parent / "runs/traces/traces.jsonl").read_bytes() == before


def test_what_never_passes_is_named(config, capsys):
    code, _ = distilled(config, lambda i: WRONG)
    assert code == 0
    output = capsys.readouterr().out
    assert "never passed" in output
    assert "x3" in output
    assert (config.parent / "runs/traces/traces.jsonl").read_text() == ""


SHORT, LONG = (json.dumps(completion(1, content=f"{text}\n\nPrompt harm: unharmful\nResponse harm: None")) for text in (
    "They ask about bread, which no rule forbids at all.",
    "They ask about bread. No rule forbids bread, so all is well.",
))  # fmt: skip


def test_accepted_traces_are_shortened_to_each_budget(config):
    """6 traces; then budget 1, whose first answer has two sentences; then budget 2."""
    code, server = distilled(
        config,
        lambda i: RIGHT if i < 6 else LONG if i == 6 else SHORT,
        "distill.budgets=[1,2]",
        "distill.teacher.concurrency=1",
    )
    assert (code, server.count) == (0, 6 + 7 + 6)
    folder = config.parent / "runs/traces"
    for budget in (1, 2):
        examples = load_examples(SourceConfig(kind="jsonl", path=str(folder / f"traces_{budget}.jsonl")))
        assert [example.trace for example in examples] == ["They ask about bread, which no rule forbids at all."] * 6
    (failed,) = (a.failures for a in read_attempts(folder / "traces_1") if not a.accepted)
    assert failed == {"over_budget": "2 sentences; at most 1 were asked for"}
    asked = [request["messages"][0]["content"] for request in server.requests]
    assert all("The user asks about bread, which no rule forbids." in text for text in asked[6:])
    assert "at most 1 sentence." in asked[6]
    assert "at most 2 sentences." in asked[-1]
    # A budget's store belongs to the traces that it shortens.
    code, _ = distilled(config, lambda i: SHORT, "distill.budgets=[1]", "distill.filter.max_words=700", "name=traces")
    assert code == PROVENANCE_CHANGED


def test_the_summary_says_why_the_last_attempt_failed(config):
    distilled(config, lambda i: WRONG)
    summary = json.loads((config.parent / "runs/traces/traces.summary.json").read_text())
    assert (summary["examples"], summary["attempts"], summary["traced"]) == (6, 12, 0)
    assert summary["failed"] == {"verdict_differs": 12}
    assert summary["never_passed"]["x3"] == {"verdict_differs": "prompt_harm: harmful, not unharmful"}


def test_progress_without_a_terminal_is_lines(config, capsys, monkeypatch):
    monkeypatch.setattr("jaxguard.utils.progress.PLAIN_SECONDS", 0.0)
    distilled(config, lambda i: RIGHT)
    assert "traces 6/6" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("distill.teacher.model=other", "serves teacher, not 'other'"),
        ("distill.prompt=tarce", "did you mean 'trace'"),
        ("distill=null", "no distill section"),
        ("data.policy=bank_support", ""),
        ("distill.teacher.temperatur=1", "did you mean 'temperature'"),
    ],
)
def test_mistakes_are_named(config, override, words, capsys):
    code, _ = distilled(config, lambda i: RIGHT, override)
    assert (code, words in capsys.readouterr().err) == ((2, True) if words else (0, True))


def test_another_teacher_is_not_mixed_in(config, capsys):
    distilled(config, lambda i: RIGHT)
    code, _ = distilled(config, lambda i: RIGHT, "distill.teacher.temperature=0")
    assert code == PROVENANCE_CHANGED
    assert "temperature" in capsys.readouterr().err


def test_half_a_character_in_an_id_costs_nothing(config):
    """It is replaced where the row is read: the traces are written, and the next start requests none again."""
    data = config.parent / "data.jsonl"
    rows = [
        {"id": "x\ud800", "prompt": "How do I bake \udc00 bread?", "prompt_label": "unharmful"},
        {"id": "y", "prompt": "How do I bake rye bread?", "prompt_label": "unharmful", "policy": "Be \ud83d kind."},
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, server = distilled(config, lambda i: RIGHT)
    assert (code, server.count) == (0, 2)
    examples = load_examples(SourceConfig(kind="jsonl", path=str(config.parent / "runs/traces/traces.jsonl")))
    assert [example.id for example in examples] == ["x\ufffd", "y"]
    code, server = distilled(config, lambda i: RIGHT)
    assert (code, server.count) == (0, 0)
