"""Plan a run: compile its step for targets, compare settings, search for the fastest that fit, and present the plans."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Group, RenderableType
from rich.text import Text

from jaxguard.config import Source, load
from jaxguard.config.hardware import GIB
from jaxguard.models.spec import Spec
from jaxguard.plan.compile import Buffer, OutOfMemoryError, Plan, compile_step, estimate, find_spec, rate
from jaxguard.plan.run_cost import run_cost
from jaxguard.plan.sampling import compile_sampling
from jaxguard.plan.targets import Cluster, find_cluster
from jaxguard.report import Bullets, Cell, Content, Drawing, Page, Paragraph, Section, Table
from jaxguard.report.figures import COLOURS, inline_svg, style
from jaxguard.report.text import short

REMAT = ("none", "dots", "full")
"""From the fastest and largest to the slowest and smallest."""
ASSUMPTIONS = (
    "matrix products at the data sheet's dense peak; memory and links at the data sheet's rates; nothing overlaps. We assume "
    "that two errors cancel out: products never reach their peak, and communication hides behind them. The bound is the "
    "longest of the three alone"
)
SAMPLING_REMEDY = (
    "try a larger mesh.tensor, which cuts the weights that a device gathers, fewer answers at a time (reinforce.batch), shorter "
    "ones (reinforce.max_tokens) or more devices"
)
MOST_COLLECTIVES = 12
"""In a terminal."""
NOTE = Paragraph([f"Estimate: {ASSUMPTIONS}."], faint=True)


@dataclass(frozen=True)
class Refusal:
    """A run that does not fit its cluster: why, what to do, and the largest arrays of the step where they are known."""

    name: str
    target: str
    reason: str
    largest: Sequence[Buffer] = ()

    def __str__(self) -> str:
        return f"{self.name} on {self.target} does not fit: {self.reason}"


@dataclass(frozen=True)
class PlanReport:
    """Plans of a run for several targets or settings, fitting or not, and what the compiler refused because it does not fit."""

    plans: Sequence[Plan] = ()
    refusals: Sequence[Refusal] = ()

    @property
    def fits(self) -> bool:
        return not self.problems

    @property
    def problems(self) -> list[Refusal]:
        """Everything that does not fit, with the reason."""
        problems = []
        for plan in (plan for plan in self.plans if not plan.fits):
            advice = remedies(plan.compute.remat)
            if plan.arguments > plan.usable:
                advice = (
                    f"its state and batch alone are {plan.arguments / GIB:.2f} GiB: take more devices or those with more memory, "
                    "and shard the weights over all of them (mesh.fsdp=-1)"
                )
            reason = f"it needs {plan.peak / GIB:.2f} GiB of {plan.usable / GIB:.1f} usable; {advice}"
            problems.append(Refusal(plan.name, plan.cluster.name, reason, plan.largest))
        for plan in self.plans:
            if plan.sampling and plan.sampling.peak > plan.usable:
                size = f"{plan.sampling.peak / GIB:.2f} GiB of {plan.usable / GIB:.1f} usable"
                reason = f"sampling needs {size}; {SAMPLING_REMEDY}"
                problems.append(Refusal(plan.name, plan.cluster.name, reason))
        return [*problems, *self.refusals]

    def to_json(self) -> list[dict[str, Any]]:
        """Plans as data, of one device and one step unless a name says otherwise; a refused run has `error`, no figures."""
        refusals = [{"run": r.name, "target": r.target, "fits": False, "error": r.reason} for r in self.refusals]
        return [*map(plan_json, self.plans), *refusals]

    def table(self) -> list[dict[str, Any]]:
        """A row of scalars for each plan and refusal, which `pandas.DataFrame` takes."""
        return [
            {key: value for key, value in row.items() if not isinstance(value, dict | list)} | row.get("estimate", {})
            for row in self.to_json()
        ]

    def facts(self) -> Table:
        """What a reader wants to know first, a column for each plan."""
        columns = [facts(plan) for plan in self.plans]
        rows = zip(columns[0], *(column.values() for column in columns), strict=True)
        return Table.of(("", *(plan.name for plan in self.plans)), rows, left=1 + len(columns))

    def render(self) -> Group:
        """For a terminal: all of a single plan, several side by side, and last what does not fit, and why."""
        parts: list[RenderableType] = []
        if self.plans:
            parts.append(self.facts().rich())
            parts += [phases(plan).rich() for plan in self.plans if plan.sampling]
            parts += [collectives_table(plan, MOST_COLLECTIVES).rich() for plan in self.plans if len(self.plans) == 1]
            parts.append(Text(f"Estimate: {ASSUMPTIONS}.", "dim"))
        for problem in self.problems:
            if problem.largest:
                title = f"Largest arrays of {problem.name} on {problem.target}"
                parts.append(largest_table(problem.largest, title).rich())
            parts.append(Text(str(problem), "bold red"))
        return Group(*parts)

    def page(self) -> Page:
        """One page with all of it."""
        names = dict.fromkeys([*(plan.name for plan in self.plans), *(refusal.name for refusal in self.refusals)])
        blocks: list[Content] = [Bullets([str(problem) for problem in self.problems], warning=True)]
        if self.plans:
            blocks += [self.facts(), self._figure()]
        for plan in self.plans:
            title = f"{plan.name} on {plan.cluster.name}"
            tables = [phases(plan)] if plan.sampling else []
            blocks.append(Section(title, [*tables, collectives_table(plan), largest_table(plan.largest)]))
        return Page(f"Plan of {' / '.join(names)}", [*blocks, NOTE if self.plans else None])

    @style()
    def _figure(self) -> Drawing:
        """Memory of a device beside what is usable, and where a step's time goes."""
        plans, guesses = self.plans, [estimate(plan) for plan in self.plans]
        names = [f"{short(plan.name, 60)}\n{plan.cluster.name}" for plan in plans]
        memory = {
            "state and batch": [plan.arguments / GIB for plan in plans],
            "temporaries": [(plan.peak - plan.arguments) / GIB for plan in plans],
        }
        times = {"products": "compute", "memory": "memory", "network": "network"}
        time = {part: [guess[key] for guess in guesses] for part, key in times.items()}
        figure = Figure(figsize=(10, 1.6 + 0.6 * len(plans)))
        left, right = figure.subplots(1, 2, sharey=True)
        left.scatter([p.usable / GIB for p in plans], names, marker="|", s=400, color=COLOURS[1], label="usable")
        for axes, parts, label in ((left, memory, "GiB of a device"), (right, time, "seconds of a step")):
            start = np.zeros(len(plans))
            for colour, (part, widths) in zip((COLOURS[0], COLOURS[5], COLOURS[4]), parts.items(), strict=False):
                axes.barh(names, widths, left=start, color=colour, label=part, height=0.6)
                start += widths
            axes.set(xlabel=label, xlim=(0, None))
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.25), ncols=3)
        left.invert_yaxis()
        title = "Memory of a device, and the time of a step"
        return Drawing(title, inline_svg(figure, "plan", title))


