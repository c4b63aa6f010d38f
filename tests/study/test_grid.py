"""Studies as written: what they come to, and what is wrong with them."""

import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from jaxguard.config import dump, load
from jaxguard.config.base import names
from jaxguard.config.evaluate import EvaluateConfig
from jaxguard.config.study import STUDIES, label, merged, read_study
from jaxguard.data.benchmarks.schema import read_benchmark
from jaxguard.data.packing import total_steps
from jaxguard.guards.baselines import BASELINES
from jaxguard.guards.formats.builtin import BUILT_IN_GUARDS
from jaxguard.study.__main__ import main
from jaxguard.study.grid import open_study, written
from jaxguard.study.run import command
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.secrets import Masked

ROOT = Path(__file__).parents[2]
SHIPPED = [(name, scale) for name in names(STUDIES) for scale in (None, "smollm")]


@pytest.mark.parametrize(("name", "scale"), SHIPPED)
def test_every_shipped_row_resolves(name, scale, monkeypatch):
    monkeypatch.chdir(ROOT)
    study = open_study(name, scale)
    names = [run.name for run in study.runs]
    assert len(set(names)) == len(names) >= 2
    for run in (*study.prepared, *study.runs):
        # The command line that is shown gives the config that was checked.
        words = shlex.split(shlex.join(command(run, run.row.stages[0])))
        stage = "data build" if run.row.stages[0] == "build" else run.row.stages[0]
        config = load(run.base, words[words.index("--config") + 2 :], stage=stage)
        assert dump(config, stage) == dump(load(run.config, stage=stage), stage)
        for benchmark in run.config.evaluate.benchmarks if run.config.evaluate else ():
            read_benchmark(benchmark.name)
        if run.config.train.objective.is_preference:
            assert {Path(str(source.path)).name for source in run.config.data.train} == {"pairs.jsonl"}
    assert all(run.folder == study.folder / run.name for run in study.runs)
    assert all(run.folder == Path("runs") / run.name for run in study.prepared)


def test_the_shipped_grid_is_the_papers(monkeypatch):
    monkeypatch.chdir(ROOT)
    runs = {run.name: run.config for run in open_study("paper/sample_efficiency").runs}
    for mode in ("reasoning", "direct"):
        for size, updates in ((500, 78), (1000, 156), (2500, 390), (5000, 781)):
            for seed in range(4):
                config = runs[f"curve-{mode}-{size}-{seed}"]
                assert (config.data.subset, config.data.subset_seed, config.data.mode) == (size, seed, mode)
                assert total_steps(size, 32, config.train.epochs, config.train.max_steps) == updates
    assert runs["full-direct-all"].data.subset is None
    equal = [config for name, config in runs.items() if name.startswith("equal_updates")]
    assert {total_steps(c.data.subset, 32, c.train.epochs, c.train.max_steps) for c in equal} == {781}
    assert runs["full_labels-all"].data.train[0].kind == "wildguardmix"
    assert len(runs) == 32 + 2 + 1 + 24


