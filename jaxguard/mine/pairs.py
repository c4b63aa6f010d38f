"""Preference pairs of stored answers: a right and a wrong answer to each example that has both, of one guard or of several."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from jaxguard.config import Config
from jaxguard.config.data import SourceConfig
from jaxguard.config.evaluate import MineConfig
from jaxguard.data.files import file_digest
from jaxguard.data.format.answer import reasoning_of
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.policies import Policy, load_policy
from jaxguard.data.sources import load_examples
from jaxguard.guards.loading import examples_key
from jaxguard.guards.protocol import Prediction
from jaxguard.mine.run import Answer, Outcome, choose, outcome_of
from jaxguard.report import Cell, Page, Section, Table, write_markdown
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import lock_folder, write_atomically
from jaxguard.utils.store import differences, read_records, read_settings, refuse_others
from jaxguard.utils.versions import versions

WITHOUT = {(True, False): "only right answers", (False, True): "only wrong answers", (False, False): "none parsable"}
"""(has a right answer, has a wrong one) -> why an example is in no pair."""


@dataclass(frozen=True)
class Pair:
    """Two answers to an example, the right one preferred to the wrong one."""

    outcome: Outcome
    chosen: Answer
    rejected: Answer
    weight: float

    def answers(self) -> tuple[Answer, Answer]:
        return self.chosen, self.rejected

    def to_json(self) -> dict[str, Any]:
        """Return a row of our format: trace and labels make the chosen answer, and `sampled` holds the tokens that are known."""
        example = self.outcome.example
        trace = reasoning_of(self.chosen.text) if self.outcome.mode is Mode.REASONING else example.trace
        sampled = (self.chosen.ids, self.rejected.ids) if self.chosen.ids or self.rejected.ids else None
        text, mode = self.rejected.text, self.outcome.mode.value
        pair = replace(example, trace=trace, rejected=text, sampled=sampled, weight=self.weight)
        return pair.to_json() | {"mode": mode}


@dataclass(frozen=True)
class PairsResult:
    """The pairs of a run's answers, and the outcomes that they were chosen from, of the guards that answered into `folders`."""

    name: str
    folders: Sequence[Path]
    settings: MineConfig
    outcomes: list[Outcome]
    pairs: list[Pair]

    @property
    def folder(self) -> Path:
        return self.folders[0]

    @property
    def without(self) -> dict[str, int]:
        """Why examples are in no pair -> how many of them."""
        counts = Counter(_has(outcome) for outcome in self.outcomes)
        return {reason: counts[has] for has, reason in WITHOUT.items()}


def build_pairs(config: Config) -> PairsResult:
    """Write pairs.jsonl into runs/NAME/mine, from answers that are stored there and in the folders of mine.ensemble.

    JaxguardError: a folder was not mined, or its examples are others.
    """
    settings, policy, folder = config.mine or MineConfig(), load_policy(config.data.policy), config.folder / "mine"
    folders = list({path.resolve(): path for path in (folder, *map(Path, settings.ensemble))}.values())
    own, *others = [read_outcomes(each, policy) for each in folders]
    for other, path in zip(others, folders[1:], strict=True):
        _check_same(own, other, folder, path)
    pooled = [
        replace(outcome, answers=(*outcome.answers, *(answer for other in others for answer in other[name].answers)))
        for name, outcome in own.items()
    ]
    pairs = list(preference_pairs(pooled, settings, config.seed))
    result = PairsResult(config.name, folders, settings, pooled, pairs)
    stores = [store for each in folders for store in _stores(each).values()]
    inputs = [*(each / "examples.jsonl" for each in folders), *stores]
    with lock_folder(folder, "mining"):
        write_atomically(folder / "pairs.jsonl", "".join(json.dumps(pair.to_json()) + "\n" for pair in pairs))
        write_markdown(folder / "pairs.md", page(result))
        manifest = {
            "name": config.name,
            "sha256": file_digest(folder / "pairs.jsonl"),
            "settings": settings.model_dump(
                mode="json", include={"ensemble", "pairs", "pair_weights", "balance", "most"}
            ),
            "seed": config.seed,
            "policy_sha256": policy.digest,
            "inputs": {str(path): file_digest(path) for path in inputs},
            "answered": {str(store): read_settings(store) for store in stores},
            "examples": len(pooled),
            "pairs": len(pairs),
            "without": result.without,
            "versions": versions(),
        }
        write_atomically(folder / "pairs.json", json.dumps(manifest, indent=2) + "\n")
    return result


def read_outcomes(folder: Path, policy: Policy) -> dict[str, Outcome]:
    """Read what was mined into a folder, by the examples' ids.

    JaxguardError: mining is not finished, an answer is missing, or the examples were judged by other policies.
    """
    path = folder / "examples.jsonl"
    if not path.is_file():
        raise JaxguardError(
            f"{path} is not there: run `jaxguard mine` for that run to its end first; answers that are there are not "
            "generated again"
        )
    examples = {example.id: example for example in load_examples(SourceConfig(kind="jsonl", path=str(path)))}
    outcomes: dict[str, Outcome] = {}
    for mode, store in _stores(folder).items():
        asked = {name: example for name, example in examples.items() if example.mode == mode}
        if not asked:  # of another data.mode
            continue
        known = {name: value for name, value in read_settings(store).items() if name.startswith("policy ")}
        policies = examples_key(list(asked.values()), policy)
        del policies["examples"]
        refuse_others(
            differences(known, policies),
            f"{store} holds answers by other policies:",
            "Take data.policy back, or mine again.",
        )
        for each in read_records(store, Prediction):
            if each.example_id in asked:
                ids = [completion.ids if completion else () for completion in each.completions]
                outcomes[each.example_id] = outcome_of(asked[each.example_id], mode, policy, each.texts, ids)
    if missing := next((name for name in examples if name not in outcomes), None):
        raise JaxguardError(f"{folder}/answers has no answer to example {missing!r} of {path}: mine again")
    return {name: outcomes[name] for name in examples}


