"""What tests of the page share."""

import json

import pytest
from page_examples import SETTINGS

from jaxguard.distill.page import write_page
from jaxguard.distill.store import open_store


@pytest.fixture
def page(tmp_path):
    """page(attempts, settings, **options): the page of a store that holds them."""

    def write(attempts, settings=SETTINGS, **options):
        with open_store(tmp_path / "store", SETTINGS) as store:
            for attempt in attempts:
                store.append(attempt)
        (tmp_path / "store/store.json").write_text(json.dumps(settings))
        write_page(tmp_path / "store", tmp_path / "page.html", **options)
        return tmp_path / "page.html"

    return write
