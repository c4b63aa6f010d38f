"""Every kind of file that is read, mutated: a checked value or an error that names the file, in seconds."""

import contextlib
import csv
import gc
import gzip
import io
import json
import lzma
import random
import shutil
import time
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from campaign import rounds
from hostile_templates import HOSTILE
from mutate import damaged, mutated, spelled
from report_examples import some

from jaxguard.config import load
from jaxguard.config.data import DataConfig, SourceConfig
from jaxguard.config.hardware import Hardware
from jaxguard.config.train import CheckpointConfig
from jaxguard.data.benchmarks.schema import read_benchmark
from jaxguard.data.encoding import Encoder
from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.guard_files import read_guard_files, write_guard_files
from jaxguard.data.model_card import add_scores, base_licence, base_model
from jaxguard.data.policies import load_policy
from jaxguard.data.sources import load as load_source
from jaxguard.distill.prompts import load_prompt
from jaxguard.distill.store import Attempt, open_traces, summarize
from jaxguard.evaluate.report.page import report
from jaxguard.evaluate.report.published import Published, read_published
from jaxguard.evaluate.scores.results import read_results, write_results
from jaxguard.guards.formats.definition import read_guard
from jaxguard.guards.formats.native import context_tokens
from jaxguard.guards.loading import open_predictions
from jaxguard.guards.protocol import Prediction
from jaxguard.models.hf_io.checkpoints import read_weights
from jaxguard.models.spec import read_spec
from jaxguard.models.weights import table
from jaxguard.plan.sweeps import SweepConfig
from jaxguard.study.grid import open_study
from jaxguard.train.checkpoints import open_checkpoints
from jaxguard.train.curves import draw_curves
from jaxguard.train.logging import read_metrics, rewind_metrics
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.parse import read_yaml

ROOT = Path(__file__).parents[2]
SECONDS = 10
BREAD = {"id": "1", "prompt": "How do I bake bread?", "prompt_label": "unharmful", "response": None, "trace": "Fine."}
ROWS = [
    BREAD,
    {**BREAD, "id": "2", "response": "Mix flour.", "response_label": "unharmful", "refusal_label": "compliance"},
    {**BREAD, "id": "3", "categories": ["a", "b"], "policy": "Be kind.", "mode": "direct", "source": "own"},
]
TURNS = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
KINDS = {
    "wildguardmix": {
        "prompt": "p", "response": "r", "prompt_harm_label": "harmful", "response_harm_label": None,
        "response_refusal_label": "refusal", "subcategory": "benign",
    },
    "aegis2": {
        "id": "1", "prompt": "p", "response": "r", "prompt_label": "safe", "response_label": "unsafe",
        "violated_categories": "A, B",
    },
    "nemotron_topics": {
        "system_instruction": "Speak of bread.", "conversation_history": TURNS, "last_user_message": "And cars?",
        "gt_topic_classification": "off-topic", "safety_reasoning_trace_deepseek_r1_0528": "No.",
        "prediction_gt_mismatch_deepseek_r1_0528": False,
    },
    "canttalkaboutthis": {
        "system_instruction": "Speak of bread.", "domain": "bread", "conversation": TURNS,
        "distractors": [{"bot turn": "hi", "distractor": "And cars?"}],
    },
}  # fmt: skip


def packed_lines(rows, pack):
    return pack("".join(spelled(row) + "\n" for row in rows).encode("utf-8", "surrogatepass"))


def as_parquet(rows):
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def as_csv(rows):
    text = io.StringIO()
    writer = csv.writer(text)
    cells = [row.values() if isinstance(row, dict) else (row,) for row in rows]
    writer.writerows(
        [list(rows[0]) if isinstance(rows[0], dict) else ["x"], *([str(cell) for cell in row] for row in cells)]
    )
    return text.getvalue().encode("utf-8", "surrogatepass")


def sealed(line, rng):
    """A store's line, mutated with a checksum that fits."""
    tree = mutated(json.loads(line), rng)
    name, body = (
        next(((k, v) for k, v in tree.items() if k != "crc32"), ("record", {}))
        if isinstance(tree, dict)
        else ("record", tree)
    )
    raw = spelled(body).encode("utf-8", "surrogatepass")
    return b'{"crc32": %d, "%b": %b}\n' % (zlib.crc32(raw), name.encode("utf-8", "replace"), raw)


