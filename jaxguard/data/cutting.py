"""Truncate untrusted text to a number of tokens."""

from typing import Final

MIN_KEPT: Final = 16
"""Least tokens of a prompt, and of a response, that truncation leaves."""
CUT_MARK: Final = "\n[... the middle is left out ...]\n"
LONGEST_TOKEN: Final = 64
"""Characters of a token. Texts longer than this times max_seq_len are cut before tokenization, which bounds time and memory."""


def shortened(text: str, most: int) -> str:
    """Cut the middle out of a text of more than `most` characters."""
    return text if len(text) <= most else text[: most // 2] + CUT_MARK + text[-(most // 2) :]


def share(counts: list[int], keep: int) -> int:
    """Return the largest limit with sum(min(count, limit)) <= keep: the longest text is cut first."""
    return keep if len(counts) == 1 else max(keep // 2, keep - min(counts))


def cut(text: str, spans: list[tuple[int, int]], limit: int) -> str:
    """Cut the middle out of a text, so that `limit` tokens are left; `spans` are its tokens' character spans."""
    if len(spans) <= limit:
        return text
    first, last = (limit + 1) // 2, limit // 2
    return text[: spans[first - 1][1]] + CUT_MARK + text[spans[-last][0] :]
