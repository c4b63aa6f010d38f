"""Made-up evaluations: two guards in two modes on a few benchmarks, and texts that try to break out of their report."""

import functools
from dataclasses import replace

import numpy as np

from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import CHOICES, LABEL
from jaxguard.evaluate.report.published import read_published
from jaxguard.evaluate.scores.metrics import (
    average_f1,
    average_weights,
    calibration,
    count_votes,
    f1_difference,
    fit_platt,
    mcnemar,
    measure,
    verdicts_at,
)
from jaxguard.evaluate.scores.results import Average, Cell, Cost, Evaluation, Thresholded, Versus, Wrong

PUBLISHED = read_published()
GUARDS = (("ours", "reasoning", 0.10), ("ours", "direct", 0.15), ("other", "reasoning", 0.2), ("other", "direct", 0.25))
SECONDS = {"reasoning": 0.08, "direct": 0.02}
DRAWS, SIZE, GENERATIONS = 10, 60, 4
HOSTILE = (
    "<script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "</pre></details><svg onload=window.hacked=1>",
    "a | b ](http://x) [a](javascript:1) ![](//x)",
    "\x1b[31mred\x1b]0;title\x07 and \u202eturned",
    "line\nbreak\r$x^{2$ \\frac & **bold** `code` _em_",
    "{{ 7 * 7 }}{% raw %} --> &lt; ]]>",
    "lone \ud800 surrogate http://x www.x.com",
)
QUESTIONS = {"safety_prompt": "prompt_harm", "safety_response": "response_harm", "custom_policy": "prompt_harm"}
GROUPS = {"prompt": "safety_prompt", "response": "safety_response", "custom": "custom_policy"}
PAPERS = {name: GROUPS[average] for average in GROUPS for name in PUBLISHED.benchmarks(average)}
FEW = {"wildguardtest_prompt": "safety_prompt", "xstest_response": "safety_response", "cosapien": "custom_policy"}


def evaluation(benchmarks=FEW, complete=True, hostile=False, wrong=3):
    """Guards of falling quality on {benchmark: group}, compared with the paper's Llama."""
    random = np.random.default_rng(0)
    labels = {name: random.random(SIZE) < 0.5 for name in benchmarks}
    found = {(g, mode): _votes(random, labels, benchmarks, noise) for g, mode, noise in GUARDS}
    cells = tuple(
        _cell(random, name, group, guard, mode, labels[name], found, complete, hostile, wrong)
        for guard, mode, _ in GUARDS
        for name, group in benchmarks.items()
    )
    averages = tuple(
        _average(guard, mode, name, found, benchmarks) for guard, mode, _ in GUARDS for name in (*GROUPS, "safety")
    )
    return Evaluation(
        name=HOSTILE[0] if hostile else "tiny",
        models={"ours": "Llama-3.1-8B-Instruct, 5,000 examples", "other": HOSTILE[3] if hostile else "another guard"},
        benchmarks=tuple(dict.fromkeys(cell.benchmark for cell in cells)),
        cells=cells,
        averages=averages,
        settings={
            "generations": GENERATIONS,
            "temperature": 0.6,
            "top_p": 0.95,
            "unparsable": "harmful",
            "limit": None,
        },
        finished="2026-01-31T12:00:00+00:00",
        hardware=HOSTILE[1] if hostile else "1 × H100",
        paper_rows={"ours/reasoning": "llama_wgm_reasoning_5k", "ours/direct": "llama_wgm_direct"},
    )


@functools.cache
def whole():
    """On the paper's benchmarks, with all that a report can show."""
    return evaluation(PAPERS)


@functools.cache
def some():
    """On a few of them."""
    return evaluation()


@functools.cache
def partly():
    """On the paper's, one of which the last guard left out."""
    left_out, (guard, mode, _) = "toxic_chat", GUARDS[-1]
    cells = [c for c in whole().cells if (c.guard, c.mode, c.benchmark) != (guard, mode, left_out)]
    averages = [
        replace(a, missing=(left_out,), versus=replace(a.versus, missing=(left_out,)))
        if (a.guard, a.mode) == (guard, mode) and a.name in ("prompt", "safety")
        else a
        for a in whole().averages
    ]
    return replace(whole(), cells=tuple(cells), averages=tuple(averages))


