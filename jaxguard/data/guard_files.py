"""The files by which an exported guard explains itself, beside its weights and tokenizer.

config.yaml     what describes the model of the resolved config of the run that trained it, without secrets and absolute paths
policy.yaml     the policy that it was trained on, as a policy file
jaxguard.json   format version, base checkpoint, modes, markers, and the questions that were trained together; written last
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple

import yaml
from pydantic import Field, model_validator

import jaxguard
from jaxguard.config import Config, read_dump
from jaxguard.config.base import Schema
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.policies import PolicyDefinition, Question, load_policy
from jaxguard.data.questions import QuestionSet
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import disk_steps
from jaxguard.utils.parse import read_yaml
from jaxguard.utils.secrets import published

MANIFEST, CONFIG, POLICY = "jaxguard.json", "config.yaml", "policy.yaml"
FORMAT: Final = 2
_DESCRIBES = {"name", "seed", "model", "data", "optimizer", "train"}
"""Fields of the config that describe the model; the others describe the machine, or other stages."""


class ExportManifest(Schema):
    """jaxguard.json."""

    format: Annotated[int, Field(ge=1, le=FORMAT)]
    """Version of these files; a newer one is refused."""
    version: str
    """Of jaxguard, when it was written."""
    name: str
    base: str
    """The checkpoint that was fine-tuned: a repository on the hub, or a folder's name."""
    modes: tuple[Mode, ...]
    reasoning_marker: str
    direct_marker: str
    max_seq_len: int
    questions: tuple[Question, ...]
    trained_together: tuple[QuestionSet, ...]
    """Every set of questions that a prompt of the training data asks; empty where that is not known."""

    @model_validator(mode="before")
    @classmethod
    def _upgrade(cls, tree: Any) -> Any:
        """Read format 1, whose sets do not say whether there was a response, as one without them."""
        return {**tree, "trained_together": ()} if isinstance(tree, dict) and tree.get("format") == 1 else tree


class GuardFiles(NamedTuple):
    """What an export says of itself: jaxguard.json, the config of the run that trained it, the path of policy.yaml."""

    manifest: ExportManifest
    config: Config
    policy: Path


def is_complete(folder: Path) -> bool:
    """Whether an export was finished there."""
    return (folder / MANIFEST).is_file()


def find_export(run: Path) -> Path:
    """Return the export in a run's folder; JaxguardError says how far the run is without one."""
    if is_complete(run / "export"):
        return run / "export"
    steps = disk_steps(run / "checkpoints")
    if steps:
        state = f"training was stopped after step {steps[-1]}, or train.export is false. To finish it"
    elif run.is_dir():
        state = "no step was trained, as after a start that failed. To try again"
    else:
        state = "there is no such folder. To train it first"
    raise JaxguardError(f"{run} holds no trained guard: {state}: jaxguard train with the run's config")


def export_or(checkpoint: str) -> str:
    """The export in a run's folder, or the checkpoint itself; JaxguardError: the folder of a run without an export."""
    folder = Path(checkpoint).expanduser()
    export = folder / "export"
    if export.is_dir() and any(export.iterdir()):  # also one that is not jaxguard's
        return str(export)
    of_run = any((folder / name).exists() for name in ("export", "checkpoints", ".lock"))
    return str(find_export(folder)) if of_run else checkpoint


def write_guard_files(folder: Path, config: Config, trained_together: Sequence[QuestionSet]) -> None:
    """Write the three files into a folder with weights and tokenizer."""
    policy, data = load_policy(config.data.policy), config.data
    local = Path(config.model.checkpoint).exists()
    manifest = ExportManifest(
        format=FORMAT,
        version=jaxguard.__version__,
        name=config.name,
        base=Path(config.model.checkpoint).name if local else config.model.checkpoint,
        modes=tuple(mode for mode in Mode if data.mode in ("dual", mode)),
        reasoning_marker=data.reasoning_marker,
        direct_marker=data.direct_marker,
        max_seq_len=data.max_seq_len,
        questions=policy.asks,
        trained_together=tuple(trained_together),
    )
    definition = PolicyDefinition.model_validate(asdict(policy)).model_dump(mode="json", exclude={"description"})
    tree = published(config.model_dump(mode="json", include=_DESCRIBES))
    (folder / CONFIG).write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), encoding="utf-8")
    (folder / POLICY).write_text(yaml.safe_dump(definition, sort_keys=False, allow_unicode=True), encoding="utf-8")
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> ExportManifest | None:
    """Read jaxguard.json; None if the folder is no export of jaxguard."""
    # JSON is YAML.
    return read_yaml(folder / MANIFEST, ExportManifest) if is_complete(folder) else None


def trained_together(folder: Path) -> tuple[QuestionSet, ...]:
    """The sets of questions that a guard was trained on; () where that is not recorded."""
    manifest = read_manifest(folder)
    return () if manifest is None else manifest.trained_together


def read_guard_files(folder: Path) -> GuardFiles | None:
    """Read what an export says of itself; None if the folder is no export of jaxguard."""
    manifest = read_manifest(folder)
    return None if manifest is None else GuardFiles(manifest, read_dump(folder / CONFIG), folder / POLICY)
