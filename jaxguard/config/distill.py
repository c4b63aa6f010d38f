"""Config schemas of distillation: the teacher, the filter, the audit.

Where the paper (arXiv 2505.20087) is silent, the default here is our choice; docs/configuration.md says which.
"""

from typing import Annotated

from pydantic import Field

from jaxguard.config.base import NonNegative, Positive, Schema, Share


class TeacherConfig(Schema):
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


class FilterConfig(Schema):
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


class AuditConfig(Schema):
    """How far the teacher agrees with people when it is not told their labels."""

    examples: Positive = 1000
    """How many of data.train are asked about, a seeded sample."""
    seed: NonNegative = 0
    """Which sample."""
    samples: Positive = 4
    """Answers to each."""
    prompt: str = "audit"
    """A name in configs/prompts or a YAML file."""


class DistillConfig(Schema):
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
