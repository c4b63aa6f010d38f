"""A study as written in YAML: rows, each a training config with changes, and the grids that they span.

A scale is what of a study is different on a smaller machine: it is merged over the study, row by row. A row, a stage or a list
that is null or empty there is left out.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from jaxguard.config.base import NonNegative, Positive, Schema, Share, read_yaml, validate
from jaxguard.config.lookup import folders, names, nearest
from jaxguard.utils.errors import JaxguardError

STUDY_FOLDER = Path("configs")
STUDIES = "paper"

Stage = Literal["distill", "build", "mine", "train", "evaluate"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")]
PositiveFloat = Annotated[float, Field(gt=0)]


class CostConfig(Schema):
    """What a study's cost is reckoned from. These are assumptions, and said to be where they are used."""

    device: str = "A100-80GB"
    """What it is called."""
    devices: Positive = 8
    """How many."""
    peak_flops: PositiveFloat = 312e12
    """Dense bfloat16 FLOP/s of one, from its data sheet."""
    parameters: PositiveFloat = 8.03e9
    """Of the model: a token costs 6 FLOPs for each in training, 2 in judging."""
    mfu: Share = 0.4
    """Share of the peak that training and reading prompts reach."""
    generate_mfu: Share = 0.04
    """Share of it that generating reaches. The paper's 0.051 s a sample of about 316 tokens on 8 A100s are this much."""
    tokens_per_second: PositiveFloat | None = None
    """Trained tokens a second of all devices together; null reckons with FLOPs."""
    generated_per_second: PositiveFloat | None = None
    """Generated tokens a second; goes with tokens_per_second."""
    start_seconds: NonNegative = 120
    """From the start of a stage to its first update or verdict: loading, compiling, and saving at the end."""
    prompt_tokens: Positive = 600
    """Of an example without its answer: instruction, policy, prompt and response."""
    trace_tokens: Positive = 300
    """Of a trace; the paper's are about this long."""
    answer_tokens: Positive = 16
    """Of the verdict lines."""
    benchmark_examples: Positive = 1000
    """In a benchmark of which nobody says how many there are."""


