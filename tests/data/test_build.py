"""Training sets in files: what is in them, who can read them, and that the same input gives the same bytes."""

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("datasketch", reason="the search for contaminated examples needs the distill extra")
import datasets
import pyarrow.parquet
import yaml

from jaxguard.config import CONFIG_FOLDER, load
from jaxguard.config.data import SourceConfig
from jaxguard.data.__main__ import main
from jaxguard.data.build import build
from jaxguard.data.encoding import Encoder
from jaxguard.data.format.answer import parse
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.prepare import select
from jaxguard.data.sources import load_examples

COUNT = 40
BENCHMARK = "Which flour is best for a dark and heavy loaf of rye bread?"
SETS = [
    {"name": "reasoning"},
    {"name": "direct", "mode": "direct"},
    {"name": "dual", "mode": "dual"},
    {"name": "short", "sources": [{"kind": "jsonl", "path": "short.jsonl"}]},
    {"name": "mixed", "mode": "dual", "append": [{"kind": "jsonl", "path": "topics.jsonl"}]},
]


def row(i, **more):
    label = "harmful" if i % 3 == 0 else "unharmful"
    return {
        "id": f"x{i}", "source": "baker", "prompt": f"How do I bake loaf number {i}? 2024-01-0{i % 9 + 1}",
        "prompt_label": label, "categories": ["bread"], "trace": f"Loaf {i} is {label}.", **more,
    }  # fmt: skip


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def config(tmp_path, tiny_tokenizer_folder, monkeypatch):
    (tmp_path / "configs").symlink_to(CONFIG_FOLDER.resolve())
    monkeypatch.chdir(tmp_path)
    # One example is the benchmark's but for case and one word, one has no trace, one has no label for what is asked.
    contaminated = row(100, prompt=BENCHMARK.upper().replace("HEAVY", "heavyy"))
    rows = [row(0, adversarial=True), *map(row, range(1, COUNT)), contaminated, row(101, trace=None)]
    write(tmp_path / "traces.jsonl", [*rows, {"id": "y", "prompt": "?", "response": "!", "refusal_label": "refusal"}])
    write(tmp_path / "short.jsonl", [row(i, trace="Short.") for i in range(30)])
    write(tmp_path / "topics.jsonl", [row(i, policy="Speak of bread only.") for i in range(4)])
    write(tmp_path / "benchmark.jsonl", [{"id": "b7", "prompt": BENCHMARK, "prompt_label": "unharmful"}])
    (tmp_path / "traces.summary.json").write_text(json.dumps({"attempts": 77, "never_passed": {"x": {}}}))
    tree = {
        "model": {"checkpoint": str(tiny_tokenizer_folder)},
        "data": {"train": [{"kind": "jsonl", "path": "traces.jsonl"}], "policy": "aegis2", "max_seq_len": 4096},
        "build": {
            "sets": SETS,
            "subsets": [8, 16, 1000],
            "seeds": [0, 1],
            "benchmarks": [{"kind": "jsonl", "path": "benchmark.jsonl"}],
        },
    }
    (tmp_path / "sets.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "sets.yaml"


@pytest.fixture
def built(config):
    assert main(["build", "--config", str(config)]) == 0
    return config.parent / "runs/sets/dataset"


def read(folder, name):
    return load_examples(SourceConfig(kind="jsonl", path=str(folder / f"{name}.parquet")))


def test_what_is_in_each_set(built):
    names = [f"x{i}" for i in range(COUNT)]
    reasoning, direct, dual = (read(built, f"{name}/all") for name in ("reasoning", "direct", "dual"))
    assert [e.id for e in reasoning] == names
    assert all(e.trace and e.mode == "reasoning" for e in reasoning)
    assert [e.id for e in direct] == [*names, "x101"]
    assert all(e.trace is None and e.mode == "direct" for e in direct)
    assert [e.adversarial for e in direct[:3]] == [True, None, None]
    assert sum(e.mode == "reasoning" for e in dual) == round((COUNT + 1) / 2)
    assert all((e.trace is None) == (e.mode == "direct") for e in dual)
    assert {e.trace for e in read(built, "short/all")} == {"Short."}
    assert reasoning[3].prompt == "How do I bake loaf number 3? 2024-01-04"
    assert reasoning[3].categories == ("bread",)


def test_subsets_are_nested_and_hold_what_is_appended(built):
    for seed in (0, 1):
        small, large = ({e.id for e in read(built, f"reasoning/{size}_{seed}")} for size in (8, 16))
        assert len(small) == 8
        assert small < large
    assert {e.id for e in read(built, "reasoning/8_0")} != {e.id for e in read(built, "reasoning/8_1")}
    assert not (built / "reasoning/1000_0.parquet").exists()
    mixed = read(built, "mixed/8_1")
    assert len(mixed) == 12
    assert sum(e.policy is not None for e in mixed) == 4
    assert sum(e.mode == "reasoning" for e in mixed) == 6
    assert len({e.id for e in mixed}) == 12


def test_what_a_benchmark_holds_is_dropped_and_listed(built):
    listed = [json.loads(line) for line in (built / "contaminated.jsonl").read_text().splitlines()]
    assert {entry["set"] for entry in listed} == {"reasoning", "direct", "dual", "mixed"}
    assert {(entry["example_id"], entry["benchmark_id"], entry["exact"]) for entry in listed} == {("x100", "b7", False)}
    assert all(0.8 <= entry["similarity"] < 1 for entry in listed)


def test_a_benchmark_is_named(config):
    (config.parent / "bench.yaml").write_text(
        (CONFIG_FOLDER / "benchmarks/own_prompts.yaml").read_text().replace("runs/own", "benchmark")
    )
    tree = yaml.safe_load(config.read_text())
    tree["build"] |= {"benchmarks": ["bench.yaml"], "sets": [{"name": "direct", "mode": "direct"}]}
    config.write_text(yaml.safe_dump(tree))
    listed = (build(load(str(config), stage="data build")).folder / "contaminated.jsonl").read_text()
    assert (json.loads(listed)["example_id"], json.loads(listed)["benchmark"]) == ("x100", "own_prompts")


def test_the_manifest_says_where_everything_comes_from(built):
    manifest = json.loads((built / "manifest.json").read_text())
    one = manifest["sets"]["reasoning"]
    assert one["contaminated"] == 1
    what = "build.sets.reasoning.sources"
    assert one["dropped"] == {f"{what}: no trace": 1, f"{what}: no label for what the policy asks": 1}
    assert one["subsets"]["all"]["examples"] == COUNT
    assert one["sources"][0]["distilled"] == {"attempts": 77}
    assert one["sources"][0]["files"]["traces.jsonl"]
    assert set(one["subsets"]) == {"all", "8_0", "8_1", "16_0", "16_1"}


def test_datasets_reads_sets_by_name(built, tmp_path):
    rows = datasets.load_dataset(str(built), "dual_8_0", cache_dir=str(tmp_path / "cache"), split="train")
    assert rows["id"] == [e.id for e in read(built, "dual/8_0")]
    chats = datasets.load_dataset(str(built), "dual_8_0_chat", cache_dir=str(tmp_path / "cache"), split="train")
    assert [turn["role"] for turn in chats[0]["messages"]] == ["user", "assistant"]


def test_chat_messages_are_what_training_renders(built, config):
    run = load(str(config))
    encoder = Encoder.load(Path(run.model.checkpoint), run.data)
    chats = pyarrow.parquet.read_table(built / "dual/chat/all.parquet").to_pylist()
    for example, chat in zip(read(built, "dual/all"), chats, strict=True):
        user, assistant = (turn["content"] for turn in chat["messages"])
        sequence = encoder.encode(example, Mode(example.mode))
        text = encoder.tokenizer.decode(sequence.tokens)
        assert user in text
        assert text.endswith(f"{assistant}<|eot_id|>")
        assert parse(assistant, ["prompt_harm"], Mode(example.mode)).prompt_harm == example.prompt_label


def test_llamafactory_finds_its_files(built):
    info = json.loads((built / "dataset_info.json").read_text())
    assert {"dual_all", "short_16_1"} <= set(info)
    assert (
        info["dual_all"]["tags"]["system_tag"] == "system"
    )  # LlamaFactory drops rows with a role that it is not told of
    assert all((built / entry["file_name"]).is_file() for entry in info.values())


def test_a_run_trains_in_the_modes_that_the_set_says(built, config):
    source = f"data.train.0.path={built / 'dual/all.parquet'}"
    chosen = select(load(str(config), [source, "data.mode=dual", "data.validation_size=5", "train.batch_size=4"]))
    assert all(mode == example.mode for example, mode in chosen.train)
    assert {mode for _, mode in chosen.train} == {"reasoning", "direct"}


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_same_input_gives_the_same_bytes(built, config):
    before = contents(built)
    shutil.rmtree(built)
    assert main(["build", "--config", str(config)]) == 0
    assert contents(built) == before
    assert main(["build", "--config", str(config)]) == 0  # and over itself
    assert contents(built) == before
    assert [p.name for p in built.parent.iterdir() if p.is_dir()] == ["dataset"]


def test_another_version_is_kept_aside(built, config):
    before, version = contents(built), json.loads((built / "manifest.json").read_text())["version"]
    assert main(["build", "--config", str(config), "seed=1"]) == 0
    assert contents(built.with_name(f"dataset-{version}")) == before
    assert json.loads((built / "manifest.json").read_text())["version"] != version


@pytest.mark.parametrize("version", ["../../outside", "", 1, None])
def test_a_version_stays_in_the_runs_folder(built, config, capsys, version):
    outside = built.parents[2] / "outside"
    outside.mkdir()
    path = built / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": version}), encoding="utf-8")
    assert main(["build", "--config", str(config), "seed=1"]) == 2
    assert "manifest.json: version" in capsys.readouterr().err
    assert outside.is_dir()


def test_a_folder_that_cannot_be_written_to_is_named(config, capsys):
    (config.parent / "file").write_text("")
    assert main(["build", "--config", str(config), f"run_folder={config.parent / 'file'}"]) == 2
    assert str(config.parent / "file") in capsys.readouterr().err


def test_a_cut_summary_is_named(config, capsys):
    (config.parent / "traces.summary.json").write_text('{"attempts": 7')
    assert main(["build", "--config", str(config)]) == 2
    assert "traces.summary.json" in capsys.readouterr().err


def test_what_a_kill_left_is_swept_away(built, config):
    before = contents(built)
    built.rename(built.with_name("dataset.partial"))
    (built.with_name("dataset.partial") / "half").write_text("half")
    assert main(["build", "--config", str(config)]) == 0
    assert contents(built) == before
    assert not built.with_name("dataset.partial").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("build.sets.0.name=../x", "build.sets.0.name"),
        ("build.sets.0.name=dual", "'dual' is given twice"),
        ("build.sets.3.sources.0.path=absent.jsonl", "sources.0.path: no file or folder 'absent.jsonl'"),
        ("build.similarity=0.1", "build.similarity"),
        ("build.benchmarks=[own_promts]", "did you mean 'own_prompts'?"),
        ("build.benchmarks=[{kind: jsonl}]", "build.benchmarks.0: kind: jsonl needs a path"),
        ("build.benchmarks=[{kind: aegis3}]", "build.benchmarks.0.kind: "),
        ("build.benchmarks=[{kinds: aegis2}]", "'build.benchmarks.0.kinds'; did you mean 'kind'?"),
        ("data.train.0.path=benchmark.jsonl", "is empty: a benchmark holds all"),
    ],
)
def test_mistakes_are_named(config, override, words, capsys):
    extra = ["build.sets=[{name: direct, mode: direct}]"] if override.startswith("data.train") else []
    assert main(["build", "--config", str(config), override, *extra]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