def with_template(config, rng):
    """A tokenizer's config whose chat template hangs, or is damaged."""
    template = config["chat_template"]
    at, size = rng.randrange(len(template)), rng.choice((1, 4, 20))
    hostile = rng.choice((*HOSTILE.values(), ""))
    template = (
        hostile + template
        if hostile
        else template[:at] + rng.choice(("", template[at : at + size] * 2)) + template[at + size :]
    )
    return json.dumps(config | {"chat_template": template}).encode()


def mutate(path, data, rng):
    """A mutated copy of a file's bytes: of its tree, where it has one, or of the bytes."""
    name, tree_wanted = path.name, rng.random() < 0.7
    with contextlib.suppress(
        ValueError, yaml.YAMLError, UnicodeDecodeError, lzma.LZMAError, EOFError, OSError, pyarrow.ArrowException
    ):
        if not tree_wanted:
            return damaged(data, rng)
        if name == "tokenizer_config.json" and rng.random() < 0.4:
            return with_template(json.loads(data), rng)
        if name.endswith((".json", "metadata")):
            return spelled(mutated(json.loads(data), rng)).encode("utf-8", "surrogatepass")
        if name.endswith(".yaml"):
            tree = mutated(yaml.safe_load(data), rng)
            return (spelled(tree) if rng.random() < 0.5 else yaml.safe_dump(tree)).encode("utf-8", "surrogatepass")
        if name.endswith(".md"):
            _, front, rest = data.decode().split("---\n", 2)
            return f"---\n{spelled(mutated(yaml.safe_load(front), rng))}\n---\n{rest}".encode("utf-8", "surrogatepass")
        if "attempts" in name or "predictions" in name:
            lines = data.splitlines(keepends=True)
            i = rng.randrange(len(lines))
            return b"".join([*lines[:i], sealed(lines[i], rng), *lines[i + 1 :]])
        if ".jsonl" in name:
            unpack, pack = {".gz": (gzip.decompress, gzip.compress), ".xz": (lzma.decompress, lzma.compress)}.get(
                path.suffix, (bytes, bytes)
            )
            rows = [json.loads(line) for line in unpack(data).splitlines()]
            i = rng.randrange(len(rows))
            rows[i] = mutated(rows[i], rng)
            return packed_lines(rows, pack)
        if name.endswith(".parquet"):
            rows = pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()
            column = rng.choice(list(rows[0]))
            value = rng.choice([1, 1.5, float("nan"), True, b"\xff", "", "x" * 1000, [1], {"a": 1}, ["a", None], None])
            return as_parquet([{**row, column: value} for row in rows])
        if name.endswith(".csv"):
            return as_csv([mutated(next(iter(csv.DictReader(io.StringIO(data.decode())))), rng)])
        if name.endswith(".safetensors"):
            size = int.from_bytes(data[:8], "little")
            header = spelled(mutated(json.loads(data[8 : 8 + size]), rng)).encode("utf-8", "surrogatepass")
            return len(header).to_bytes(8, "little") + header + data[8 + size :]
    return damaged(data, rng)


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_checkpoint, tiny_files):
    """A folder with every kind of file, as jaxguard writes it or takes it from others."""
    folder = tmp_path_factory.mktemp("world")
    config = load(str(tiny_files(folder)))
    shutil.copytree(tiny_checkpoint, folder / "checkpoint")
    (folder / "checkpoint" / "README.md").write_text(
        "---\nlicense: mit\nbase_model: a/b\ntags: [x]\n---\n# Bread\n", encoding="utf-8"
    )
    write_guard_files(folder / "checkpoint", config, ())
    for name, pack in (("rows.jsonl", bytes), ("rows.jsonl.gz", gzip.compress), ("rows.jsonl.xz", lzma.compress)):
        (folder / name).write_bytes(packed_lines(ROWS, pack))
    (folder / "rows.json").write_text(json.dumps(ROWS), encoding="utf-8")
    (folder / "rows.parquet").write_bytes(as_parquet([{**BREAD, "id": i, "categories": ["a"]} for i in range(3)]))
    (folder / "rows.csv").write_bytes(
        as_csv([{"id": 1, "prompt": "How?", "prompt_label": "harmful", "categories": "a, b"}])
    )
    for kind, row in KINDS.items():
        (folder / f"{kind}.jsonl").write_bytes(packed_lines([row] * 3, bytes))
    for kind, path in (
        ("policy", "policies/aegis2"),
        ("guard", "guards/granite_guardian"),
        ("benchmark", "benchmarks/beavertails"),
        ("prompt", "prompts/wildguard"),
        ("sweep", "sweeps/scaling"),
        ("hardware", "hardware/targets"),
        ("published", "published/paper"),
    ):
        source = ROOT / "configs" / f"{path}.yaml"
        source = source if source.is_file() else sorted(source.parent.glob("*.yaml"))[0]
        shutil.copyfile(source, folder / f"{kind}.yaml")
    (folder / "study.yaml").write_text(yaml.safe_dump({
        "title": "Bread", "config": "tiny.yaml", "set": {"train.max_steps": 1}, "metric": "own", "cost": {"devices": 1},
        "rows": {"base": {"stages": ["train"]}, "more": {"axes": {"seed": [0, 1]}, "after": ["base"], "series": "more"}},
        "curve": {"axis": "seed", "label": "loaves"}, "scales": {"tiny": {"about": "Less.", "rows": {"more": None}}},
    }), encoding="utf-8")  # fmt: skip
    records = [{"step": i, "loss": 1 / i, "validation/loss": 0.5, "speed": {"mfu": 0.1}} for i in range(1, 5)]
    (folder / "metrics.jsonl").write_bytes(packed_lines(records, bytes))
    write_results(some(), folder / "results.json")
    attempt = Attempt("1", 0, 0, "Fine.", "Prompt harm: unharmful", "stop", {}, 1, 2, 0.5, "2026-01-01", 0)
    with open_traces(folder / "traces", {"teacher": "t"}, {}) as store:
        store.append(attempt)
        store.append(Attempt("2", 0, 0, "", "", "length", {"cut": "short"}, 1, 2, 0.5, "2026-01-01", 0))
    with open_predictions(folder / "predictions.jsonl", {"guard": "g"}) as predictions:
        predictions.append(Prediction("1", {"prompt_harm": (1, 0)}, {"prompt_harm": 0.5}, ("a", "b")))
    with open_checkpoints(folder / "checkpoints", CheckpointConfig(), "model") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, STATE)
    return folder


