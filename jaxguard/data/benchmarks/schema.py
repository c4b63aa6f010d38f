"""A benchmark as written in YAML: where its rows are, which of them count, and which are positive."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, StringConstraints, field_validator, model_validator

from jaxguard.config.base import LocalPath, Schema, beside, find_yaml
from jaxguard.config.data import SourceConfig
from jaxguard.data.files import Row
from jaxguard.data.policies import Question
from jaxguard.utils.parse import Fields, check, read_yaml

BENCHMARK_FOLDER = Path("configs/benchmarks")

Group = Literal["safety_prompt", "safety_response", "custom_policy", "extra"]
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Count = Annotated[int, Field(ge=0)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class Choice(Schema):
    """Fields of which exactly one of each group is given, and some go with one of others: (field, *others)."""

    ONE_OF: ClassVar[tuple[tuple[str, ...], ...]] = ()
    GOES_WITH: ClassVar[tuple[tuple[str, ...], ...]] = ()

    @model_validator(mode="after")
    def _check_choice(self) -> Self:
        fields = type(self).model_fields.items()
        defaults = {name: field.get_default(call_default_factory=True, validated_data={}) for name, field in fields}
        given = {name for name, default in defaults.items() if getattr(self, name) != default}
        for group in self.ONE_OF:
            if len(given.intersection(group)) != 1:
                raise ValueError(f"give exactly one of {', '.join(group)}")
        for name, *others in self.GOES_WITH:
            if name in given and not given.intersection(others):
                raise ValueError(f"{name} goes with {' or '.join(others)}")
        return self


class Condition(Choice):
    """What must hold in a row.

    Texts are compared without case and outer white space; true, 1 and "True" are the same. A null cell equals nothing.
    """

    ONE_OF = (("column", "columns", "always"), ("equals", "not_equals", "empty", "always"))
    GOES_WITH = (("at_least", "columns"), ("at_most", "columns"))

    column: Text | None = None
    """The column to compare."""
    columns: tuple[Text, ...] = ()
    """Or several, of which as many must hold as `at_least` and `at_most` say; a row may lack some."""
    equals: tuple[str, ...] = ()
    """The value, or a list of which it must be one."""
    not_equals: tuple[str, ...] = ()
    """The value, or a list of which it must be none."""
    empty: bool | None = None
    """true: the cell is null or blank; false: it is not."""
    at_least: Count | None = None
    """With `columns`: how many must hold; 1 where neither limit is given."""
    at_most: Count | None = None
    """With `columns`: how many may hold."""
    always: bool = False
    """Alone: holds in every row."""

    @field_validator("equals", "not_equals", mode="before")
    @classmethod
    def _as_written(cls, value: Any) -> tuple[str, ...]:
        values = value if isinstance(value, list | tuple) else [value]
        if not all(isinstance(v, str | bool | int | float) for v in values):
            raise ValueError("expected text, a number, true or false, or a list of them; for null use empty")
        return tuple(str(v).lower() if isinstance(v, bool) else str(v) for v in values)

    def holds(self, row: Row) -> bool:
        named = [""] if self.empty is not None else [plain(value) for value in self.equals or self.not_equals]
        number = sum((plain(row.get(column)) in named) == bool(self.empty or self.equals) for column in self.names)
        least = 1 if self.at_least is self.at_most is None else self.at_least or 0
        return self.always or (number >= least and (self.at_most is None or number <= self.at_most))

    @property
    def names(self) -> tuple[str, ...]:
        """The columns that it reads."""
        return (self.column,) if self.column else self.columns

    def __str__(self) -> str:
        if self.always:
            return "always"
        negated = bool(self.not_equals) or self.empty is False
        values = "empty" if self.empty is not None else " or ".join(map(repr, self.equals or self.not_equals))
        condition = f"{'is not' if negated else 'is'} {values}"
        if self.column:
            return f"{self.column} {condition}"
        limits = {"at least": self.at_least, "at most": self.at_most}
        number = " and ".join(f"{word} {n}" for word, n in limits.items() if n is not None) or "any"
        if self.at_least == self.at_most is not None:
            number = str(self.at_least)
        return f"{number} of {', '.join(self.columns)} {condition}"


def plain(cell: Any) -> str:
    """A cell as it is compared: null is empty, true is 1, no case, no outer white space."""
    if cell is None:
        return ""
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    text = str(cell).strip().casefold()
    return {"true": "1", "false": "0"}.get(text, text)


class BenchmarkSource(Choice):
    """Where the rows are: on the hub, at a URL, in a local file, or in a source that is trained on too."""

    ONE_OF = (("hub", "url", "path", "data"),)
    GOES_WITH = (("config", "hub"), ("file", "hub"), ("revision", "hub"), ("splits", "hub", "url", "path"),
                 ("keys_as", "file", "url", "path"))  # fmt: skip

    hub: Text | None = None
    config: str | None = None
    splits: tuple[Text, ...] = Field(("test",), min_length=1)
    """Splits that are read one after the other; with several, the column `split` says which a row is from."""
    file: str | None = None
    """One file of the repository instead, by its path in it."""
    revision: str | None = None
    """Branch, tag or commit."""
    url: Annotated[str, StringConstraints(pattern=r"^https://[^\s]+$")] | None = None
    path: LocalPath | None = None
    data: SourceConfig | None = None
    """A source as in `data.train`, read as there: its examples are the rows, with the columns of our JSON lines."""
    keys_as: Text | None = None
    """The file is one JSON object whose values are lists of rows; its keys become this column."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.file and (self.config or len(self.splits) > 1):
            raise ValueError("file stands for the whole source: no config, no splits")
        return self

    @property
    def name(self) -> str:
        """Where the rows are, as errors name it."""
        data = f"data source {self.data.kind}" if self.data else ""
        return (self.data and self.data.path) or self.path or self.hub or self.url or data


