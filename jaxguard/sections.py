"""The sections of a run's configuration, each typed and with its defaults; config.py puts them together.

Where the paper (arXiv 2505.20087) is silent, the default here is our choice; docs/configuration.md says which.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from jaxguard.fields import Section

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class ModelConfig(Section):
    """Which weights to train, and how they are computed with. Shape comes from the checkpoint's config.json."""

    checkpoint: str
    """A Hugging Face directory, or a repository id on the hub."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of activations and matmuls; on a CPU of matmuls alone, and bfloat16 only where it has instructions for it (avx512_bf16).
    Master weights and Adam state are always float32."""
    attention: Literal["auto", "xla", "block_sparse", "cudnn", "splash"] = "auto"
    """Attention kernel; auto takes the best one that the device and the head size allow."""
    remat: Literal["full", "dots", "none"] = "full"
    """What the backward pass recomputes: every layer, all but its matmuls, or nothing."""
    query_chunk: Positive = 512
    """Query tokens whose scores are held at once by attention in XLA: xla, block_sparse."""
    loss_chunk: Positive = 256
    """Memory of a device for logits, as the number of target tokens whose logits fill it."""


class SourceConfig(Section):
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


class DataConfig(Section):
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
    row_tokens: Positive = 2048
    """The longest packed row; an example longer than that is cut in its untrusted text."""
    share_prefixes: bool = True
    """Compute what the examples of a row begin with, the policy, once for all of them; the gradient does not change."""
    prefetch: Positive = 8
    """Batches that grain prepares ahead."""


class OptimizerConfig(Section):
    """AdamW on a schedule."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How it decays after warmup."""
    warmup_steps: NonNegative = 0
    """Updates of linear warmup."""
    final_learning_rate_share: Share = 0.0
    """Learning rate at the end, as a share of the peak."""
    beta1: Share = 0.9
    """Adam's decay of the mean gradient."""
    beta2: Share = 0.999
    """Adam's decay of the mean squared gradient."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Adam's addend to the root of the mean squared gradient."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled decay of matrices; norm weights are never decayed."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Global gradient norm limit; None turns it off."""


class TrainConfig(Section):
    """The loop."""

    batch_size: Positive = 32
    """Examples in one optimizer step."""
    epochs: Annotated[float, Field(gt=0)] = 5
    """Passes over the training examples."""
    max_steps: Positive | None = None
    """Stop after this many updates; the schedule then ends there too."""
    accumulation: Positive = 1
    """Micro-batches that one step's rows are cut into; the gradient does not change."""
    evaluate_every: NonNegative = 50
    """Updates between validations, which also run before the first and after the last; 0 for only those two."""
    export: bool = True
    """Write a Hugging Face checkpoint at the end."""


class MeshConfig(Section):
    """How devices are arranged, and how hosts find each other."""

    data: Positive = 1
    """Copies of the weights."""
    fsdp: int = -1
    """Devices that one copy of the weights is cut over; -1 takes all that are left."""
    tensor: Positive = 1
    """Devices that heads, hidden units and vocabulary are cut over."""
    hosts: Literal["single", "auto", "explicit"] = "single"
    """auto: jax.distributed finds SLURM, GKE or a TPU pod by itself. explicit: the three fields below."""
    coordinator: str | None = None
    """host:port of process 0."""
    processes: Positive | None = None
    """How many processes there are."""
    process: NonNegative | None = None
    """Which of them this one is, from 0."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.fsdp == 0 or self.fsdp < -1:
            raise ValueError("fsdp must be positive, or -1 for all the devices that are left")
        explicit = (self.coordinator, self.processes, self.process)
        if self.hosts == "explicit" and None in explicit:
            raise ValueError("hosts: explicit needs coordinator, processes and process")
        if self.hosts != "explicit" and any(x is not None for x in explicit):
            raise ValueError(f"coordinator, processes and process go with hosts: explicit, not {self.hosts}")
        return self


class TeacherConfig(Section):
    """Who answers, and how."""

    endpoints: tuple[str, ...] = Field(("http://127.0.0.1:30000/v1",), min_length=1)
    """Base addresses of OpenAI-style servers, or of one router before them."""
    model: str
    """The name it is served under."""
    version: str | None = None
    """SGLang's weight_version that answers must carry; None takes any."""
    api_key_env: str = "JAXGUARD_API_KEY"
    """Environment variable that holds the key; unset sends none."""
    temperature: Annotated[float, Field(ge=0)] = 0.6
    """Sampling temperature; the one that DeepSeek recommends for R1."""
    top_p: Share = 0.95
    """Nucleus sampling."""
    max_tokens: Positive = 4096
    """Tokens of an answer, thought included; one that needs more is cut and not used."""
    concurrency: Positive = 256
    """Most requests under way at once; how many really are adapts to the server."""
    timeout: Annotated[float, Field(gt=0)] = 900.0
    """Seconds for one answer."""
    tries: Positive = 8
    """How often a request is sent before the run stops."""
    grammar: bool = False
    """Let SGLang's grammar hold the answer to its format; for teachers that are loose with it."""