STATE = {"weights": {"a": jnp.arange(12.0).reshape(3, 4), "b": jnp.ones(3)}, "count": jnp.zeros((), jnp.int32)}


def rows_of(kind):
    def read(path):
        loaded = load_source(SourceConfig(kind=kind, path=str(path)))
        for example in loaded.examples:
            json.dumps(example.to_json(), ensure_ascii=False).encode()

    return read


def encode(path):
    encoder = Encoder.load(path.parent, DataConfig(train=(SourceConfig(kind="jsonl", path="x"),), policy="aegis2"))
    encoder.encode(Example("1", "s", "How?", prompt_label="harmful", trace="Because."), Mode.REASONING)


def weights(path):
    folder = path.parent
    read_weights(folder, read_spec(folder))


def spec(path):
    sizes = read_spec(path.parent)
    assert sizes.fingerprint
    assert all(weight.hf_shape(sizes) for weight in table(sizes))
    context_tokens(path.parent)


def card(path):
    base_licence(path.parent)
    base_model(str(path.parent), path.parent)
    add_scores(path.parent, [])


def results(path):
    report(read_results(path), read_published())


def metrics(path):
    read_metrics(path)
    draw_curves(path, path.with_name("curves.png"), "$\\frac{x$")
    rewind_metrics(path, 2)


def traces(path):
    with open_traces(path.parent, {"teacher": "t"}, {}):
        summarize(path.parent, {"1": "", "2": ""})


def predictions(path):
    with open_predictions(path, {"guard": "g"}) as opened:
        json.dumps({name: each.verdicts for name, each in opened.answers.items()})


