"""Training sets in files: examples and traces in, one folder out that explains itself.

    runs/NAME/dataset/
      README.md            a card; `datasets.load_dataset(folder, "dual_500_0")` reads a set by its name
      manifest.json        where everything comes from, with hashes, counts and seeds
      contaminated.jsonl   training examples that were dropped because a benchmark holds their prompt
      dataset_info.json    the chat files as LlamaFactory wants them
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
from rich.console import Console
from rich.table import Table
from rich.text import Text

import jaxguard
from jaxguard.config import Config
from jaxguard.config.data import BuildConfig, SetConfig, SourceConfig
from jaxguard.data.card import card
from jaxguard.data.contamination import Match, find_matches
from jaxguard.data.encoding import TOKENIZER_FILES, Encoder
from jaxguard.data.examples import Example
from jaxguard.data.files import file_digest
from jaxguard.data.format.dialogue import Mode, answers, questions
from jaxguard.data.policies import load_policy, policy_for
from jaxguard.data.prepare import assign_modes, load_sources, subset, usable
from jaxguard.data.sources import LABELS, load, unique_ids
from jaxguard.utils import hub
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import lock_folder

_TEXT = pyarrow.string()
SCHEMA = pyarrow.schema(
    [(name, _TEXT) for name in ("id", "source", "prompt", "response", *LABELS)]
    + [("categories", pyarrow.list_(_TEXT)), ("policy", _TEXT), ("trace", _TEXT), ("mode", _TEXT)]
)
"""Of Example, as Parquet."""
CHAT_SCHEMA = pyarrow.schema(
    [("id", _TEXT), ("messages", pyarrow.list_(pyarrow.struct([("role", _TEXT), ("content", _TEXT)])))]
)

_DATA_FIELDS = {"policy", "reasoning_marker", "direct_marker", "dual_reasoning_share"}


@dataclass(frozen=True)
class Built:
    """One training set, ready to be written.

    Attributes:
        config: what was asked for.
        base: its examples, but for the appended.
        appended: what each of its subsets gets besides.
        origins: where they come from.
        dropped: reason -> examples that were left out.
        matches: contaminated examples; they are not in it.
    """

    config: SetConfig
    base: list[Example]
    appended: list[Example]
    origins: list[dict[str, Any]]
    dropped: Counter[str]
    matches: list[Match]


def build(config: Config) -> int:
    """Build all sets of a config into run_folder/name/dataset.

    A folder that is there with other contents is moved aside, as dataset-VERSION.

    Raises:
        JaxguardError: a source cannot be read, a set comes out empty, or the folder is in use or cannot be written.
    """
    settings, folder, console = config.build or BuildConfig(), config.folder, Console(soft_wrap=True)
    tokenizer = hub.fetch(config.model.checkpoint, config.model.revision, TOKENIZER_FILES)
    encoder = Encoder.load(tokenizer, config.data)
    benchmarks = {
        " ".join(filter(None, (source.kind, source.path, source.split))): load(source).examples
        for source in settings.benchmarks
    }
    pools = cache(lambda sources: read_pool(sources, benchmarks, settings.similarity))
    folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder, "run"):
        draft = folder / "dataset.partial"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        sets = [_choose(config, wanted, pools) for wanted in settings.sets]
        files = {built.config.name: dict(_write_set(draft, built, settings, config, encoder)) for built in sets}
        manifest = _manifest(config, settings, sets, files)
        _write_rest(draft, manifest, sets)
        output = _put_in_place(draft, manifest["version"])
    console.print(_table(manifest))
    console.print(Text(f"version {manifest['version']}: {output}"))
    return 0


@dataclass(frozen=True)
class Pool:
    """Sources as examples.

    Attributes:
        examples: all of them.
        origins: where they come from, for the manifest.
        matches: those that a benchmark also holds.
    """

    examples: list[Example]
    origins: list[dict[str, Any]]
    matches: list[Match]


def read_pool(sources: Sequence[SourceConfig], benchmarks: Mapping[str, list[Example]], similarity: float) -> Pool:
    """Read sources and hold them against the benchmarks.

    Raises:
        JaxguardError: one cannot be read.
    """
    examples, origins = load_sources(sources, "sources")
    origins = [origin | _filter_statistics(source) for origin, source in zip(origins, sources, strict=True)]
    return Pool(examples, origins, find_matches(examples, benchmarks, similarity) if benchmarks else [])


def _choose(config: Config, wanted: SetConfig, pools: Callable[[tuple[SourceConfig, ...]], Pool]) -> Built:
    """A set's examples: those that its mode can use and no benchmark holds.

    Raises:
        JaxguardError: a source cannot be read, or none is left.
    """
    policy, dropped = load_policy(config.data.policy), Counter[str]()
    origins: list[dict[str, Any]] = []
    matched: list[Match] = []

    def chosen(sources: tuple[SourceConfig, ...], role: str) -> list[Example]:
        pool = pools(sources)
        origins.extend({**origin, "role": role} for origin in pool.origins)
        matched.extend(pool.matches)
        names = {match.example_id for match in pool.matches}
        examples = usable(pool.examples, f"build.sets.{wanted.name}.{role}", policy, wanted.mode, dropped)
        return [example for example in examples if example.id not in names]

    base = chosen(wanted.sources or config.data.train, "sources")
    appended = chosen(wanted.append, "append") if wanted.append else []
    if not base:
        raise JaxguardError(f"build.sets: {wanted.name!r} is empty: a benchmark holds all of its prompts")
    return Built(wanted, base, appended, origins, dropped, matched)


def _filter_statistics(source: SourceConfig) -> dict[str, Any]:
    """What the distillation that wrote a source says of it, where there is one."""
    summary = Path(source.path or "").with_suffix(".summary.json")
    if source.path is None or not summary.is_file():
        return {}
    told = json.loads(summary.read_text(encoding="utf-8"))
    return {"distilled": {name: value for name, value in told.items() if name != "never_passed"}}


def _write_set(
    draft: Path, built: Built, settings: BuildConfig, config: Config, encoder: Encoder
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Write a set and its subsets; (subset's name, what the manifest says of it)."""
    folder = draft / built.config.name
    (folder / "chat").mkdir(parents=True)
    sizes = [size for size in settings.subsets if size < len(built.base)]
    chosen = {"all": built.base}
    chosen |= {f"{size}_{s}": subset(built.base, size, s) for size in sorted(sizes) for s in settings.seeds}
    for name, base in chosen.items():
        examples = _with_modes(unique_ids([*base, *built.appended]), built.config.mode, config)
        rows, messages = folder / f"{name}.parquet", folder / "chat" / f"{name}.parquet"
        _write_parquet(rows, [example.to_json() for example in examples], SCHEMA)
        _write_parquet(messages, [chat(example, encoder) for example in examples], CHAT_SCHEMA)
        yield (
            name,
            {
                "examples": len(examples),
                "appended": len(built.appended),
                "by_mode": dict(sorted(Counter(str(example.mode) for example in examples).items())),
                "labels": {x: dict(sorted(Counter(str(getattr(e, x)) for e in examples).items())) for x in LABELS},
                "files": {str(path.relative_to(draft)): file_digest(path) for path in (rows, messages)},
            },
        )


