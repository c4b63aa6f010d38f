"""Config schemas of distillation: the teacher, the filter, the audit."""

from typing import Annotated

from pydantic import Field, NonNegativeFloat, PositiveFloat

from jaxguard.config.base import NonNegative, Positive, Schema, Share

Prompt = Annotated[str, Field(description="A name in configs/prompts or a YAML file.")]


class TeacherConfig(Schema):
    """A model behind an OpenAI-style server, and its sampling."""

    endpoints: tuple[str, ...] = Field(("http://127.0.0.1:30000/v1",), min_length=1)
    """Base addresses of OpenAI-style servers, or of one router before them."""
    model: str
    """The name it is served under."""
    version: str | None = None
    """SGLang's weight_version that completions must have; null accepts any."""
    api_key_env: str = "JAXGUARD_API_KEY"
    """Environment variable with the API key; unset sends none."""
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