def checkpoint(path):
    folder = (
        path.parents[2] if path.parent.name == "about" else next(p for p in path.parents if p.name == "checkpoints")
    )
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), STATE)
    with open_checkpoints(folder, CheckpointConfig(), "model") as checkpoints:
        restored = checkpoints.restore(abstract)
    if restored:
        assert all((a == b).all() for a, b in zip(jax.tree.leaves(restored[1]), jax.tree.leaves(STATE), strict=True))


READERS = {
    "tiny.yaml": lambda path: load(str(path)),
    "policy.yaml": lambda path: load_policy(str(path)),
    "guard.yaml": read_guard,
    "benchmark.yaml": lambda path: read_benchmark(str(path)),
    "prompt.yaml": lambda path: load_prompt(str(path)),
    "sweep.yaml": lambda path: read_yaml(path, SweepConfig),
    "hardware.yaml": lambda path: read_yaml(path, Hardware),
    "published.yaml": lambda path: read_yaml(path, Published),
    "study.yaml": lambda path: (open_study(str(path)), open_study(str(path), "tiny")),
    "checkpoint/config.yaml": lambda path: read_guard_files(path.parent),
    "checkpoint/jaxguard.json": lambda path: read_guard_files(path.parent),
    "checkpoint/config.json": spec,
    "checkpoint/generation_config.json": encode,
    "checkpoint/tokenizer.json": encode,
    "checkpoint/tokenizer_config.json": encode,
    "checkpoint/model.safetensors": weights,
    "checkpoint/README.md": card,
    **dict.fromkeys(
        (f"rows.{kind}" for kind in ("jsonl", "jsonl.gz", "jsonl.xz", "json", "parquet", "csv")), rows_of("jsonl")
    ),
    **{f"{kind}.jsonl": rows_of(kind) for kind in KINDS},
    "metrics.jsonl": metrics,
    "results.json": results,
    "traces/attempts.jsonl": traces,
    "predictions.jsonl": predictions,
    "checkpoints/2": checkpoint,
}
SLOW = {
    "checkpoint/tokenizer.json": 3,
    "checkpoint/model.safetensors": 2,
    "results.json": 10,
    "metrics.jsonl": 3,
    "checkpoints/2": 3,
}
"""How many times fewer rounds a reader gets that takes long."""


@pytest.fixture(autouse=True)
def _nothing_left():
    """What Orbax's other reads of a damaged checkpoint left, unheard, is freed here, not in the middle of another test."""
    yield
    gc.collect()


@pytest.mark.parametrize("name", READERS)
@pytest.mark.filterwarnings("ignore")
def test_a_mutated_file_is_read_or_named(world, tmp_path, name, monkeypatch):
    monkeypatch.chdir(ROOT)
    rng, folder, read = random.Random(name), tmp_path / "world", READERS[name]
    top = name.partition("/")[0]
    copy = shutil.copytree if (world / top).is_dir() else shutil.copyfile
    accepted, messages = 0, []
    folder.mkdir()
    for support in ("tiny.yaml", "train.jsonl", "lamps.yaml"):
        shutil.copyfile(world / support, folder / support)
    for number in range(max(3, rounds(6, 150) // SLOW.get(name, 1))):
        if number == 0 or copy is shutil.copytree or name.endswith((".jsonl", ".md")):
            shutil.rmtree(folder / top, ignore_errors=True)
            copy(world / top, folder / top)
        path = rng.choice(
            sorted(p for p in folder.glob(f"{name}/**/*" if name == "checkpoints/2" else name) if p.is_file())
        )
        data = (world / path.relative_to(folder)).read_bytes()
        path.write_bytes(data if number == 0 else mutate(path, data, rng))
        start = time.monotonic()
        try:
            read(path)
            accepted += 1
        except JaxguardError as error:
            messages.append(str(error))
        except BaseException as error:
            raise AssertionError(f"{type(error).__name__}: {error}; {path}: {path.read_bytes()[:3000]!r}") from error
        assert time.monotonic() - start < SECONDS, path.read_bytes()[:3000]
        assert number or accepted, f"the original is refused: {messages}"
    assert not [message[:300] for message in messages if len(message) > 500_000]
