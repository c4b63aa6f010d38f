"""The section of the report about the cascade of a guard's two modes."""

import math

from matplotlib.figure import Figure

from jaxguard import report as blocks
from jaxguard.evaluate.report.tables import difference
from jaxguard.evaluate.scores.escalation import MARGIN, SHARES
from jaxguard.evaluate.scores.results import Arm, Cascade, Evaluation
from jaxguard.report.figures import COLOURS, FAINT, inline_svg, style
from jaxguard.report.text import ABSENT, share, short

ARMS = {
    "direct": "direct alone",
    "reasoning": "reasoning alone",
    "cascade": "reasoning where direct is uncertain",
    "random": "reasoning at random",
    "value": "reasoning by its learned value",
}
ABOUT = (
    "Direct answers count by their probability: above the threshold of the best F1 in guard.json, else above a half; a single "
    "reasoned one by that of its own mode, several by their words. Uncertain is what lies between the certified thresholds of "
    "mode auto, else as many examples as evaluate.auto.budget allows, nearest to the threshold. Random and learned choices "
    "reason about as many: random is an exact expectation; the learned one is a logistic model (log-odds, distance from the "
    "threshold, length) of whether reasoning is right where the direct answer is wrong, fitted on the benchmark's other "
    "examples. F1 is over all examples of a benchmark; differences are paired. Time and generated tokens are means, divided by "
    "those of reasoning alone; both answers count."
)
VERDICTS = {
    "dominates": f"better than direct and than random, beyond the noise, and at most {MARGIN} below reasoning",
    "inside the noise": "no difference can be claimed",
    "worse": "below direct, random or reasoning, beyond the noise",
}


def section(evaluation: Evaluation) -> blocks.Section | None:
    """What the cascade is worth on each benchmark; None where no guard was evaluated in both modes."""
    if not evaluation.cascades:
        return None
    columns = ("choice", "F1", "F1 of the cascade less", "reasoned about", "time", "generated tokens")
    table, certified = blocks.Table(columns, "The cascade"), dict[tuple[str, str], list[str]]()
    for each in evaluation.cascades:
        if each.certified:
            certified.setdefault((each.guard, each.certified), []).append(each.benchmark)
        for name, arm in sorted(each.arms.items(), key=lambda item: list(ARMS).index(item[0])):
            table.add(
                ARMS[name],
                *_cells(arm),
                group=f"{each.guard}: {each.heading}",
                kind="strong" if name == "cascade" else "",
            )
    verdicts = [
        f"{verdict[0].upper()}{verdict[1:]} ({meaning}): {', '.join(named)}."
        for verdict, meaning in VERDICTS.items()
        if (named := [f"{each.guard} on {each.benchmark}" for each in evaluation.cascades if each.verdict == verdict])
    ]
    thresholds = [f"{guard}, {', '.join(named)}: {text}." for (guard, text), named in certified.items()]
    alt = "F1 over the share of examples that are reasoned about; the table has the numbers"
    drawing = blocks.Drawing(
        "F1 by the share that is reasoned about", inline_svg(figure(evaluation.cascades), "cascade", alt), wide=True
    )
    return blocks.Section(
        table.title,
        [blocks.note(ABOUT), blocks.Bullets([*verdicts, *thresholds]), table, blocks.Beside([drawing])],
        "cascade",
    )


def _cells(arm: Arm) -> list[blocks.Value]:
    ratios = [ABSENT if ratio is None else f"{ratio:.2f}" for ratio in (arm.seconds, arm.tokens)]
    reasoned = blocks.Cell(share(arm.escalated), f"{share(arm.traffic)} of traffic")
    return [arm.f1, difference(arm.less) if arm.less else "", reasoned, *ratios]


@style()
def figure(cascades: tuple[Cascade, ...]) -> Figure:
    """F1 over the share that is reasoned about, a panel for each guard and benchmark; the mark is the cascade of the table."""
    columns = min(3, len(cascades))
    rows = math.ceil(len(cascades) / columns)
    drawn = Figure(figsize=(3.1 * columns, 2.5 * rows + 0.4))
    panels = iter(drawn.subplots(rows, columns, squeeze=False).flat)
    for each, axes in zip(cascades, panels, strict=False):
        for name, colour in zip(("cascade", "value", "random"), (*COLOURS[:2], FAINT), strict=True):
            if name in each.curve:
                curve = [math.nan if f1 is None else f1 for f1 in each.curve[name]]
                axes.plot(SHARES, curve, color=colour, label=ARMS[name], linestyle=":" if name == "random" else "-")
        mark = each.arms["cascade"]
        axes.plot(mark.escalated, math.nan if mark.f1.value is None else mark.f1.value, "o", color=COLOURS[0])
        axes.set(title=short(f"{each.guard}, {each.benchmark}"), xlabel="share reasoned about", ylabel="F1")
    for axes in panels:
        axes.set_axis_off()
    lines = {line.get_label(): line for axes in drawn.axes for line in axes.lines if line.get_label() in ARMS.values()}
    drawn.legend(handles=list(lines.values()), loc="outside lower center", ncols=3)
    return drawn