def _write_parquet(path: Path, rows: list[dict[str, Any]], schema: pyarrow.Schema) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), path, compression="zstd")


def _with_modes(examples: list[Example], mode: str, config: Config) -> list[Example]:
    """Each example with its mode, and with a trace only if it is to give it."""
    modes = assign_modes(
        [replace(example, mode=None) for example in examples], mode, config.data.dual_reasoning_share, config.seed
    )
    return [
        replace(example, mode=own.value, trace=example.trace if own is Mode.REASONING else None)
        for example, own in zip(examples, modes, strict=True)
    ]


def chat(example: Example, encoder: Encoder) -> dict[str, Any]:
    """What training renders, as messages; over-long text is not cut."""
    policy, mode = policy_for(example, encoder.policy), Mode(example.mode or "direct")
    asks = questions(example, policy)
    answer = encoder.dialogue.completion(answers(example, asks), example.trace, mode)
    turns = encoder.dialogue.messages(example, policy, mode, asks)
    return {"id": example.id, "messages": [*turns, {"role": "assistant", "content": answer}]}


def _manifest(
    config: Config,
    settings: BuildConfig,
    sets: list[Built],
    files: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    policy = load_policy(config.data.policy)
    manifest = {
        "jaxguard": jaxguard.__version__,
        "checkpoint": config.model.checkpoint,
        "data": config.data.model_dump(
            mode="json", include={"policy", "reasoning_marker", "direct_marker", "dual_reasoning_share"}
        ),
        "policy_sha256": policy.digest,
        "build": settings.model_dump(mode="json"),
        "seed": config.seed,
        "sets": {
            built.config.name: {
                "mode": built.config.mode,
                "sources": built.origins,
                "dropped": dict(sorted(built.dropped.items())),
                "contaminated": len({match.example_id for match in built.matches}),
                "subsets": files[built.config.name],
            }
            for built in sets
        },
    }
    version = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:12]
    return {"version": version, **manifest}


def _write_rest(draft: Path, manifest: dict[str, Any], sets: list[Built]) -> None:
    matches = {
        json.dumps({"set": built.config.name, **asdict(match)}) + "\n" for built in sets for match in built.matches
    }
    (draft / "contaminated.jsonl").write_text("".join(sorted(matches)), encoding="utf-8")
    roles = {f"{role}_tag": role for role in ("user", "assistant", "system")}
    tags = {"role_tag": "role", "content_tag": "content", **roles}
    chats = {
        f"{name}_{part}": {
            "file_name": f"{name}/chat/{part}.parquet",
            "formatting": "sharegpt",
            "columns": {"messages": "messages"},
            "tags": tags,
        }
        for name, one in manifest["sets"].items()
        for part in one["subsets"]
    }
    for name, tree in (("dataset_info.json", chats), ("manifest.json", manifest)):
        (draft / name).write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (draft / "README.md").write_text(card(manifest), encoding="utf-8")


def _put_in_place(draft: Path, version: str) -> Path:
    """Give the finished folder its name; one with other contents is kept under its version."""
    output = draft.with_name("dataset")
    if output.is_dir():
        before = _version(output)
        if before == version:
            shutil.rmtree(draft)
            return output
        aside = draft.with_name(f"dataset-{before}")
        shutil.rmtree(aside, ignore_errors=True)
        output.rename(aside)
    return draft.rename(output)


def _version(folder: Path) -> str:
    try:
        return str(json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["version"])
    except (OSError, ValueError, KeyError, TypeError):
        return "unreadable"


def _table(manifest: dict[str, Any]) -> Table:
    table = Table("set", title="Training sets", title_justify="left")
    for heading in ("examples", "reasoning", "direct", "subsets", "contaminated", "dropped"):
        table.add_column(heading, justify="right")
    for name, one in manifest["sets"].items():
        whole, modes = one["subsets"]["all"], one["subsets"]["all"]["by_mode"]
        counts = (whole["examples"], modes.get("reasoning", 0), modes.get("direct", 0), len(one["subsets"]) - 1)
        table.add_row(name, *(f"{n:,}" for n in (*counts, one["contaminated"], sum(one["dropped"].values()))))
    return table
