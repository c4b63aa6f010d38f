"""The formats under attack; and no campaign takes more than the bar of memory."""

from collections.abc import Iterator

import pytest
from campaign import FULL, MEMORY, peak
from external_templates import GUARDS, guard_tokenizer

from jaxguard.data.policies import Policy
from jaxguard.guards.formats.external import external_format


@pytest.fixture(autouse=True, scope="module")
def _bounded_memory() -> Iterator[None]:
    """All of it in `make fuzz`; else what a module adds, since other tests run in the same process."""
    before = 0 if FULL else peak()
    yield
    assert peak() - before < MEMORY, f"a campaign took {peak() >> 20} MiB"


@pytest.fixture(scope="module")
def form(tiny_tokenizer_folder):
    """form[kind]: the format of a guard."""
    return {
        kind: external_format(kind, guard_tokenizer(tiny_tokenizer_folder, kind), Policy("wildguard", rules="Be kind."))
        for kind in GUARDS
    }