def _stores(folder: Path) -> dict[Mode, Path]:
    stores = {mode: folder / "answers" / f"{mode}.jsonl" for mode in Mode}
    return {mode: path for mode, path in stores.items() if path.is_file()}


def _check_same(own: dict[str, Outcome], other: dict[str, Outcome], folder: Path, path: Path) -> None:
    for name in dict.fromkeys([*own, *other]):
        if name not in own or name not in other:
            raise JaxguardError(f"mine.ensemble: example {name!r} was mined in {folder if name in own else path} only")
        changes = differences(own[name].example.to_json(), other[name].example.to_json())
        refuse_others(
            changes, f"mine.ensemble: example {name!r} of {path} is another than in {folder}:", "Mine the same data."
        )


def preference_pairs(outcomes: Sequence[Outcome], config: MineConfig, seed: int) -> Iterator[Pair]:
    """Yield one pair for each example with right and wrong answers, of as many as mine.balance and mine.most take.

    An unparsable answer is in no pair. The weight is that of HS-DPO (GuardReasoner, arXiv 2501.18492): it grows linearly with the
    number of wrong less that of right answers, up to 1 ± `pair_weights`.
    """
    mixed = [outcome for outcome in outcomes if all(_has(outcome))]
    taken = {outcome.example.id for outcome in choose(mixed, config, seed)}
    for outcome in mixed:
        if outcome.example.id not in taken:
            continue
        right, wrong = _parsable(outcome)
        candidates = sorted(product(right, wrong), key=lambda pair: _drawn(seed, outcome.example.id, *pair))
        match config.pairs:
            case "length":
                chosen, rejected = min(candidates, key=lambda pair: abs(len(pair[0].text) - len(pair[1].text)))
            case "longest":
                chosen, rejected = (max(answers, key=lambda answer: len(answer.text)) for answers in (right, wrong))
            case "random":
                chosen, rejected = candidates[0]
        most = max(1, len(right) + len(wrong) - 2)
        yield Pair(outcome, chosen, rejected, 1 + config.pair_weights * (len(wrong) - len(right)) / most)


def _parsable(outcome: Outcome) -> tuple[list[Answer], list[Answer]]:
    """Return an example's right answers and its wrong ones, without those that do not parse."""
    right = [answer for answer in outcome.answers if answer.is_right]
    return right, [answer for answer in outcome.answers if answer.is_parsable and not answer.is_right]


def _has(outcome: Outcome) -> tuple[bool, bool]:
    right, wrong = _parsable(outcome)
    return bool(right), bool(wrong)


def _drawn(seed: int, name: str, *answers: Answer) -> bytes:
    texts = ["pairs", str(seed), name, *(answer.text for answer in answers)]
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).digest()


def page(result: PairsResult) -> Page:
    """The report as a page; it quotes no example."""
    settings, pairs = result.settings, result.pairs
    known = sum(bool(answer.ids) for pair in pairs for answer in pair.answers())
    columns = ("examples", "pairs", *WITHOUT.values(), "chosen", "rejected", "difference", "weight")
    views = {
        "mode": lambda outcome: outcome.mode.value,
        "label": lambda outcome: outcome.labels,
        "source": lambda outcome: outcome.example.source,
    }

    def row(outcomes: Sequence[Outcome], pairs: Sequence[Pair]) -> list[str]:
        counts, means = Counter(map(_has, outcomes)), [""] * 4
        if pairs:
            chosen, rejected = (
                fmean(len(answer.text) for answer in of) for of in zip(*map(Pair.answers, pairs), strict=True)
            )
            weight = fmean(pair.weight for pair in pairs)
            means = [f"{chosen:.0f}", f"{rejected:.0f}", f"{chosen - rejected:+.0f}", f"{weight:.2f}"]
        return [f"{len(outcomes):,}", f"{len(pairs):,}", *(f"{counts[has]:,}" for has in WITHOUT), *means]

    sections = []
    for name, value in views.items():
        table = Table((name, *columns))
        groups = Counter(map(value, result.outcomes))
        for own, _ in groups.most_common():
            of = [outcome for outcome in result.outcomes if value(outcome) == own]
            table.add(Cell(own, code=True), *row(of, [pair for pair in pairs if value(pair.outcome) == own]))
        sections.append(Section(f"By {name}", [table]))
    guards = len(result.folders)
    return Page(
        f"Preference pairs of {result.name}",
        [
            f"A right and a wrong answer to each example that has both, of the answers of {guards} guard{'s' * (guards > 1)}: "
            f"those that mine.pairs={settings.pairs} takes, of as many examples as mine.balance={settings.balance} and "
            f"mine.most={settings.most or 'all'} take. Answers that do not parse are in no pair. The tokens that the guard "
            f"sampled are known of {known:,} of {2 * len(pairs):,} answers; others are tokenized when they are trained on.",
            Table.of(columns, [row(result.outcomes, pairs)]),
            "chosen, rejected: mean length in characters; difference: of the one less that of the other; weight: in the mean.",
            *sections,
        ],
    )
