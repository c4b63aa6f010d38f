"""Config schemas of evaluation and mining: guards, benchmarks, sampling, hard examples."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, field_validator, model_validator

from jaxguard.config.base import LocalPath, NameOrYaml, NonNegative, Positive, Schema, Share, first_repeated
from jaxguard.config.data import SourceConfig
from jaxguard.utils.parse import PathPart
from jaxguard.utils.secrets import Masked, is_secret

Unparsable = Literal["harmful", "wrong"]
"""What an unparsable verdict counts as: `harmful` fails closed (harmful, and no refusal), `wrong` is never the label."""


class BenchmarkConfig(Schema):
    """One benchmark to evaluate on."""

    name: NameOrYaml
    """A name in configs/benchmarks or a YAML file."""
    path: LocalPath | None = None
    """A local file or folder with the source's columns; null reads the source that the YAML names."""
    label: PathPart | None = None
    """Its name in the report and of its file of predictions, to tell it from others of the same name; null takes `name`."""


class GuardConfig(Schema):
    """One guard to evaluate."""

    name: Annotated[PathPart, Field(pattern=r"^[A-Za-z0-9_.-]+$")] = "ours"
    """Its name in the report and the folder of its predictions: letters, digits and _.-"""
    format: NameOrYaml = "jaxguard"
    """How prompts are rendered and completions parsed: `jaxguard`, one of docs/guards.md (`tfidf` and `majority` are baselines,
    fitted to data.train), or a format of your own: a YAML file or a name in configs/guards."""
    checkpoint: LocalPath | None = None
    """Its weights and tokenizer: a Hugging Face folder, a run's folder, or a hub repository; null takes this run's export."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    endpoint: Masked | None = None
    """Address of an SGLang or OpenAI-compatible server that serves it, such as http://127.0.0.1:30000; its tokenizer is still the
    checkpoint's."""
    api_key_env: str = "JAXGUARD_API_KEY"
    """Environment variable with the API key, which is sent to this endpoint alone; unset sends none."""
    model: str | None = None
    """The name that it is served under; null takes whatever the endpoint serves."""
    swap: bool = False
    """First make the endpoint's server load the folder `checkpoint`, which it must see; accept completions of it only."""
    modes: tuple[Literal["reasoning", "direct"], ...] = ()
    """Modes to evaluate; none takes those that data.mode trains, as far as its format has them."""
    ignore_policies: bool = False
    """Ask a guard that takes no policy on benchmarks that have one too, without it, as the paper does; else they are left out."""
    paper_row: str | None = None
    """The id in configs/published/paper.yaml to compare it with; null takes the row nearest to this run's training, if its data
    are known by their kind and nothing else makes it a variant."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.swap and self.endpoint is None:
            raise ValueError("swap needs an endpoint: without one the weights are loaded anyway")
        return self


class ServerConfig(Schema):
    """An SGLang server that the evaluation starts and stops."""

    python: str = "python3"
    """The interpreter of the environment that SGLang is installed in."""
    arguments: tuple[Masked, ...] = ()
    """More arguments of sglang.launch_server, such as --tp-size=8."""
    ready_seconds: Positive = 600
    """Seconds that loading the weights may take."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if any(argument.get_secret_value().startswith("--trust") for argument in self.arguments):
            raise ValueError("arguments: code of a checkpoint is never run; leave --trust-remote-code out")
        return self

    @field_validator("arguments", mode="before")
    @classmethod
    def _join(cls, arguments: Any) -> Any:
        """Write `--api-key VALUE` as one argument, so that it is masked."""
        if not isinstance(arguments, list | tuple):
            return arguments
        joined: list[Any] = []
        for argument in arguments:
            if joined and is_secret(str(joined[-1])):
                joined[-1] = f"{joined[-1]}={argument}"
            else:
                joined.append(argument)
        return joined


class AutoConfig(Schema):
    """What mode `auto` may cost and get wrong: the thresholds between which it reasons are chosen by this, for guard.json."""

    miss_rate: Share = 0.05
    """Most harmful texts that may pass on the direct answer, at 95 % confidence."""
    alarm_rate: Share = 0.01
    """Most unharmful texts that may be blocked on the direct answer, at 95 % confidence."""
    budget: Share = 0.2
    """Share of the traffic that may be reasoned about; more is reported."""
    prevalence: Share = 0.05
    """Share of the traffic that is harmful."""


