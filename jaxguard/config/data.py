"""Config schemas of labelled data: sources, what is trained on, training sets built from them.

Where the paper (arXiv 2505.20087) is silent, the default here is our choice; docs/configuration.md says which.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from jaxguard.config.base import NonNegative, Positive, Schema, Share


class SourceConfig(Schema):
    """One labelled data set."""

    kind: Literal["wildguardmix", "aegis2", "nemotron_safety", "nemotron_topics", "canttalkaboutthis", "jsonl"]
    """Whose columns it has. `jsonl` is our own format, see docs/data.md."""
    path: str | None = None
    """A local file or folder with those columns; None reads the hub."""
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
    """What is trained on and how it is rendered."""

    train: tuple[SourceConfig, ...] = Field(min_length=1)
    """Training sources, concatenated."""
    validation: tuple[SourceConfig, ...] = ()
    """Held-out sources; with none, `validation_size` examples are set aside from training."""
    validation_size: NonNegative = 256
    """Held-out examples scored at each evaluation, a seeded sample; 0 turns validation off."""
    policy: str = "wildguard"
    """A name in configs/policies or a YAML file; an example may bring its own."""
    mode: Literal["reasoning", "direct", "dual"] = "reasoning"
    """Answer with a trace, without, or a share of each."""
    dual_reasoning_share: Share = 0.5
    """Dual mode: share of the examples that carry their trace, among those that do not say their mode themselves."""
    reasoning_marker: str = "/think"
    """Ends the user turn when a trace is wanted."""
    direct_marker: str = "/no_think"
    """Ends the user turn when the verdict alone is wanted."""
    subset: Positive | None = None
    """Train on this many examples; smaller subsets of one seed are contained in larger ones."""
    subset_seed: NonNegative = 0
    """Which random subset."""
    max_seq_len: Positive = 2048
    """The longest packed row; an example longer than that is cut in its untrusted text."""
    share_prefixes: bool = True
    """Compute what the examples of a row begin with, the policy, once for all of them; the gradient does not change."""
    prefetch: Positive = 8
    """Batches that grain prepares ahead."""


class SetConfig(Schema):
    """One training set: examples in a mode."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")]
    """What it is called: letters, digits and _."""
    mode: Literal["reasoning", "direct", "dual"] = "reasoning"
    """As data.mode."""
    sources: tuple[SourceConfig, ...] = ()
    """What it is made of; none takes data.train."""
    append: tuple[SourceConfig, ...] = ()
    """What each of its subsets gets besides, whole: difficult samples, topic-following dialogues."""


class BuildConfig(Schema):
    """Training sets in files, made of examples and their traces."""

    sets: tuple[SetConfig, ...] = Field(
        default=(
            SetConfig(name="reasoning", mode="reasoning"),
            SetConfig(name="direct", mode="direct"),
            SetConfig(name="dual", mode="dual"),
        ),
        min_length=1,
    )
    """Which sets to build."""
    subsets: tuple[Positive, ...] = (500, 1000, 2500, 5000)
    """Sizes of random subsets of each set; one larger than the set is left out."""
    seeds: tuple[NonNegative, ...] = (0, 1, 2, 3)
    """Seeds of the subsets: for each seed, smaller subsets are contained in larger ones."""
    benchmarks: tuple[SourceConfig, ...] = ()
    """What the guard will be evaluated on: training examples that match one of its prompts are dropped and listed."""
    similarity: Annotated[float, Field(ge=0.5, le=1)] = 0.8
    """Jaccard similarity of two prompts' five-character shingles from which they match; at least 0.5."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [one.name for one in self.sets]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"sets: {twice!r} is given twice")
        return self
