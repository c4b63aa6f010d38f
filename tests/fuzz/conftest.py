"""No campaign takes more than the bar of memory."""

from collections.abc import Iterator

import pytest
from campaign import FULL, MEMORY, peak


@pytest.fixture(autouse=True, scope="module")
def _bounded_memory() -> Iterator[None]:
    """All of it in `make fuzz`; else what a module adds, since other tests run in the same process."""
    before = 0 if FULL else peak()
    yield
    assert peak() - before < MEMORY, f"a campaign took {peak() >> 20} MiB"
