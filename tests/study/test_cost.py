"""What a study takes, against hand-worked cases."""

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from jaxguard.data.prepare import prepare
from jaxguard.data.report import packing
from jaxguard.study.cost import cost_table, speed_of, work
from jaxguard.study.grid import open_study

ROOT = Path(__file__).parents[2]


def rows(study):
    """Run -> its cells as texts."""
    return {row.cells[0].text: [cell.text for cell in row.cells[1:]] for row in cost_table(study).rows}


def test_the_5k_run_by_hand(monkeypatch):
    """5,000 × 5 / 32 = 781 updates of 32 examples of 100 + 300 + 16 tokens, 3 in a row that holds the policy's 500 once."""
    monkeypatch.chdir(ROOT)
    study = open_study("paper/controls")
    run = next(run for run in study.runs if run.name == "seeds-reasoning-0")
    amount = work(run)
    assert amount["steps"] == 781
    assert amount["trained"] == 781 * (32 * 416 + 11 * 500) == 14_692_172
    # The benchmarks of both averages, once in the one mode that is trained, each with four answers.
    predicted = 1699 + 1964 + 1680 + 100 + 2853 + 1709 + 852 + 446 + 300 + 2362 + 200
    assert (amount["predictions"], amount["generated"]) == (predicted, 4 * 316 * predicted)
    # The 100 tokens after the policy are read to generate, and once more with the four reasoning traces for P(harmful).
    assert amount["read"] == (2 * 100 + 4 * 300) * predicted
    assert not amount["assumed"]
    train = 6 * 8.03e9 * 14_692_172 / (8 * 312e12 * 0.4)
    read = 2 * 8.03e9 * amount["read"] / (8 * 312e12 * 0.4)
    generate = 2 * 8.03e9 * amount["generated"] / (8 * 312e12 * 0.04)
    assert float(rows(study)[run.name][-1]) == pytest.approx((train + read + generate + 2 * 120) * 8 / 3600, abs=0.01)
    assert train == pytest.approx(709.1, abs=0.1)


def test_both_modes_of_a_dual_run_are_predicted(monkeypatch):
    monkeypatch.chdir(ROOT)
    runs = {run.name: run for run in open_study("paper/controls").runs}
    dual, reasoning, direct = (work(runs[f"seeds-{mode}-0"]) for mode in ("dual", "reasoning", "direct"))
    assert direct["trained"] < dual["trained"] < reasoning["trained"]
    assert dual["predictions"] == 2 * reasoning["predictions"]
    assert dual["generated"] == reasoning["generated"] + direct["generated"]


