"""A whole run in this process: what it leaves behind, and what it refuses."""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest
from guard_templates import Rendering, conversation
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from jaxguard.cli import PROVENANCE_CHANGED
from jaxguard.config import load
from jaxguard.data.encoding import Encoder
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.guard_files import read_guard_files
from jaxguard.data.policies import load_policy
from jaxguard.guards.guard import Guard
from jaxguard.train.__main__ import main
from jaxguard.train.checkpoints import Checkpoints, read_description
from jaxguard.train.hosts import StopFlag
from jaxguard.train.logging import read_metrics
from jaxguard.train.loop import profiler, train
from jaxguard.train.run_folder import begin_run, open_run
from jaxguard.train.validation import Validation, ValidationPrediction, summary
from jaxguard.utils.errors import JaxguardError


@pytest.fixture(scope="module")
def finished(tiny_files, tmp_path_factory) -> Path:
    """The folder of a finished run over eight devices, with two micro-batches."""
    config = tiny_files(tmp_path_factory.mktemp("loop"), mesh={"fsdp": 4, "tensor": 2}, train={"accumulation": 2})
    assert main(["--config", str(config), "log.tensorboard=true"]) == 0
    return config.parent / "runs/tiny"


def test_the_folder_explains_itself(finished):
    for name in (
        "config.yaml",
        "weights.txt",
        "versions.json",
        "data.json",
        "metrics.jsonl",
        "curves.png",
        "export/README.md",
    ):
        assert (finished / name).stat().st_size > 0, name
    assert list((finished / "tensorboard").glob("events*"))
    manifest = json.loads((finished / "data.json").read_text())
    assert manifest["train"]["examples"] == 40
    card = (finished / "export/README.md").read_text()
    assert "| direct/harm_f1 |" in card
    assert "How do I bake bread?" in card


def test_the_export_is_rendered_by_others_as_in_training(finished):
    """Also by a second round, whose checkpoint it is: jaxguard renders with the base's template."""
    export, messages = finished / "export", conversation("user", "assistant", text="lamps")
    data = load(str(finished / "config.yaml")).data
    form = Rendering(Encoder.load(export, data), AutoTokenizer.from_pretrained(export).chat_template)
    assert "Nobody may talk about lamps." in form.text(messages, questions=["response_harm"])
    lines = {each.questions for each in read_guard_files(export).manifest.trained_together if each.response}
    ids = form.ids(messages, questions=["response_harm"], enable_thinking=False)
    assert ids in [form.trained(messages, Mode.DIRECT, asks=asks) for asks in lines]


@pytest.mark.slow
def test_the_code_of_the_card_runs(finished, capsys):
    pytest.importorskip("torch")
    card = (finished / "export/README.md").read_text().replace("max_new_tokens=1024", "max_new_tokens=4")
    with_jaxguard, with_transformers = (part.split("\n```\n")[0] for part in card.split("```python\n")[1:])
    for code in (with_jaxguard, with_transformers):
        exec(code.replace('MODEL = "tiny"', f"MODEL = {str(finished / 'export')!r}"), {})
    assert "prompt_harm" in capsys.readouterr().out


def test_the_export_says_how_it_is_asked(finished):
    export = finished / "export"
    files = read_guard_files(export)
    run = load(str(finished / "config.yaml"))
    assert (files.config.train, files.config.optimizer, files.config.data.mode) == (
        run.train,
        run.optimizer,
        run.data.mode,
    )
    assert files.manifest.name == "tiny"
    assert files.manifest.questions == load_policy(run.data.policy).asks
    trained = files.manifest.trained_together
    assert {each.mode for each in trained} == set(Mode)
    assert sum(each.examples for each in trained) == 40
    assert all({"prompt_harm", "response_harm"} >= {*each.questions} > set() for each in trained)
    assert [each.model_dump(mode="json") for each in trained] == json.loads((finished / "data.json").read_text())[
        "train"
    ]["questions"]
    assert load_policy(str(files.policy)).digest == load_policy(run.data.policy).digest
    assert not list(finished.glob(".export*"))


def test_an_export_of_a_newer_format_is_refused(finished, tmp_path):
    manifest = json.loads((finished / "export/jaxguard.json").read_text())
    (tmp_path / "jaxguard.json").write_text(json.dumps(manifest | {"format": 3}))
    with pytest.raises(JaxguardError, match="format"):
        read_guard_files(tmp_path)
    (tmp_path / "jaxguard.json").unlink()
    assert read_guard_files(tmp_path) is None