def test_the_prepared_files_are_those_that_the_rows_read(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in ("main", "gemma", "sample_efficiency", "sentence_budget"):
        study = open_study(f"paper/{name}")
        built = {
            run.folder / "dataset" / one.name / file
            for run in study.prepared
            if run.config.build
            for one in run.config.build.sets
            for file in ("all.parquet", *(f"{n}_{s}.parquet" for n in run.config.build.subsets for s in (0,)))
        }
        own = {run.folder / "mine" / f"{x}.jsonl" for run in study.runs for x in ("train", "hard", "held_out")}
        read = {Path(source.path) for run in study.runs for source in run.config.data.train if source.path}
        assert read <= built | own
        assert read


def test_the_published_rows_exist(monkeypatch):
    published = ROOT / "configs/published/paper.yaml"
    if not published.is_file():
        pytest.skip("configs/published is not here yet")
    known = {row["id"] for row in yaml.safe_load(published.read_text())["rows"]}
    named = [
        one
        for name, scale in SHIPPED
        for row in read_study(name, scale)[0].rows.values()
        for one in row.published.values()
    ]
    assert set(named) <= known
    assert len(named) > 20


def test_the_shipped_guards_of_others_can_be_asked(monkeypatch):
    """Not by JAX, which computes Llama, Gemma and Qwen only, and without policies, where their format takes none."""
    monkeypatch.chdir(ROOT)
    external = [
        (run.config, guard)
        for name, scale in SHIPPED
        for run in open_study(name, scale).runs
        for guard in (run.config.evaluate or EvaluateConfig()).guards
        if guard.format not in ("jaxguard", *BASELINES)
    ]
    assert [guard.name for _, guard in external] == ["wildguard"]
    for config, guard in external:
        assert config.evaluate.backend == "sglang"
        benchmarks = [read_benchmark(one.name) for one in config.evaluate.benchmarks]
        assert guard.ignore_policies or not any(one.policy for one in benchmarks)
        assert {one.question for one in benchmarks} <= set(BUILT_IN_GUARDS[guard.format].questions)


def test_axes_span_a_grid(study):
    names = [run.name for run in study().runs]
    assert names == ["base", "bread-8-0", "bread-8-1", "bread-16-0", "bread-16-1", "more"]
    run = study().runs[2]
    assert (run.config.data.subset, run.config.data.subset_seed) == (8, 1)
    assert run.labels == {"data.subset": "8", "data.subset_seed": "1"}
    assert run.folder == Path("runs/study/bread-8-1")


def test_labelled_values_may_be_anything(study):
    paths = {1: [{"kind": "jsonl", "path": "a.jsonl"}], 2: [{"kind": "jsonl", "path": "b.jsonl"}]}
    runs = study(rows={"x": {"axes": {"data.train": paths}}}).runs
    assert [(run.name, run.config.data.train[0].path) for run in runs] == [("x-1", "a.jsonl"), ("x-2", "b.jsonl")]


def test_a_scale_replaces_what_it_names(study):
    small = study(scale="tiny")
    assert [run.name for run in small.runs] == ["base", "bread-4-0", "bread-4-1"]
    assert small.folder == Path("runs/study-tiny")
    assert small.definition.about == "Less bread."


def test_overrides_of_a_study_win_over_its_rows_and_those_of_the_command_line_over_them(study):
    rows = {"x": {"set": {"train.batch_size": 8}, "axes": {"data.subset": [8, 16]}}, "y": {"set": {"seed": 1}}}
    overrides = {"train.batch_size": 2, "data.subset": 4, "evaluate.limit": 3}
    first, second = study("evaluate.limit=5", rows=rows, overrides=overrides).runs
    assert (first.name, first.config.train.batch_size, first.config.data.subset) == ("x-4", 2, 4)
    assert (second.config.train.batch_size, second.config.seed, second.config.data.subset) == (2, 1, None)
    assert {run.config.evaluate.limit for run in (first, second)} == {5}


def test_a_scale_of_all_studies_is_merged_before_a_studys_own(study):
    Path("configs").unlink()
    shutil.copytree(ROOT / "configs", "configs", ignore=shutil.ignore_patterns("shapes"))
    Path("configs/scales/tiny.yaml").write_text("about: Flour.\noverrides: {seed: 7, data.subset_seed: [3]}\n")
    tiny = study(scale="tiny")
    assert tiny.definition.about == "Less bread."
    assert [run.name for run in tiny.runs] == ["base", "bread-4-3"]
    assert {run.config.seed for run in tiny.runs} == {7}
    assert study(scale="tiny", scales={}).definition.about == "Flour."
    assert "tiny" in tiny.definition.title


def test_null_in_a_scale_leaves_out_rows_but_is_a_value_of_a_field():
    base = {"rows": {"a": {"set": {"x": 1}}, "b": {}}, "prepare": {"p": {}}}
    top = {"rows": {"a": {"set": {"x": None}}, "b": None}, "prepare": None}
    assert merged(base, top) == {"rows": {"a": {"set": {"x": None}}}}


def test_overrides_change_every_run_and_replace_axes(study):
    opened = study(
        "optimizer.learning_rate=0.5", "data.subset=[12]", "data.subset_seed=3", "name=loaves", "run_folder=out"
    )
    assert [run.name for run in opened.runs] == ["base", "bread-12-3", "more"]
    assert {run.config.optimizer.learning_rate for run in opened.runs} == {0.5}
    assert opened.runs[0].config.data.subset is None
    assert {run.folder.parent for run in opened.runs} == {Path("out/loaves")}


def test_overrides_leave_what_another_row_wrote(study):
    runs = {run.name: run.config for run in study("model.checkpoint=mill").runs}
    assert runs["bread-8-0"].model.checkpoint == "mill"
    assert runs["more"].model.checkpoint == "runs/study/base/export"


def test_a_row_without_training_evaluates_the_model_itself(study):
    base, *others = study("evaluate.guards=[{name: flour, modes: [direct]}]").runs
    assert base.config.evaluate.guards[0].checkpoint == "baker/oven"
    assert base.config.evaluate.guards[0].name == "flour"
    assert others[0].config.evaluate.guards[0].checkpoint is None


def test_only_overrides_of_preparing_reach_what_is_prepared(study):
    opened = study("data.mode=dual", "build.similarity=0.9", prepare={"sets": SETS}, rows={"y": {}, "x": READS_SETS})
    (sets,) = opened.prepared
    assert (sets.config.build.similarity, sets.config.data.mode) == (0.9, "direct")
    assert sets.folder == Path("runs/sets")
    assert opened.runs[1].config.build is None


SETS = {"stages": ["build"], "set": {"data.train": [{"kind": "jsonl", "path": "runs/traces/traces.jsonl"}]}}
READS_SETS = {"set": {"data.train": [{"kind": "jsonl", "path": "runs/sets/dataset/loaves/all.parquet"}]}}


def test_a_teachers_address_reaches_only_what_asks_a_teacher(study):
    distill = {"stages": ["distill"], "set": {"distill.teacher.model": "baker"}}
    opened = study(
        "distill.teacher.endpoints=[http://oven]",
        "model.checkpoint=mill",
        prepare={"traces": distill, "sets": SETS},
        rows={"x": READS_SETS},
    )
    traces, sets = opened.prepared
    assert traces.config.distill.teacher.endpoints == (Masked("http://oven"),)
    assert sets.config.distill is None
    assert {run.config.model.checkpoint for run in (*opened.prepared, *opened.runs)} == {"mill"}


def test_only_what_a_run_reads_is_prepared(study):
    distill = {"stages": ["distill"], "set": {"distill.teacher.model": "baker"}}
    prepare = {"traces": distill, "sets": SETS, "other": SETS}
    opened = study(prepare=prepare, rows={"x": READS_SETS})
    assert [run.name for run in opened.prepared] == ["traces", "sets"]
    opened = study("data.train=[{kind: jsonl, path: bread.jsonl}]", prepare=prepare, rows={"x": READS_SETS})
    assert opened.prepared == ()


def test_the_documented_studies_without_a_teacher_ask_for_none(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert [run.name for run in open_study("paper/sample_efficiency").prepared] == [
        "wildguard_traces",
        "wildguard_sets",
    ]
    assert open_study("paper/sample_efficiency", None, ["data.train=[{kind: nemotron_safety}]"]).prepared == ()


def test_the_metric_is_the_studys(study):
    opened = study("metric=safety")
    assert opened.definition.metric == "safety"
    assert opened.runs[1].config == study().runs[1].config


@pytest.mark.parametrize(
    ("changes", "overrides", "words"),
    [
        ({"rows": {"x": {"set": {"data.mod": 1}}}}, (), ["row x", "data.mod", "did you mean 'mode'"]),
        ({"rows": {"x": {"after": ["y"]}}}, (), ["rows.x.after", "'y' is not an earlier row"]),
        ({"rows": {"x": {"axes": {"seed": [1, 1]}}}}, (), ["rows.x.axes", "only once"]),
        ({"rows": {"x": {"axes": {"data.train": [[]]}}}}, (), ["needs labels"]),
        ({"rows": {"x": {"stage": ["train"]}}}, (), ["unknown field", "did you mean 'stages'"]),
        ({"rows": {"x-1": {}}}, (), ["rows.x-1"]),
        ({"prepare": {"x": {}}}, (), ["prepare.x", "distill and build"]),
        ({}, ("data.subset=[8, 8]",), ["override 'data.subset=[8, 8]'", "only once"]),
        ({}, ("data.subset",), ["field=value"]),
        ({}, ("name=a/b",), ["name", "'a/b'"]),
        ({}, ("cost.mfu=2",), ["cost.mfu"]),
        ({}, ("cost.mfv=0.2",), ["did you mean 'mfu'"]),
    ],
)
def test_mistakes_are_named(study, changes, overrides, words):
    with pytest.raises(JaxguardError) as error:
        study(*overrides, **changes)
    for word in words:
        assert word in str(error.value)


def test_an_unknown_study_or_scale_is_named_with_those_there_are(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["cost", "paper/mian"]) == 2
    assert "did you mean 'paper/main'" in capsys.readouterr().err
    assert main(["cost", "paper/sample_efficiency", "--scale", "smolm"]) == 2
    assert "did you mean 'smollm'" in capsys.readouterr().err


def test_a_dry_run_prints_the_commands_and_writes_nothing(study, capsys):
    study()
    assert main(["run", "study.yaml", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 2 * 4 + 2
    assert "data.subset=16 data.subset_seed=1 name=bread-16-1 run_folder=runs/study" in lines[-3]
    assert not Path("runs").exists()


def test_values_are_written_as_the_command_line_reads_them():
    assert [written(x) for x in ("a.b", "1", None, 2e-06, True)] == ["a.b", '"1"', "null", "2e-06", "true"]
    assert [label(x) for x in (None, True, 5e-7, "a b/c")] == ["all", "true", "5e_07", "a_b_c"]
