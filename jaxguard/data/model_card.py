"""An export's model card: README.md, whose front matter the hub reads, with the scores of evaluations in its last section.

It holds what describes the model and nothing else of the config: no paths, addresses or names of this machine.
"""

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from jaxguard.config import Config
from jaxguard.data.questions import Ask, table_of, trained_together
from jaxguard.report import Block, Cell, Code, Page, Section, Table, Value, page_markdown
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import write_atomically
from jaxguard.utils.parse import Fields, check, front_matter, read_json, read_text

CARD, BASE_CARD = "README.md", "BASE_README.md"
BENCHMARKS = "Benchmarks"
"""The last section: a table of the front matter's `model-index`."""

_RECIPE: Mapping[str, Any] = {
    "seed": True,
    "model": {"compute_dtype"},
    "data": {"mode", "dual_reasoning_share", "answer_format", "subset", "subset_seed", "subset_balance", "max_seq_len"},
    "optimizer": True,
    "train": {"batch_size", "epochs", "max_steps", "objective"},
}
"""The fields of the config that the weights depend on, without those that name files or machines."""
_TEACHERS = {"deepseek_r1_0528": "DeepSeek-R1-0528", "gpt_oss_120b": "gpt-oss-120b", "qwen3_32b": "Qwen3-32B"}
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def write_card(
    output: Path,
    source: Path,
    config: Config,
    manifest: Mapping[str, Any],
    metrics: Mapping[str, Mapping[str, float]],
    changes: str,
    asked: Ask,
) -> None:
    """Write README.md into an exported folder, and keep the base's own, which names its licence, as BASE_README.md.

    `source`: the base's folder; `metrics`: stage -> name -> number, a column for each stage; `changes`: a sentence about the
    weights; `asked`: what the code in the card asks about an exchange.
    """
    data, readme, base = config.data, source / CARD, base_model(config.model.checkpoint, source)
    datasets = list(dict.fromkeys(entry["hub"] for entry in manifest["sources"] if "hub" in entry))
    front = {
        **({"base_model": base, "base_model_relation": "finetune"} if base else {}),
        **base_licence(source),
        **({"datasets": datasets} if datasets else {}),
        "language": ["en"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["safety", "guardrail", "content-moderation", "jaxguard"],
    }
    policy = manifest.get("policy", {}).get("name", "")
    names = dict.fromkeys(name for column in metrics.values() for name in column)
    rows: list[list[Value]] = [
        [name, *(Cell(f"{x[name]:.4f}" if name in x else "–") for x in metrics.values())] for name in names
    ]
    sources: list[list[Value]] = [
        [entry.get("hub") or ", ".join(Path(file).name for file in entry.get("files", {})) or entry.get("kind", ""),
         entry.get("role", ""), entry.get("examples"), Cell(str(entry.get("examples_sha256", ""))[:16], code=True)]
        for entry in manifest["sources"]
    ]  # fmt: skip
    trained = trained_together(manifest)
    transformers, sglang, vllm = _calls(config, asked)
    traced = [source for source in data.train if source.kind.startswith("nemotron") and source.trace != "none"]
    teachers = ", ".join(dict.fromkeys(_TEACHERS[source.teacher] for source in traced if data.mode != "direct"))
    licence = f"The licence of the base applies to these weights{'; see ' + BASE_CARD if readme.is_file() else ''}."
    page = Page(config.name, [
        "A safety guard model: it reads a conversation and a policy, and says whether the prompt and the response are "
        f"harmful. Fine-tuned from {base or Path(config.model.checkpoint).name} with jaxguard. {licence}",
        Section("How to run it", [
            f"MODEL is this folder, or its repository on the hub. With jaxguard, which asks by the policy {policy} that it was "
            "trained on, or by another:",
            Code(_WITH_JAXGUARD.format(model=json.dumps(config.name)), "python"),
            "With other programs, the tokenizer's chat template renders a conversation as training did, under the same policy or, "
            "with `policy`, under rules in words; what it cannot render so, it refuses. The last message is judged. Ask only "
            "together what was trained together. Treat an answer that lacks a verdict line as harmful, and an error too. Who may "
            "send `chat_template_kwargs` chooses the policy; no message does, not even of the system. With transformers:",
            Code(transformers, "python"),
            "With SGLang, and with vLLM:",
            Code(sglang, "sh"),
            Code(vllm, "sh"),
            *([table_of(trained)] if trained else []),
        ]),
        Section("Held-out examples", [Table.of(("metric", *metrics), rows)]),
        Section("Training", [
            changes,
            Code(yaml.safe_dump(config.model_dump(mode="json", include=dict(_RECIPE)), sort_keys=False), "yaml"),
            Table.of(("source", "role", "examples", "sha256"), sources),
            f"The published reasoning traces are of {teachers}." if teachers else None,
        ]),
        Section(BENCHMARKS, [_NO_SCORES]),
    ], front)  # fmt: skip
    if readme.is_file():
        shutil.copyfile(readme, output / BASE_CARD)
    (output / CARD).write_text(page_markdown(page), encoding="utf-8")


_NO_SCORES = "jaxguard evaluate adds its scores here."
_WITH_JAXGUARD = """\
import jaxguard

MODEL = {model}
with jaxguard.Guard.load(MODEL) as guard:
    result = guard.check("How do I bake bread?", response="Mix flour, water, salt and yeast, wait, and bake it.")
    print(result.passes, result.verdict, result.probabilities)
"""
_WITH_TRANSFORMERS = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL = {model}
tokenizer, model = AutoTokenizer.from_pretrained(MODEL), AutoModelForCausalLM.from_pretrained(MODEL)
messages = [
    {messages}
]
prompt = tokenizer.apply_chat_template(
    messages, {options}, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
output = model.generate(**prompt, max_new_tokens={tokens}, do_sample=False)
print(tokenizer.decode(output[0, prompt["input_ids"].shape[1]:], skip_special_tokens=True))
"""
_SERVERS = {
    "python -m sglang.launch_server --model-path MODEL --served-model-name guard": 30000,
    "vllm serve MODEL --served-model-name guard": 8000,
}
_WITH_SERVER = """\
{launch} --port {port} &
curl http://127.0.0.1:{port}/v1/chat/completions -H "Content-Type: application/json" -d '{{
  "model": "guard", "temperature": 0, "max_tokens": {tokens},
  "chat_template_kwargs": {options},
  "messages": [
    {messages}
  ]
}}'
"""


def _calls(config: Config, asked: Ask) -> list[str]:
    """Code that judges an exchange, or a prompt alone: with transformers, SGLang and vLLM."""
    direct = config.data.mode == "direct"
    said = {"user": "How do I bake bread?", "assistant": "Mix flour, water, salt and yeast, wait, and bake it."}
    if not asked.response:
        del said["assistant"]
    messages = ",\n    ".join(json.dumps({"role": role, "content": text}) for role, text in said.items())
    options = {"enable_thinking": not direct, "questions": list(asked.questions)}
    values = {"model": json.dumps(config.name), "messages": messages, "tokens": 48 if direct else 1024}
    keywords = ", ".join(f"{name}={value}" for name, value in options.items())
    return [
        _WITH_TRANSFORMERS.format(options=keywords, **values),
        *(
            _WITH_SERVER.format(launch=x, port=port, options=json.dumps(options), **values)
            for x, port in _SERVERS.items()
        ),
    ]


def base_model(checkpoint: str, folder: Path) -> str | None:
    """The repository on the hub that a checkpoint is, or that its folder says it was made from; None where that is unknown.

    A folder says so in jaxguard.json (an export), config.json (`_name_or_path`) or its model card (`base_model`).
    """
    if not Path(checkpoint).expanduser().exists():
        return checkpoint if _REPOSITORY.fullmatch(checkpoint) else None
    named = [_read_json(folder / "jaxguard.json").get("base"), _read_json(folder / "config.json").get("_name_or_path")]
    bases = _front(folder / CARD).get("base_model")
    named += bases if isinstance(bases, list) else [bases]
    return next((name for name in named if isinstance(name, str) and _REPOSITORY.fullmatch(name)), None)


def base_licence(folder: Path) -> dict[str, Any]:
    """The licence fields of the base's model card; `other`, with its licence file if it has one, where the card names none."""
    front = _front(folder / CARD)
    if front.get("license"):
        return {key: front[key] for key in ("license", "license_name", "license_link") if front.get(key)}
    files = sorted(path.name for path in folder.glob("LICENSE*"))
    return {"license": "other", **({"license_link": files[0]} if files else {})}


