"""Which mesh, accumulation and remat policy to train with on a target: those that fit, the fastest first."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from jaxguard.config import Config
from jaxguard.models.spec import Spec
from jaxguard.plan.compile import OutOfMemoryError, Plan, compile_step
from jaxguard.plan.estimate import estimate
from jaxguard.plan.targets import Cluster

REMAT = ("none", "dots", "full")
"""From the fastest and largest to the slowest and smallest."""


@dataclass(frozen=True)
class Choice:
    """One way to train.

    Attributes:
        overrides: fields of the config, as a command line says them.
        plan: None where the compiler found no schedule that fits.
    """

    overrides: tuple[str, ...]
    plan: Plan | None

    @property
    def fits(self) -> bool:
        return self.plan is not None and self.plan.fits


def search(
    vary: Callable[[tuple[str, ...]], Config],
    spec: Spec,
    cluster: Cluster,
    rows: int | None,
    targets: int | None,
    tell: Callable[[Choice], None],
) -> list[Choice]:
    """Compile what could be the best; `tell` hears of each as soon as it is known.

    For each mesh and number of micro-batches, remat from none to full until one fits: what comes after it is slower. More
    micro-batches are tried as long as something had to be computed twice.

    Args:
        vary: the run with these overrides.
        spec: shape of the model.
        cluster: what to compile for.
        rows: of the batch; None for one of each example.
        targets: target positions of a row; None for the most there can be.
        tell: for progress.

    Returns:
        those that fit, the fastest first.
    """
    batch_size = vary(()).train.batch_size
    found: list[Choice] = []
    for mesh in meshes(spec, cluster, batch_size):
        for accumulation in _doubling(min(batch_size, rows or batch_size) // (mesh["data"] * mesh["fsdp"])):
            for remat in REMAT:
                overrides = (
                    *(f"mesh.{axis}={size}" for axis, size in mesh.items()),
                    f"model.remat={remat}",
                    f"train.accumulation={accumulation}",
                )
                choice = Choice(overrides, _plan(vary(overrides), spec, cluster, rows, targets))
                tell(choice)
                found.append(choice)
                if choice.fits:
                    break
            if choice.fits and remat == REMAT[0]:
                break
    return ranked(found)


def _doubling(most: int) -> Iterator[int]:
    """1, 2, 4 … up to `most`."""
    yield from (2**n for n in range(most.bit_length()))


def ranked(found: list[Choice]) -> list[Choice]:
    """Those that fit, the fastest first."""
    timed = [(estimate(choice.plan).step, choice) for choice in found if choice.plan is not None and choice.fits]
    return [choice for _, choice in sorted(timed, key=lambda pair: pair[0])]


def meshes(spec: Spec, cluster: Cluster, batch_size: int) -> Iterator[dict[str, int]]:
    """Meshes that make sense: weights cut over all devices, or over a host's and copied over hosts; heads cut in up to eight.

    Rows are shared out over data and fsdp, so these are no more than the batch has examples; heads are cut only within a
    host or slice, evenly. Weights are never cut over several slices.
    """
    devices, linked = cluster.devices, cluster.linked
    for tensor in (1, 2, 4, 8):
        if linked % tensor or spec.num_kv_heads % tensor or devices // tensor > batch_size:
            continue
        copies = {devices // linked} if cluster.slices > 1 else {1, devices // linked}
        for data in sorted(copies):
            yield {"data": data, "fsdp": devices // tensor // data, "tensor": tensor}


def _plan(config: Config, spec: Spec, cluster: Cluster, rows: int | None, targets: int | None) -> Plan | None:
    try:
        return compile_step(config, spec, cluster, rows, targets)
    except OutOfMemoryError:
        return None