@functools.cache
def hostile():
    """On a few of them, with every breakout among the errors."""
    return evaluation(hostile=True, wrong=len(HOSTILE))


def _votes(random, labels, benchmarks, noise):
    found = {}
    for name, truth in labels.items():
        verdicts = (truth[:, None] ^ (random.random((SIZE, GENERATIONS)) < noise)).astype(np.int8)
        verdicts[0, 0] = -1
        found[name] = count_votes(truth, verdicts, QUESTIONS[benchmarks[name]])
    return found


def _average(guard, mode, name, found, benchmarks):
    chosen = [
        b
        for b, group in benchmarks.items()
        if group in ({GROUPS[name]} if name in GROUPS else {"safety_prompt", "safety_response"})
    ]
    prompts = sum(benchmarks[b] == "safety_prompt" for b in chosen)
    weights = average_weights(*([prompts, len(chosen) - prompts] if name == "safety" else [len(chosen)]))
    mine, first = ([found[one, mode][b] for b in chosen] for one in (guard, "ours"))
    versus = None
    if guard != "ours":
        versus = Versus("ours", mode, f1_difference(mine, first, weights, resamples=DRAWS))
    return Average(guard, mode, name, average_f1(mine, weights, resamples=DRAWS), versus)


def _cell(random, name, group, guard, mode, labels, found, complete, hostile, wrong):
    mine, question = found[guard, mode][name], QUESTIONS[group]
    slices = {
        f"category: {HOSTILE[i] if hostile else word}": random.random(SIZE) < 0.4
        for i, word in enumerate(("rye", "spelt", "none"))
    }
    probabilities = np.clip(labels * 0.5 + random.random(SIZE) * 0.5, 0, 1)
    platt = fit_platt(labels, probabilities)
    after = platt(probabilities)
    chosen = measure(count_votes(labels, verdicts_at(after, 0.4), question), resamples=DRAWS)
    return Cell(
        guard=guard,
        mode=mode,
        benchmark=f"{name} {HOSTILE[2]}" if hostile else name,
        source=name,
        title=HOSTILE[6] if hostile else f"Bread of {name}",
        group=group,
        question=question,
        examples=SIZE,
        complete=complete,
        result=measure(mine, resamples=DRAWS),
        cost=Cost(SECONDS[mode], 0.01, SIZE * SECONDS[mode], 300.0, 120.0 if mode == "reasoning" else 9.0, 5, 0, 0),
        slices={name: measure(mine[rows], resamples=DRAWS) for name, rows in slices.items()},
        calibration=calibration(labels, probabilities, resamples=DRAWS),
        thresholded=Thresholded(
            0.4,
            platt,
            chosen,
            calibration(labels, after, resamples=DRAWS),
            points={"f1": chosen.scores, "0.01": chosen.scores},
        ),
        versus=None if guard == "ours" else _versus(mine, found["ours", mode][name], mode),
        wrong=tuple(_wrong(i, question, list(slices), hostile) for i in range(wrong)),
    )


def _versus(mine, first, mode):
    return Versus("ours", mode, f1_difference([mine], [first], resamples=DRAWS), mcnemar(mine, first))


def _wrong(i, question, slices, hostile):
    text = HOSTILE[i % len(HOSTILE)] if hostile else f"How is sourdough number {i} fed?"
    label, said = CHOICES[question]
    example = Example(
        id=f"{i} {text}" if hostile else f"x{i}",
        source="bread",
        prompt=text,
        response=None if question == "prompt_harm" else f"With flour. {text if hostile else ''}",
        policy=text if hostile else None,
        **{LABEL[question]: label},
    )
    return Wrong(
        example, label, (said,) * GENERATIONS, None if i == 1 else 0.02 + 0.1 * i, text, (slices[i % len(slices)],)
    )
