"""metrics.jsonl goes on exactly, and what is shown is what was logged."""

import io
import json
import math
import struct
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboardX.proto.event_pb2 import Event

from jaxguard.config import Config, load
from jaxguard.train.curves import draw_curves
from jaxguard.train.logging import RunLog, distinct, read_metrics, rewind_metrics
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.terminal import Console


def config_with(**log: Any) -> Config:
    tree = {
        "name": "tiny",
        "model": {"checkpoint": "somewhere"},
        "data": {"train": [{"kind": "jsonl", "path": "a.jsonl"}]},
        "log": {"tensorboard": False, **log},
    }
    return load(tree)


def plain_console() -> Console:
    return Console(file=io.StringIO(), width=80)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def open_log(folder: Path, step: int | None = None, total: int = 10, **settings: Any) -> RunLog:
    return RunLog(folder, config_with(**settings), total, step, plain_console())


def train(folder: Path, start: int | None, until: int, total: int = 10) -> None:
    with open_log(folder, start, total) as log:
        if start is None:
            log.log(0, {"validation/direct/loss": 2.0})
        for step in range((start or 0) + 1, until + 1):
            log.log(step, {"loss": 1 / step, "learning_rate": step * 1e-7}, {"seconds": step + until / 7})
            if step % 4 == 0:
                log.log(step, {"validation/direct/loss": 1 / 3 / step})


def without_speed(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "speed"} for record in read_metrics(path)]


def test_interrupted_run_leaves_the_same_records(tmp_path: Path) -> None:
    for name in ("straight", "interrupted"):
        (tmp_path / name).mkdir()
    train(tmp_path / "straight", None, 10)
    train(tmp_path / "interrupted", None, 3)  # no checkpoint yet: starts anew
    train(tmp_path / "interrupted", None, 7)
    with (tmp_path / "interrupted" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    train(tmp_path / "interrupted", 4, 10)
    straight, interrupted = (without_speed(tmp_path / name / "metrics.jsonl") for name in ("straight", "interrupted"))
    assert straight == interrupted
    assert len(straight) == 13


@pytest.mark.parametrize("half", ["", '{"step": 9', '{"step": 9, "loss": 1.0}', "\ufffd\x00\x00"])
def test_rewind_keeps_lines_byte_for_byte(tmp_path: Path, half: str) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [f'{{"step": {n},   "loss": 1.{n}0}}\n' for n in (0, 4, 4, 5, 6)]
    path.write_text("".join(lines) + half)
    assert len(read_metrics(path)) == 5
    rewind_metrics(path, 4)
    assert path.read_text() == "".join(lines[:3])
    rewind_metrics(path, None)
    assert path.read_text() == ""


@pytest.mark.parametrize("value", ["{}", '{"a": 1}', "[1]", '"x"', "null"])
def test_a_metric_that_is_no_number_is_named(tmp_path: Path, value: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "loss": "NaN", "speed": {{"mfu": 0.1}}}}\n{{"step": 2, "loss": {value}}}\n')
    with pytest.raises(JaxguardError, match=r"metrics.jsonl, line 2: .*loss"):
        read_metrics(path)


def test_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(JaxguardError, match=r"metrics\.jsonl, line 2: not JSON"):
        rewind_metrics(path, 2)
    assert path.read_text().count("\n") == 3


@given(st.lists(st.floats(width=32) | st.floats(), min_size=1, max_size=5))
def test_floats_are_read_back_exactly(tmp_path_factory: pytest.TempPathFactory, values: list[float]) -> None:
    folder = tmp_path_factory.mktemp("run")
    with open_log(folder) as log:
        log.log(1, {str(n): np.float64(v) for n, v in enumerate(values)})
    text = (folder / "metrics.jsonl").read_text()
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    (record,) = read_metrics(folder / "metrics.jsonl")
    for n, value in enumerate(values):
        back = record[str(n)]
        assert struct.pack("d", back) == struct.pack("d", value) or (math.isnan(back) and math.isnan(value))


def test_lines_are_flushed(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.log(1, {"loss": 1.5}, {"mfu": 0.25})
        assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 1.5, "speed": {"mfu": 0.25}}\n'


def test_only_process_0_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jax.process_index", lambda: 1)
    with open_log(tmp_path, tensorboard=True) as log:
        log.log(1, {"loss": 1.0})
        log.print("nothing")
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_hides_repeated_steps(tmp_path: Path) -> None:
    for start, until in ((None, 3), (2, 4)):
        with open_log(tmp_path, start, tensorboard=True) as log:
            for step in range((start or 0) + 1, until + 1):
                log.log(step, {"loss": float(step)}, {"mfu": 0.5})
    events = []
    for path in sorted((tmp_path / "tensorboard").iterdir(), key=lambda p: p.stat().st_mtime):
        raw, at = path.read_bytes(), 0
        while at < len(raw):
            (size,) = struct.unpack_from("<Q", raw, at)
            events.append(Event.FromString(raw[at + 12 : at + 12 + size]))
            at += size + 16
    logged = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
    assert [(s, v) for s, tag, v in logged if tag == "loss"] == [(1, 1.0), (2, 2.0), (3, 3.0), (3, 3.0), (4, 4.0)]
    assert sum(tag == "speed/mfu" for _, tag, _ in logged) == 5
    starts = [e.step for e in events if e.HasField("session_log")]
    assert starts[-1] == 3  # the second start hides what the first logged from step 3 on


