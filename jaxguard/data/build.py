"""Write training sets into a folder that describes itself.

    runs/NAME/dataset/
      README.md            card; `datasets.load_dataset(folder, "dual_500_0")` loads a set by its name
      manifest.json        sources with hashes, counts and seeds
      contaminated.jsonl   training examples that were dropped because a benchmark holds their prompt
      dataset_info.json    the chat files, as LlamaFactory expects them
      dual/all.parquet     the set: our columns, which data.train reads with kind: jsonl
      dual/500_0.parquet   its random subset of 500, seed 0
      dual/chat/           the same as chat messages, for TRL and LlamaFactory

The same examples and the same config give the same bytes.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

import jaxguard
from jaxguard.config import Config
from jaxguard.config.data import BuildConfig, SetConfig, SourceConfig
from jaxguard.data.card import card
from jaxguard.data.contamination import Match, find_matches
from jaxguard.data.encoding import TOKENIZER_FILES, Encoder
from jaxguard.data.examples import LABELS, Example
from jaxguard.data.files import file_digest
from jaxguard.data.format.dialogue import Mode, answers, questions
from jaxguard.data.policies import load_policy, policy_for
from jaxguard.data.prepare import assign_modes, load_sources, subset, usable
from jaxguard.data.sources import load, unique_ids
from jaxguard.utils import hub
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import lock_folder

_TEXT = pyarrow.string()
SCHEMA = pyarrow.schema(
    [(name, _TEXT) for name in ("id", "source", "prompt", "response", *LABELS)]
    + [("categories", pyarrow.list_(_TEXT)), ("policy", _TEXT), ("trace", _TEXT), ("mode", _TEXT)]
)
CHAT_SCHEMA = pyarrow.schema(
    [("id", _TEXT), ("messages", pyarrow.list_(pyarrow.struct([("role", _TEXT), ("content", _TEXT)])))]
)


@dataclass(frozen=True)
class BuildResult:
    """A built data set: its folder, and its manifest as in manifest.json."""

    folder: Path
    manifest: dict[str, Any]


@dataclass(frozen=True)
class Pool:
    """The examples of some sources, the sources' manifest entries, and the examples that a benchmark holds too."""

    examples: list[Example]
    origins: list[dict[str, Any]]
    matches: list[Match]


@dataclass(frozen=True)
class TrainingSet:
    """A set to be written: `base` without contaminated examples, and `appended`, which every subset gets in full."""

    config: SetConfig
    base: list[Example]
    appended: list[Example]
    origins: list[dict[str, Any]]
    dropped: Counter[str]
    matches: list[Match]


def build(config: Config) -> BuildResult:
    """Build all sets of a config into run_folder/name/dataset.

    An existing folder with other contents is renamed to dataset-VERSION.

    Raises:
        JaxguardError: a source cannot be loaded, a set is empty, or the folder is in use or cannot be written.
    """
    settings, folder = config.build or BuildConfig(), config.folder
    tokenizer = hub.fetch(config.model.checkpoint, config.model.revision, TOKENIZER_FILES)
    encoder = Encoder.load(tokenizer, config.data)
    benchmarks = {
        " ".join(filter(None, (source.kind, source.path, source.split))): load(source).examples
        for source in settings.benchmarks
    }
    pools = cache(lambda sources: load_pool(sources, benchmarks, settings.similarity))
    folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder, "run"):
        draft = folder / "dataset.partial"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        sets = [_select(config, each, pools) for each in settings.sets]
        subsets = {each.config.name: dict(_write_set(draft, each, settings, config, encoder)) for each in sets}
        manifest = _manifest(config, settings, sets, subsets)
        _write_metadata(draft, manifest, sets)
        return BuildResult(_publish(draft, manifest["version"]), manifest)


def load_pool(sources: Sequence[SourceConfig], benchmarks: Mapping[str, list[Example]], similarity: float) -> Pool:
    """Load sources and find the examples that a benchmark holds too.

    Raises:
        JaxguardError: one cannot be loaded.
    """
    examples, origins = load_sources(sources, "sources")
    origins = [origin | _distillation(source) for origin, source in zip(origins, sources, strict=True)]
    return Pool(examples, origins, find_matches(examples, benchmarks, similarity) if benchmarks else [])


def _select(config: Config, settings: SetConfig, pools: Callable[[tuple[SourceConfig, ...]], Pool]) -> TrainingSet:
    """Select a set's examples: those that its mode can use and no benchmark holds.

    Raises:
        JaxguardError: a source cannot be loaded, or none is left.
    """
    policy, dropped = load_policy(config.data.policy), Counter[str]()
    origins: list[dict[str, Any]] = []
    matches: list[Match] = []

    def select(sources: tuple[SourceConfig, ...], role: str) -> list[Example]:
        pool = pools(sources)
        origins.extend({**origin, "role": role} for origin in pool.origins)
        matches.extend(pool.matches)
        contaminated = {match.example_id for match in pool.matches}
        examples = usable(pool.examples, f"build.sets.{settings.name}.{role}", policy, settings.mode, dropped)
        return [example for example in examples if example.id not in contaminated]

    base = select(settings.sources or config.data.train, "sources")
    appended = select(settings.append, "append") if settings.append else []
    if not base:
        raise JaxguardError(f"build.sets: {settings.name!r} is empty: a benchmark holds all of its prompts")
    return TrainingSet(settings, base, appended, origins, dropped, matches)