def facts(plan: Plan) -> dict[str, str | Cell]:
    """The most important figures of a plan, in words."""
    guess, cluster, shape, compute = estimate(plan), plan.cluster, plan.shape, plan.compute
    counted = plan.flops["layers"] + plan.flops["attention"] + plan.flops["head"]
    share = plan.compiled_flops / (counted / cluster.devices)
    sent = f"{plan.sent / plan.ideal_sent:.2f}" if plan.ideal_sent else "-"
    peak = f"{plan.peak / GIB:.2f} GiB of {plan.usable / GIB:.1f} usable: {'fits' if plan.fits else 'does not fit'}"
    skipped = "unknown until tokenizer and data are local"
    if plan.skipped is not None:
        skipped = f"{plan.skipped:.0%} of the blocks of causal attention"
    return {
        "target": f"{cluster.devices} × {cluster.target.title}"
        + (f", {cluster.slices} slices" if cluster.slices > 1 else ""),
        "mesh": " × ".join(f"{axis} {size}" for axis, size in plan.mesh.items()),
        "batch": f"{shape.rows} rows of {shape.tokens:,} tokens, {shape.targets:,} targets each",
        "computes": f"{compute.attention} attention, remat {compute.remat}, {compute.dtype.name}",
        "state and batch": f"{plan.arguments / GIB:.2f} GiB a device",
        "temporaries": f"{plan.temporaries / GIB:.2f} GiB",
        "peak": Cell(peak, tone="" if plan.fits else "bad"),
        "FLOPs": f"{plan.compiled_flops / 1e12:,.1f} T a device, {share:.2f} of the count",
        "memory traffic": f"{plan.traffic / GIB:,.0f} GiB a device, {plan.attention_traffic / GIB:,.1f} of them attention's",
        "sent": f"{plan.sent / GIB:,.2f} GiB a device, {sent} of the ideal",
        "… behind products": f"{plan.hidden / plan.sent:.0%}" if plan.sent else "-",
        "kernels": ", ".join(f"{count:g} {name}" for name, count in sorted(plan.kernels.items())) or "none",
        "skipped": skipped,
        "step": f"{guess['step']:.3g} s, no less than {guess['bound']:.3g}",
        "… products": f"{guess['compute']:.3g} s",
        "… memory": f"{guess['memory']:.3g} s",
        "… network": f"{guess['network']:.3g} s",
        "MFU": f"{guess['mfu']:.0%}",
        "whole run": plan.cost.describe(plan.seconds, cluster.devices),
        "programs": plan.cost.programs,
    }