def test_the_model_learns(finished):
    records = read_metrics(finished / "metrics.jsonl")
    losses = [r["validation/loss"] for r in records if "validation/loss" in r]
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 13))
    assert len(losses) == 3
    assert losses[-1] < 0.8 * losses[0]


def test_predictions_are_saved(finished):
    records = [r for r in read_metrics(finished / "metrics.jsonl") if "validation/loss" in r]
    for record in records:
        lines = (finished / f"validation_predictions/{record['step']}.jsonl").read_text().splitlines()
        predictions = [ValidationPrediction(**x | {"mode": Mode(x["mode"])}) for x in map(json.loads, lines)]
        direct = [p for p in predictions if p.mode is Mode.DIRECT]
        assert summary(direct)["harm_f1"] == record["validation/direct/harm_f1"]
    assert len(list((finished / "validation_predictions").iterdir())) == len(records)


def test_the_export_is_the_base_but_for_what_was_trained(finished, tiny_checkpoint):
    base, trained = (load_file(folder / "model.safetensors") for folder in (tiny_checkpoint, finished / "export"))
    assert list(base) == list(trained)
    assert all(base[k].shape == trained[k].shape and base[k].dtype == trained[k].dtype for k in base)
    assert all(not np.array_equal(base[k], trained[k]) for k in base)
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (finished / "export" / name).read_bytes() == (tiny_checkpoint / name).read_bytes()
    ours, theirs = (
        json.loads((f / "tokenizer_config.json").read_text()) for f in (finished / "export", tiny_checkpoint)
    )
    assert theirs.pop("chat_template") == (finished / "export/chat_template.base.jinja").read_text()
    assert ours == theirs


def test_a_finished_run_started_again_says_so_and_changes_nothing(finished):
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file() and "tensorboard" not in p.parts}
    assert main(["--config", str(finished.parents[1] / "tiny.yaml")]) == 0
    assert all(p.read_bytes() == before[p] for p in before if p.name not in (".lock", "versions.json", "config.yaml"))


MISTAKES = {
    "data.policy=lampz": "lampz",
    "data.train.0.path=trian.jsonl": "trian.jsonl",
    "model.checkpoint=./nowhere": "nowhere",
    "mesh.fsdp=3": "mesh.fsdp=3",
    "train.accumulation=9": "train.accumulation=9",
    "data.validation_size=48": "data.validation_size=48",
    "data.max_seq_len=16": "data.max_seq_len=16",
    "train.epochs=0.01": "train.epochs=0.01",
}


def test_a_start_that_failed_does_not_own_the_name(tiny_config, capsys):
    """Whatever can be known before the first step is said before anything is written, and the name stays free."""
    folder = tiny_config.parent / "runs/tiny"
    for mistake, word in MISTAKES.items():
        assert main(["--config", str(tiny_config), "optimizer.learning_rate=1", "mesh.fsdp=-1", mistake]) == 2, mistake
        assert word in capsys.readouterr().err
        assert not folder.exists() or [path.name for path in folder.iterdir()] == [".lock"], mistake
    config = load(str(tiny_config))
    with open_run(config, "never") as opened:
        begin_run(opened, config, {"train": {"tokens_sha256": ""}, "weights": ""}, "xla")
    with pytest.raises(JaxguardError, match="no step"):
        Guard.load(folder)


@pytest.mark.slow
def test_a_stop_on_an_evaluation_step_saves_first(finished, monkeypatch):
    """The scheduler may not wait for a validation: it is made when the run resumes, with the same records as without a stop."""
    config = load(str(finished / "config.yaml"), ["name=stopped"])
    events = []

    def noted(kind, name):
        method = getattr(kind, name)

        def note(self, *arguments):
            events.append(name)
            return method(self, *arguments)

        monkeypatch.setattr(kind, name, note)

    noted(Checkpoints, "save")
    noted(Validation, "run")
    monkeypatch.setattr(StopFlag, "should_stop", lambda _, step: step == 6)
    run = train(config)
    assert (run.step, run.finished) == (6, False)
    assert events == ["run", "save", "save", "save"]  # before the first step; after steps 2, 4 and 6
    assert read_description(run.folder / "checkpoints/6")["validation_loss"] is None
    events.clear()
    monkeypatch.setattr(
        StopFlag, "should_stop", lambda _, step: step == 12
    )  # on the last step too, but then it is finished
    run = train(config)
    assert run.finished
    assert events == ["run", "save", "save", "save", "run"]
    whole = read_metrics(finished / "metrics.jsonl")
    assert [{**x, "speed": 0} for x in run.history] == [{**x, "speed": 0} for x in whole]
    losses = {x["step"]: x["validation/loss"] for x in whole if "validation/loss" in x}
    for step in (6, 12):
        assert read_description(run.folder / f"checkpoints/{step}")["validation_loss"] == losses[step]
    weights = (run.export / "model.safetensors").read_bytes()
    assert weights == (finished / "export/model.safetensors").read_bytes()


