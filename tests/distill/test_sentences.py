"""Where sentences end."""

import pytest

from jaxguard.distill.filters import split_sentences


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("", []),
        (" \n ", []),
        ("...", []),
        ("One thought", ["One thought"]),
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ("Is it?! Yes… No.", ["Is it?!", "Yes…", "No."]),
        ('He said "stop." Then he left.', ['He said "stop."', "Then he left."]),
        (
            "Some harms, e.g. threats, vs. jokes, etc. are listed.",
            ["Some harms, e.g. threats, vs. jokes, etc. are listed."],
        ),
        ("Mr. J. Smith asks for version 2.5 of it.", ["Mr. J. Smith asks for version 2.5 of it."]),
        ("1. The prompt is rude.\n2. The answer is not.", ["1. The prompt is rude.", "2. The answer is not."]),
        ("- no full stop\n- nor here", ["- no full stop", "- nor here"]),
        ("A heading\n\nA paragraph.", ["A heading", "A paragraph."]),
        ("它有害。它无害。", ["它有害。", "它无害。"]),
        ("See example.com for it. Done.", ["See example.com for it.", "Done."]),
    ],
)
def test_sentences(text, sentences):
    assert split_sentences(text) == sentences
