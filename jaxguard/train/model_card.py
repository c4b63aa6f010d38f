"""The README.md of an exported guard: where it comes from, how it was made, what it scores, how to ask it."""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from jaxguard.config import Config, dump
from jaxguard.models.hf_io.checkpoints import ExportReport
from jaxguard.utils.errors import JaxguardError

BASE_README = "BASE_README.md"

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def write_card(
    output: Path,
    *,
    source: Path,
    base: str,
    config: Config,
    manifest: Mapping[str, Any],
    metrics: Mapping[str, Any],
    report: ExportReport,
    datasets: Sequence[str] = (),
    example: str = "",
) -> Path:
    """Write README.md into an exported folder, and keep the base's own as BASE_README.md.

    Args:
        output: the exported folder.
        source: folder of the base checkpoint, whose README.md names its licence.
        base: what the config calls the base checkpoint: a hub repository, or a path.
        config: the resolved config of the run.
        manifest: what was trained on, as the run folder keeps it.
        metrics: name -> number, or stage -> name -> number for one column a stage.
        report: what the export did.
        datasets: hub ids of the training data.
        example: one rendered prompt with the answer that is wanted.

    Returns:
        The path of README.md.
    """
    base_name = base if _is_repository(base) else Path(base).name
    front = {
        **({"base_model": base, "base_model_relation": "finetune"} if _is_repository(base) else {}),
        **base_licence(source),
        **({"datasets": list(datasets)} if datasets else {}),
        "language": ["en"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["safety", "guardrail", "content-moderation", "jaxguard"],
    }
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {config.name}",
        f"A safety guard model: it reads a conversation and a policy, and says whether the prompt and the response are "
        f"harmful. Fine-tuned from {base_name} with jaxguard. The licence of the base applies to these weights"
        f"{'; see ' + BASE_README if (source / 'README.md').is_file() else ''}.",
        "## How to prompt it",
        _prompting(config),
        *([_fenced(example)] if example else []),
        "## Metrics",
        _metrics_table(metrics),
        "## What changed",
        f"{report.changed_fraction:.2%} of the {report.values:,} trained weights, as stored in "
        f"{', '.join(report.dtypes)}, differ from the base. {report.tensors:,} tensors were trained; "
        f"{report.carried:,} were carried over as bytes.",
        "## Recipe",
        _fenced(dump(config), "yaml"),
        "## Training data",
        _fenced(json.dumps(manifest, indent=2, ensure_ascii=False, default=str), "json"),
    ]
    if (source / "README.md").is_file():
        shutil.copyfile(source / "README.md", output / BASE_README)
    path = output / "README.md"
    try:
        path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    except OSError as error:
        raise JaxguardError(
            f"{path} cannot be written ({error.strerror}); the weights beside it are complete"
        ) from None
    return path


def base_licence(source: Path) -> dict[str, str]:
    """The licence fields of the base's model card; `other` where it names none."""
    readme = source / "README.md"
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    try:
        front = yaml.safe_load(match.group(1)) if match else {}
    except yaml.YAMLError:
        front = {}
    if not isinstance(front, dict) or not front.get("license"):
        return {"license": "other"}
    return {key: str(front[key]) for key in ("license", "license_name", "license_link") if front.get(key)}


def _is_repository(base: str) -> bool:
    return bool(_REPOSITORY.fullmatch(base)) and not Path(base).exists()


def _prompting(config: Config) -> str:
    data = config.data
    reasoning = (
        f"end the user turn with `{data.reasoning_marker}` for an answer that reasons first, inside `<think>` tags"
    )
    direct = f"end it with `{data.direct_marker}` for the verdict lines alone"
    how = {"reasoning": reasoning, "direct": direct.replace("end it", "end the user turn")}.get(
        data.mode, f"{reasoning}; {direct}"
    )
    return (
        f"Render one user turn (instruction, policy, conversation, answer format) with this folder's chat "
        f"template, and {how}. It was trained on the policy `{data.policy}`. Treat an answer that lacks a verdict line "
        "as harmful."
    )


def _metrics_table(metrics: Mapping[str, Any]) -> str:
    """One row a metric; one column a stage where the values are mappings themselves."""
    if not metrics:
        return "None were measured."
    staged = all(isinstance(value, Mapping) for value in metrics.values())
    columns: dict[str, Mapping[str, Any]] = dict(metrics) if staged else {"value": metrics}
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    rows = [["metric", *columns], ["---"] * (len(columns) + 1)]
    rows += [[name, *(_number(column.get(name)) for column in columns.values())] for name in names]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _number(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _fenced(text: str, language: str = "") -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
