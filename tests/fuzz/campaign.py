"""How long a campaign is: a seeded sample in `make test`, all of it in `make fuzz`."""

import os

FULL = os.environ.get("JAXGUARD_FUZZ") == "full"


def rounds(quick: int, full: int) -> int:
    """Return how many inputs to try: `full` under `make fuzz`, else `quick`."""
    return full if FULL else quick
