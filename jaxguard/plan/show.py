"""A plan for people, in the terminal, and for programs, as JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from jaxguard.config.hardware import GIB
from jaxguard.plan.compile import Plan
from jaxguard.plan.estimate import ASSUMPTIONS, estimate, rate
from jaxguard.plan.search import Choice
from jaxguard.plan.targets import Cluster
from jaxguard.plan.work import Work

SMALL = 0.005
"""Collectives that send a smaller share of all bytes are one line."""


Planned = tuple[Plan, Work]


@dataclass(frozen=True)
class Refused:
    """A run that does not fit.

    Attributes:
        name: of the run.
        target: of the cluster.
        why: and what to do.
        largest: arrays, as Plan has them.
    """

    name: str
    target: str
    why: str
    largest: Sequence[tuple[int, str, str]] = ()


def show(planned: Sequence[Planned], refused: Sequence[Refused] = ()) -> RenderableType:
    """Everything that is known of one plan; of several, what differs, side by side; last what does not fit, and why."""
    parts: list[RenderableType] = []
    if planned:
        parts.append(_side_by_side(planned))
    if len(planned) == 1:
        parts.append(_collectives(planned[0][0]))
    if planned:
        parts.append(f"[dim]Estimate: {ASSUMPTIONS}.[/]")
    for one in [*(_too_large(plan) for plan, _ in planned if not plan.fits), *refused]:
        if one.largest:
            parts.append(_largest(one))
        parts.append(Text(f"{one.name} on {one.target} does not fit: {one.why}", "bold red"))
    return Group(*parts)


def _too_large(plan: Plan) -> Refused:
    """A plan that was compiled, but whose peak is above what is usable."""
    much = f"it needs {plan.peak / GIB:.2f} GiB of {plan.usable / GIB:.1f} usable; "
    state = plan.arguments / GIB if plan.arguments > plan.usable else None
    return Refused(plan.name, plan.cluster.name, much + remedies(plan.compute.remat, state), plan.largest)


def remedies(remat: str, state: float | None = None) -> str:
    """What to try where a run does not fit.

    Args:
        remat: the policy that it had.
        state: GiB of its state and batch, if they are too much already.
    """
    if state is not None:
        return (
            f"its state and batch alone are {state:.2f} GiB: take more devices or those with more memory, "
            "and cut the weights over all of them (mesh.fsdp=-1)"
        )
    first = "" if remat == "full" else "model.remat=full, "
    return (
        f"try {first}a larger train.accumulation, fewer rows (train.batch_size, or --rows if they are packed), shorter ones "
        "(data.max_seq_len) or more devices; --search finds what fits"
    )


def _side_by_side(planned: Sequence[Planned]) -> Table:
    columns = [facts(plan, work) for plan, work in planned]
    table = Table("", *(Column(Text(plan.name)) for plan, _ in planned))
    for fact in columns[0]:
        cells = [column[fact] for column in columns]
        table.add_row(fact, *cells)
    return table


def facts(plan: Plan, work: Work) -> dict[str, str]:
    """What a reader wants to know first, in words; the verdict on memory is in rich's markup."""
    guess, target, slices = estimate(plan), plan.cluster.target, plan.cluster.slices
    compiled, counted = plan.matmul_flops + plan.kernel_flops, plan.flops.total / plan.cluster.devices
    return {
        "target": f"{plan.cluster.devices} × {target.title}" + (f", {slices} slices" if slices > 1 else ""),
        "mesh": " × ".join(f"{axis} {size}" for axis, size in plan.mesh.items()),
        "batch": f"{plan.shape.rows} rows of {plan.shape.tokens:,} tokens, {plan.shape.targets:,} targets each",
        "computes": f"{plan.compute.attention} attention, remat {plan.compute.remat}, {plan.compute.dtype.name}",
        "state and batch": f"{plan.arguments / GIB:.2f} GiB a device",
        "temporaries": f"{plan.temporaries / GIB:.2f} GiB",
        "peak": f"{plan.peak / GIB:.2f} GiB of {plan.usable / GIB:.1f} usable: {verdict(plan)}",
        "FLOPs": f"{compiled / 1e12:,.1f} T a device, {share(compiled, counted)} of the count",
        "memory traffic": f"{plan.traffic / GIB:,.0f} GiB a device",
        "sent": f"{plan.sent / GIB:,.2f} GiB a device, {share(plan.sent, plan.ideal_sent)} of the ideal",
        "vendor kernels": ", ".join(f"{count:g} {name}" for name, count in sorted(plan.kernels.items())) or "none",
        "update": f"{guess.step:.3g} s, no less than {guess.bound:.3g}",
        "… products": f"{guess.compute:.3g} s",
        "… memory": f"{guess.memory:.3g} s",
        "… network": f"{guess.network:.3g} s",
        "MFU": f"{guess.mfu:.0%}",
        "whole run": work.said(guess.step, plan.cluster.devices),
        "programs": work.programs,
        "compiled in": f"{plan.seconds:.0f} s",
    }