def test_trackers_follow_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []

    def fake(name: str) -> types.ModuleType:
        module = types.ModuleType(name)
        started = types.SimpleNamespace(
            log=lambda values, step=None: calls.append((f"{name}.log", (values, step))),
            define_metric=lambda pattern, step_metric: calls.append((f"{name}.metric", (pattern, step_metric))),
            finish=lambda: calls.append((f"{name}.finish", None)),
        )

        def init(**kwargs: Any) -> Any:
            calls.append((f"{name}.init", kwargs))
            return started

        module.init = init  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
        return module

    fake("wandb"), fake("trackio")
    for start in (None, 1):
        with open_log(tmp_path, start, wandb=True, trackio=True, project="guards") as log:
            log.log(2, {"loss": 1.5, "bad": math.nan})
    inits = [kwargs for name, kwargs in calls if name == "wandb.init"]
    assert inits[0]["id"] == inits[1]["id"]
    assert all(
        k["project"] == "guards" and k["config"]["name"] == "tiny" for name, k in calls if name.endswith(".init")
    )
    assert ("wandb.log", ({"step": 2, "loss": 1.5}, None)) in calls
    assert ("trackio.log", ({"loss": 1.5}, 2)) in calls
    assert sum(name.endswith("finish") for name, _ in calls) == 4


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_missing_tracker_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(JaxguardError, match=rf"pip install '{name}>=.*', or set log.{name}=false"):
        open_log(tmp_path, **{name: True})


def test_steps_and_validations_are_printed(tmp_path: Path) -> None:
    console = plain_console()
    with RunLog(tmp_path, config_with(), 3, None, console) as log:
        speed = {"seconds": 1.0, "tokens_per_second": 12345.6, "examples_per_second": 32.1, "mfu": 0.4123}
        log.log(2, {"loss": 0.5})
        log.log(2, {"validation/loss": 0.25, "validation/direct/loss": 0.25, "validation/direct/prompt_harm_f1": 0.5})
        log.log(3, {"loss": 0.5, "learning_rate": 1e-6}, speed)
        log.log(3, {"validation/loss": 0.125})
    validation, step = shown(console).splitlines()
    assert step.startswith("tiny 3/3  loss 0.5000  lr 1.00e-06  12,346 tokens/s  32.1 examples/s  MFU 41.2%")
    assert validation == "step 2/3  validation: loss 0.2500  prompt_harm_f1 0.5000"


@pytest.mark.parametrize(
    ("names", "kept"),
    [
        ("loss direct/loss direct/prompt_harm_f1 direct/harm_f1", "loss prompt_harm_f1"),
        ("loss direct/loss direct/response_refusal_f1", "loss response_refusal_f1"),
        (
            "loss direct/loss direct/prompt_harm_f1 direct/response_harm_f1 direct/harm_f1 direct/harm_auprc",
            "loss prompt_harm_f1 response_harm_f1 harm_f1 harm_auprc",
        ),
        (
            "loss direct/loss direct/prompt_harm_f1 direct/harm_f1 reasoning/loss reasoning/prompt_harm_f1",
            "loss direct/loss direct/prompt_harm_f1 reasoning/loss reasoning/prompt_harm_f1",
        ),
        ("direct/loss", "loss"),
    ],
)
def test_no_metric_is_shown_twice(names: str, kept: str) -> None:
    assert list(distinct(dict.fromkeys(names.split(), 0.5))) == kept.split()


def test_curves_are_drawn_from_the_record(tmp_path: Path) -> None:
    train(tmp_path, None, 10)
    picture = tmp_path / "curves.png"
    assert draw_curves(tmp_path / "metrics.jsonl", picture, "tiny")
    for title in ("$\\frac{x$", "$$", "<b>$x^2$ \\$"):  # no mathematics
        assert draw_curves(tmp_path / "metrics.jsonl", picture, title)
    raw = picture.read_bytes()
    assert raw.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", raw[16:24])
    assert width > 3 * 400  # three panels in a row: loss, learning rate, validation loss
    assert height > 300
    assert [p.name for p in tmp_path.glob("*.png*")] == ["curves.png"]


def test_curves_leave_out_what_is_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": "NaN"}\n{"step": 2, "loss": "-Infinity"}\n')
    assert not draw_curves(path, tmp_path / "curves.png")
    path.write_text(path.read_text() + '{"step": 3, "loss": 0.5, "speed": {"mfu": 1.0}}\n')
    assert draw_curves(path, tmp_path / "curves.png")
