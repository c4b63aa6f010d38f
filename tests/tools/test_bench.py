"""The benchmarks: their jobs, and how they treat contenders that fail, differ or do not exist."""

import io
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import cost
import evaluation
import training
import updates
import workloads
from jaxguard.data.encoding import Encoder
from jaxguard.data.format.template import TEMPLATE_KWARGS
from jaxguard.data.prepare import prepare
from jaxguard.models.spec import read_spec
from training import Contender, Run, table
from workloads import WORKLOADS, Job

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "labelled.jsonl"
    rows = [
        {"id": str(i), "source": "test", "prompt": f"bread {i}", "response": "rye " * (i % 7), "prompt_label": "unharmful",
         "response_label": "harmful"}
        for i in range(40)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def contender(tmp_path, monkeypatch):
    """contender(code): a contender whose script is this code."""
    (tmp_path / "env" / "bin").mkdir(parents=True)
    (tmp_path / "env" / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.setattr(training, "BENCH", tmp_path)

    def make(code: str) -> Contender:
        (tmp_path / "peer.py").write_text(code, encoding="utf-8")
        return Contender("peer", "padded", str(tmp_path / "env"), "peer.py")

    return make


def job(tmp_path) -> Job:
    return Job("direct", "model", "examples", "data", "padded", str(tmp_path))


@pytest.mark.parametrize("workload", [w for w in WORKLOADS if w.objective == "sft"], ids=lambda w: w.name)
def test_peers_get_what_we_train_in_our_order(workload, source, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(workloads, "EXAMPLES", 64)
    written = workloads.write(workload, source, tiny_checkpoint, 2, tmp_path / "out")
    config = workloads.ours(written)
    encoder = Encoder.load(tiny_checkpoint, config.data)
    messages = [json.loads(line)["messages"] for line in Path(written.data).read_text(encoding="utf-8").splitlines()]
    assert len(messages) == 2 * written.batch_size
    ours = [list(example.tokens) for example in prepare(config, tiny_checkpoint).train]
    for turns in messages:
        text = encoder.tokenizer.apply_chat_template(turns, tokenize=False, **TEMPLATE_KWARGS)
        theirs = encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert any(tokens == theirs[: len(tokens)] for tokens in ours)
    assert ("<think>" in messages[0][1]["content"]) == (workload.name != "direct")


def test_a_contender_is_measured(contender, tmp_path):
    lines = [{"step": i, "seconds": s, "examples": 8, "loss": 2.0} for i, s in ((1, 100), (2, 4), (3, 4))]
    run = training.run_contender(job(tmp_path), contender(f"import json\nfor x in {lines}: print(json.dumps(x))\n"), 1)
    assert (run.error, run.losses, run.speed) == (None, (2.0, 2.0, 2.0), 2.0)
    assert run.peak_gib > 0


def test_a_failed_contender_names_its_log(contender, tmp_path):
    run = training.run_contender(
        job(tmp_path), contender("import sys\nprint('why', file=sys.stderr)\nsys.exit(3)\n"), 1
    )
    assert run.error is not None
    assert "code 3" in run.error
    assert (tmp_path / "peer-padded.log").read_text(encoding="utf-8") == "why\n"


def test_a_contender_without_an_environment_is_skipped(tmp_path):
    run = training.run_contender(job(tmp_path), Contender("peer", "padded", ".venv-bench-none", "peer.py"), 1)
    assert run.error == ".venv-bench-none does not exist"


def test_a_stopped_benchmark_goes_on(contender, tmp_path, monkeypatch):
    results, calls = tmp_path / "training.jsonl", tmp_path / "calls"
    monkeypatch.setattr(training, "RESULTS", results)
    lines = [{"step": i, "seconds": 4, "examples": 8, "loss": 2.0} for i in (1, 2)]
    code = f"import json\nopen({str(calls)!r}, 'a').write('x')\nfor x in {lines}: print(json.dumps(x))\n"
    peer, console = contender(code), Console(file=io.StringIO())
    assert len(list(training.measure(job(tmp_path), [peer], 2, console))) == 2
    results.write_bytes(results.read_bytes()[:-5])  # killed while it wrote the second
    known = training.measured(results)
    assert [run.round for run in known] == [1]
    again = list(training.measure(job(tmp_path), [peer], 2, console, known))
    assert [(run.round, run.speed) for run in again] == [(1, 2.0), (2, 2.0)]
    assert calls.read_text(encoding="utf-8") == "xxx"


def test_ratios_are_of_the_same_round_and_other_losses_are_shown():
    def run(label, count, seconds, loss):
        return Run("direct", label, count, (9, seconds), (32, 32), (loss, loss), 1.0)

    ours = training.CONTENDERS["sft"][0].label
    runs = [run(ours, 1, 10, 2.0), run("peer", 1, 30, 2.01), run(ours, 2, 20, 2.0), run("peer", 2, 40, 2.01)]
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table([*runs, run("liar", 1, 1, 3.0)]).rich())
    text = console.export_text()
    assert "2.50 [2.00, 3.00]" in text
    assert text.count("differs") == 1


@pytest.mark.parametrize("workload", [w for w in WORKLOADS if w.objective != "sft"], ids=lambda w: w.name)
def test_updates_get_right_and_wrong_answers(workload, source, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    written = updates.write(workload, source, tiny_checkpoint, tmp_path, keep=False)
    steps = [json.loads(line) for line in Path(written.data).read_text(encoding="utf-8").splitlines()]
    assert [len(group) for group in steps[0]] == [2]
    assert steps[1] == steps[2][3::8]
    size = {"dpo": 2, "grpo": updates.GROUP}[workload.objective]
    assert [len(group) for group in steps[2]] == [size] * written.batch_size
    for group in steps[2]:
        assert len({tuple(answer["ids"][: answer["prompt"]]) for answer in group}) == 1
        assert all(len(answer["ids"]) - answer["prompt"] == len(answer["reference"]) for answer in group)
        if workload.objective == "grpo":
            assert sum(answer["advantage"] for answer in group) == pytest.approx(0, abs=1e-6)
        if workload.trace_words or workload.objective == "dpo":
            assert len({tuple(answer["ids"]) for answer in group}) == size


@pytest.mark.parametrize("name", ["direct-dpo", "direct-grpo"])
def test_our_updates_begin_at_the_reference(name, source, tiny_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    workload = next(w for w in WORKLOADS if w.name == name)
    written = replace(updates.write(workload, source, tiny_checkpoint, tmp_path, keep=False), steps=2)
    (tmp_path / "job.json").write_text(json.dumps(asdict(written)), encoding="utf-8")
    updates.main(str(tmp_path / "job.json"))
    first, second = (json.loads(line)["loss"] for line in capsys.readouterr().out.splitlines())
    step = json.loads(Path(written.data).read_text(encoding="utf-8").splitlines()[0])
    advantages = [answer["advantage"] for answer in step[0]]
    start = np.log(2) if workload.objective == "dpo" else -np.mean(advantages)  # all ratios are 1
    assert first == pytest.approx(start, abs=1e-5)
    assert second != pytest.approx(start, abs=1e-6)


def done(seconds, odds=(), answers=()):
    return {"seconds": seconds, "odds": list(odds), "answers": list(answers)}


def test_losses_of_updates_must_agree_twice():
    def run(label, loss):
        return Run("direct-dpo", label, 1, (9, 4), (1, 4), (0.6931, loss), 1.0)

    ours = training.CONTENDERS["dpo"][0].label
    rows = table([run(ours, 0.5), run("peer", 0.50005), run("liar", 0.501)]).rows
    assert ["differs" in row.cells[-1].text for row in rows] == [False, False, True]


def test_scores_that_disagree_are_marked():
    ours = done(1.0, odds=[0.0, 2.0])
    for theirs, differs in ([0.0, 2.0001], False), ([0.001, 2.0], True):
        console = Console(file=io.StringIO(), width=120)
        console.print(evaluation.table("verdicts", {"jaxguard": [ours], "peer": [done(3.0, odds=theirs)]}))
        text = console.file.getvalue()
        assert ("(differs)" in text) == differs
        assert "3.00 [3.00, 3.00]" in text


@pytest.fixture
def make_job(source, tiny_checkpoint, tmp_path, monkeypatch):
    """make_job(workload): the job of five examples, and the encoder of its tokens."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(evaluation, "MODEL", tiny_checkpoint)
    monkeypatch.setattr(evaluation, "FOLDER", tmp_path)

    def make(workload):
        written = evaluation.write(workload, workloads.read_examples(source, 5)).read_text(encoding="utf-8")
        return json.loads(written), Encoder.load(tiny_checkpoint, evaluation.settings().data)

    return make


def test_what_is_scored_ends_before_the_verdict(make_job):
    job, encoder = make_job("verdicts")
    assert len(job["prompts"]) == len(job["pairs"]) == 5
    for prompt, (positive, negative) in zip(job["prompts"], job["pairs"], strict=True):
        assert encoder.tokenizer.decode(prompt).endswith("Prompt harm:")
        assert positive != negative


def test_answers_begin_before_the_reasoning(make_job):
    job, encoder = make_job("answers")
    assert job["new_tokens"] == evaluation.NEW_TOKENS["answers"]
    assert len(job["stop_ids"]) == 1
    for prompt in map(encoder.tokenizer.decode, job["prompts"]):
        assert "bread" in prompt
        assert not prompt.endswith("Prompt harm:")


def test_lines_end_with_any_token_that_has_a_line_break(make_job):
    job, encoder = make_job("lines")
    answers, _ = make_job("answers")
    assert (job["prompts"], job["new_tokens"]) == (answers["prompts"], evaluation.NEW_TOKENS["lines"])
    assert encoder.ids("bread\n")[-1] in job["stop_ids"]
    assert all("\n" in encoder.tokenizer.decode([i]) for i in set(job["stop_ids"]) - set(answers["stop_ids"]))


def test_samples_are_answers_of_the_same_prompts(make_job):
    (job, _), (answers, _) = make_job("samples"), make_job("answers")
    assert job["prompts"] == answers["prompts"]
    assert (job["generations"], answers["generations"]) == (8, 1)
    assert (evaluation.sampling(8).temperature, evaluation.sampling(1).temperature) == (1, 0)


def test_answers_are_compared():
    console = Console(file=io.StringIO(), width=120)
    ours, theirs = done(1.0, answers=[[1, 2], [3]]), done(2.0, answers=[[1, 2], [4, 5]])
    console.print(evaluation.table("answers", {"jaxguard": [ours], "peer": [theirs]}))
    text = console.file.getvalue()
    assert "1 of 2" in text
    assert "2.00 [2.00, 2.00]" in text


@pytest.mark.slow
def test_a_policy_that_is_computed_once_costs_less(tiny_checkpoint, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(cost, "MODEL", tiny_checkpoint)
    spec = read_spec(tiny_checkpoint)
    case = cost.Case(examples=3, policy=48, own=16, vocabulary=64, layers=1)
    result = cost._cost(case, spec, rate=1e9)
    assert 0 < result.bound < result.repeated < 3 * result.bound
    assert result.measured > 0