class RowConfig(Schema):
    """One row: a config, what is different, and what is done."""

    config: str | None = None
    """A training config by name or path; null takes the study's."""
    set: dict[str, Any] = Field({})
    """Dotted field -> value. "{study}" in a text is the study's folder."""
    axes: dict[str, dict[str, Any]] = Field({})
    """Dotted field -> its values, each with a label; a plain list labels itself. Every combination is a run."""
    stages: tuple[Stage, ...] = Field(("train", "evaluate"), min_length=1)
    """What is done, in order."""
    after: tuple[str, ...] = ()
    """Earlier rows whose output this one reads; it is left out when one of them failed."""
    examples: Positive | None = None
    """How many examples data.train has, where no subset is taken and the files are not here; for the cost alone."""
    cost: dict[str, Any] = Field({})
    """Of the study's cost section, what is different."""
    series: str | None = None
    """What the report calls it; rows of one name are one curve. null takes the row's name."""
    published: dict[Literal["reasoning", "direct"], str] = Field({})
    """The mode in which it is asked -> the row of configs/published that it reproduces. Scales show none."""

    @field_validator("axes", mode="before")
    @classmethod
    def _with_labels(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {field: labelled(values) for field, values in value.items()}


class CurveConfig(Schema):
    """A figure of F1 along an axis."""

    axis: str
    """The field, such as data.subset; runs that lack the axis are not in the figure."""
    label: str
    """What it is called in the figure."""
    published: Literal["sample_efficiency", "sentence_budget"] | None = None
    """The published curve that is drawn beside, that of the reasoning mode. Scales show none."""
    series: str | None = None
    """The series that it is about; null: all of them."""


class StudyConfig(Schema):
    """A study."""

    title: str
    """For people."""
    about: str = ""
    """What it shows, and what it does not; printed, and in the report."""
    config: str
    """The training config of rows that name none."""
    set: dict[str, Any] = Field({})
    """Changes for every row."""
    prepare: dict[Name, RowConfig] = Field({})
    """What is needed first, in runs/NAME whatever run_folder says; its output is taken as it is when it is there."""
    rows: dict[Name, RowConfig] = Field(min_length=1)
    """The rows, in order."""
    metric: str = "safety"
    """What the curve shows: an average, or a benchmark's label; where no run was asked for it, the first that there is."""
    curve: CurveConfig | None = None
    """The figure; null draws none."""
    cost: CostConfig = CostConfig()

    @model_validator(mode="after")
    def _check(self) -> "StudyConfig":
        names = list(self.rows)
        for i, (name, row) in enumerate(self.rows.items()):
            for other in row.after:
                if other not in names[:i]:
                    raise ValueError(f"rows.{name}.after: {other!r} is no earlier row")
        for name, row in self.prepare.items():
            if row.axes or set(row.stages) - {"distill", "build"}:
                raise ValueError(f"prepare.{name}: it has no axes, and its stages are distill and build")
        return self


def read_study(name: str, scale: str | None = None, folder: Path = STUDY_FOLDER) -> tuple[StudyConfig, str]:
    """What the YAML file of a study says at a scale, and the study's name.

    Raises:
        JaxguardError: no such study or scale; unknown, missing or ill-typed field.
    """
    path = _find(name, folder)
    tree = read_yaml(path)
    scales = tree.pop("scales", None) or {}
    if scale is not None:
        if scale not in scales:
            raise JaxguardError(
                f"{path}: no scale {scale!r}; {nearest(scale, scales)}known: {', '.join(scales) or 'none'}"
            )
        tree = merged(tree, scales[scale])
    origin = f"{path}, scale {scale}" if scale else str(path)
    for part in ("prepare", "rows"):  # one by one, so that an error names the row
        for key, row in tree.get(part, {}).items():
            validate(RowConfig, row or {}, f"{origin}: {part}.{key}")
    return validate(StudyConfig, tree, origin), f"{path.stem}-{scale}" if scale else path.stem


def merged(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """`top` over `base`: sections, rows, and in them set, axes and cost by field; whatever is null in `top` is gone."""
    result = dict(base)
    for key, value in top.items():
        old = result.get(key)
        if value is None:
            result.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(old, Mapping):
            # In these, keys are fields, and null is a value of theirs.
            fields = key in ("set", "axes", "cost")
            result[key] = {**old, **value} if fields else merged(old, value)
        else:
            result[key] = value
    return result


def labelled(values: Any) -> dict[str, Any]:
    """The values of an axis, each under its label.

    Raises:
        ValueError: a list or a mapping stands for itself, or two values have one label.
    """
    if isinstance(values, dict):
        return {label(name): value for name, value in values.items()}
    values = values if isinstance(values, list) else [values]
    if any(isinstance(value, dict | list) for value in values):
        raise ValueError("an axis of lists or sections needs labels: write it as label: value")
    found = {label(value): value for value in values}
    if len(found) < len(values) or not values:
        raise ValueError("an axis needs at least one value, and each only once")
    return found


def label(value: Any) -> str:
    """What a value is called in the name of a run's folder."""
    if value is None:
        return "all"
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return "".join(c if c.isascii() and (c.isalnum() or c in "._") else "_" for c in text)


def _find(name: str, folder: Path) -> Path:
    for candidate in (Path(name), *(source / f"{name}.yaml" for source in folders(folder))):
        if candidate.suffix in {".yaml", ".yml"} and candidate.is_file():
            return candidate
    known = [f"{STUDIES}/{study}" for study in names(folder / STUDIES)]
    raise JaxguardError(f"no study {name!r}: {nearest(name, known)}known in {folder}/: {', '.join(known) or 'none'}")
