"""The sections of the configuration that say what is evaluated and mined, each typed and with its defaults.

Where the paper (arXiv 2505.20087) is silent, the default here is our choice; docs/configuration.md says which.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from jaxguard.config.base import NonNegative, Positive, Schema
from jaxguard.config.data import SourceConfig


class BenchmarkConfig(Schema):
    """One benchmark to be evaluated on."""

    name: str
    """A name in configs/benchmarks or a YAML file."""
    path: str | None = None
    """A local file or folder with the source's columns; None reads the source that the YAML names."""
    label: str | None = None
    """What the report calls it, and tells it from others of the same name; None takes `name`."""


class GuardConfig(Schema):
    """One guard to be evaluated."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")] = "ours"
    """What the report and the folder of its predictions call it: letters, digits and _.-"""
    format: str = "jaxguard"
    """How it is asked and how its answer is read: `jaxguard`, one of docs/guards.md (`tfidf` and `majority` are baselines, fitted
    to data.train), or a format of your own: a YAML file or a name in configs/guards."""
    checkpoint: str | None = None
    """Its weights and tokenizer: a Hugging Face folder, a run's folder, or a repository on the hub; None takes this run's
    export."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    endpoint: str | None = None
    """Address of an SGLang server that serves it, such as http://127.0.0.1:30000; its tokenizer is still the checkpoint's."""
    model: str | None = None
    """The name that it is served under; None takes whatever the endpoint serves."""
    swap: bool = False
    """First have the endpoint's server load `checkpoint` in place of its weights, and take answers of these only. The folder
    must be visible to the server."""
    modes: tuple[Literal["reasoning", "direct"], ...] = ()
    """In which modes it is asked; none takes those that data.mode trains, as far as its format has them."""
    paper_row: str | None = None
    """An id in configs/published/paper.yaml that it is compared with; None takes the row nearest to this run's training, if
    its data are known by their kind and nothing else makes it a variant."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.swap and self.endpoint is None:
            raise ValueError("swap needs an endpoint: without one the weights are loaded anyway")
        return self


class ServerConfig(Schema):
    """An SGLang server that the evaluation starts and stops itself."""

    python: str = "python3"
    """The interpreter of the environment that SGLang is installed in."""
    arguments: tuple[str, ...] = ()
    """More of sglang.launch_server's, such as --tp-size=8."""
    ready_seconds: Positive = 600
    """How long it may take to load the weights."""


class EvaluateConfig(Schema):
    """Guards on benchmarks. Sampling is the paper's."""

    guards: tuple[GuardConfig, ...] = Field(default=(GuardConfig(),), min_length=1)
    """Which guards; the first is the one that others are compared with."""
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
    """Which benchmarks; the default are those of the paper's two averages."""
    validation: tuple[SourceConfig, ...] = ()
    """Labelled examples on which a threshold is chosen and probabilities are calibrated; none leaves both out."""
    limit: Positive | None = None
    """Judge at most so many examples of each benchmark, a seeded sample; for a quick look."""
    backend: Literal["jax", "sglang"] = "jax"
    """Who computes for guards without an endpoint: this process, over the training mesh, or an SGLang server of its own."""
    server: ServerConfig = ServerConfig()
    ask: Literal["policy", "benchmark"] = "policy"
    """Ask for all that a policy asks, or only for what is known of the example, as in training."""
    generations: NonNegative = 4
    """Answers to each example; 0 takes the verdict from the probability alone, without sampling, in direct mode."""
    temperature: Annotated[float, Field(ge=0)] = 0.6
    """Sampling temperature."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Nucleus sampling."""
    reasoning_tokens: Positive = 1024
    """A thought that is longer is ended, and a verdict forced."""
    verdict_tokens: Positive = 48
    """Tokens of a verdict."""
    seed: NonNegative = 0
    """Of sampling, of the bootstrap and of `limit`."""
    unparsable: Literal["harmful", "wrong"] = "harmful"
    """What an answer that cannot be read counts as; it is counted by itself in any case."""
    batch: Positive = 32
    """Answers that are generated at a time: rows of a batch in JAX, requests under way at a server."""
    resamples: Positive = 1000
    """Draws of the bootstrap."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        labels = [one.label or one.name for one in self.benchmarks]
        for what, names in (("guards", [guard.name for guard in self.guards]), ("benchmarks", labels)):
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise ValueError(f"{what}: {twice!r} is given twice; give one of them another name")
        return self
