"""Cutting untrusted text to a number of tokens."""

from typing import Final

MIN_KEPT: Final = 16
"""Tokens of a prompt, and of a response, that cutting leaves; an example with less to judge would teach nothing."""
CUT_MARK: Final = "\n[... the middle is left out ...]\n"
LONGEST_TOKEN: Final = 64
"""Characters. Longer texts than this times the row are cut before they are tokenised, which bounds time and memory."""


def shortened(text: str, most: int) -> str:
    """At most about `most` characters of a text: its head and its tail."""
    return text if len(text) <= most else text[: most // 2] + CUT_MARK + text[-(most // 2) :]


def share(counts: list[int], keep: int) -> int:
    """The largest limit with sum(min(count, limit)) <= keep: the longest text gives first."""
    return keep if len(counts) == 1 else max(keep // 2, keep - min(counts))


def cut(text: str, spans: list[tuple[int, int]], limit: int) -> str:
    """Head and tail of a text, `limit` tokens together, around a mark; `spans` are its tokens' character spans."""
    if len(spans) <= limit:
        return text
    head, tail = (limit + 1) // 2, limit // 2
    return text[: spans[head - 1][1]] + CUT_MARK + text[spans[-tail][0] :]
