"""The package's own names: what `import jaxguard` offers, and what it costs."""

import asyncio
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

import jaxguard
from jaxguard.config import Config
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.threads import outside_event_loop

CONFIG = {"name": "own", "model": {"checkpoint": "x"}, "data": {"train": [{"kind": "jsonl", "path": "a.jsonl"}]}}
STAGES = {
    "build_data": "jaxguard.data.build.build",
    "distill": "jaxguard.distill.run.distill",
    "evaluate": "jaxguard.evaluate.run.evaluate",
    "mine": "jaxguard.mine.run.mine",
    "plan": "jaxguard.plan.run.plan",
    "train": "jaxguard.train.loop.train",
}


def python(code):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=Path(jaxguard.__file__).parents[1], check=True, capture_output=True, text=True)


def test_importing_loads_nothing_heavy():
    heavy = ("jax", "transformers", "pydantic", "numpy", "rich")
    python(f"import sys, jaxguard; sys.exit(any(name in sys.modules for name in {heavy}))")


def test_every_name_exists():
    assert set(dir(jaxguard)) == {*jaxguard.__all__, "__version__"}
    for name in jaxguard.__all__:
        assert callable(getattr(jaxguard, name))
    with pytest.raises(AttributeError):
        _ = jaxguard.absent


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_is_called_with_its_config(name, monkeypatch):
    calls = []
    monkeypatch.setattr(STAGES[name], lambda config, *rest, **options: calls.append(config) or "result")
    targets = (["a100-80gb:8"],) if name == "plan" else ()
    stage = getattr(jaxguard, name)
    assert stage(CONFIG, *targets, {"seed": 2}) == "result"
    assert stage("tiny", *targets, ["model.checkpoint=y"]) == "result"
    assert stage(Config.model_validate(CONFIG), *targets) == "result"
    assert [config.seed for config in calls] == [2, 0, 0]
    assert calls[1].model.checkpoint == "y"


def test_a_stage_is_callable_after_its_modules_were_imported():
    python(
        "import jaxguard.train.hosts, jaxguard; assert callable(jaxguard.train)\n"
        "from jaxguard.train import hosts; assert jaxguard.train.hosts is hosts"
    )


def test_one_override_needs_no_list():
    config = jaxguard.load_config("tiny", "train.epochs=3")
    assert config.train.epochs == 3


def test_a_stage_refuses_what_it_does_not_read():
    with pytest.raises(JaxguardError):
        jaxguard.train(CONFIG, {"mine.most": 1})


INTERRUPTED = """
import asyncio, signal, threading, time
from jaxguard.utils.threads import outside_event_loop

def work():
    try:
        for _ in range(1000):
            time.sleep(0.01)
        print("it went on")
    finally:
        print("it ended")

async def cell():
    threading.Timer(0.2, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
    outside_event_loop(work)

signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    asyncio.new_event_loop().run_until_complete(cell())
except KeyboardInterrupt:
    print("interrupted")
"""


def test_an_interrupt_inside_an_event_loop_ends_the_work():
    """Else a cell of a notebook would wait for hours, or go on unseen."""
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n") == ["it ended", "interrupted", ""]


def test_a_stage_runs_inside_an_event_loop():
    async def notebook():
        return outside_event_loop(lambda: asyncio.run(asyncio.sleep(0, "done")))

    assert asyncio.run(notebook()) == "done"
    assert outside_event_loop(lambda: "done") == "done"


def test_transformers_does_not_ask_for_torch(caplog):
    """Its warning, which is in its sources as it is here, goes nowhere; others do."""
    text = "PyTorch was not found"
    assert text in Path(transformers.__file__).read_text(encoding="utf-8")
    logger = logging.getLogger("transformers")
    shown = [logger.filter(logging.makeLogRecord({"msg": message})) for message in (f"{text}. Models", "other")]
    assert [bool(each) for each in shown] == [False, True]
