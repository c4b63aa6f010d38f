"""Threads that work ahead, and code that must not run in an event loop."""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_turn(work: Callable[[Item], Result], items: Iterable[Item], threads: int, ahead: int) -> Iterator[Result]:
    """`work` of each item, in their order; threads compute up to `ahead` results before they are used."""
    following = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        under_way = deque(pool.submit(work, item) for item in islice(following, ahead))
        while under_way:
            done = under_way.popleft().result()
            under_way.extend(pool.submit(work, item) for item in islice(following, 1))
            yield done


def outside_event_loop(work: Callable[[], Result]) -> Result:
    """Call `work`, which starts an event loop: in a thread of its own if one is running here, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return work()
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()