class ExampleColumns(Schema):
    """How a row becomes an example."""

    prompt: Text
    """Column of the user's message: text, or a list of turns with role and content that ends with it."""
    response: str | None = None
    positive: Condition
    """When the example is harmful; for response_refusal, when it is a refusal."""
    negative: Condition | None = None
    """When it is not; a row that is neither is an error. null: all that are not positive."""


class BenchmarkPolicy(Choice):
    """The policy of the examples, where it is not the run's."""

    ONE_OF = (("name", "column"),)
    GOES_WITH = (("rules", "column"), ("optional", "column"))

    name: str | None = None
    """A name in configs/policies, for all examples."""
    column: Text | None = None
    """A column with each example's policy, as a name or as rules in plain text."""
    rules: dict[str, Text] = Field(default_factory=dict)
    """With `column`: what its values stand for, as names or as rules in plain text."""
    optional: bool = False
    """With `column`: it may be absent or empty; such an example has the run's policy."""


class Slice(Choice):
    """A division of the examples that is scored apart."""

    ONE_OF = (("column", "columns", "when"),)
    GOES_WITH = (("separator", "column"),)

    name: Text
    column: Text | None = None
    """Column of its value; a list's items, or an object's true keys, are several values."""
    columns: tuple[Text, ...] = ()
    """Or flags: the names of those that are true are the values."""
    when: Condition | None = None
    """Or a condition: the values are yes and no."""
    separator: Annotated[str, StringConstraints(min_length=1)] | None = None
    """With `column`: what stands between several values in one text."""
    mean: Literal["main", "beside"] | None = None
    """The mean of its values' F1 is the benchmark's F1 (main), or stands beside F1 over all examples."""

    @property
    def names(self) -> tuple[str, ...]:
        """The columns that it reads."""
        return self.when.names if self.when else self.columns or (self.column or "",)

    def values(self, row: Row) -> list[str]:
        """Its values in a row; none where the cell is null."""
        if self.when:
            known = self.when.columns or self.when.always or plain(row.get(self.when.column or ""))
            return ["yes" if self.when.holds(row) else "no"] if known else []
        cell: Any = {name: row.get(name) for name in self.columns} if self.columns else row.get(self.column or "")
        if isinstance(cell, dict):
            return [str(key) for key, value in cell.items() if plain(value) not in {"", "0"}]
        if isinstance(cell, bool):
            return ["yes" if cell else "no"]
        if not isinstance(cell, list | tuple):
            cell = "" if cell is None else str(cell).split(self.separator or "\0")
        return [text for text in (str(part).strip() for part in cell) if text]


class Expected(Schema):
    """What a count should come to, as published."""

    positive: Count | None = None
    negative: Count | None = None
    total: Count | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if None not in (parts := (self.positive, self.negative)) and self.total not in (None, sum(filter(None, parts))):
            raise ValueError("positive and negative do not add up to total")
        return self


class Sample(Schema):
    """A sample of the rows that `where` leaves, by Python's random.sample; fewer are taken whole."""

    size: Annotated[int, Field(gt=0)]
    seed: Count = 0


class BenchmarkDefinition(Schema):
    """A benchmark as written in YAML."""

    name: Name
    title: Text
    group: Group = "extra"
    question: Question
    source: BenchmarkSource
    where: tuple[Condition, ...] = ()
    """Rows that count: all of these hold."""
    sample: Sample | None = None
    id: str | None = None
    """Column of a row's id; null: a hash of the texts."""
    examples: tuple[ExampleColumns, ...] = Field(min_length=1)
    """What each row gives: one example, or several."""
    policy: BenchmarkPolicy | None = None
    """null: the run's."""
    slices: tuple[Slice, ...] = ()
    expected: Expected = Expected()
    """Published counts; others are a warning."""
    license: Text
    citation: Text
    url: Text

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.question != "prompt_harm" and not all(example.response for example in self.examples):
            raise ValueError(f"question {self.question} needs a response in every one of examples")
        names = [s.name for s in self.slices]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"slices: {twice!r} is given twice")
        if sum(each.mean is not None for each in self.slices) > 1:
            raise ValueError("slices: only one of them can have a mean")
        return self


class BenchmarkGroup(Schema):
    """Benchmarks of the same rows under one name: those whose question no row is labelled for are left out."""

    name: Name
    benchmarks: tuple[Text, ...] = Field(min_length=1)
    """Names in configs/benchmarks, or YAML files."""


def read_benchmark(name_or_path: str) -> BenchmarkDefinition:
    """Read the YAML file of a benchmark, by its name in configs/benchmarks or its path."""
    path = find_yaml(name_or_path, BENCHMARK_FOLDER, "benchmark")
    return check(beside(read_yaml(path, Fields), BenchmarkDefinition, path.parent), BenchmarkDefinition, str(path))


def read_group(name_or_path: str) -> tuple[str, ...]:
    """Return the names of a group's benchmarks; of a benchmark, its own."""
    path = find_yaml(name_or_path, BENCHMARK_FOLDER, "benchmark")
    tree = read_yaml(path, Fields)
    return check(tree, BenchmarkGroup, str(path)).benchmarks if "benchmarks" in tree else (name_or_path,)
