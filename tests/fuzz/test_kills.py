"""SIGKILLs at random moments of training, export, building data, distillation and evaluation: what is finished in the end has the
bits of a run that nobody disturbed, and nothing half-written stays.
"""

import asyncio
import json
import multiprocessing
import os
import queue
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from campaign import FULL
from faulty_server import serve
from kill_targets import command, export
from safetensors.numpy import load_file, save_file

pytestmark = [] if FULL else [pytest.mark.slow]  # a kill costs a start of JAX
KILLS = {"train": 20, "reinforce": 20, "export": 15, "build": 15, "distill": 15, "evaluate": 15}
"""100 of them."""
PATIENCE = 300
"""Seconds that a process may take on a busy machine."""
IMPORTED = [f"jaxguard.{name}.__main__" for name in ("train", "reinforce", "data", "distill", "evaluate")] + [
    "jaxguard.train.loop", "jaxguard.reinforce.run", "jaxguard.data.build", "jaxguard.distill.run", "jaxguard.evaluate.run",
    "jaxguard.guards.backends.jax",
    "datasketch", "pyarrow.parquet", "transformers", "kill_targets",
]  # fmt: skip


@dataclass
class Job:
    """What to start in a folder, and the bits of its result; `begin` copies the inputs there."""

    target: Callable[..., None]
    arguments: Callable[[Path], tuple[Any, ...]]
    begin: Callable[[Path], object]
    result: Callable[[Path], Any]


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Processes that have imported everything, and compile each program once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1")
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("programs")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        yield context


def start(processes: Any, job: Job, folder: Path) -> Any:
    process = processes.Process(target=job.target, args=(*job.arguments(folder), str(folder / "log")))
    process.start()
    return process


def finish(processes: Any, job: Job, folder: Path) -> float:
    """Run to the end; the seconds that it took."""
    begun = time.monotonic()
    process = start(processes, job, folder)
    process.join(PATIENCE)
    assert process.exitcode == 0, (folder / "log").read_text()
    return time.monotonic() - begun


def attack(processes: Any, job: Job, tmp_path: Path, kills: int, seed: str) -> None:
    """Kill so many processes of a job, each at a moment of its own; whenever one got to its end, compare and begin again."""
    moments, whole = random.Random(seed), tmp_path / "whole"
    job.begin(whole)
    finish(processes, job, whole)  # compiles
    expected, folder, killed = job.result(whole), tmp_path / "0" / "whole", 0
    job.begin(folder)
    seconds = finish(processes, job, folder)
    assert job.result(folder) == expected
    for attempt in range(1, 20 * kills):
        if job.result(folder) is not None:
            folder = tmp_path / str(attempt) / "whole"
            job.begin(folder)
        process = start(processes, job, folder)
        process.join(moments.random() * seconds)
        process.kill()
        process.join(PATIENCE)
        assert process.exitcode in (0, -signal.SIGKILL), (folder / "log").read_text()
        killed += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0:
            assert job.result(folder) == expected
        if killed == kills:
            break
    assert killed == kills
    finish(processes, job, folder)
    assert job.result(folder) == expected


