"""The config schema of a study: rows, each a training config with changes, and the grids that they span.

A scale holds what differs on a smaller machine: for all studies in configs/scales, for one in its own file, which is merged last.
It is merged over the study, row by row; a row that is null there is left out.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, model_validator

from jaxguard.config.base import NameOrYaml, NonNegative, Positive, Schema, Share, beside, find_yaml, names
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.parse import Fields, check, nearest, read_yaml

STUDIES, SCALES = Path("configs/studies"), Path("configs/scales")

Stage = Literal["distill", "build", "mine", "pairs", "train", "reinforce", "evaluate"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")]


def labelled(values: Any) -> dict[str, Any]:
    """Return label -> value of an axis; ValueError: a list or mapping without a label, or two values with one label."""
    if isinstance(values, dict):
        return {label(name): value for name, value in values.items()}
    values = values if isinstance(values, list) else [values]
    if any(isinstance(value, dict | list) for value in values):
        raise ValueError("an axis of lists or mappings needs labels: write it as label: value")
    by_label = {label(value): value for value in values}
    if len(by_label) < len(values) or not values:
        raise ValueError("an axis needs at least one value, and each only once")
    return by_label


def label(value: Any) -> str:
    """Return a value's label in the name of a run's folder."""
    if value is None:
        return "all"
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return "".join(c if c.isascii() and (c.isalnum() or c in "._") else "_" for c in text)


class CostConfig(Schema):
    """Assumptions behind a study's cost; printed with it."""

    device: str = "A100-80GB"
    """Name of the device, as in configs/hardware/targets.yaml (`device_kind`)."""
    devices: Positive = 8
    """Number of devices."""
    parameters: PositiveFloat = 8.03e9
    """Of the model, unless its checkpoint is a local folder: a token costs 6 FLOPs for each in training, 2 in evaluation."""
    mfu: Share = 0.4
    """Share of the peak that training and reading prompts reach."""
    generate_mfu: Share = 0.04
    """Share of the peak that generation reaches: the paper's 0.051 s a sample of about 316 tokens on 8 A100s."""
    tokens_per_second: PositiveFloat | None = None
    """Trained tokens per second of all devices together; null uses FLOPs."""
    generated_per_second: PositiveFloat | None = None
    """Generated tokens per second; used with tokens_per_second."""
    start_seconds: NonNegative = 120
    """Seconds to start a stage and to save at its end: loading, compiling."""
    prompt_tokens: Positive = 600
    """Tokens of an example without its answer: instruction, policy, prompt and response."""
    policy_tokens: NonNegative = 500
    """Of these, the tokens of instruction, policy and answer format, which the examples of a row share."""
    trace_tokens: Positive = 300
    """Tokens of a trace; the paper's are about this long."""
    answer_tokens: Positive = 16
    """Tokens of the verdict lines."""
    benchmark_examples: Positive = 1000
    """Examples of a benchmark that does not state its size."""

    @model_validator(mode="after")
    def _check(self) -> "CostConfig":
        if self.policy_tokens >= self.prompt_tokens:
            raise ValueError(f"policy_tokens={self.policy_tokens} is a part of prompt_tokens={self.prompt_tokens}")
        return self


class RowConfig(Schema):
    """One row: a config, what differs, and its stages."""

    config: NameOrYaml | None = None
    """A training config by name or path; null takes the study's."""
    set: dict[str, Any] = Field({})
    """Dotted field -> value. "{study}" in a string is the study's folder."""
    axes: dict[str, Annotated[dict[str, Any], BeforeValidator(labelled)]] = Field({})
    """Dotted field -> label -> value; values of a plain list are their own labels. Every combination is a run."""
    stages: tuple[Stage, ...] = Field(("train", "evaluate"), min_length=1)
    """Stages, in order."""
    after: tuple[str, ...] = ()
    """Earlier rows whose output this one reads; it is skipped if one of them failed."""
    examples: Positive | None = None
    """Examples in data.train if there is no subset, and in mine.sources, where the files are not local; for the cost only."""
    cost: dict[str, Any] = Field({})
    """Changes to the study's cost."""
    series: str | None = None
    """Name in the report; rows of one name are one curve. null takes the row's name."""
    published: dict[Literal["reasoning", "direct"], str] = Field({})
    """Mode -> the row of configs/published that it reproduces. Scales show none."""