def collectives_table(plan: Plan, most: int | None = None) -> Table:
    columns = ("collective", "axis", "for", "devices", "MiB", "times", "hidden", "sent, GiB", "s")
    table = Table(columns, title="What devices exchange", left=3)
    for c in plan.collectives[:most]:
        figures = (f"{c.size / 2**20:,.1f}", f"{c.count:g}", f"{c.hidden:g}", f"{c.sent / GIB:.2f}")
        table.add(c.kind, c.axes, c.source, c.group, *figures, f"{c.sent / rate(plan.cluster.target, c):.3f}")
    return table


def phases(plan: Plan) -> Table:
    """What a step of reinforcement learning does one after the other."""
    columns = ("phase", "", "peak, GiB", "s", "products", "memory", "network")
    table = Table(columns, title=f"A step of {plan.name} on {plan.cluster.name}", left=2)
    guess, shape, sampling = estimate(plan), plan.shape, plan.sampling
    if sampling:
        text = (
            f"{sampling.batches} × {sampling.answers} answers of {sampling.tokens:,} tokens to {sampling.prompts} prompts of "
            f"{sampling.prompt_tokens:,}"
        )
        seconds = sampling.seconds
        each = (sum(seconds.values()), *(seconds[part] for part in ("compute", "memory", "network")))
        table.add("sample", text, f"{sampling.peak / GIB:.1f}", *(f"{time:.3g}" for time in each))
    text = f"{shape.rows} rows of {shape.tokens:,} tokens, {shape.targets:,} targets each"
    each = (guess["step"], guess["compute"], guess["memory"], guess["network"])
    table.add("update", text, f"{plan.peak / GIB:.1f}", *(f"{time:.3g}" for time in each))
    return table


def largest_table(largest: Sequence[Buffer], title: str = "Largest arrays that a step makes") -> Table:
    rows = [(f"{size / GIB:.2f}", array, source) for size, array, source in largest]
    return Table.of(("GiB", "array", "for"), rows, title=title, left=3)


def plan_json(plan: Plan) -> dict[str, Any]:
    """A plan as data; see PlanReport.to_json."""
    guess, compute, cost = estimate(plan), plan.compute, plan.cost
    same = [
        "mesh",
        "arguments",
        "temporaries",
        "peak",
        "usable",
        "fits",
        "traffic",
        "attention_traffic",
        "sent",
        "hidden",
    ]
    same += ["ideal_sent", "kernels"]
    return {
        "run": plan.name,
        "target": plan.cluster.name,
        "devices": plan.cluster.devices,
        "shape": plan.shape._asdict(),
        "attention": compute.attention,
        "remat": compute.remat,
        "compute_dtype": compute.dtype.name,
        **{name: getattr(plan, name) for name in same},
        "largest": [{"bytes": size, "array": array, "for": source} for size, array, source in plan.largest],
        "analytic_flops_of_all": plan.flops,
        "compiled_flops": plan.compiled_flops,
        "collectives": [asdict(collective) | {"sent": collective.sent} for collective in plan.collectives],
        "skipped_blocks": plan.skipped,
        "estimate": guess,
        "steps": cost.steps,
        "shapes": [shape._asdict() | {"steps": steps} for shape, steps in cost.shapes.items()] or None,
        "sampling": plan.sampling and asdict(plan.sampling),
        **cost.totals(plan.seconds, plan.cluster.devices),
    }


def remedies(remat: str) -> str:
    """What to try where a run with this remat policy does not fit."""
    first = "" if remat == "full" else "model.remat=full, "
    return (
        f"try {first}a larger train.accumulation, fewer rows (train.batch_size, or --rows if they are packed), shorter ones "
        "(data.max_seq_len) or more devices; --search finds what fits"
    )


def plan(
    config: Source,
    targets: str | Sequence[str],
    *,
    compare: Sequence[Sequence[str]] = (),
    rows: int | None = None,
    target_tokens: int | None = None,
    price: float | None = None,
    on_start: Callable[[str], object] = lambda _: None,
) -> PlanReport:
    """Compile a run's step for each target.

    Args:
        config: the run.
        targets: one or several clusters such as `a100-80gb:8`; see find_cluster.
        compare: overrides of the config; each is planned too, beside the run itself.
        rows: of the batch; default: of the run's largest batch where its data are local, else one for each example.
        target_tokens: target positions of a row; default: all of them.
        price: dollars for a device and hour.
        on_start: called with a message before each compilation.

    Raises:
        JaxguardError: an unknown target or field, or settings that cannot run on the target.
    """
    base = load(config)
    clusters = [find_cluster(text) for text in ([targets] if isinstance(targets, str) else targets)]
    variants = [(" ".join([base.name, *changes]), load(base, changes, stage="plan")) for changes in ((), *compare)]
    spec = find_spec(base.model)
    plans, refusals = [], []
    for cluster in clusters:
        for name, variant in variants:
            on_start(f"compiling {name} for {cluster.name} …")
            cost = run_cost(variant, cluster.devices, price)
            try:
                compiled = compile_step(variant, spec, cluster, rows, target_tokens, cost.largest)
            except OutOfMemoryError as error:
                reason = f"{error}; {remedies(variant.model.remat)}"
                refusals.append(Refusal(name, cluster.name, reason, error.largest))
                continue
            sampling = None
            try:
                sampling = compile_sampling(variant, spec, cluster)
            except OutOfMemoryError as error:
                reason = f"sampling: {error}; {SAMPLING_REMEDY}"
                refusals.append(Refusal(name, cluster.name, reason, error.largest))
            plans.append(replace(compiled, name=name, cost=cost, sampling=sampling))
    return PlanReport(plans, refusals)