class FilterConfig(Section):
    """Which traces of the teacher are fit to learn from."""

    min_words: NonNegative = 8
    """A shorter trace says nothing."""
    max_words: Positive = 800
    """A longer trace is overthinking, or a loop."""
    max_hesitations: NonNegative = 3
    """How often a trace may take itself back ("wait", "let me check", "alternatively")."""
    ngram: Positive = 4
    """Words in a run, for finding repetition."""
    max_repeated_share: Share = 0.2
    """Share of a trace's runs of words that may have stood before."""
    language: str | None = "en"
    """ISO 639 code of the language that traces are wanted in; null takes any."""
    script: str = "LATIN"
    """Unicode name of the script that traces are wanted in."""
    min_script_share: Share = 0.9
    """Share of a trace's letters that must be of that script; quotations may be of another."""


class AuditConfig(Section):
    """How far the teacher agrees with people when it is not told their labels."""

    examples: Positive = 1000
    """How many of data.train are asked about, a seeded sample."""
    seed: NonNegative = 0
    """Which sample."""
    samples: Positive = 4
    """Answers to each."""
    prompt: str = "audit"
    """A name in configs/prompts or a YAML file."""


class DistillConfig(Section):
    """Reasoning traces from a teacher, for the examples of data.train."""

    teacher: TeacherConfig
    prompt: str = "trace"
    """A name in configs/prompts or a YAML file."""
    rounds: Positive = 4
    """How often an example is tried until a trace passes the filter."""
    candidates: Positive = 1
    """Traces asked for in a round; all are kept, the first good one is used."""
    filter: FilterConfig = FilterConfig()
    judge: TeacherConfig | None = None
    """A model that reads each trace which passed all other checks, and may turn it down; null asks nobody."""
    judge_prompt: str = "judge"
    """A name in configs/prompts or a YAML file."""
    budgets: tuple[Positive, ...] = ()
    """Numbers of sentences that accepted traces are shortened to, a file for each; the paper's are 1 to 10."""
    shorten_prompt: str = "shorten"
    """A name in configs/prompts or a YAML file."""
    audit: AuditConfig = AuditConfig()


class SetConfig(Section):
    """One training set: examples in a mode."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")]
    """What it is called: letters, digits and _."""
    mode: Literal["reasoning", "direct", "dual"] = "reasoning"
    """As data.mode."""
    sources: tuple[SourceConfig, ...] = ()
    """What it is made of; none takes data.train."""
    append: tuple[SourceConfig, ...] = ()
    """What each of its subsets gets besides, whole: difficult samples, topic-following dialogues."""


class BuildConfig(Section):
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


class CheckpointConfig(Section):
    """Orbax checkpoints of weights, optimizer and step."""

    every: Positive = 100
    """Updates between checkpoints; the last update is always kept."""
    keep_last: Positive = 2
    """How many of the newest to keep."""
    keep_best: NonNegative = 1
    """How many of the best by validation loss to keep besides."""


class LogConfig(Section):
    """Where the curves go. metrics.jsonl is always written."""

    tensorboard: bool = True
    """Write event files to the run's folder."""
    trackio: bool = False
    """Log to trackio; install the extra of that name."""
    wandb: bool = False
    """Log to Weights & Biases; install the extra of that name."""
    project: str = "jaxguard"
    """Project name for trackio and wandb."""
    profile_step: Positive | None = None
    """Trace three updates from this one with the JAX profiler."""
