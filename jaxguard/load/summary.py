"""What outcomes say: percentiles, goodput, refusals, and whether the client was quick enough to measure them."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from jaxguard.load.client import Outcome

QUANTILES: Final = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "p99.9": 0.999}
HELD: Final = 0.95
"""Share of requests with a verdict within the SLO at which a rate is held."""
MOST_LATE: Final = 0.005
"""Seconds by which the client may be late at p99, or a tenth of the latency if that is more."""
REFUSED: Final = (429, 503)
QUICK: Final = 0.02
"""Seconds in which a refusal should be there."""
_BLOCKS, _RESAMPLES = 10, 200


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """p50 to p99.9 by nearest rank; None where fewer than one value lies above."""
    ordered, n = sorted(values), len(values)
    return {
        name: ordered[math.ceil(q * n) - 1] if n * (1 - q) > 1 - 1e-9 or (q == 0.5 and n) else None
        for name, q in QUANTILES.items()
    }


def interval(outcomes: Sequence[Outcome], quantile: float, seed: int = 0) -> tuple[float, float] | None:
    """95 % interval of a percentile of latency: a bootstrap of a tenth of the phase each, since neighbours wait together."""
    blocks = [block for block in np.array_split([each.latency for each in outcomes], _BLOCKS) if len(block)]
    if len(blocks) < _BLOCKS:
        return None
    random = np.random.default_rng(seed)
    picks = random.integers(_BLOCKS, size=(_RESAMPLES, _BLOCKS))
    drawn = [np.quantile(np.concatenate([blocks[i] for i in pick]), quantile, method="inverted_cdf") for pick in picks]
    low, high = np.quantile(drawn, (0.025, 0.975)).tolist()
    return low, high


def summarize(outcomes: Sequence[Outcome], seconds: float, slo: float, price: float | None = None) -> dict[str, Any]:
    """Summarize a phase.

    Args:
        outcomes: of its requests.
        seconds: that they were scheduled over.
        slo: seconds in which a verdict is of use.
        price: of the machine an hour, for the cost of a million verdicts within the SLO.
    """
    answered = [each for each in outcomes if each.answer]
    refused = [each for each in outcomes if each.status in REFUSED]
    good = [each for each in answered if each.latency <= slo]
    labelled = [each for each in outcomes if each.labels]
    lacking = len(outcomes) - len(answered)
    latency = percentiles([each.latency for each in outcomes])
    late = [each.sent - each.at for each in outcomes if each.sent is not None]
    not_sent = len(outcomes) - len(late)
    lateness = percentiles(late)["p99"] or max(late, default=0.0)
    allowed = max(MOST_LATE, (latency["p99"] or latency["p50"] or 0.0) / 10)
    usage, stages = (
        {name: float(np.mean([each.answer.get(part, {}).get(name, 0) for each in answered])) for name in names}
        if (names := sorted({name for each in answered for name in each.answer.get(part, {})}))
        else {}
        for part in ("usage", "seconds")
    )
    end = max((each.done for each in outcomes), default=0.0)
    return {
        "requests": len(outcomes),
        "seconds": seconds,
        "scheduled_per_second": len(outcomes) / seconds,
        "answered_per_second": len(answered) / max(seconds, end),
        "goodput_per_second": len(good) / seconds,
        "goodput_share": _ratio(len(good), len(outcomes)),
        "latency": latency,
        "latency_intervals": {name: interval(outcomes, QUANTILES[name]) for name in ("p50", "p95", "p99")},
        "latency_of_verdicts": percentiles([each.latency for each in answered]),
        "seconds_to_refuse": percentiles([each.latency for each in refused]),
        "refused_share": _ratio(len(refused), len(outcomes)),
        "refused_quickly_share": _ratio(sum(each.latency <= QUICK for each in refused), lacking),
        "statuses": {str(status): count for status, count in sorted(Counter(each.status for each in outcomes).items())},
        "malformed": sum(each.status == 200 for each in outcomes) - len(answered),
        "repeated_ids": len(answered) - len({each.answer["id"] for each in answered}),
        "labelled": len(labelled),
        "accuracy": _ratio(sum(each.right for each in labelled), sum(bool(each.answer) for each in labelled)),
        "accuracy_within_slo": _ratio(sum(each.right and each.latency <= slo for each in labelled), len(labelled)),
        "seconds_of_verdicts": stages,
        "tokens_of_verdicts": usage,
        "cost_of_a_million": None if price is None or not good else price / 3600 * seconds / len(good) * 1e6,
        "lateness": percentiles(late),
        "not_sent": not_sent,
        "void": f"{not_sent} requests were not sent: too many were under way"
        if not_sent
        else f"the client itself was late: {1000 * lateness:.0f} ms at p99"
        if lateness > allowed
        else "",
    }


def knee(steps: Sequence[tuple[float, float]]) -> tuple[float | None, bool]:
    """The rate at which the share of verdicts within the SLO falls below HELD, and whether it was seen to fall.

    `steps` are (rate, share). Between the last rate that held and the first that did not, the share is taken to be linear.
    None: the lowest rate was not held. Where none fell, it is the highest one, a lower bound.
    """
    last: tuple[float, float] | None = None
    for rate, share in sorted(steps):
        if share >= HELD:
            last = rate, share
        else:
            return (last and last[0] + (rate - last[0]) * (last[1] - HELD) / (last[1] - share)), True
    return last and last[0], False


def _ratio(count: int, of: int) -> float | None:
    return count / of if of else None
