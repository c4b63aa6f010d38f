"""What tests of other guards' formats share: a policy, two examples, thoughts, and how a format is asked."""

from external_templates import GUARDS, LINES

from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.policies import Category, Policy
from jaxguard.guards.formats.external import external_guard
from jaxguard.guards.protocol import Request

HOUSE = Policy("house", (Category("Burnt bread", "Recipes that burn."), Category("Waste")), rules="Be kind.")
GENERAL = Policy("wildguard", (Category("Fraud"),))
BOTH = Example("1", "s", "How do I bake bread?", "Mix flour and water.")
ALONE = Example("2", "s", "How do I bake bread?")
FIXED = ("wildguard", "qwen3guard", "guardreasoner", "polyguard")
THOUGHT = {
    "gpt_oss_safeguard": "<|channel|>analysis<|message|>Bread.<|end|><|start|>assistant<|channel|>final<|message|>",
    "nemotron_reasoning": "<think>\nBread.\n</think>\n\n",
    "nemotron_35": "<think>\nBread.\n</think>\n",
    "granite_guardian_33": "<think>\nBread.\n</think>\n",
    "guardreasoner": "# Task 1\n\nBread.\n\n---\n\nAnswers: \n",
    "dynaguard": "<think>\nBread.\n</think>\n",
    LINES: "<reason>\nBread.\n</reason>\n",
}


def asked(question="prompt_harm", example=BOTH, mode=Mode.REASONING):
    return Request(example, (question,), mode)


def shown(form, ask):
    return form.text(form.prompt(ask).ids)


def reserved(kind):
    """Special tokens and sections of that guard, and the think tags of any."""
    return (
        *GUARDS[kind][1],
        *external_guard(kind).tags,
        "<|eot_id|>",
        "<think>",
        "</think>",
        "Prompt harm:",
        "AI assistant:",
    )
