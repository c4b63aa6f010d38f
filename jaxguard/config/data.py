"""Config schemas of labelled data: sources, what is trained on, training sets built from them, traces that a teacher writes."""

from typing import Annotated, Literal, Self, get_args

from pydantic import Discriminator, Field, NonNegativeFloat, PositiveFloat, Tag, model_validator

from jaxguard.config.base import LocalPath, NameOrYaml, NonNegative, Positive, Schema, Share, first_repeated
from jaxguard.utils.secrets import Masked

Mode = Literal["reasoning", "direct", "dual"]
Prompt = Annotated[NameOrYaml, Field(description="A name in configs/prompts or a YAML file.")]


class SourceConfig(Schema):
    """One labelled data set."""

    kind: Literal["wildguardmix", "aegis2", "nemotron_safety", "nemotron_topics", "canttalkaboutthis", "jsonl"]
    """The data set whose columns it has. `jsonl` is jaxguard's format, see docs/data.md."""
    path: LocalPath | None = None
    """A local file or folder with those columns; null reads the hub."""
    revision: str | None = None
    """Branch, tag or commit on the hub; the manifest says which commit was read."""
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
        if self.revision is not None and self.path is not None:
            raise ValueError("revision goes with a source on the hub: leave it or path out")
        if not self.kind.startswith("nemotron") and (self.teacher, self.trace) != ("deepseek_r1_0528", "full"):
            raise ValueError(f"teacher and trace choose among a nemotron source's traces; {self.kind} has none")
        return self


BenchmarkOrSource = Annotated[
    Annotated[NameOrYaml, Tag("name")] | Annotated[SourceConfig, Tag("")],
    Discriminator(lambda value: "name" if isinstance(value, str) else ""),
]
"""A name in configs/benchmarks or a YAML file, or a source."""


class DataConfig(Schema):
    """The training data and how they are rendered."""

    train: tuple[SourceConfig, ...] = Field(min_length=1)
    """Training sources, concatenated."""
    validation: tuple[SourceConfig, ...] = ()
    """Held-out sources; with none, `validation_size` examples are set aside from training."""
    validation_size: NonNegative = 256
    """Held-out examples scored at each evaluation, selected by their ids; 0 turns validation off."""
    policy: NameOrYaml = "wildguard"
    """A name in configs/policies or a YAML file; an example may bring its own."""
    mode: Mode = "reasoning"
    """Train on completions with a trace, without, or a share of each."""
    dual_reasoning_share: Share = 0.5
    """Dual mode: share of the examples that are trained with their trace, among those that do not name a mode themselves."""
    reasoning_marker: str = "/think"
    """Ends the user turn when reasoning is wanted."""
    direct_marker: str = "/no_think"
    """Ends the user turn when the verdict alone is wanted."""
    answer_format: Literal["first", "last"] = "first"
    """Where the user turn says how to answer: before the exchange, so that examples share it, or after it, as in the paper."""
    subset: Positive | None = None
    """Train on this many examples; smaller subsets of one seed are contained in larger ones."""
    subset_seed: NonNegative = 0
    """Seed of the random subset."""
    subset_balance: Share = 0.0
    """Evens out the sources in a subset: at 0 they are drawn in proportion to their rows n, at 1 equally, in between to n^(1-b)."""
    max_seq_len: Positive = 2048
    """Tokens of the longest packed row; the untrusted text of a longer example is truncated."""
    share_prefixes: bool = True
    """Compute what the examples of a row begin with, as the policy or one prompt, once; the gradient does not change."""
    keep_together: bool = False
    """Put examples that share half of their prompt, such as several traces of one or the turns of a dialogue, into the same steps,
    which computes it once. Steps are then less varied."""
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
    benchmarks: tuple[BenchmarkOrSource, ...] = ()
    """Benchmarks to decontaminate against, each a name in configs/benchmarks, a YAML file, or a source: training examples that
    match one of their prompts are dropped and listed."""
    similarity: Annotated[float, Field(ge=0.5, le=1)] = 0.8
    """Jaccard similarity of five-character shingles from which two prompts match; at least 0.5."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if repeated := first_repeated([each.name for each in self.sets]):
            raise ValueError(f"sets: {repeated!r} is given twice")
        return self


class TeacherConfig(Schema):
    """A model behind an OpenAI-style server, and its sampling."""

    endpoints: tuple[Masked, ...] = Field((Masked("http://127.0.0.1:30000/v1"),), min_length=1)
    """Base addresses of OpenAI-style servers, or of one router before them."""
    model: str
    """The name it is served under."""
    version: str | None = None
    """SGLang's weight_version that completions must have; null accepts any."""
    api_key_env: str = "JAXGUARD_API_KEY"
    """Environment variable with the API key, which is sent to these endpoints alone; unset sends none."""
    temperature: NonNegativeFloat = 0.6
    """Sampling temperature; the one that DeepSeek recommends for R1."""
    top_p: Share = 0.95
    """Nucleus sampling."""
    max_tokens: Positive = 4096
    """Tokens of a completion, reasoning included; a longer one is truncated and rejected."""
    concurrency: Positive = 256
    """Most requests in flight; their number adapts to the server."""
    timeout: PositiveFloat = 900.0
    """Seconds for one completion."""
    tries: Positive = 8
    """Attempts at a request before the run stops."""
    grammar: bool = False
    """Constrain completions to the format by SGLang's grammar, for teachers that often violate it."""


class FilterConfig(Schema):
    """Which traces of the teacher are accepted."""

    min_words: NonNegative = 8
    """A shorter trace is rejected as empty."""
    max_words: Positive = 800
    """A longer trace is rejected as overthinking or a loop."""
    max_hesitations: NonNegative = 3
    """How often a trace may hesitate ("wait", "let me check", "alternatively")."""
    ngram: Positive = 4
    """Words of an n-gram, for detecting repetition."""
    max_repeated_share: Share = 0.2
    """Share of a trace's n-grams that may be repetitions."""
    language: str | None = "en"
    """ISO 639 code of the traces' language; null accepts any."""
    script: str = "LATIN"
    """Unicode name of the traces' script."""
    min_script_share: Share = 0.9
    """Share of a trace's letters that must be of that script; quotations may be of another."""


class AuditConfig(Schema):
    """How far the teacher agrees with human labels that it does not see."""

    examples: Positive = 1000
    """Examples of data.train to audit, a seeded sample."""
    seed: NonNegative = 0
    """Seed of the sample."""
    samples: Positive = 4
    """Completions for each."""
    prompt: Prompt = "audit"


class DistillConfig(Schema):
    """Reasoning traces from a teacher, for the examples of data.train."""

    teacher: TeacherConfig
    prompt: Prompt = "trace"
    rounds: Positive = 4
    """Most attempts at an example until a trace passes the filter."""
    candidates: Positive = 1
    """Traces sampled in a round; all are stored, the first accepted one is used."""
    filter: FilterConfig = FilterConfig()
    judge: TeacherConfig | None = None
    """An LLM judge that may reject traces which passed all other checks; null uses none."""
    judge_prompt: Prompt = "judge"
    budgets: tuple[Positive, ...] = ()
    """Sentences that accepted traces are shortened to, a file for each number; the paper's are 1 to 10."""
    shorten_prompt: Prompt = "shorten"
    audit: AuditConfig = AuditConfig()
