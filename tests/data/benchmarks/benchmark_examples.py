"""Hand-made rows with the columns of each shipped benchmark, and the answers that must come out of them."""

from pathlib import Path

from jaxguard.data.benchmarks.loading import load_benchmark
from jaxguard.data.format.dialogue import LABEL

ROOT = Path(__file__).parents[3]
SHIPPED = ROOT / "configs" / "benchmarks"

HARM, SAFE = "harmful", "unharmful"
WILDGUARD = [
    {"prompt": "A", "response": "a", "adversarial": True, "subcategory": "fraud"},
    {"prompt": "B", "response": "b", "adversarial": False, "subcategory": "benign"},
    {"prompt": "C", "response": "c", "adversarial": None, "subcategory": None},
]
for row, harm, refusal in zip(WILDGUARD, (HARM, SAFE, None), ("refusal", "compliance", None), strict=True):
    row |= {"prompt_harm_label": harm, "response_harm_label": harm, "response_refusal_label": refusal}
AEGIS2 = [
    {"id": "x", "prompt": "A", "response": "a", "prompt_label": "safe", "response_label": "unsafe"},
    {"id": "y", "prompt": "B", "response": "", "prompt_label": "unsafe", "response_label": "safe"},
    {"id": "z", "prompt": "C", "response": None, "prompt_label": "unsafe", "response_label": None},
    {"id": "u", "prompt": "D", "response": "d", "prompt_label": "safe", "response_label": ""},
    {"id": "v", "prompt": "REDACTED", "response": "e", "prompt_label": "unsafe", "response_label": "unsafe"},
]
for row in AEGIS2:
    row["violated_categories"] = "Bread, Cake" if row["id"] == "x" else None
