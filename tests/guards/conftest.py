"""What the tests of guards share."""

import pytest
from external_examples import FIXED, GENERAL, HOUSE
from external_templates import guard_tokenizer
from fake_guard import guard, run

from jaxguard.guards.formats.external import external_format

__all__ = ["form", "guard", "run"]


@pytest.fixture(scope="module")
def form(tiny_tokenizer_folder):
    """form(kind, policy=None, template=None): that guard's format, by a policy that it takes."""
    made = {}

    def make(kind, policy=None, template=None):
        key = (kind, policy, template)
        if key not in made:
            tokenizer = guard_tokenizer(tiny_tokenizer_folder, kind, template)
            made[key] = external_format(kind, tokenizer, policy or (GENERAL if kind in FIXED else HOUSE))
        return made[key]

    return make
