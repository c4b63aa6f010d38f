"""How long a campaign is: a seeded sample in `make test`, all of it in `make fuzz`."""

import os
import resource

FULL = os.environ.get("JAXGUARD_FUZZ") == "full"
MEMORY = 2 * 2**30
"""Bytes that this process, or one that it started, may take; the weights of the campaigns are tiny."""


def peak() -> int:
    """Return the most bytes that this process or one that it has waited for ever held."""
    return 1024 * max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def rounds(quick: int, full: int) -> int:
    """Return how many inputs to try: `full` under `make fuzz`, else `quick`."""
    return full if FULL else quick
