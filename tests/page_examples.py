"""A small trace store, and texts that try to break out of its page."""

from dataclasses import replace

from jaxguard.distill.store import Attempt

SETTINGS = {
    "teacher": "deepseek-r1",
    "version": None,
    "sampling": {"temperature": 0.6, "top_p": 0.95},
    "prompt": "0123456789abcdef" * 4,
    "filter": {"min_words": 8},
}
GOOD = Attempt(
    "x0", 0, 0, "Bread is fine.", "Prompt harm: unharmful", "stop", {}, 100, 7, 1.5, "2026-01-01T00:00:00+00:00"
)
LEAKED = {"labels_leaked": "says 'the given label'"}
DIFFERS = {"verdict_differs": "prompt_harm: harmful, not unharmful"}
# x0 passes at once, x1 at its third try, x2 never.
STORE = [
    GOOD,
    replace(
        GOOD, example_id="x1", failures=DIFFERS | LEAKED, trace="Flour and yeast.", time="2026-01-01T00:01:00+00:00"
    ),
    replace(GOOD, example_id="x1", round=1, failures=LEAKED),
    replace(GOOD, example_id="x1", round=2, trace="Rye needs a sourdough."),
    replace(GOOD, example_id="x2", failures={"judge": "wrong"} | DIFFERS, finish_reason="length", completion_tokens=9),
    replace(GOOD, example_id="x2", round=1, failures={"judge": "wrong"}, time="2026-01-02T00:00:00+00:00"),
]
BREAKOUTS = (
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "<!--<script>",
    "]]>\u2028window.hacked = 1\u2029",
    "lone \ud800 surrogate \udc00",
    "{{ 7 * 7 }}{% raw %}",
    "\"'&amp;<svg onload=window.hacked=1>",
    "javascript:window.hacked=1",
)


def hostile():
    return [
        replace(
            GOOD,
            example_id=f"{i} {text}",
            trace=text,
            answer=text,
            finish_reason=text,
            failures={text: text} if i % 2 else {},
        )
        for i, text in enumerate(BREAKOUTS)
    ]