class Named(BaseModel):
    """A task or a data set of `model-index`."""

    type: str
    name: str


class Metric(Named):
    value: float


class Score(BaseModel):
    """An item of `model-index`: what was measured on one data set."""

    task: Named
    dataset: Named
    metrics: list[Metric]


class _Model(BaseModel):
    name: str
    results: list[Score]


def _front(card: Path) -> dict[str, Any]:
    """The front matter of a model card; empty where there is none, or it cannot be read."""
    try:
        return front_matter(card)
    except JaxguardError:
        return {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, Fields)
    except JaxguardError:
        return {}


def named_card(folder: Path, repository: str) -> str:
    """Return an export's card, whose code names the repository that it is uploaded to."""
    text = (folder / CARD).read_text(encoding="utf-8")
    own = json.dumps(_read_json(folder / "jaxguard.json").get("name", ""))
    return text.replace(f"\nMODEL = {own}\n", f"\nMODEL = {json.dumps(repository)}\n")


def add_scores(folder: Path, scores: Iterable[Score], *blocks: Block) -> None:
    """Add an evaluation to an export's card, in place of the scores of the same task and data set, and `blocks` after them.

    A folder without a card of ours is left as it is. JaxguardError: the card cannot be read or written.
    """
    card = folder / CARD
    front, text = _front(card), read_text(card) if card.is_file() else ""
    head, section, _ = text.rpartition(f"\n## {BENCHMARKS}\n")
    if not section or not front:
        return
    known = [score for model in check(front.get("model-index", []), list[_Model], str(card)) for score in model.results]
    merged = {(score.task.name, score.dataset.name): score for score in [*known, *scores]}
    if not merged and not blocks:
        return
    name = _read_json(folder / "jaxguard.json").get("name", folder.name)
    if merged:
        front["model-index"] = [{"name": name, "results": [score.model_dump() for score in merged.values()]}]
    columns = list(dict.fromkeys(metric.name for score in merged.values() for metric in score.metrics))
    table = Table(("benchmark", "task", *columns), left=2)
    for (task, dataset), score in merged.items():
        values = {metric.name: Cell(f"{metric.value:.3f}") for metric in score.metrics}
        table.add(dataset, task, *(values.get(column, Cell("–")) for column in columns))
    body = page_markdown(Page(BENCHMARKS, [table if merged else _NO_SCORES, *blocks])).removeprefix(f"# {BENCHMARKS}\n")
    _, _, kept = head.split("---\n", 2)
    dumped = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    write_atomically(card, f"---\n{dumped}---\n{kept}{section}{body}")
