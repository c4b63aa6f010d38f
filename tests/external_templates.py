"""Chat templates with the structure of other guards' own, in few words, put on the tiny tokenizer with their special tokens."""

from jaxguard.data.format.template import load_tokenizer

LLAMA_GUARD = """\
<|begin_of_text|><|start_header_id|>user<|end_header_id|>

{% set names = {'user': 'User', 'assistant': 'Agent'} %}Guard '{{ names[messages[-1]['role']] }}'.

<BEGIN UNSAFE CONTENT CATEGORIES>
S1: Burnt Crusts.
S2: Raw Dough.
<END UNSAFE CONTENT CATEGORIES>

<BEGIN CONVERSATION>

{% for message in messages %}{{ names[message['role']] }}: {{ CONTENT | trim }}

{% endfor %}<END CONVERSATION>

Safe or unsafe?<|eot_id|><|start_header_id|>assistant<|end_header_id|>"""
LLAMA_GUARD_TEXT = LLAMA_GUARD.replace("CONTENT |", "message['content'] |")
LLAMA_GUARD_PARTS = LLAMA_GUARD.replace(
    "{{ CONTENT | trim }}",
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}{{ '' }}",
)
SHIELDGEMMA = """\
<bos>Guard {{ 'an answer' if messages | length > 1 else 'a prompt' }}.

<start_of_turn>
Human Question: {{ messages[0]['content'] | trim }}
<end_of_turn>
{% if messages | length > 1 %}
<start_of_turn>
Chatbot Response: {{ messages[1]['content'] | trim }}
<end_of_turn>
{% endif %}
Our safety principle is defined in the below:

* {{ guideline }}

===

Yes or No?

"""
QWEN = """\
<|im_start|>user
Guard the {{ messages[-1]['role'] }}.

<BEGIN CONVERSATION>
{% for message in messages %}
{{ 'USER' if message['role'] == 'user' else 'ASSISTANT' }}: {{ message['content'] }}
{% endfor %}
<END CONVERSATION><|im_end|>
<|im_start|>assistant
<think>

</think>

"""
HARMONY = """\
<|start|>system<|message|>Today: {{ strftime_now('%Y-%m-%d') }}<|end|><|start|>developer<|message|># Instructions

{{ messages[0]['content'] }}<|end|><|start|>user<|message|>{{ messages[1]['content'] }}<|end|>\
{% if add_generation_prompt %}<|start|>assistant{% endif %}"""
GEMMA = """\
<bos>{% for message in messages %}<start_of_turn>{{ message['role'] }}
{{ message['content'] | trim }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""

CHATML = """\
{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LLAMA_3 = """\
<|begin_of_text|>{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>

{{ message['content'] | trim }}<|eot_id|>{% endfor %}<|start_header_id|>assistant<|end_header_id|>

"""
LLAMA_GUARD_4 = (
    LLAMA_GUARD_PARTS.replace("start_header_id", "header_start").replace("end_header_id", "header_end")
).replace("eot_id", "eot")
NEMOTRON_35 = """\
<bos><start_of_turn>user
Guard by {{ custom_policy or 'its own categories' }}.

{% for message in messages %}
{{ message['role'] }}: {{ message['content'] }}
{% endfor %}
{{ request_categories }} {{ '/think' if enable_thinking else '/no_think' }}<end_of_turn>
<start_of_turn>model
"""
GRANITE = """\
<|start_of_role|>user<|end_of_role|>Guard.

<start_of_turn>
User Message: {{ messages[0]['content'] }}
{% if messages | length > 1 %}
Assistant Message: {{ messages[1]['content'] }}
{% endif %}
<end_of_turn>

<start_of_risk_definition>
* {{ guardian_config['risk_definition'] or 'Harm by common sense.' }}
<end_of_risk_definition>

Yes or No?<|end_of_text|>
<|start_of_role|>assistant<|end_of_role|>"""
GRANITE_33 = """\
<|start_of_role|>judge_protocol<|end_of_role|>### Criteria: {{ guardian_config['custom_criteria'] or 'Universal harm.' }}

### Scoring Schema: yes or no.<|end_of_text|>
{% for message in messages %}
<|start_of_role|>{{ message['role'] }}<|end_of_role|>{{ message['content'] }}<|end_of_text|>
{% endfor %}
<|start_of_role|>judge{{ '' if think else '{no_think}' }}<|end_of_role|>"""

LINES = "tests/guards/thinking_lines.yaml"
"""A format that a user wrote."""
GUARDS = {
    "llama_guard": (LLAMA_GUARD_TEXT, ()),
    "wildguard": (None, ("<s>", "</s>")),
    "shieldgemma": (SHIELDGEMMA, ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")),
    "qwen3guard": (QWEN, ("<|im_start|>", "<|im_end|>", "<|endoftext|>")),
    "gpt_oss_safeguard": (
        HARMONY,
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"),
    ),
    "yes_no": (GEMMA, ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")),
    LINES: (None, ("<s>", "</s>")),
    "nemotron_reasoning": (GEMMA, ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")),
    "nemotron_35": (NEMOTRON_35, ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")),
    "granite_guardian": (GRANITE, ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>")),
    "granite_guardian_33": (GRANITE_33, ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>")),
    "nemoguard": (LLAMA_3, ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "guardreasoner": (None, ("<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>")),
    "polyguard": (CHATML, ("<|im_start|>", "<|im_end|>", "<|endoftext|>")),
    "dynaguard": (None, ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>")),
}


def guard_tokenizer(folder, kind, template=None):
    """The tiny tokenizer as the checkpoint of such a guard would have it."""
    tokenizer = load_tokenizer(folder)
    own, tokens = GUARDS[kind]
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    tokenizer.chat_template = template or own
    return tokenizer