def files(folder: Path, *left_out: str) -> dict[str, bytes] | None:
    """Every file of a folder; None where it is not there."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in left_out)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths} if paths else None


def without(tree: Any, *names: str) -> Any:
    """A plain tree without the fields that tell the time."""
    match tree:
        case dict():
            return {key: without(value, *names) for key, value in tree.items() if key not in names}
        case list():
            return [without(value, *names) for value in tree]
        case _:
            return tree


def records(path: Path, *names: str) -> list[Any]:
    return sorted((without(json.loads(line), *names) for line in path.read_text().splitlines()), key=json.dumps)


def count(kind: str) -> int:
    return KILLS[kind] if FULL else 2


def write_rows(path: Path, number: int, labels: Sequence[str] = ("harmful", "unharmful")) -> None:
    rows = [
        {
            "id": f"x{i}",
            "prompt": f"How do I bake loaf {i}?",
            "prompt_label": labels[i % len(labels)],
            "trace": f"Loaf {i} it is, as asked.",
        }
        for i in range(number)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_training(processes, tiny_files, tmp_path):
    """With its export: weights, predictions and metrics, all of whose bits a config decides."""

    def result(folder):
        run = folder / "runs/tiny"
        if not (run / "export/jaxguard.json").is_file():
            return None
        assert not list(run.glob(".export*/**/*.safetensors"))
        metrics = [without(json.loads(line), "speed") for line in (run / "metrics.jsonl").read_text().splitlines()]
        return files(run / "export"), files(run / "validation_predictions"), metrics

    job = Job(
        command,
        lambda folder: ("jaxguard.train.__main__", ["--config", str(folder / "tiny.yaml")]),
        lambda folder: (folder.mkdir(parents=True), tiny_files(folder)),
        result,
    )
    attack(processes, job, tmp_path, count("train"), "train")


def test_reinforcement(processes, tiny_files, tmp_path):
    """Answers, rewards, weights and metrics; in direct mode all verdicts are scored, in reasoning mode answers are sampled."""

    def result(folder):
        run = folder / "runs/tiny"
        if not (run / "export/jaxguard.json").is_file():
            return None
        metrics = [without(json.loads(line), "speed") for line in (run / "metrics.jsonl").read_text().splitlines()]
        return files(run / "export"), files(run / "rollouts"), metrics

    overrides = [
        "train.objective.kind=grpo", "reinforce.answers=2", "reinforce.max_tokens=8", "reinforce.reward.kind=probability",
        "reinforce.updates=2", "train.max_steps=6", "data.max_seq_len=640",
    ]  # fmt: skip
    job = Job(
        command,
        lambda folder: ("jaxguard.reinforce.__main__", ["--config", str(folder / "tiny.yaml"), *overrides]),
        lambda folder: (folder.mkdir(parents=True), tiny_files(folder)),
        result,
    )
    attack(processes, job, tmp_path, count("reinforce"), "reinforce")


def test_export(processes, tiny_checkpoint, tmp_path):
    """Of weights large enough to be caught half-written."""
    source = tmp_path / "source"
    shutil.copytree(tiny_checkpoint, source)
    config = json.loads((source / "config.json").read_text())
    size = 2_000_000 // 32
    tensors = load_file(source / "model.safetensors")
    noise = np.random.default_rng(0).normal(size=(size, 32)).astype(np.float32)
    tensors |= {"model.embed_tokens.weight": noise, "lm_head.weight": noise}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    (source / "config.json").write_text(json.dumps(config | {"vocab_size": size}))

    def result(folder):
        whole = files(folder / "export")
        if whole is not None:
            assert sorted(path.name for path in folder.iterdir() if not list(path.glob(".lock"))) == ["export", "log"]
            assert not list(folder.glob(".*/**/*.safetensors"))
        return whole

    job = Job(
        export,
        lambda folder: (str(source), str(folder / "export")),
        lambda folder: folder.mkdir(parents=True),
        result,
    )
    attack(processes, job, tmp_path / "runs", count("export"), "export")


def test_building_data(processes, tiny_tokenizer_folder, tmp_path):
    pytest.importorskip("datasketch")

    def begin(folder):
        folder.mkdir(parents=True)
        write_rows(folder / "rows.jsonl", 60)
        tree = {
            "name": "built",
            "run_folder": str(folder / "runs"),
            "model": {"checkpoint": str(tiny_tokenizer_folder)},
            "data": {
                "train": [{"kind": "jsonl", "path": str(folder / "rows.jsonl")}],
                "policy": "aegis2",
                "max_seq_len": 4096,
            },
            "build": {"subsets": [8, 16]},
        }
        (folder / "built.yaml").write_text(yaml.safe_dump(tree))

    def result(folder):
        return files(folder / "runs/built/dataset") if (folder / "runs/built/dataset").is_dir() else None

    job = Job(
        command,
        lambda folder: ("jaxguard.data.__main__", ["build", "--config", str(folder / "built.yaml")]),
        begin,
        result,
    )
    attack(processes, job, tmp_path, count("build"), "build")


@contextmanager
def teacher() -> Iterator[str]:
    """An OpenAI-style server in a thread of its own; the value is its address."""
    urls: queue.Queue[tuple[str, asyncio.AbstractEventLoop, asyncio.Event]] = queue.Queue()

    async def run() -> None:
        end = asyncio.Event()
        async with serve(lambda i: "", keep=False) as server:
            urls.put((server.url, asyncio.get_running_loop(), end))
            await end.wait()

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    url, loop, end = urls.get(timeout=PATIENCE)
    try:
        yield url
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join()


def test_distillation(processes, tiny_tokenizer_folder, tmp_path):
    with teacher() as url:

        def begin(folder):
            folder.mkdir(parents=True)
            write_rows(folder / "rows.jsonl", 200, ("unharmful",))
            tree = {
                "name": "traces",
                "run_folder": str(folder / "runs"),
                "model": {"checkpoint": str(tiny_tokenizer_folder)},
                "data": {"train": [{"kind": "jsonl", "path": str(folder / "rows.jsonl")}], "policy": "aegis2"},
                "distill": {"teacher": {"model": "teacher", "endpoints": [url], "concurrency": 2}},
            }
            (folder / "traces.yaml").write_text(yaml.safe_dump(tree))

        def result(folder):
            run = folder / "runs/traces"
            if not (run / "traces.summary.json").is_file():
                return None
            return (run / "traces.jsonl").read_bytes(), (run / "traces.jsonl").read_text().count("\n")

        job = Job(
            command,
            lambda folder: ("jaxguard.distill.__main__", ["--config", str(folder / "traces.yaml")]),
            begin,
            result,
        )
        attack(processes, job, tmp_path, count("distill"), "distill")


def test_evaluation(processes, tiny_files, tiny_checkpoint, tmp_path):
    """Predictions and scores but for the seconds that they took."""
    clocks = ("seconds", "scoring", "wall", "wait", "finished", "cost")

    def begin(folder):
        folder.mkdir(parents=True)
        shipped = Path(__file__).parents[2] / "configs/benchmarks/own_prompts.yaml"
        benchmarks = [{"name": str(shipped), "path": str(folder / "train.jsonl")}]
        guards = [{"checkpoint": str(tiny_checkpoint), "modes": ["direct"]}]
        tiny_files(
            folder, evaluate={"benchmarks": benchmarks, "guards": guards, "generations": 2, "batch": 4, "resamples": 10}
        )

    def result(folder):
        run = folder / "runs/tiny/evaluate"
        if not (run / "report.html").is_file():
            return None
        (stored,) = run.glob("predictions/**/*.jsonl")
        scores = without(json.loads((run / "results.json").read_text()), *clocks)
        return records(stored, "crc32", *clocks), scores

    job = Job(
        command,
        lambda folder: ("jaxguard.evaluate.__main__", ["--config", str(folder / "tiny.yaml")]),
        begin,
        result,
    )
    attack(processes, job, tmp_path, count("evaluate"), "evaluate")