OWN = [
    {"prompt": "A", "response": "a", "prompt_label": HARM, "response_label": SAFE, "trace": "Bread."},
    {"prompt": "B", "response": None, "prompt_label": SAFE, "response_label": None},
    {"prompt": "C", "response": "c", "prompt_label": None, "response_label": HARM},
]
ASKED, ADVICE = ({"role": "assistant", "content": text} for text in ("Which bread?", "Knead for long."))
RYE, THANKS = ({"role": "user", "content": text} for text in ("Rye.", "Thanks."))
DIALOGUE = {
    "domain": "cooking",
    "scenario": "first loaf",
    "system_instruction": "Only talk of bread.",
    "conversation": [ASKED, RYE, ADVICE, THANKS],
    "distractors": [{"bot turn": "Knead for long.", "distractor": "Who won the chess final?"}],
    "conversation_with_distractors": [],
}
TOPIC = {
    "system_instruction": "Only talk of bread.",
    "conversation_history": [ASKED, RYE, ADVICE],
    "last_user_message": "Who won the chess final?",
    "gt_topic_classification": "off-topic",
    "safety_reasoning_trace_deepseek_r1_0528": "Chess is no bread.",
    "efficient_reasoning_trace_deepseek_r1_0528": "No bread.",
    "prediction_gt_mismatch_deepseek_r1_0528": False,
}
KEYS = ("S", "H", "V", "HR", "SH", "S3", "H2", "V2")
# Rows with the columns of each benchmark's source, and the answers that must come out, in order.
ROWS = {
    "own_prompts": (OWN, [HARM, SAFE]),
    "own_responses": (OWN, [SAFE, HARM]),
    "own_topics": (
        [
            {"policy": "Only bread.", "prompt": "A", "label": "on-topic", "domain": "kitchen"},
            {"policy": "Only bread.", "prompt": "B", "label": "off-topic", "domain": "kitchen"},
            {"policy": None, "prompt": "C", "label": "off-topic", "domain": "kitchen"},
            {"policy": "Only bread.", "prompt": "D", "label": None, "domain": "kitchen"},
        ],
        [SAFE, HARM],
    ),
    "canttalkaboutthis": (
        [
            DIALOGUE,
            {**DIALOGUE, "distractors": [{"bot turn": "Which bread?", "distractor": "Who won the chess final?"}]},
        ],
        [SAFE, SAFE, HARM, SAFE, SAFE, HARM],
    ),
    "nemotron_topics": (
        [
            TOPIC,
            {**TOPIC, "prediction_gt_mismatch_deepseek_r1_0528": True},
            {**TOPIC, "conversation_history": [], "last_user_message": "Rye?", "gt_topic_classification": "on-topic"},
            {**TOPIC, "system_instruction": None},
        ],
        [HARM, HARM, SAFE],
    ),
    "wildguardtest_prompt": (WILDGUARD, [HARM, SAFE]),
    "wildguardtest_response": (WILDGUARD, [HARM, SAFE]),
    "wildguardtest_refusal": (WILDGUARD, ["refusal", "compliance"]),
    "aegis2_prompt": (AEGIS2, [SAFE, HARM, HARM, SAFE]),
    "aegis2_response": (AEGIS2, [HARM, SAFE]),
    "openai_moderation": (
        [
            {"prompt": "A", **dict.fromkeys(KEYS, 0)},
            {"prompt": "B", "S": 0, "V2": 1},
            {"prompt": "C", "H": 0},
            {"prompt": "D"},
            {"prompt": "E", **dict.fromkeys(KEYS, 0), "HR": 1.0},
        ],
        [SAFE, HARM, SAFE, SAFE, HARM],
    ),
    "simple_safety_tests": ([{"prompt": "A", "harm_area": "Bread, Cake"}, {"prompt": " ", "harm_area": "x"}], [HARM]),
    "toxic_chat": (
        [
            {"user_input": "A", "human_annotation": True, "toxicity": 1, "jailbreaking": 1},
            {"user_input": "B", "human_annotation": "True", "toxicity": "0", "jailbreaking": 0},
            {"user_input": "C", "human_annotation": False, "toxicity": 1, "jailbreaking": 0},
        ],
        [HARM, SAFE],
    ),
    "xstest_response": (
        [
            {"prompt": "A", "response": "a", "label": "harmful", "prompt_type": "prompt_harmful"},
            {"prompt": "B", "response": "b", "label": "unharmful", "prompt_type": "prompt_safe"},
        ],
        [HARM, SAFE],
    ),
    "jbb_response": (
        [
            {"prompt": "A", "goal": "g", "target_response": "a", "human_majority": 1},
            {"prompt": "B", "goal": "g", "target_response": "b", "human_majority": 0},
        ],
        [HARM, SAFE],
    ),
    "aegis1_prompt": (
        [
            {"text": "A", "text_type": "user_message", "labels_0": "Safe", "labels_1": "Safe", "labels_2": "Bread"},
            {"text": "B", "text_type": "user_message", "labels_0": "Safe", "labels_1": "Bread", "labels_2": None},
            {"text": "C", "text_type": "llm_response", "labels_0": "Bread", "labels_1": "Bread", "labels_2": "Bread"},
            {"text": "D", "text_type": "user_message", "labels_0": "Needs Caution", "labels_1": None, "labels_2": None},
        ],
        [SAFE, HARM, HARM],
    ),
    "harmbench_prompt": (
        [
            {"Behavior": what, "FunctionalCategory": what, "SemanticCategory": "bread", "BehaviorID": f"id_{what}"}
            for what in ("standard", "contextual", "copyright")
        ],
        [HARM, HARM],
    ),
    "harmbench_response": (
        {
            "bake": [
                {"test_case": "A", "generation": "a", "human_0": 1, "human_1": 0, "human_2": 1, "experiment": "x"},
                {
                    "test_case": "A",
                    "generation": "b",
                    "human_0": 1,
                    "human_1": 0,
                    "human_2": 0,
                    "experiment": "default",
                },
            ],
            "fry": [{"test_case": "B", "generation": "", "human_0": 1, "human_1": 1, "human_2": 1, "experiment": "x"}],
        },
        [HARM, SAFE, HARM],
    ),
    "beavertails": (
        [
            {"prompt": "A", "response": "a", "is_safe": False, "category": {"bread": True, "cake": False}},
            {"prompt": "A", "response": "b", "is_safe": True, "category": {"bread": False, "cake": False}},
        ],
        [HARM, SAFE],
    ),
    "saferlhf": (
        [
            {"prompt": "A", "response_0": "a", "response_1": "b", "is_response_0_safe": one, "is_response_1_safe": two}
            for one, two in ((True, False), (False, True), (True, True), (False, False))
        ],
        [SAFE, HARM, HARM, SAFE],
    ),
    "xstest_prompt": (
        [
            {"prompt": "A", "label": "unsafe", "type": "contrast_bread", "focus": "x"},
            {"prompt": "B", "label": "safe", "type": "bread", "focus": "x"},
        ],
        [HARM, SAFE],
    ),
    "dynaguardrail": (
        [
            {"prompt": "A", "label": "unsafe", "dataset_type": "finance"},
            {"prompt": "B", "label": "safe", "dataset_type": "injection"},
        ],
        [HARM, SAFE],
    ),
    "dynabench": (
        [
            {"transcript": "User: A\nAgent: a", "label": "FAIL", "policy": "Only bread."},
            {"transcript": "User: B\nAgent: b", "label": "PASS", "policy": "1. Only cake."},
        ],
        [HARM, SAFE],
    ),
    "cosapien": (
        [
            {"prompt": what, "scenario": "Only bread.", "type": what}
            for what in ("allowed", "disallowed", "partial", "safe")
        ],
        [SAFE, HARM, HARM, SAFE] * 5,
    ),
}


def answers(benchmark):
    return [getattr(example, LABEL[benchmark.definition.question]) for example in benchmark.examples]


def texts(benchmark, ids):
    return {(e.prompt, e.response) for e in benchmark.examples if e.id in ids}


def shipped(name, local):
    return load_benchmark(name, local)
