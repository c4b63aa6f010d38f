"""Where sentences end, for sentence budgets."""

import re

_END = re.compile(
    r"""[.!?\u2026]+["'\u201d\u2019)\]*_]*(?=\s|$)"""
    r"|[\u3002\uff01\uff1f]+"
    r"|\n\s*\n"
    r"|\n(?=\s*(?:[-*\u2022]|\d{1,2}[.)])\s)"
)
_ABBREVIATION = re.compile(
    r"(?:\b(?:e\.g|i\.e|etc|vs|cf|mr|mrs|ms|dr|prof|st|no|u\.s|approx)|(?:^|\s)[A-Za-z]|^\s*\d{1,2})\.$", re.IGNORECASE
)
_WORD = re.compile(r"\w")


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, without outer white space; a list item and a paragraph end one too.

    A full stop after an abbreviation, an initial or an item's number ends none. What holds no letter or digit is none.
    """
    sentences, start = [], 0
    for end in _END.finditer(text):
        sentence = text[start : end.end()]
        if end[0] == "." and _ABBREVIATION.search(sentence):
            continue
        sentences.append(sentence.strip())
        start = end.end()
    return [sentence for sentence in [*sentences, text[start:].strip()] if _WORD.search(sentence)]
