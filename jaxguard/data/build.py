"""Write training sets into a folder that describes itself; docs/data.md lists its files.

The same examples and the same config give the same bytes.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet

import jaxguard
from jaxguard.config import Config
from jaxguard.config.data import BuildConfig, SetConfig, SourceConfig
from jaxguard.data.benchmarks.loading import load_benchmarks
from jaxguard.data.contamination import Match, find_matches
from jaxguard.data.encoding import TOKENIZER_FILES, Encoder
from jaxguard.data.examples import LABELS, Example
from jaxguard.data.files import file_digest
from jaxguard.data.format.dialogue import Mode, answers, questions
from jaxguard.data.policies import load_policy, policy_for
from jaxguard.data.prepare import assign_modes, load_sources, subset, usable
from jaxguard.data.sources import load, unique_ids
from jaxguard.report import Cell, Code, Content, Page, Paragraph, Section, Table, page_markdown
from jaxguard.utils import hub
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import lock_folder
from jaxguard.utils.parse import Fields, PathPart, read_json
from jaxguard.utils.secrets import published

_TEXT = pyarrow.string()
SCHEMA = pyarrow.schema(
    [(name, _TEXT) for name in ("id", "source", "prompt", "response", *LABELS)]
    + [("categories", pyarrow.list_(_TEXT)), ("policy", _TEXT), ("trace", _TEXT), ("mode", _TEXT)]
    + [("adversarial", pyarrow.bool_())]
)
CHAT_SCHEMA = pyarrow.schema(
    [("id", _TEXT), ("messages", pyarrow.list_(pyarrow.struct([("role", _TEXT), ("content", _TEXT)])))]
)
_DATA_FIELDS = {"policy", "reasoning_marker", "direct_marker", "answer_format", "dual_reasoning_share"}

Pool = tuple[list[Example], list[dict[str, Any]], list[Match]]
"""The examples of some sources, the sources' manifest entries, and the examples that a benchmark holds too."""


@dataclass(frozen=True)
class _Manifest:
    """What is read of a manifest.json: the version, which becomes a folder's name."""

    version: PathPart


class BuildResult(NamedTuple):
    """A built data set: its folder, and its manifest as in manifest.json."""

    folder: Path
    manifest: dict[str, Any]


def build(config: Config) -> BuildResult:
    """Build all sets of a config into run_folder/name/dataset; one with other contents is renamed to dataset-VERSION."""
    settings, folder = config.build or BuildConfig(), config.folder
    tokenizer = hub.fetch(config.model.checkpoint, config.model.revision, TOKENIZER_FILES)
    encoder = Encoder.load(tokenizer, config.data)
    benchmarks: dict[str, Sequence[Example]] = {}
    for source in settings.benchmarks:
        if isinstance(source, str):
            benchmarks |= {benchmark.definition.name: benchmark.examples for benchmark in load_benchmarks(source)}
        else:
            benchmarks[" ".join(filter(None, (source.kind, source.path, source.split)))] = load(source).examples

    @cache
    def pool(sources: tuple[SourceConfig, ...]) -> Pool:
        examples, origins = load_sources(sources, "sources")
        for origin, source in zip(origins, sources, strict=True):
            path = Path(source.path or "").with_suffix(".summary.json")
            if source.path and path.is_file():  # of the distillation that wrote it
                summary = read_json(path, Fields)
                origin["distilled"] = {name: value for name, value in summary.items() if name != "never_passed"}
        return examples, origins, find_matches(examples, benchmarks, settings.similarity) if benchmarks else []

    with lock_folder(folder, "run"):
        draft = folder / "dataset.partial"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        sets, contaminated = {}, set[str]()
        for each in settings.sets:
            sets[each.name], matches = _build_set(draft, each, config, encoder, pool)
            contaminated |= {json.dumps({"set": each.name, **asdict(match)}) + "\n" for match in matches}
        manifest = published(
            {
                "jaxguard": jaxguard.__version__,
                "checkpoint": config.model.checkpoint,
                "data": config.data.model_dump(mode="json", include=_DATA_FIELDS),
                "policy_sha256": load_policy(config.data.policy).digest,
                "build": settings.model_dump(mode="json"),
                "seed": config.seed,
                "sets": sets,
            }
        )
        version = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:12]
        manifest = {"version": version, **manifest}
        _write_metadata(draft, manifest, contaminated)
        return BuildResult(_publish(draft, version), manifest)


