"""How the report writes numbers, and texts that nobody trusts."""

from typing import NamedTuple

from jaxguard.evaluate.scores.comparison import Difference
from jaxguard.report.markdown import plain
from jaxguard.utils.statistics import Estimate

ABSENT = "n/a"
"""What is not defined."""
DASH = "–"
"""What was not judged."""


class Shown(NamedTuple):
    """What a cell says, and in smaller letters what belongs to it."""

    text: str
    more: str = ""


def cut(text: str, most: int, rest: str = "") -> tuple[str, int]:
    """The beginning of a text, and how many characters are left out."""
    return (text, 0) if len(text) <= most else (text[:most].rstrip() + rest, len(text) - most)


def short(text: object, most: int = 40) -> str:
    """A name on one line that does not burst a diagram."""
    return cut(plain(text), most - 1, "…")[0]


def number(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.3f}"


def share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else ABSENT


def interval(low: float | None, high: float | None, *, difference: bool = False) -> str:
    if low is None or high is None:
        return ""
    return f"[{signed(low)}, {signed(high)}]" if difference else f"[{low:.3f}, {high:.3f}]"


def estimate(found: Estimate | None, deviation: bool = False) -> Shown:
    """A score with its interval, and how far generations deviate."""
    if found is None or found.value is None:
        return Shown(ABSENT)
    spread = f"± {found.deviation:.3f}" if deviation and found.deviation is not None else ""
    return Shown(number(found.value), " ".join(filter(None, (interval(found.low, found.high), spread))))


def difference(found: Difference | None) -> Shown:
    """A difference with its interval and p."""
    if found is None or found.value is None:
        return Shown(ABSENT)
    parts = (interval(found.low, found.high, difference=True), "" if found.p is None else probability(found.p))
    return Shown(signed(found.value), " ".join(filter(None, parts)))


def signed(value: float) -> str:
    return f"{round(value, 3) + 0.0:+.3f}"  # no -0.000


def probability(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def seconds(value: float) -> str:
    """Seconds with two or three digits that say something."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
