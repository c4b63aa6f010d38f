"""Pages that are one file: what their templates have in common."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def page_template(path: Path, **filters: Callable[..., Any]) -> Template:
    """A Jinja template in which every value is escaped, and one that is missing is an error."""
    environment = Environment(
        loader=FileSystemLoader(path.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)
    return environment.get_template(path.name)


def svg(figure: "Figure") -> str:
    """A matplotlib figure as an element of a page, the same for the same figure; its texts can be searched and read aloud."""
    from matplotlib import rc_context  # doors without a page need not load it

    drawn = io.StringIO()
    with rc_context({"svg.fonttype": "none"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue()[drawn.getvalue().index("<svg") :]