def _build_set(
    draft: Path, wanted: SetConfig, config: Config, encoder: Encoder, pool: Callable[[tuple[SourceConfig, ...]], Pool]
) -> tuple[dict[str, Any], list[Match]]:
    """Write a set and its subsets; return its entry in the manifest, and what is left out because a benchmark holds it."""
    dropped, origins, matches = Counter[str](), list[dict[str, Any]](), list[Match]()

    def select(sources: tuple[SourceConfig, ...], role: str) -> list[Example]:
        examples, pool_origins, pool_matches = pool(sources)
        origins.extend({**origin, "role": role} for origin in pool_origins)
        matches.extend(pool_matches)
        contaminated = {match.example_id for match in pool_matches}
        examples = usable(examples, f"build.sets.{wanted.name}.{role}", encoder.policy, wanted.mode, dropped)
        return [example for example in examples if example.id not in contaminated]

    base = select(wanted.sources or config.data.train, "sources")
    appended = select(wanted.append, "append") if wanted.append else []
    if not base:
        raise JaxguardError(f"build.sets: {wanted.name!r} is empty: a benchmark holds all of its prompts")
    folder, settings = draft / wanted.name, config.build or BuildConfig()
    (folder / "chat").mkdir(parents=True)
    sizes = sorted(size for size in settings.subsets if size < len(base))
    parts = {"all": base} | {f"{n}_{seed}": subset(base, n, seed) for n in sizes for seed in settings.seeds}
    subsets = {}
    for name, selected in parts.items():
        examples = [replace(example, mode=None) for example in unique_ids([*selected, *appended])]
        modes = assign_modes(examples, wanted.mode, config.data.dual_reasoning_share, config.seed)
        examples = [
            replace(example, mode=mode.value, trace=example.trace if mode is Mode.REASONING else None)
            for example, mode in zip(examples, modes, strict=True)
        ]
        paths = folder / f"{name}.parquet", folder / "chat" / f"{name}.parquet"
        rows = [example.to_json() for example in examples], [chat(example, encoder) for example in examples]
        for path, table, schema in zip(paths, rows, (SCHEMA, CHAT_SCHEMA), strict=True):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table, schema), path, compression="zstd")
        subsets[name] = {
            "examples": len(examples),
            "appended": len(appended),
            "by_mode": dict(sorted(Counter(str(example.mode) for example in examples).items())),
            "labels": {x: dict(sorted(Counter(str(getattr(e, x)) for e in examples).items())) for x in LABELS},
            "files": {str(path.relative_to(draft)): file_digest(path) for path in paths},
        }
    entry = {
        "mode": wanted.mode,
        "sources": origins,
        "dropped": dict(sorted((+dropped).items())),
        "contaminated": len({match.example_id for match in matches}),
        "subsets": subsets,
    }
    return entry, matches


def chat(example: Example, encoder: Encoder) -> dict[str, Any]:
    """Render an example as training does, as chat messages; long text is not truncated."""
    policy, mode = policy_for(example, encoder.policy), Mode(example.mode or "direct")
    asks = questions(example, policy)
    turn = encoder.dialogue.user_turn(example.prompt, example.response, policy, asks, mode)
    answer = encoder.dialogue.completion(answers(example, asks), example.trace, mode)
    messages = [{"role": "user", "content": turn}, {"role": "assistant", "content": answer}]
    return {"id": example.id, "messages": messages}


