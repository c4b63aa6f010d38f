"""What tests of the page share."""

import pytest
from page_examples import SETTINGS

from jaxguard.distill.page import write_store_page
from jaxguard.distill.store import open_traces


@pytest.fixture
def page(tmp_path):
    """page(attempts, settings, **options): the page of a store that holds them."""

    def write(attempts, settings=SETTINGS, **options):
        with open_traces(tmp_path / "store", settings, {}) as store:
            for attempt in attempts:
                store.append(attempt)
        write_store_page(tmp_path / "store", tmp_path / "page.html", **options)
        return tmp_path / "page.html"

    return write
