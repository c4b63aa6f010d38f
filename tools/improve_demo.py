"""`make prefer-demo` and `make reinforce-demo`: the guard of `make demo` learns from its own mistakes.

    prefer      python -m jaxguard.mine --config smollm_demo, then mine pairs, then python -m jaxguard.train --config smollm_hsdpo
    reinforce   python -m jaxguard.reinforce --config smollm_grpo

What is done is not done again: interrupt it and call it once more. Further arguments are overrides of the last command's config.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

import demo
from jaxguard.cli import exit_code
from jaxguard.config import Config, load
from jaxguard.data.sources import load_examples
from jaxguard.train.logging import read_metrics

MODULE = {"prefer": "train", "reinforce": "reinforce"}
CONFIG = {"prefer": "smollm_hsdpo", "reinforce": "smollm_grpo"}
WATCHED = {
    "preference/accuracy": "right answer preferred",
    "preference/margin": "margin of the right answer",
    "rollouts/reward": "reward",
    "rollouts/right": "right answers",
    "rollouts/no_verdict": "answers without a verdict",
    "rollouts/false_positive_rate": "false positives",
    "rollouts/false_negative_rate": "false negatives",
}


def main(arguments: Sequence[str]) -> int:
    return exit_code(lambda: improve(*arguments))


def improve(kind: str, *overrides: str) -> None:
    console = Console(highlight=False)
    started, first = time.monotonic(), load("smollm_demo")
    base, data = Path(first.model.checkpoint), Path(str(first.data.train[0].path)).parent
    demo.stage(console, f"weights -> {base}", lambda: demo.fetch_weights(base))
    demo.stage(console, "data", lambda: demo.fetch_data(data))
    demo.stage(console, f"the guard to improve -> {first.folder}", lambda: demo.train([]))
    if kind == "prefer":
        mine = [sys.executable, "-m", "jaxguard.mine"]
        sampled = [*mine, "--config", "smollm_demo", "evaluate.temperature=1.0"]
        balanced = ["--config", "smollm_demo", "mine.balance=class"]  # or the guard moves towards one verdict
        demo.stage(console, "right and wrong answers", lambda: demo.run(sampled))
        demo.stage(console, "pairs of them", lambda: demo.run([*mine, "pairs", *balanced]))
    config = load(CONFIG[kind], overrides)
    command = [sys.executable, "-m", f"jaxguard.{MODULE[kind]}", "--config", CONFIG[kind], *overrides]
    demo.stage(console, f"{kind} -> {config.folder}", lambda: demo.run(command))
    show(console, config)
    console.print(f"\ndone in {demo.clock(time.monotonic() - started)}")


def show(console: Console, config: Config) -> None:
    """What the run says of itself, at its beginning and its end, and held-out scores before and after."""
    records = [record for record in read_metrics(config.folder / "metrics.jsonl") if "loss" in record]
    tenth = max(1, len(records) // 10)
    table = Table("", "first tenth", "last tenth", title=f"{len(records)} steps", title_justify="left")
    for name, title in WATCHED.items():
        parts = [[x[name] for x in part if name in x] for part in (records[:tenth], records[-tenth:])]
        if all(parts):
            table.add_row(title, *(f"{sum(part) / len(part):.3f}" for part in parts))
    held = load_examples(config.data.validation[0])
    scores = Table("", "F1", "AUPRC", title=f"{len(held)} held-out exchanges", title_justify="left")
    for name, found in zip(("before", "after"), demo.validation_predictions(config.folder), strict=True):
        own = demo.score(name, found, held)
        scores.add_row(name, f"{own.f1:.3f}", f"{own.auprc:.3f}")
    console.print(table, scores)
    for what in ("export", "curves.png", "rollouts.html", "metrics.jsonl"):
        if (config.folder / what).exists():
            console.print(f"{what:<14}{config.folder / what}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
