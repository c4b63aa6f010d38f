"""The config: what it accepts, what it refuses, and what its errors name."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from jaxguard.config import READS, Config, dump, load, read_by, read_dump
from jaxguard.config.base import Schema
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.parse import check, inner_schema

ROOT = Path(__file__).parents[1]
SHIPPED = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
RECIPES = [f"{model}_{what}" for model in ("gemma4b", "llama8b") for what in ("5k", "full", "dual_5k", "direct_5k")]
SMALL = {"model": {"checkpoint": "some/model"}, "data": {"train": [{"kind": "jsonl", "path": "a.jsonl"}]}}


@pytest.fixture
def configs(tmp_path):
    """configs(name, tree or text): writes a config into a folder, and returns the folder."""

    def write(name, tree):
        text = tree if isinstance(tree, str) else yaml.safe_dump(tree)
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
        return tmp_path

    return write


def message(configs, tree, *overrides):
    with pytest.raises(JaxguardError) as error:
        load("run", overrides, configs("run", tree))
    return str(error.value)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_load(name):
    config = load(name, folder=ROOT / "configs")
    assert config.name == name
    assert (ROOT / "configs" / "policies" / f"{config.data.policy}.yaml").is_file()


def test_promised_configs_are_shipped():
    assert set(RECIPES) | {"smollm_demo", "tiny"} <= set(SHIPPED)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name):
    config = load(name, folder=ROOT / "configs")
    assert ("gemma-3-4b-it" if name.startswith("gemma4b") else "Llama-3.1-8B-Instruct") in config.model.checkpoint
    assert config.data.subset == (None if name.endswith("full") else 5000)
    mode = "dual" if "dual" in name else "direct" if "direct" in name else "reasoning"
    assert config.data.mode == mode
    recipe = (config.train.batch_size, config.train.epochs, config.optimizer.learning_rate, config.data.max_seq_len)
    assert recipe == (32, 5, 1e-6, 2048)


def test_direct_control_has_the_same_examples():
    reasoning, direct = (load(name, folder=ROOT / "configs").data for name in ("gemma4b_5k", "gemma4b_direct_5k"))
    assert reasoning.model_dump(exclude={"mode"}) == direct.model_dump(exclude={"mode"})


def test_default_name(configs):
    assert load("run", (), configs("run", SMALL)).name == "run"
    assert load("run", (), configs("run", {**SMALL, "name": "other"})).name == "other"


def test_load_by_path(configs):
    folder = configs("run", SMALL)
    assert load(str(folder / "run.yaml"), folder=Path("nowhere")).model.checkpoint == "some/model"


def test_unknown_config(configs):
    folder = configs("gemma", SMALL)
    with pytest.raises(JaxguardError) as error:
        load("gema", folder=folder)
    assert all(word in str(error.value) for word in ("'gema'", "'gemma'", str(folder)))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.atention=xla"], ["unknown field 'model.atention'", "did you mean 'attention'?", "known here"]),
        (["optimiser.learning_rate=1"], ["unknown field 'optimiser'", "did you mean 'optimizer'?"]),
        (["data.train.0.knd=jsonl"], ["'data.train.0.knd'", "did you mean 'kind'?"]),
        (["data.mode=raesoning"], ["data.mode", "'raesoning'", "did you mean 'reasoning'?"]),
        (["data.train.0.kind=wildgard"], ["data.train.0.kind", "did you mean 'wildguardmix'?"]),
        (["train.batch_size=many"], ["train.batch_size", "integer", "'many'"]),
        (["train.batch_size=2.5"], ["train.batch_size", "integer", "2.5"]),
        (["optimizer.learning_rate=fast"], ["optimizer.learning_rate", "number", "'fast'"]),
        (["optimizer.learning_rate=.inf"], ["optimizer.learning_rate", "finite"]),
        (["optimizer.learning_rate=0"], ["optimizer.learning_rate", "greater than 0"]),
        (["log.tensorboard=perhaps"], ["log.tensorboard", "'perhaps'"]),
        (["model=3"], ["model", "fields"]),
        (["learning_rate=3"], ["did you mean 'optimizer.learning_rate'?"]),
        (["data.epochs=3"], ["did you mean 'train.epochs'?"]),
        (["checkpoint=some/model"], ["checkpoint", "did you mean 'model.checkpoint'?"]),
        (["data.train=a.jsonl"], ["data.train", "list"]),
        (["data.train=[]"], ["data.train", "at least one"]),
        (["model.checkpoint=5"], ["model.checkpoint", "text", "5"]),
    ],
)
def test_bad_field(configs, overrides, words):
    text = message(configs, SMALL, *overrides)
    assert all(word in text for word in words), text
    assert len(text.splitlines()) == 1
    assert text.startswith(f"override {overrides[-1]!r}")
    assert "run.yaml" not in text


def test_all_bad_fields(configs):
    assert len(message(configs, SMALL, "seed=-1", "train.epochs=0", "model.remat=some").splitlines()) == 3


def test_missing_field(configs):
    text = message(configs, {"data": SMALL["data"]})
    assert "field 'model' is missing" in text
    assert "run.yaml" in text


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.subset=8"], ["data.subset=8", "train.batch_size=32"]),
        (["data.direct_marker=/think"], ["data.reasoning_marker", "data.direct_marker"]),
        (["data.direct_marker=''"], ["data.direct_marker", "empty"]),
        (["data.mode=dual", "data.dual_reasoning_share=1"], ["data.dual_reasoning_share=1", "data.mode=reasoning"]),
        (["data.mode=dual", "data.dual_reasoning_share=0"], ["data.mode=direct"]),
        (["data.train.0.path=null"], ["data.train.0", "jsonl needs a path"]),
        (["data.train.0.trace=one_sentence"], ["data.train.0", "jsonl has none"]),
        (["mesh.fsdp=0"], ["mesh", "fsdp must be positive"]),
        (["mesh.hosts=explicit"], ["mesh", "coordinator, processes and process"]),
        (["mesh.process=0"], ["mesh", "hosts: explicit"]),
        (["model.attention=cudnn", "model.compute_dtype=float32"], ["model.attention=cudnn", "bfloat16"]),
        (["model.attention=flash", "model.compute_dtype=float32"], ["model.attention=flash", "bfloat16"]),
        (["name=../elsewhere"], ["name", "'../elsewhere'", "folder"]),
        (["name=a\x07b"], ["name", "control characters"]),
        (["evaluate.guards=[{name: ..}]"], ["evaluate.guards.0.name", "'..'"]),
        (["evaluate.benchmarks=[{name: own, label: ../../config}]"], ["benchmarks.0.label", "'../../config'"]),
        (["data.policy=~nobody-of-this-name/x.yaml"], ["data.policy", "path"]),
    ],
)
def test_impossible_combinations(configs, overrides, words):
    text = message(configs, SMALL, "seed=1", *overrides)
    assert all(word in text for word in words), text
    assert text.startswith(tuple(f"override {override!r}" for override in overrides))


def test_an_error_of_the_file_names_the_file(configs):
    text = message(configs, {**SMALL, "train": {"epochs": 0}}, "train.batch_size=64", "seed=3")
    assert "run.yaml" in text
    assert "override" not in text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("{}/rn.yaml", ["rn.yaml", "'run.yaml'"]),
        ("{}/absent/run.yaml", ["'absent'"]),
        ("{}", ["is no YAML file"]),
        ("{}/guard", ["guard/config.yaml"]),
    ],
)
def test_an_absent_file(configs, name, words):
    folder = configs("run", SMALL)
    (folder / "guard").mkdir()
    (folder / "guard/config.yaml").touch()
    with pytest.raises(JaxguardError) as error:
        load(name.format(folder))
    assert all(word in str(error.value) for word in words), error.value


def test_text_may_hold_brackets(configs):
    folder = configs("run", SMALL)
    assert load("run", ["model.checkpoint={study}/base"], folder).model.checkpoint == "{study}/base"
    with pytest.raises(JaxguardError, match="bracket"):
        load("run", ["data.train=[{kind: jsonl"], folder)


def test_extends(configs):
    configs("base", {**SMALL, "name": "base", "train": {"epochs": 2, "batch_size": 8}})
    folder = configs(
        "run", {"extends": "base", "train": {"epochs": 3}, "data": {"train": [{"kind": "aegis2"}, {"kind": "aegis2"}]}}
    )
    config = load("run", ["train.batch_size=16"], folder)
    assert (config.train.epochs, config.train.batch_size) == (3, 16)
    assert [source.kind for source in config.data.train] == ["aegis2", "aegis2"]
    assert config.model.checkpoint == "some/model"
    assert config.name == "run", "two runs must not share a folder"


def test_extends_has_one_level(configs):
    configs("a", SMALL)
    configs("b", {"extends": "a"})
    with pytest.raises(JaxguardError) as error:
        load("c", folder=configs("c", {"extends": "b"}))
    assert all(word in str(error.value) for word in ("b.yaml", "c.yaml", "'a'"))


def test_extends_absent(configs):
    assert "no config 'absent'" in message(configs, {"extends": "absent"})


def test_overrides(configs):
    folder = configs("run", {**SMALL, "data": {"train": [{"kind": "aegis2"}, {"kind": "jsonl", "path": "b"}]}})
    config = load(
        "run",
        [
            "optimizer.learning_rate=2e-6",
            "data.train.1.path=c=d",
            "data.subset=null",
            "log.trackio=yes",
            "seed=1",
            "seed=2",
        ],
        folder,
    )
    assert config.optimizer.learning_rate == 2e-6
    assert config.data.train[1].path == "c=d"
    assert config.data.train[0].kind == "aegis2"
    assert config.data.subset is None
    assert config.log.trackio
    assert config.seed == 2


@pytest.mark.parametrize("override", ["train.epochs", "data.train.1.path=x", "data.train.first.path=x"])
def test_bad_overrides(configs, override):
    assert f"override {override!r}" in message(configs, SMALL, override)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: [", "run.yaml: not YAML"),
        ("- a\n- b\n", "expected fields, found list"),
        ("", "expected fields"),
        ("seed: 1\nseed: 2\n", "'seed' is given twice"),
    ],
)
def test_malformed_files(configs, text, words):
    assert words in message(configs, text)


def test_scientific_notation(configs):
    assert (
        load("run", (), configs("run", yaml.safe_dump(SMALL) + "optimizer:\n  epsilon: 1e-6\n")).optimizer.epsilon
        == 1e-6
    )


def test_frozen(configs):
    config = load("run", (), configs("run", SMALL))
    with pytest.raises(ValidationError):
        config.seed = 3


@given(
    seed=st.integers(0, 2**31),
    rate=st.floats(1e-12, 1, exclude_min=True),
    name=st.from_regex(r"[A-Za-z0-9_é]+", fullmatch=True),
    path=st.text(min_size=1, max_size=20).filter(lambda s: s.isprintable()),
    subset=st.none() | st.integers(32, 10**6),
)
def test_round_trip(tmp_path_factory, seed, rate, name, path, subset):
    tree = {
        "name": name,
        "seed": seed,
        "optimizer": {"learning_rate": rate},
        "model": {"checkpoint": path},
        "data": {"train": [{"kind": "jsonl", "path": path}], "subset": subset},
    }
    config = load(tree)
    file = tmp_path_factory.mktemp("dump") / "config.yaml"
    file.write_text(dump(config), encoding="utf-8")
    assert load(str(file)) == config


def test_a_run_has_few_fields():
    counted = set()

    def count(annotation):
        schema = inner_schema(annotation)
        if schema is None or schema in counted:
            return 1
        counted.add(schema)
        return sum(count(field.annotation) for field in schema.model_fields.values())

    assert sum(count(Config.model_fields[name].annotation) for name in READS["train"]) <= 65


FULL = {
    **SMALL,
    "optimizer": {"learning_rate": 1e-5},
    "distill": {"teacher": {"model": "teacher"}},
    "build": {"seeds": [1]},
    "evaluate": {"generations": 2},
    "mine": {"most": 9},
}


@pytest.mark.parametrize("stage", READS)
def test_a_stage_shows_only_what_it_reads(configs, tmp_path, stage):
    config = load("run", (), configs("run", FULL), stage)
    text = dump(config, stage)
    assert list(yaml.safe_load(text)) == [name for name in Config.model_fields if name in READS[stage]]
    (tmp_path / "again.yaml").write_text(text, encoding="utf-8")
    assert dump(load("again", (), tmp_path, stage), stage) == text


def test_every_field_is_read_by_a_stage():
    assert {name for names in READS.values() for name in names} == set(Config.model_fields)


@pytest.mark.parametrize(
    ("stage", "override", "reader"),
    [
        ("train", "mine.most=5", "mine"),
        ("distill", "optimizer.beta1=0.5", "train"),
        ("data", "build.seeds=[1]", "data build"),
    ],
)
def test_an_override_of_what_a_stage_does_not_read(configs, stage, override, reader):
    folder = configs("run", FULL)
    with pytest.raises(JaxguardError) as error:
        load("run", [override], folder, stage)
    assert all(word in str(error.value) for word in (override, stage, reader))
    assert load("run", [override], folder, reader)
    assert read_by(stage, ["seed=1", override, "data.mode=direct"]) == ["seed=1", "data.mode=direct"]


@pytest.mark.parametrize(("stage", "field"), [("evaluate", "evaluate"), ("mine", "mine"), ("data build", "build")])
def test_a_stage_fills_in_its_schema(configs, stage, field):
    folder = configs("run", SMALL)
    assert getattr(load("run", (), folder), field) is None
    assert getattr(load("run", (), folder, stage), field) is not None


def test_a_small_subset_is_a_mistake_for_training_only(configs):
    folder = configs("run", {**FULL, "data": {**SMALL["data"], "subset": 8}})
    assert load("run", (), folder, "distill").data.subset == 8
    for stage in ("train", None):
        with pytest.raises(JaxguardError):
            load("run", (), folder, stage)


def test_a_config_comes_from_a_name_a_path_a_tree_or_a_config(configs):
    folder = configs("run", SMALL)
    by_name = load("run", ["seed=2"], folder)
    assert load(folder / "run.yaml", {"seed": 2}) == by_name
    assert load({**SMALL, "name": "run"}, {"seed": 2}) == by_name
    assert load(by_name) == by_name
    assert load(load("run", (), folder), {"seed": 2}) == by_name
    assert load({"extends": "gemma4b_5k", "name": "own"}).data.subset == 5000


def test_overrides_as_a_mapping(configs):
    folder = configs("run", SMALL)
    overrides = {"train.epochs": 3, "data.train.0.path": Path("b.jsonl"), "optimizer": {"beta1": 0.5}}
    config = load("run", overrides, folder)
    assert (config.train.epochs, config.data.train[0].path, config.optimizer.beta1) == (3, "b.jsonl", 0.5)
    with pytest.raises(JaxguardError) as error:
        load("run", {"train.epoch": 3}, folder)
    assert "'train.epoch'" in str(error.value)


def test_a_bad_field_below_a_name_of_the_users_choice():
    class Item(Schema):
        size: int = 0

    class Shelf(Schema):
        items: dict[str, Item]
        more: dict[str, tuple[Item, ...]] | None = None

    with pytest.raises(JaxguardError) as error:
        check({"items": {"bread": {"sise": 1}}, "more": {"items": [{"siez": 2}]}}, Shelf, "shelf.yaml")
    lines = str(error.value).splitlines()
    assert len(lines) == 2
    for line, field in zip(lines, ("'items.bread.sise'", "'more.items.0.siez'"), strict=True):
        assert all(word in line for word in ("shelf.yaml", field, "'size'")), line


PATHS = {
    "model": {"checkpoint": "base"},
    "data": {
        "train": [{"kind": "jsonl", "path": "a.jsonl"}, {"kind": "aegis2", "path": None}],
        "policy": "rules.yaml",
    },
    "distill": {"teacher": {"model": "m"}, "prompt": "rules.yaml"},
    "evaluate": {
        "guards": [{"checkpoint": "base"}, {"name": "b", "format": "rules.yaml"}],
        "benchmarks": [{"name": "rules.yaml", "path": "a.jsonl"}],
        "validation": [{"kind": "jsonl", "path": "a.jsonl"}],
    },
    "mine": {"guard": {"checkpoint": "base"}},
    "build": {"benchmarks": [{"kind": "jsonl", "path": "a.jsonl"}]},
}


def paths_of(config):
    evaluate = config.evaluate
    return [
        config.model.checkpoint, config.data.train[0].path, config.data.policy, config.distill.prompt,
        evaluate.guards[0].checkpoint, evaluate.guards[1].format, evaluate.benchmarks[0].name, evaluate.benchmarks[0].path,
        evaluate.validation[0].path, config.mine.guard.checkpoint, config.build.benchmarks[0].path,
    ]  # fmt: skip


@pytest.fixture
def elsewhere(configs, tmp_path, monkeypatch):
    """A config with paths of every kind, beside their files, seen from a folder with files of the same names."""
    folder = configs("run", PATHS)
    (tmp_path / "cwd").mkdir()
    for place in (tmp_path, tmp_path / "cwd"):
        (place / "base").mkdir()
        (place / "wildguard").mkdir()
        (place / "a.jsonl").touch()
        (place / "rules.yaml").touch()
    monkeypatch.chdir(tmp_path / "cwd")
    return folder


def test_paths_in_a_file_are_beside_it(elsewhere):
    config = load("../run.yaml")
    assert all(Path(path).parent == Path("..") for path in paths_of(config))
    assert config.data.reasoning_marker == "/think"
    assert config.run_folder == "runs"


def test_what_is_not_beside_a_file_is_in_the_working_directory(elsewhere):
    for name in ("a.jsonl", "rules.yaml"):
        (elsewhere / name).unlink()
    (elsewhere / "base").rmdir()
    assert all(Path(path).parent == Path() for path in paths_of(load("../run.yaml")))


def test_paths_in_an_override_are_in_the_working_directory(elsewhere):
    config = load("../run.yaml", ["data.train.0.path=a.jsonl", "model.checkpoint=base"])
    assert (config.data.train[0].path, config.model.checkpoint) == ("a.jsonl", "base")


def test_names_and_absolute_paths_stay(elsewhere, tmp_path):
    tree = {"extends": "run", "data": {"policy": "wildguard", "train": [{"kind": "jsonl", "path": "/a.jsonl"}]}}
    (elsewhere / "own.yaml").write_text(yaml.safe_dump(tree))
    data = load("../own.yaml").data
    assert (data.policy, data.train[0].path) == ("wildguard", "/a.jsonl")


def test_each_file_has_its_own_paths(elsewhere, tmp_path):
    (tmp_path / "cwd/configs").mkdir()
    (tmp_path / "cwd/configs/lower.yaml").write_text(yaml.safe_dump(SMALL | {"data": PATHS["data"]}))
    (tmp_path / "cwd/configs/a.jsonl").touch()
    (elsewhere / "own.yaml").write_text(yaml.safe_dump({"extends": "lower", "data": {"policy": "rules.yaml"}}))
    data = load("../own.yaml").data
    assert (data.train[0].path, data.policy) == ("configs/a.jsonl", "../rules.yaml")


def test_what_was_dumped_is_read_as_it_is(elsewhere, tmp_path):
    config = load("../run.yaml", ["data.train.0.path=a.jsonl"])
    (elsewhere / "config.yaml").write_text(dump(config))
    assert read_dump(elsewhere / "config.yaml") == config


def test_an_installed_file_is_dumped_as_a_path_that_every_installation_finds(elsewhere):
    config = load("../run.yaml", ["data.policy=configs/policies/pool.yaml"])
    assert Path(config.data.policy).is_absolute()
    assert config.model_dump()["data"]["policy"] == "configs/policies/pool.yaml"
    (elsewhere / "config.yaml").write_text(dump(config))
    assert read_dump(elsewhere / "config.yaml") == config