@dataclass(frozen=True)
class SearchReport:
    """The result of a search: overrides of the config -> plan, None where no schedule fits, and the best, or the refusal."""

    candidates: Mapping[tuple[str, ...], Plan | None]
    best: PlanReport

    @property
    def ranking(self) -> list[tuple[tuple[str, ...], Plan]]:
        """The candidates that fit, the fastest first."""
        fitting = [(overrides, plan) for overrides, plan in self.candidates.items() if plan is not None and plan.fits]
        return sorted(fitting, key=lambda candidate: estimate(candidate[1])["step"])

    def table(self) -> Table:
        table = Table(("", "overrides", "peak, GiB", "step, s", "MFU"), left=2)
        for rank, (overrides, plan) in enumerate(self.ranking, 1):
            guess = estimate(plan)
            figures = (f"{plan.peak / GIB:.1f}", f"{guess['step']:.3g}", f"{guess['mfu']:.0%}")
            table.add(rank, " ".join(overrides), *figures)
        return table


def search(
    config: Source,
    target: str,
    *,
    rows: int | None = None,
    target_tokens: int | None = None,
    price: float | None = None,
    on_candidate: Callable[[str], object] = lambda _: None,
) -> SearchReport:
    """Compile meshes, accumulations and remat policies for a target.

    For each mesh and number of micro-batches, remat goes from none to full until one fits: the next would be slower. More
    micro-batches are tried as long as something had to be recomputed. Arguments and errors are those of `plan`; on_candidate is
    called with a line about each.
    """
    base, cluster = load(config), find_cluster(target)
    spec, batch_size = find_spec(base.model), base.train.batch_size
    candidates: dict[tuple[str, ...], Plan | None] = {}
    for mesh in meshes(spec, cluster, batch_size):
        rows_per_device = min(batch_size, rows or batch_size) // (mesh["data"] * mesh["fsdp"])
        for accumulation in (2**n for n in range(rows_per_device.bit_length())):
            for remat in REMAT:
                sizes = (f"mesh.{axis}={size}" for axis, size in mesh.items())
                overrides = (*sizes, f"model.remat={remat}", f"train.accumulation={accumulation}")
                figures, compiled = "", None
                try:
                    compiled = compile_step(load(base, overrides, stage="plan"), spec, cluster, rows, target_tokens)
                    figures = f"{compiled.peak / GIB:.1f} GiB, {estimate(compiled)['step']:.3g} s a step, "
                except OutOfMemoryError:
                    pass
                candidates[overrides] = compiled
                fits = compiled is not None and compiled.fits
                on_candidate(f"{' '.join(overrides)}: {figures}{'fits' if fits else 'does not fit'}")
                if fits:
                    break
            if fits and remat == REMAT[0]:
                break
    reason = (
        "no setting that was tried does; take more devices or those with more memory, fewer rows (train.batch_size) or shorter "
        "ones (data.max_seq_len)"
    )
    report = SearchReport(candidates, PlanReport(refusals=[Refusal(base.name, cluster.name, reason)]))
    for overrides, best in report.ranking[:1]:
        cost = run_cost(load(base, overrides), cluster.devices, price)
        report = replace(report, best=PlanReport([replace(best, cost=cost)]))
    return report


def meshes(spec: Spec, cluster: Cluster, batch_size: int) -> Iterator[dict[str, int]]:
    """Meshes that make sense: weights sharded over all devices, or over a host's with a copy on each; tensor up to eight.

    Rows are shared by data and fsdp, so these are no more than the batch has examples. `tensor` stays within a host or
    slice and divides the heads. Weights are never sharded over several slices.
    """
    devices, linked = cluster.devices, cluster.linked
    for tensor in (1, 2, 4, 8):
        if linked % tensor or spec.num_kv_heads % tensor or devices // tensor > batch_size:
            continue
        copies = {devices // linked} if cluster.slices > 1 else {1, devices // linked}
        for data in sorted(copies):
            yield {"data": data, "fsdp": devices // tensor // data, "tensor": tensor}