class CurveConfig(Schema):
    """A figure of F1 along an axis."""

    axis: str
    """The field, such as data.subset; runs without this axis are not in the figure."""
    label: str
    """Label of the axis in the figure."""
    published: Literal["sample_efficiency", "sentence_budget"] | None = None
    """The published curve to draw, of the reasoning mode. Scales show none."""
    series: str | None = None
    """The series that the published curve belongs to; null: all of them."""
    levels: dict[str, str] = Field({})
    """Title -> the row of configs/published to draw as a horizontal line beside the published curve."""


class StudyConfig(Schema):
    """A study."""

    title: str
    """Heading of the report."""
    about: str = ""
    """What the study shows, and what it does not; printed, and in the report."""
    config: NameOrYaml
    """Training config of rows that name none."""
    set: dict[str, Any] = Field({})
    """Changes for every row."""
    overrides: dict[str, Any] = Field({})
    """Changes of every run, over its row's; those of the command line come after them and work as they do."""
    keep_checkpoints: bool = True
    """Keep the checkpoints of runs that are done, which nothing reads any more; false leaves their exports."""
    prepare: dict[Name, RowConfig] = Field({})
    """Data that rows read, in runs/NAME whatever run_folder is; existing output is used as it is."""
    rows: dict[Name, RowConfig] = Field(min_length=1)
    """The rows, in order."""
    quoted: tuple[str, ...] = ()
    """Rows of configs/published that stand in the report without a run of ours. Scales show none."""
    against: tuple[str, ...] = ()
    """Rows that all others are compared with: the difference in accuracy on the same examples, with its interval."""
    metric: str = "safety"
    """Metric of the curve: an average, or a benchmark's label; if no run has it, the table's first column."""
    curve: CurveConfig | None = None
    """The figure; null draws none."""
    cost: CostConfig = CostConfig()

    @model_validator(mode="after")
    def _check(self) -> "StudyConfig":
        for position, (name, row) in enumerate(self.rows.items()):
            for other in row.after:
                if other not in list(self.rows)[:position]:
                    raise ValueError(f"rows.{name}.after: {other!r} is not an earlier row")
        for name in self.against:
            if name not in self.rows:
                raise ValueError(f"against: no row {name!r}")
        for name, row in self.prepare.items():
            if row.axes or set(row.stages) - {"distill", "build"}:
                raise ValueError(f"prepare.{name}: only stages distill and build, and no axes, are possible")
        return self


def read_study(name: str, scale: str | None = None, changes: Mapping[str, Any] = {}) -> tuple[StudyConfig, str]:
    """Read a study at a scale, by its name in configs/studies or by its file's path; return it and the study's name.

    `changes` is merged over it as a scale is. JaxguardError: no such study or scale; unknown, missing or ill-typed field.
    """
    path = find_yaml(name, STUDIES, "study")
    tree, origin, stem = beside(read_yaml(path, Fields), StudyConfig, path.parent), str(path), path.stem
    scales = check(tree.pop("scales", None) or {}, dict[str, Fields], f"{path}: scales")
    if scale is not None:
        known = sorted({*scales, *names(SCALES)})
        if scale not in known:
            raise JaxguardError(f"{path}: no scale {scale!r}; {nearest(scale, known)}known: {', '.join(known)}")
        if scale in names(SCALES):
            tree = merged(tree, read_yaml(find_yaml(scale, SCALES, "scale"), Fields))
        tree, origin, stem = merged(tree, scales.get(scale, {})), f"{path}, scale {scale}", f"{stem}-{scale}"
    study = check(merged(tree, changes), StudyConfig, origin)
    return study if scale is None else study.model_copy(update={"title": f"{study.title} (scale {scale})"}), stem


def merged(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """Merge `top` over `base`, recursively; null in `top` deletes, except inside set, axes and cost, which hold fields."""
    result = dict(base)
    for key, value in top.items():
        old = result.get(key)
        if value is None:
            result.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(old, Mapping):
            result[key] = {**old, **value} if key in ("set", "axes", "cost") else merged(old, value)
        else:
            result[key] = value
    return result
