"""Plan a run: compile its step for targets, compare settings, and search for the fastest that fit."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from jaxguard.config import Source, load
from jaxguard.config.hardware import GIB
from jaxguard.models.spec import Spec
from jaxguard.plan.compile import OutOfMemoryError, Plan, compile_step, find_spec
from jaxguard.plan.estimate import estimate, run_cost
from jaxguard.plan.report import PlanReport, Refusal, remedies
from jaxguard.plan.targets import Cluster, find_cluster
from jaxguard.report import Table

REMAT = ("none", "dots", "full")
"""From the fastest and largest to the slowest and smallest."""
NOTHING_FITS = (
    "no setting that was tried does; take more devices or those with more memory, fewer rows (train.batch_size) or shorter "
    "ones (data.max_seq_len)"
)


def plan(
    config: Source,
    targets: Sequence[str],
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
        targets: clusters such as `a100-80gb:8`; see find_cluster.
        compare: overrides of the config; each is planned too, beside the run itself.
        rows: of the batch; default: of the run's largest batch where its data are local, else one for each example.
        target_tokens: target positions of a row; default: all of them.
        price: dollars for a device and hour.
        on_start: called with a message before each compilation.

    Raises:
        JaxguardError: an unknown target or field, or settings that cannot run on the target.
    """
    base = load(config)
    clusters = [find_cluster(text) for text in targets]
    variants = [(" ".join([base.name, *changes]), load(base, changes, stage="plan")) for changes in ((), *compare)]
    spec = find_spec(base.model)
    plans, refusals = [], []
    for cluster in clusters:
        for name, variant in variants:
            on_start(f"compiling {name} for {cluster.name} …")
            cost = run_cost(variant, cluster.devices, price)
            try:
                compiled = compile_step(variant, spec, cluster, rows, target_tokens, cost.largest)
                plans.append(replace(compiled, name=name, cost=cost))
            except OutOfMemoryError as error:
                reason = f"{error}; {remedies(variant.model.remat)}"
                refusals.append(Refusal(name, cluster.name, reason, error.largest))
    return PlanReport(plans, refusals)


@dataclass(frozen=True)
class SearchReport:
    """The result of a search.

    Attributes:
        candidates: overrides of the config -> the plan, in order; None where the compiler found no schedule that fits.
        best: the plan of the fastest that fits, or the refusal.
    """

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
            table.add(
                rank, " ".join(overrides), f"{plan.peak / GIB:.1f}", f"{guess['step']:.3g}", f"{guess['mfu']:.0%}"
            )
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
    report = SearchReport(candidates, PlanReport(refusals=[Refusal(base.name, cluster.name, NOTHING_FITS)]))
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