def verdict(plan: Plan) -> str:
    """Whether it fits, in colour."""
    return "[green]fits[/]" if plan.fits else "[red]does not fit[/]"


def share(part: float, whole: float) -> str:
    """`0.98`, or a dash where there is nothing to compare with."""
    return f"{part / whole:.2f}" if whole else "-"


def _collectives(plan: Plan) -> Table:
    table = Table(
        "collective", "axis", "devices", "MiB", "times", "sent, GiB", "s", "for", title="What devices exchange"
    )
    rest = [one for one in plan.collectives if one.sent < SMALL * plan.sent]
    for one in plan.collectives[: len(plan.collectives) - len(rest)]:
        table.add_row(
            one.kind, one.axes, str(one.group), f"{one.size / 2**20:,.1f}", f"{one.count:g}", f"{one.sent / GIB:.2f}",
            f"{one.sent / rate(plan.cluster.target, one):.3f}", one.source,
        )  # fmt: skip
    if rest:
        table.add_row(f"{len(rest)} smaller", "", "", "", "", f"{sum(one.sent for one in rest) / GIB:.2f}", "", "")
    return table


def _largest(one: Refused) -> Table:
    table = Table("GiB", "array", "for", title=Text(f"The largest arrays of {one.name} on {one.target}"))
    for size, array, source in one.largest:
        table.add_row(f"{size / GIB:.2f}", Text(array), Text(source))
    return table


def as_json(planned: Sequence[Planned], refused: Sequence[Refused] = ()) -> list[dict[str, Any]]:
    """Plans as data; bytes, FLOPs and seconds are of one device and one update unless their name says otherwise.

    What was refused has `error` in place of figures.
    """
    return [
        {
            "run": plan.name,
            "target": plan.cluster.name,
            "devices": plan.cluster.devices,
            "shape": plan.shape._asdict(),
            "mesh": plan.mesh,
            "attention": plan.compute.attention,
            "remat": plan.compute.remat,
            "compute_dtype": plan.compute.dtype.name,
            "arguments": plan.arguments,
            "temporaries": plan.temporaries,
            "peak": plan.peak,
            "usable": plan.usable,
            "fits": plan.fits,
            "largest": [{"bytes": size, "array": array, "for": source} for size, array, source in plan.largest],
            "counted_flops_of_all": asdict(plan.flops),
            "compiled_flops": plan.matmul_flops + plan.kernel_flops,
            "traffic": plan.traffic,
            "collectives": [asdict(one) | {"sent": one.sent} for one in plan.collectives],
            "sent": plan.sent,
            "ideal_sent": plan.ideal_sent,
            "kernels": plan.kernels,
            "estimate": asdict(estimate(plan)) | {"step": estimate(plan).step, "bound": estimate(plan).bound},
            "updates": work.updates,
            "shapes": None if work.shapes is None else [s._asdict() | {"updates": n} for s, n in work.shapes.items()],
            "hours": work.hours(estimate(plan).step),
            "dollars": work.dollars(estimate(plan).step, plan.cluster.devices),
            "compile_seconds": plan.seconds,
        }
        for plan, work in planned
    ] + [{"run": one.name, "target": one.target, "fits": False, "error": one.why} for one in refused]


def line(choice: Choice) -> str:
    """One choice of a search, as it becomes known."""
    said = "does not fit" if choice.plan is None else _told(choice.plan)
    return f"{' '.join(choice.overrides)}: {said}"


def _told(plan: Plan) -> str:
    return f"{plan.peak / GIB:.1f} GiB, {estimate(plan).step:.3g} s an update, {verdict(plan)}"


def ranking(name: str, cluster: Cluster, best: Sequence[Choice]) -> Table:
    """What a search found, the fastest first."""
    table = Table("", "overrides", "peak, GiB", "update, s", "MFU", title=f"{name} on {cluster.name}")
    for place, choice in enumerate(best, 1):
        if choice.plan is not None:
            found = estimate(choice.plan)
            peak, step, mfu = f"{choice.plan.peak / GIB:.1f}", f"{found.step:.3g}", f"{found.mfu:.0%}"
            table.add_row(str(place), " ".join(choice.overrides), peak, step, mfu)
    return table