def _write_metadata(draft: Path, manifest: dict[str, Any], contaminated: Iterable[str]) -> None:
    tags = {"role_tag": "role", "content_tag": "content"} | {f"{x}_tag": x for x in ("user", "assistant", "system")}
    layout = {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
    info = {
        f"{name}_{part}": {"file_name": f"{name}/chat/{part}.parquet", **layout}
        for name, entry in manifest["sets"].items()
        for part in entry["subsets"]
    }
    texts = {"contaminated.jsonl": "".join(sorted(contaminated)), "README.md": card(manifest)}
    for name, tree in (("dataset_info.json", info), ("manifest.json", manifest)):
        texts[name] = json.dumps(tree, indent=2, ensure_ascii=False) + "\n"
    for name, text in texts.items():
        (draft / name).write_text(text, encoding="utf-8")


def card(manifest: dict[str, Any]) -> str:
    """Return README.md of a built data set, with YAML that `datasets` and the hub read."""
    columns = ("set", "examples", "with a trace", "appended", "harmful prompts", "harmful responses", "contaminated")
    sets, sources = Table(columns), Table(("set", "source", "examples", "skipped", "teacher's attempts"), left=2)
    configs = []
    for name, entry in manifest["sets"].items():
        for part, counts in entry["subsets"].items():
            for suffix, path in zip(("", "_chat"), counts["files"], strict=True):
                configs.append({"config_name": f"{name}_{part}{suffix}", "data_files": path})
            harmful = [counts["labels"][label].get("harmful", 0) for label in ("prompt_label", "response_label")]
            traced = counts["by_mode"].get("reasoning", 0)
            sets.add(f"{name}_{part}", counts["examples"], traced, counts["appended"], *harmful, entry["contaminated"])
        for origin in entry["sources"]:
            path = origin.get("hub") or ", ".join(origin["files"])
            role = f"{origin['kind']}, appended" if origin["role"] == "append" else origin["kind"]
            attempts = origin.get("distilled", {}).get("attempts", "")
            skipped = sum(origin["skipped"].values())
            sources.add(name, Cell(path, role, code=True), origin["examples"], skipped, attempts)
    front = {
        "task_categories": ["text-classification", "text-generation"],
        "tags": ["safety", "guardrails", "reasoning", "jaxguard"],
        "configs": [{"default": True, **configs[0]}, *configs[1:]],
    }
    first = next(iter(manifest["sets"]))
    example = (
        f'datasets.load_dataset("path/to/this/folder", "{first}_all")       # our columns\n'
        f'datasets.load_dataset("path/to/this/folder", "{first}_all_chat")  # chat messages'
    )
    blocks: list[Content] = [
        Paragraph(["Built by jaxguard ", manifest["jaxguard"], ", version ", Cell(manifest["version"], code=True), ". It holds "
                   "offensive text by nature: conversations that people labelled as harmful or not, and a teacher's reasoning "
                   "about them. The licences of its sources apply."]),
        Code(example, "python"),
        sets,
        Paragraph(["SIZE_SEED are random subsets; for each seed, smaller ones are contained in larger ones. Appended examples "
                   "are added to each subset. The column mode says whether an example is trained with its trace. Chat messages "
                   "are rendered as in training for ", Cell(manifest["checkpoint"], code=True), " under the policy ",
                   Cell(manifest["data"]["policy"], code=True), "."]),
        Section("Sources", [
            sources,
            "manifest.json has the hash of every file, what was dropped and why, and the config. contaminated.jsonl lists the "
            "examples that were dropped because a benchmark holds their prompt.",
        ]),
    ]  # fmt: skip
    return page_markdown(Page("Training sets for a safety guard", blocks, front))


def _publish(draft: Path, version: str) -> Path:
    """Rename the finished folder to dataset; an existing one with other contents gets its version as a suffix."""
    output = draft.with_name("dataset")
    if output.is_dir():
        existing = read_json(output / "manifest.json", _Manifest).version
        if existing == version:
            shutil.rmtree(draft)
            return output
        aside = draft.with_name(f"dataset-{existing}")
        shutil.rmtree(aside, ignore_errors=True)
        output.rename(aside)
    return draft.rename(output)