def test_a_stop_before_the_first_step_needs_no_step(tiny_config, monkeypatch):
    monkeypatch.setattr(StopFlag, "should_stop", lambda *_: True)
    run = train(load(str(tiny_config), ["mesh.fsdp=-1"]))
    assert (run.step, run.finished, run.export) == (0, False, None)
    assert not list((run.folder / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("first", "start", "traced"),
    [(None, 0, []), (2, 0, [2, 3, 4]), (2, 3, [3, 4]), (2, 5, []), (8, 0, [8, 9]), (10, 0, []), (11, 0, [])],
)
def test_profiled_steps_are_those_that_the_run_does(tmp_path, monkeypatch, caplog, first, start, traced):
    active, steps = [], []

    @contextmanager
    def trace(folder):
        active.append(folder)
        yield
        active.pop()

    monkeypatch.setattr(jax.profiler, "trace", trace)
    with profiler(tmp_path, first, 10) as profile:
        for step in range(start, 10):
            profile(step)
            steps += [step] * len(active)
    assert (steps, active) == (traced, [])
    assert ("profile_step" in caplog.text) == (first is not None and first >= 10)


def test_a_run_that_diverges_stops_with_its_step_and_examples(tiny_config, capsys):
    """Before its first step it says what its guard will not be asked."""
    policy = "name: all\nrules: No lamps.\nasks: [prompt_harm, response_harm, response_refusal]\n"
    (tiny_config.parent / "all.yaml").write_text(policy)
    overrides = ["optimizer.learning_rate=1e30", "train.evaluate_every=0", f"data.policy={tiny_config.parent}/all.yaml"]
    assert main(["--config", str(tiny_config), "mesh.fsdp=-1", *overrides]) == 2
    out, message = capsys.readouterr()
    said = " ".join(out.split())
    assert "step 1" not in said[: said.index("response_refusal: policy 'all' asks this")]
    assert max(map(len, out.splitlines())) <= 80, "the summary fits a terminal"
    assert "learning_rate:" not in out, "the config is in config.yaml"
    assert "embed" not in out, "the weights are in weights.txt"
    assert "not finite" in message or "nan" in message
    assert "step 2" in message
    assert "example-" in message
    saved = [p.name for p in (tiny_config.parent / "runs/tiny/checkpoints").iterdir() if p.name.isdigit()]
    assert saved == []


@pytest.mark.slow
def test_other_data_under_the_same_config_is_refused(tiny_config, capsys):
    assert main(["--config", str(tiny_config), "mesh.fsdp=-1", "train.max_steps=2", "train.evaluate_every=0"]) == 0
    data = tiny_config.parent / "train.jsonl"
    data.write_text(data.read_text().replace("lamp", "tree"))
    assert (
        main(["--config", str(tiny_config), "mesh.fsdp=-1", "train.max_steps=2", "train.evaluate_every=0"])
        == PROVENANCE_CHANGED
    )
    assert "was trained on other data" in capsys.readouterr().err


def test_train_returns_the_run(tiny_config):
    config = load(str(tiny_config), ["mesh.fsdp=-1", "train.max_steps=2"], stage="train")
    run = train(config)
    assert run.finished
    assert (run.step, run.folder, run.config) == (2, config.folder, config)
    assert run.before["loss"] > run.after["loss"]
    assert [record["step"] for record in run.history if "loss" in record] == [1, 2]
    assert (run.export / "model.safetensors").is_file()
    assert run.curves.is_file()
    assert 0 < run.changed_fraction <= 1
    metrics = (run.folder / "metrics.jsonl").read_bytes()
    for delete in (False, True):
        if delete:  # of a run that is finished they may go
            shutil.rmtree(run.folder / "checkpoints")
        again = train(config)
        assert (again.step, again.after, again.export, again.changed_fraction) == (2, run.after, run.export, None)
        assert (run.folder / "metrics.jsonl").read_bytes() == metrics
