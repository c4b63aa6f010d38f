"""Config schemas of labelled data: sources, what is trained on, training sets built from them."""

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from jaxguard.config.base import NonNegative, Positive, Schema, Share, first_repeated

Mode = Literal["reasoning", "direct", "dual"]


class SourceConfig(Schema):
    """One labelled data set."""

    kind: Literal["wildguardmix", "aegis2", "nemotron_safety", "nemotron_topics", "canttalkaboutthis", "jsonl"]
    """The data set whose columns it has. `jsonl` is jaxguard's format, see docs/data.md."""
    path: str | None = None
    """A local file or folder with those columns; null reads the hub."""
    split: str = "train"
    """The split on the hub, or the file's stem inside a folder."""
    teacher: Literal["deepseek_r1_0528", "gpt_oss_120b", "qwen3_32b"] = "deepseek_r1_0528"
    """Whose traces to take from a nemotron source."""
    trace: Literal["full", "one_sentence", "none"] = "full"
    """Which trace to take from a nemotron source; none takes every row without its trace, whatever the teacher said."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "jsonl" and self.path is None:
            raise ValueError("kind: jsonl needs a path")
        if not self.kind.startswith("nemotron") and (self.teacher, self.trace) != ("deepseek_r1_0528", "full"):
            raise ValueError(
                f"teacher and trace choose among a nemotron source's traces; {self.kind} has none to choose"
            )
        return self


class DataConfig(Schema):
    """The training data and how they are rendered."""

    train: tuple[SourceConfig, ...] = Field(min_length=1)
    """Training sources, concatenated."""
    validation: tuple[SourceConfig, ...] = ()
    """Held-out sources; with none, `validation_size` examples are set aside from training."""
    validation_size: NonNegative = 256
    """Held-out examples scored at each evaluation, a seeded sample; 0 turns validation off."""
    policy: str = "wildguard"
    """A name in configs/policies or a YAML file; an example may bring its own."""
    mode: Mode = "reasoning"
    """Train on completions with a trace, without, or a share of each."""
    dual_reasoning_share: Share = 0.5
    """Dual mode: share of the examples that are trained with their trace, among those that do not name a mode themselves."""
    reasoning_marker: str = "/think"
    """Ends the user turn when reasoning is wanted."""
    direct_marker: str = "/no_think"
    """Ends the user turn when the verdict alone is wanted."""
    subset: Positive | None = None
    """Train on this many examples; smaller subsets of one seed are contained in larger ones."""
    subset_seed: NonNegative = 0
    """Seed of the random subset."""
    max_seq_len: Positive = 2048
    """Tokens of the longest packed row; the untrusted text of a longer example is truncated."""
    share_prefixes: bool = True
    """Compute the prefix that the examples of a row share, the policy, once; the gradient does not change."""
    prefetch: Positive = 8
    """Batches that grain prepares in advance."""


class SetConfig(Schema):
    """One training set: examples in a mode."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")]
    """Its name: letters, digits and _."""
    mode: Mode = "reasoning"
    """As data.mode."""
    sources: tuple[SourceConfig, ...] = ()
    """Its sources; none takes data.train."""
    append: tuple[SourceConfig, ...] = ()
    """Sources that are added whole to each of its subsets: hard examples, topic-following dialogues."""


class BuildConfig(Schema):
    """Training sets built into files from examples and their traces."""

    sets: tuple[SetConfig, ...] = Field(
        default=tuple(SetConfig(name=mode, mode=mode) for mode in get_args(Mode)), min_length=1
    )
    """Sets to build."""
    subsets: tuple[Positive, ...] = (500, 1000, 2500, 5000)
    """Sizes of random subsets of each set; one larger than the set is left out."""
    seeds: tuple[NonNegative, ...] = (0, 1, 2, 3)
    """Seeds of the subsets: for each seed, smaller subsets are contained in larger ones."""
    benchmarks: tuple[SourceConfig, ...] = ()
    """Benchmarks to decontaminate against: training examples that match one of their prompts are dropped and listed."""
    similarity: Annotated[float, Field(ge=0.5, le=1)] = 0.8
    """Jaccard similarity of five-character shingles from which two prompts match; at least 0.5."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if repeated := first_repeated([each.name for each in self.sets]):
            raise ValueError(f"sets: {repeated!r} is given twice")
        return self