def test_examples_are_counted_in_local_files_and_else_taken_from_the_row(study):
    amounts = {run.name: work(run) for run in study().runs}
    assert (amounts["bread-8-0"]["steps"], amounts["bread-8-0"]["assumed"]) == (8 * 5 // 4, 0)
    assert (amounts["more"]["steps"], amounts["more"]["assumed"]) == (20 * 5 // 4, 0)
    Path("bread.jsonl").unlink()
    x, y = study("data.validation_size=2", rows={"x": {"examples": 10, "stages": ["train"]}, "y": {}}).runs
    assert (work(x)["steps"], work(x)["assumed"]) == (8 * 5 // 4, 1)
    assert work(y)["steps"] == 0
    assert work(y)["assumed"] > 0


def test_speed_is_measured_or_assumed(study):
    assumed = study("cost.tokens_per_second=50", "cost.generated_per_second=9")
    assert speed_of(assumed)[:2] == (50, 9)
    forward = 8 * 312e12 / (2 * 8.03e9)
    assert speed_of(study())[:2] == (pytest.approx(forward * 0.4 / 3), pytest.approx(forward * 0.04))
    folder = assumed.runs[1].folder
    folder.mkdir(parents=True)
    lines = [{"speed": {"tokens_per_second": n}} for n in (1, 2, 40, 60, 80)]
    text = "".join(json.dumps(line) + "\n" for line in (*lines, {"validation/loss": 1}))
    (folder / "metrics.jsonl").write_text(text + '{"cut', encoding="utf-8")
    assert speed_of(assumed)[:2] == (60, 9)
    assert "3 steps of this study" in cost_table(assumed).note


def test_the_table_adds_up(study):
    bread = study("cost.tokens_per_second=1", "cost.generated_per_second=1", "cost.start_seconds=0", "cost.devices=2")
    # 8 × 5 / 4 = 10 steps of 4 examples of 116 tokens in a row with the policy's 500; 20 examples predicted, 4 × 16 tokens
    # generated for each, and its prompt read once to answer and once for the probability, at a third of a training step's cost.
    one = 10 * (4 * 116 + 500) + 20 * 2 * 100 / 3 + 20 * 64
    table = rows(bread)
    assert table["bread-8-0"][-1] == f"{one * 2 / 3600:.2f}"
    assert float(table["6 runs"][-1]) == pytest.approx(sum(float(table[run.name][-1]) for run in bread.runs), abs=0.05)


def test_the_small_study_takes_the_minutes_that_the_documents_say(monkeypatch):
    monkeypatch.chdir(ROOT)
    study = open_study("paper/sample_efficiency", "smollm")
    (*_, total) = rows(study).values()
    minutes = float(total[-1]) * 60
    assert minutes < 27
    text = f"{len(study.runs)} runs, estimated at {minutes:.0f} minutes"
    assert text in (ROOT / "docs/studies.md").read_text(encoding="utf-8")


def test_mining_reads_no_probabilities(study):
    (run,) = study(rows={"x": {"stages": ["mine"]}}).runs
    assert +work(run) == {"predictions": 20, "read": 20 * 100, "generated": 20 * 4 * 16}
    other = {"mine.sources": [{"kind": "jsonl", "path": "absent.jsonl"}]}
    (run,) = study(rows={"x": {"stages": ["mine"], "examples": 50, "set": other}}).runs
    assert (work(run)["predictions"], work(run)["assumed"]) == (50, 1)


def test_baselines_cost_nothing(study):
    baseline = {"evaluate.guards": [{"name": "most", "format": "majority"}]}
    (run,) = study(rows={"x": {"stages": ["evaluate"], "set": baseline}}).runs
    assert +work(run) == {}


def test_trained_tokens_are_those_that_the_data_report_counts(study, tiny_checkpoint):
    """With the data's own means in place of the assumptions, to a tenth: rows are filled better or worse than by a division."""
    texts = [f"{i} times: how do I bake {'a loaf of ' * (i % 5)}bread?" for i in range(40)]
    rows = [{"id": str(i), "prompt": text, "prompt_label": "unharmful"} for i, text in enumerate(texts)]
    Path("loaf.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    fields = [
        f"model.checkpoint={tiny_checkpoint}",
        "data.policy=bank_support",
        "data.max_seq_len=1024",
        "data.train.0.path=loaf.jsonl",
    ]
    made = study(*fields, rows={"x": {"stages": ["train"]}})
    config = made.runs[0].config
    prepared = prepare(config, tiny_checkpoint)
    packed, encoded = packing(config, prepared.train), prepared.train
    mean = sum(len(each.tokens) for each in encoded) / len(encoded)
    answer = sum(int(each.loss_mask.sum()) for each in encoded) / len(encoded)
    means = {"prompt_tokens": mean - answer, "policy_tokens": encoded[0].shared, "answer_tokens": answer}
    run = study(
        *fields, *(f"cost.{name}={round(x)}" for name, x in means.items()), rows={"x": {"stages": ["train"]}}
    ).runs[0]
    computed = packed["steps"] * config.train.batch_size * packed["computed"]
    assert packed["shared"] > 0.3
    assert work(run)["trained"] == pytest.approx(computed, rel=0.1)


def test_a_local_model_costs_what_it_is(study, tiny_checkpoint):
    weights = sum(array.size for path in tiny_checkpoint.glob("*.safetensors") for array in load_file(path).values())
    assumed, local = speed_of(study("model.checkpoint=x/y")), speed_of(study(f"model.checkpoint={tiny_checkpoint}"))
    assert local[0] / assumed[0] == pytest.approx(8.03e9 / weights)


def test_sampled_answers_are_generated_and_trained_on(study):
    """Answers of 300 + 16 tokens, 4 to each of 4 prompts a step; of exact rewards in direct mode none is generated."""
    set_ = {"train.objective.kind": "grpo", "train.max_steps": 3, "reinforce.answers": 4, "data.mode": "reasoning"}
    rows = {"sampled": {"stages": ["reinforce"], "set": set_}}
    rows["exact"] = {
        "stages": ["reinforce"],
        "set": set_ | {"data.mode": "direct", "reinforce.reward.kind": "probability"},
    }
    rows["supervised"] = {"stages": ["train"], "set": {"train.max_steps": 3, "data.mode": "reasoning"}}
    amounts = {run.name: work(run) for run in study(rows=rows).runs}
    assert amounts["sampled"]["generated"] == 3 * 4 * 4 * 316
    assert amounts["sampled"]["trained"] == 3 * (4 * (100 + 4 * 316) + 4 * 500)  # a prompt with its answers a row
    assert amounts["supervised"]["trained"] == 3 * (4 * 416 + 2 * 500)
    assert amounts["exact"]["generated"] == 0
    assert amounts["exact"]["trained"] == 3 * (4 * (100 + 2 * 16) + 500)


def test_a_preference_has_two_answers_and_a_reference(study):
    set_ = {"train.objective.kind": "dpo", "train.max_steps": 3, "data.mode": "reasoning"}
    (run,) = study(rows={"x": {"stages": ["train"], "set": set_}}).runs
    amount = work(run)
    assert amount["trained"] == 3 * (4 * (100 + 2 * 316) + 2 * 500)
    assert amount["read"] == 20 * (100 + 2 * 316)
