"""Config schemas of reinforcement learning: rollouts and rewards."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from jaxguard.config.base import Positive, Schema, Share
from jaxguard.utils.secrets import Masked


class RewardConfig(Schema):
    """What an answer is worth: 1 if its verdict is right, and what the costliest error does if it has none."""

    kind: Literal["sampled", "probability", "log_odds"] = "sampled"
    """sampled: the verdict of each answer is right or wrong. probability: the expected reward over all verdicts after the answer's
    reasoning, exactly; in direct mode nothing is sampled. log_odds: the log-odds of the right verdict there."""
    prompt_weight: PositiveFloat = 1.0
    """Weight of the verdict about the prompt, where an answer has several."""
    response_weight: PositiveFloat = 1.0
    """Weight of the verdicts about the response."""
    false_positive: NonNegativeFloat = 1.0
    """What it costs to call something harmful, or a refusal, that is not."""
    false_negative: NonNegativeFloat = 1.0
    """What it costs to miss one that is."""
    length_budget: Positive | None = None
    """Tokens of an answer that are free; null leaves length out. Shorter is never better."""
    length_penalty: NonNegativeFloat = 0.5
    """What an answer of reinforce.max_tokens costs; between the budget and that it rises linearly."""


class ReinforceConfig(Schema):
    """Reinforcement learning: a step samples answers to train.batch_size prompts, at temperature 1, and trains on them."""

    answers: Annotated[int, Field(ge=2)] = 8
    """Answers to each prompt, a group: an answer's advantage is its reward minus that of its group."""
    max_tokens: Positive = 512
    """Tokens of an answer; one that does not end within them has no verdict."""
    reward: RewardConfig = RewardConfig()
    baseline: Literal["mean", "leave_one_out"] = "mean"
    """What is subtracted from a reward: the group's mean, or that of its other answers."""
    scale: Literal["group", "none"] = "group"
    """Divide advantages by the standard deviation of their group's rewards, as GRPO does, or not, as Dr. GRPO."""
    average: Literal["tokens", "answers", "constant"] = "tokens"
    """The loss is a mean over all tokens of a step as in DAPO, over answers of the means over their tokens as in GRPO, or over
    answers of sums over tokens, divided by max_tokens, as in Dr. GRPO. GSPO's is over answers."""
    clip_low: Share = 0.2
    """How far a ratio of probabilities may fall below 1, in answers with a negative advantage, before its gradient ends; GSPO's is
    0.0003. cispo does not use it."""
    clip_high: PositiveFloat = 0.28
    """How far it may rise above 1, in those with a positive one; DAPO's is 0.28, GRPO's 0.2, GSPO's 0.0004. cispo caps the ratios
    of all answers at 1 more than this: TRL's epsilon_high of 5 is 4 here."""
    candidates: Positive = 1
    """Dynamic sampling: prompts that a step may sample for each that it trains on. Groups that are all right or all wrong, which
    teach nothing, are left out while others can be sampled instead."""
    updates: Positive = 1
    """Steps for which answers are sampled at a time; the ratio to the model that sampled them corrects for later steps."""
    batch: Positive = 32
    """Answers that are sampled at the same time."""
    endpoint: Masked | None = None
    """Address of an SGLang server that samples, such as http://127.0.0.1:30000; it loads the weights of each step from the run's
    folder, which it must see. null samples in this process."""
    api_key_env: str = "JAXGUARD_API_KEY"
    """Environment variable with its API key, if it wants one."""
    collapse_steps: Positive | None = 20
    """Stop after so many steps in which all verdicts were the same, though labels differ; null never stops."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.average == "answers" and self.reward.kind != "sampled":
            raise ValueError(f"reward.kind={self.reward.kind} is a sum over tokens: set average to tokens or constant")
        budget = self.reward.length_budget
        if budget is not None and budget >= self.max_tokens:
            raise ValueError(f"reward.length_budget={budget} must be below max_tokens={self.max_tokens}")
        return self