def _distillation(source: SourceConfig) -> dict[str, Any]:
    """Return the summary of the distillation that wrote a source, if there is one."""
    path = Path(source.path or "").with_suffix(".summary.json")
    if source.path is None or not path.is_file():
        return {}
    summary = json.loads(path.read_text(encoding="utf-8"))
    return {"distilled": {name: value for name, value in summary.items() if name != "never_passed"}}


def _write_set(
    draft: Path, training_set: TrainingSet, settings: BuildConfig, config: Config, encoder: Encoder
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Write a set and its subsets; yield (subset's name, its manifest entry)."""
    folder, base = draft / training_set.config.name, training_set.base
    (folder / "chat").mkdir(parents=True)
    sizes = sorted(size for size in settings.subsets if size < len(base))
    subsets = {"all": base} | {f"{n}_{seed}": subset(base, n, seed) for n in sizes for seed in settings.seeds}
    for name, selected in subsets.items():
        examples = unique_ids([*selected, *training_set.appended])
        examples = _with_modes(examples, training_set.config.mode, config)
        paths = folder / f"{name}.parquet", folder / "chat" / f"{name}.parquet"
        _write_parquet(paths[0], [example.to_json() for example in examples], SCHEMA)
        _write_parquet(paths[1], [chat(example, encoder) for example in examples], CHAT_SCHEMA)
        entry = {
            "examples": len(examples),
            "appended": len(training_set.appended),
            "by_mode": dict(sorted(Counter(str(example.mode) for example in examples).items())),
            "labels": {x: dict(sorted(Counter(str(getattr(e, x)) for e in examples).items())) for x in LABELS},
            "files": {str(path.relative_to(draft)): file_digest(path) for path in paths},
        }
        yield name, entry


def _write_parquet(path: Path, rows: list[dict[str, Any]], schema: pyarrow.Schema) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), path, compression="zstd")


def _with_modes(examples: list[Example], mode: str, config: Config) -> list[Example]:
    """Assign modes, and remove the traces of direct examples."""
    examples = [replace(example, mode=None) for example in examples]
    modes = assign_modes(examples, mode, config.data.dual_reasoning_share, config.seed)
    return [
        replace(example, mode=own.value, trace=example.trace if own is Mode.REASONING else None)
        for example, own in zip(examples, modes, strict=True)
    ]


def chat(example: Example, encoder: Encoder) -> dict[str, Any]:
    """Render an example as training does, as chat messages; long text is not truncated."""
    policy, mode = policy_for(example, encoder.policy), Mode(example.mode or "direct")
    asks = questions(example, policy)
    answer = encoder.dialogue.completion(answers(example, asks), example.trace, mode)
    turns = encoder.dialogue.messages(example, policy, mode, asks)
    return {"id": example.id, "messages": [*turns, {"role": "assistant", "content": answer}]}


def _manifest(
    config: Config, settings: BuildConfig, sets: list[TrainingSet], subsets: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    fields = {"policy", "reasoning_marker", "direct_marker", "dual_reasoning_share"}
    manifest = {
        "jaxguard": jaxguard.__version__,
        "checkpoint": config.model.checkpoint,
        "data": config.data.model_dump(mode="json", include=fields),
        "policy_sha256": load_policy(config.data.policy).digest,
        "build": settings.model_dump(mode="json"),
        "seed": config.seed,
        "sets": {
            each.config.name: {
                "mode": each.config.mode,
                "sources": each.origins,
                "dropped": dict(sorted((+each.dropped).items())),
                "contaminated": len({match.example_id for match in each.matches}),
                "subsets": subsets[each.config.name],
            }
            for each in sets
        },
    }
    version = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:12]
    return {"version": version, **manifest}


def _write_metadata(draft: Path, manifest: dict[str, Any], sets: list[TrainingSet]) -> None:
    matches = {json.dumps({"set": each.config.name, **asdict(match)}) + "\n" for each in sets for match in each.matches}
    tags = {"role_tag": "role", "content_tag": "content"} | {f"{x}_tag": x for x in ("user", "assistant", "system")}
    info = {
        f"{name}_{part}": {
            "file_name": f"{name}/chat/{part}.parquet",
            "formatting": "sharegpt",
            "columns": {"messages": "messages"},
            "tags": tags,
        }
        for name, entry in manifest["sets"].items()
        for part in entry["subsets"]
    }
    texts = {"contaminated.jsonl": "".join(sorted(matches)), "README.md": card(manifest)}
    for name, tree in (("dataset_info.json", info), ("manifest.json", manifest)):
        texts[name] = json.dumps(tree, indent=2, ensure_ascii=False) + "\n"
    for name, text in texts.items():
        (draft / name).write_text(text, encoding="utf-8")


def _publish(draft: Path, version: str) -> Path:
    """Rename the finished folder to dataset; an existing one with other contents gets its version as a suffix."""
    output = draft.with_name("dataset")
    if output.is_dir():
        try:
            existing = str(json.loads((output / "manifest.json").read_text(encoding="utf-8"))["version"])
        except (OSError, ValueError, KeyError, TypeError):
            existing = "unknown"
        if existing == version:
            shutil.rmtree(draft)
            return output
        aside = draft.with_name(f"dataset-{existing}")
        shutil.rmtree(aside, ignore_errors=True)
        output.rename(aside)
    return draft.rename(output)