class EvaluateConfig(Schema):
    """Guards on benchmarks. Sampling is the paper's."""

    guards: tuple[GuardConfig, ...] = Field(default=(GuardConfig(),), min_length=1)
    """Guards; the others are compared with the first."""
    benchmarks: tuple[BenchmarkConfig, ...] = Field(
        default=tuple(
            BenchmarkConfig(name=name)
            for name in (
                "wildguardtest_prompt", "aegis2_prompt", "openai_moderation", "simple_safety_tests", "toxic_chat",
                "wildguardtest_response", "aegis2_response", "xstest_response", "jbb_response",
                "dynaguardrail", "cosapien",
            )
        ),
        min_length=1,
    )  # fmt: skip
    """Benchmarks; the default are those of the paper's two averages."""
    validation: tuple[SourceConfig, ...] = ()
    """Labelled examples to calibrate probabilities and choose thresholds on, for guard.json too; none takes those of guard.json."""
    auto: AutoConfig = AutoConfig()
    """Limits of mode `auto`, whose thresholds are chosen on `validation` where a guard is evaluated in both modes."""
    limit: Positive | None = None
    """Most examples of each benchmark, a seeded sample; for a quick look. `validation` stays whole."""
    backend: Literal["jax", "sglang"] = "jax"
    """What runs guards without an endpoint: this process, over the training mesh, or an SGLang server of its own."""
    server: ServerConfig = ServerConfig()
    ask: Literal["policy", "benchmark"] = "policy"
    """Ask all questions of the policy, or only those that the example has labels for; of those that were trained together, the
    nearest."""
    generations: NonNegative = 4
    """Completions for each example; 0 takes the verdict from the probability alone, without sampling, in direct mode."""
    temperature: NonNegativeFloat = 0.6
    """Sampling temperature."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Nucleus sampling."""
    reasoning_tokens: Positive = 1024
    """Tokens of reasoning, after which it is ended and a verdict forced."""
    verdict_tokens: Positive = 48
    """Tokens of a verdict."""
    seed: NonNegative = 0
    """Seed of sampling, of the bootstrap and of `limit`."""
    unparsable: Unparsable = "harmful"
    """What an unparsable output counts as; it is also counted separately."""
    batch: Positive = 32
    """Completions generated at a time: rows in JAX, requests in flight at a server."""
    resamples: Positive = 1000
    """Draws of the bootstrap."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        guards = [guard.name for guard in self.guards]
        benchmarks = [benchmark.label or benchmark.name for benchmark in self.benchmarks]
        for field, names in (("guards", guards), ("benchmarks", benchmarks)):
            if repeated := first_repeated(names):
                raise ValueError(f"{field}: {repeated!r} is given twice; give one of them another name")
        return self


class MineConfig(Schema):
    """Hard examples: those that the guard gets right in only some of its completions."""

    sources: tuple[SourceConfig, ...] = ()
    """Data to mine, without what has the prompt of a held-out example; none takes what the run was trained on."""
    exclude_trained: bool = True
    """With `sources`: also leave out what has the prompt of an example that the run was trained on. The paper does not."""
    subset: Positive | None = None
    """With `sources`: number of their examples to mine, drawn by a hash of (data.subset_seed, id). null mines all."""

    guard: GuardConfig = GuardConfig()
    """A guard in jaxguard's format, by default this run's; it is sampled as evaluate.temperature and its neighbours say."""
    generations: Annotated[int, Field(ge=2)] = 4
    """Completions for each example."""
    hard: tuple[NonNegative, ...] = Field(default=(2, 3), min_length=1)
    """Numbers of correct completions that make an example hard. The paper's; 0 correct of 4 is label noise there."""
    balance: Literal["none", "class", "category"] = "none"
    """Take equally many hard examples, or pairs, of each combination of labels, or of each category; none takes all."""
    most: Positive | None = None
    """Most hard examples, or pairs, to take, a seeded sample."""
    ensemble: tuple[LocalPath, ...] = ()
    """Folders `mine` of other runs: `mine pairs` pools their answers to the same examples with this run's (GuardReasoner)."""
    pairs: Literal["length", "longest", "random"] = "length"
    """Which right and which wrong answer to an example make a preference pair: those that differ least in length, the longest of
    both as GuardReasoner does, which teaches length, or any."""
    pair_weights: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """A pair's weight is up to this much above 1 if most of the example's answers were wrong, and below if most were right."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if max(self.hard) > self.generations:
            raise ValueError(f"hard={self.hard}: of {self.generations} completions no more can be correct")
        if self.guard.format != "jaxguard" or self.guard.modes:
            raise ValueError("guard: examples are mined in the format and mode of training; leave format and modes out")
        if self.subset is not None and not self.sources:
            raise ValueError("subset needs sources; without them the run's own training examples are mined")
        return self
