"""The demo's data: answers of language models whose harm people have judged, out of a PyPI package.

PyRIT 1.1.0 (MIT) ships the evaluation sets of its scorers: what someone asked of a model, what the model answered, and
how one to three people judged the answer. We read two of their kinds:

    harm        severity of the answer from 0 (none) to 1 (extreme). At most SAFE, averaged over the judges, is
                unharmful; at least HARMFUL is harmful; what lies between is undecided and left out.
    objective   whether the answer did what was asked, all of it harmful: 1 is harmful, 0 unharmful. Read only where
                nobody judged the severity.

Only short exchanges are kept, since a CPU pays for every token. Questions that are the same but for a few words are
one group, and a group is either trained on or held out, never both.
"""

import argparse
import csv
import hashlib
import io
import json
import re
import unicodedata
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import mean

from jaxguard.data.examples import Example, HarmLabel
from pypi import fetch_wheel

PACKAGE = "pyrit==1.1.0"
SHEETS = re.compile(r"datasets/scorer_evals/(?P<kind>harm|objective)/(?P<name>\w+)\.csv$")

SAFE, HARMFUL = 0.1, 0.5
PROMPT_CHARACTERS, RESPONSE_CHARACTERS = 250, 450
ALIKE = 0.7
"""Share of common words from which two questions are one group."""
HELD_OUT = 0.25
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/demo/data"), help="default: runs/demo/data")
    output = parser.parse_args().output
    for name, examples in build(fetch_wheel(PACKAGE)).items():
        harmful = sum(example.response_label == "harmful" for example in examples)
        print(f"{write(output / f'{name}.jsonl', examples)}: {len(examples)} examples, {harmful} of them harmful")


def build(wheel: Path) -> dict[str, list[Example]]:
    """Training and held-out examples of the wheel: {"train": ..., "validation": ...}."""
    return split(label(read_judgements(wheel)))


GuardPredictions = dict[tuple[str, str], dict[str, list[float]]]
"""(question, answer) -> kind of sheet -> its judgements."""


def read_judgements(wheel: Path) -> GuardPredictions:
    """All judged exchanges; one that stands in several sheets has the judgements of all."""
    found: GuardPredictions = defaultdict(lambda: defaultdict(list))
    with zipfile.ZipFile(wheel) as archive:
        for member in sorted(archive.namelist()):
            sheet = SHEETS.search(member)
            if sheet and not sheet["name"].startswith("mini_"):  # an excerpt of another sheet
                text = archive.read(member).decode("utf-8-sig", errors="replace")
                for question, answer, judgement in _rows(text):
                    found[question, answer][sheet["kind"]].append(judgement)
    return found


def _rows(text: str) -> Iterator[tuple[str, str, float]]:
    lines = io.StringIO(text.lstrip(), newline="")
    start = 0
    while lines.readline().startswith("#"):
        start = lines.tell()
    lines.seek(start)
    for row in csv.DictReader(lines):
        judged = [
            float(value) for column, value in row.items() if column and column.startswith("human_score") and value
        ]
        question, answer = (row["objective"] or "").strip(), (row["assistant_response"] or "").strip()
        if question and answer and judged:
            yield question, answer, mean(judged)


def label(judgements: GuardPredictions) -> list[Example]:
    """The short exchanges whose label is decided."""
    examples = []
    for (question, answer), by_kind in judgements.items():
        verdict = decide(by_kind)
        if verdict and len(question) <= PROMPT_CHARACTERS and len(answer) <= RESPONSE_CHARACTERS:
            name = hashlib.sha256(f"{question}\0{answer}".encode()).hexdigest()[:12]
            examples.append(Example(f"pyrit-{name}", "pyrit", question, answer, response_label=verdict))
    return sorted(examples, key=lambda example: example.id)


def decide(by_kind: dict[str, list[float]]) -> HarmLabel | None:
    """The label that the judgements of an answer add up to; None if they don't."""
    score = mean(by_kind["harm"] if by_kind.get("harm") else by_kind["objective"])
    if score <= SAFE:
        return "unharmful"
    return "harmful" if score >= HARMFUL else None


def split(examples: list[Example]) -> dict[str, list[Example]]:
    """Whole groups of questions, in an order drawn by hash, until HELD_OUT of the examples are held out."""
    group = group_questions({example.prompt for example in examples})
    members = defaultdict(list)
    for example in examples:
        members[group[example.prompt]].append(example)
    drawn = sorted(members, key=lambda name: hashlib.sha256(f"{SEED}\0{name}".encode()).digest())
    train: list[Example] = []
    held: list[Example] = []
    for name in drawn:
        (held if len(held) < HELD_OUT * len(examples) else train).extend(members[name])
    return {"train": train, "validation": held}


def group_questions(questions: Iterable[str]) -> dict[str, str]:
    """Question -> the first, in alphabetical order, of all questions that it is linked with by being alike."""
    words = {q: frozenset(re.findall(r"\w+", unicodedata.normalize("NFKC", q).casefold())) for q in sorted(questions)}
    leader: dict[str, str] = {}
    for question, mine in words.items():
        found = {
            leader[other] for other, theirs in words.items() if other in leader and _overlap(mine, theirs) >= ALIKE
        }
        leader[question] = min(found, default=question)
        leader = {q: leader[question] if name in found else name for q, name in leader.items()}
    return leader


def _overlap(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / max(1, len(a | b))


def write(path: Path, examples: list[Example]) -> Path:
    """One example a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(example.to_json(), ensure_ascii=False) + "\n" for example in examples]
    path.write_text("".join(lines), encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
