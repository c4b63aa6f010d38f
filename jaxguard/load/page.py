"""The page of one or several simulations: latency and goodput over the rate, and a table of the phases."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from jaxguard.load.summary import HELD
from jaxguard.report import Bullets, Cell, Drawing, Facts, Page, Section, Table
from jaxguard.report.figures import COLOURS, FAINT, inline_svg, style
from jaxguard.report.text import ABSENT

Run = Mapping[str, Any]
_COLUMNS = "phase,sent /s,in the SLO,refused,p50 ms,p95 ms,p99 ms,p99 to refuse,void"
NOTE = (
    "Milliseconds from the scheduled time, also of requests that were refused or never answered, with 95 % intervals from tenths "
    "of the phase. The knee is the rate at which the share of verdicts within the SLO falls below 95 %."
)


def page(runs: Mapping[str, Run], title: str, file: str = "") -> Page:
    """The page of results by name; `file` is the figure beside it in Markdown."""
    void = [
        f"{name}, {phase}: void, {s['void']}" for name, run in runs.items() for phase, s in _phases(run) if s["void"]
    ]
    drawing = Drawing(
        "Latency and goodput over the rate", inline_svg(figure(runs), "load", "Latency over rate"), file=file
    )
    sections = [Section(name, [Facts(_facts(run)), _table(run)]) for name, run in runs.items()]
    return Page(title, [Bullets(void, warning=True), NOTE, drawing, *sections])


@style()
def figure(runs: Mapping[str, Run]) -> Figure:
    """Percentiles of latency, and the share within the SLO, over the rate of the ramp's steps."""
    drawing = Figure(figsize=(9, 3.6))
    latency, goodput = drawing.subplots(1, 2)
    for i, (name, run) in enumerate(runs.items()):
        steps = sorted((s for s in run["ramp"] if not s["void"]), key=lambda step: step["scheduled_per_second"])
        rates, colour = [step["scheduled_per_second"] for step in steps], COLOURS[i % len(COLOURS)]
        for quantile, line in (("p50", "-"), ("p95", "--"), ("p99", ":")):
            values = [1000 * (step["latency"][quantile] or float("nan")) for step in steps]
            latency.plot(rates, values, line, color=colour, marker=".", label=f"{name}, {quantile}")
        latency.axhline(1000 * run["slo_seconds"], color=FAINT, linewidth=0.8)
        goodput.plot(rates, [step["goodput_share"] for step in steps], color=colour, marker=".", label=name)
    goodput.axhline(HELD, color=FAINT, linewidth=0.8)
    if any(run["ramp"] for run in runs.values()):
        latency.set(xscale="log", yscale="log")
        latency.legend()
        goodput.set(xscale="log")
    latency.set(xlabel="requests a second", title="Latency in ms, and the SLO")
    goodput.set(xlabel="requests a second", title="Share of verdicts within the SLO", ylim=(0, 1.03))
    return drawing


def _facts(run: Run) -> list[tuple[str, object]]:
    mix, knee, steady = run["assumptions"], run["knee"], run["phases"].get("steady", {})
    shares = ", ".join(f"{mix[name]:.0%} {name}" for name in ("exchanges", "harmful", "repeats", "long"))
    costs = [
        ("A million verdicts within the SLO", _format(steady.get("cost_of_a_million"), ".4g")),
        ("Price of the machine, assumed", f"{_format(run['price_per_hour'], 'g')} an hour"),
    ]
    return [
        ("Knee", f"{knee['per_second']:.4g}/s{' or more' if knee['lower_bound'] else ''}" if knee else ABSENT),
        ("SLO", f"a verdict within {_ms(run['slo_seconds'])} ms"),
        *(costs if run["price_per_hour"] else ()),
        ("Accuracy within the SLO", _format(steady.get("accuracy_within_slo"), ".1%")),
        ("Seconds of a verdict", _words(steady.get("seconds_of_verdicts", {}))),
        ("Tokens of a verdict", _words(steady.get("tokens_of_verdicts", {}))),
        ("Traffic, assumed", f"{shares}; policies: {_words(mix['policies']) or 'the default'}; seed {run['seed']}"),
        ("Drawn", _words(mix["drawn"])),
        ("Machine", f"{run['cores']} cores, load average before: {run['load_average']:.2f}"),
    ]


def _phases(run: Run) -> list[tuple[str, Run]]:
    ramp = [(f"ramp {i}", step) for i, step in enumerate(run["ramp"], 1)]
    return [("idle", run["idle"]), *ramp, *run["phases"].items()]


def _table(run: Run) -> Table:
    table = Table(_COLUMNS.split(","))
    for phase, summary in _phases(run):
        latency, interval = summary["latency"], summary["latency_intervals"]["p95"]
        table.add(
            phase,
            f"{summary['scheduled_per_second']:.3g}",
            _format(summary["goodput_share"], ".1%"),
            _format(summary["refused_share"], ".1%"),
            _ms(latency["p50"]),
            Cell(
                _ms(latency["p95"]), f"[{_ms(interval[0])}, {_ms(interval[1])}]" if interval and latency["p95"] else ""
            ),
            _ms(latency["p99"]),
            _ms(summary["seconds_to_refuse"]["p99"]),
            "void" if summary["void"] else "",
        )
    return table


def _words(numbers: Mapping[str, float]) -> str:
    written = {
        name.replace("_", " "): f"{value:,}" if value == int(value) else f"{value:.4g}"
        for name, value in numbers.items()
    }
    return ", ".join(f"{name} {value}" for name, value in written.items())


def _ms(seconds: float | None) -> str:
    return ABSENT if seconds is None else f"{1000 * seconds:.4g}"


def _format(value: float | None, form: str) -> str:
    return ABSENT if value is None else format(value, form)
