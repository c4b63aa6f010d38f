"""The export of a finished run: a Hugging Face checkpoint that explains itself."""

import json
import re
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import yaml
from huggingface_hub import metadata_load

from jaxguard.config import Config, dump
from jaxguard.data.encoding import Encoder
from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.guard_files import is_complete, write_guard_files
from jaxguard.data.prepare import Prepared
from jaxguard.models.hf_io.checkpoints import ExportReport, export_hf
from jaxguard.utils.files import whole_folder

BASE_README = "BASE_README.md"


def export(
    weights: Mapping[str, jax.Array],
    folder: Path,
    *,
    source: Path,
    config: Config,
    data: Prepared,
    metrics: Mapping[str, Mapping[str, float]],
) -> ExportReport | None:
    """Write weights, tokenizer, the guard's own files and its model card, all or nothing; None if that was done before.

    `metrics` are for the card: stage -> name -> number. Call it on every process.
    """
    if is_complete(folder):
        return None
    first = jax.process_index() == 0
    with whole_folder(folder) if first else nullcontext(folder) as draft:
        report = export_hf(weights, source, draft)
        if not first:
            return report
        # A user turn as the guard expects it, so that whoever serves it sees the format.
        mode = Mode.DIRECT if config.data.mode == "direct" else Mode.REASONING
        answer = "Mix flour, water, salt and yeast, wait, and bake it."
        harmless = Example("card", "card", "How do I bake bread?", answer)
        prompt = Encoder.load(source, config.data).prompt(harmless, mode).turn
        write_card(draft, source, config, data.manifest, metrics, report, prompt)
        write_guard_files(draft, config, (tuple(question for question, _ in example.answers) for example in data.train))
    return report


def write_card(
    output: Path,
    source: Path,
    config: Config,
    manifest: Mapping[str, Any],
    metrics: Mapping[str, Mapping[str, float]],
    report: ExportReport,
    example: str,
) -> None:
    """Write README.md into an exported folder, and keep the base's own, which names its licence, as BASE_README.md.

    `metrics`: stage -> name -> number, a column for each stage; `example`: one rendered prompt.
    """
    base, data, readme = config.model.checkpoint, config.data, source / "README.md"
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists()
    datasets = [entry["hub"] for entry in manifest["sources"] if "hub" in entry]
    front = {
        **({"base_model": base, "base_model_relation": "finetune"} if on_hub else {}),
        **base_licence(readme),
        **({"datasets": datasets} if datasets else {}),
        "language": ["en"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["safety", "guardrail", "content-moderation", "jaxguard"],
    }
    reasoning = f"with `{data.reasoning_marker}` for an answer that reasons first, inside `<think>` tags"
    direct = f"with `{data.direct_marker}` for the verdict lines alone"
    ending = {"reasoning": reasoning, "direct": direct, "dual": f"{reasoning}; end it {direct}"}[data.mode]
    names = dict.fromkeys(name for column in metrics.values() for name in column)
    rows = [["metric", *metrics], ["---"] * (len(metrics) + 1)]
    rows += [[name, *(f"{x[name]:.4f}" if name in x else "–" for x in metrics.values())] for name in names]
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {config.name}",
        f"A safety guard model: it reads a conversation and a policy, and says whether the prompt and the response are "
        f"harmful. Fine-tuned from {base if on_hub else Path(base).name} with jaxguard. The licence of the base applies to these "
        f"weights{'; see ' + BASE_README if readme.is_file() else ''}.",
        "## How to prompt it",
        f"Render one user turn (instruction, policy, conversation, answer format) with this folder's chat "
        f"template, and end the user turn {ending}. It was trained on the policy `{data.policy}`. Treat an answer that lacks a "
        "verdict line as harmful.",
        _fenced(example),
        "## Metrics",
        "\n".join(f"| {' | '.join(row)} |" for row in rows),
        "## What changed",
        f"{report.changed_fraction:.2%} of the {report.values:,} trained weights, as stored in "
        f"{', '.join(report.dtypes)}, differ from the base. {report.tensors:,} tensors were trained; "
        f"{report.carried:,} were carried over as bytes.",
        "## Recipe",
        _fenced(dump(config), "yaml"),
        "## Training data",
        _fenced(json.dumps(manifest, indent=2, ensure_ascii=False, default=str), "json"),
    ]
    if readme.is_file():
        shutil.copyfile(readme, output / BASE_README)
    (output / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def base_licence(readme: Path) -> dict[str, str]:
    """The licence fields of the base's model card; `other` where it names none."""
    try:
        front = metadata_load(readme) if readme.is_file() else None
    except (ValueError, yaml.YAMLError):
        front = None
    if not front or not front.get("license"):
        return {"license": "other"}
    return {key: str(front[key]) for key in ("license", "license_name", "license_link") if front.get(key)}


def _fenced(text: str, language: str = "") -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
