"""Threads that work ahead, and code that must not run in an event loop."""

import asyncio
import ctypes
import logging
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

from jaxguard.utils.errors import where

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")


class LoopThread:
    """An event loop in a thread of its own: its work goes on beside a script's, or that of a running loop such as a notebook's."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(_unexpected)
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    @property
    def closed(self) -> bool:
        return self._loop.is_closed()

    def submit(self, work: Coroutine[Any, Any, Result]) -> Future[Result]:
        """Start work; it must not be closed."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def settle(self) -> None:
        """Wait until the thread is free: what was cancelled ends only where it next waits for something."""
        await asyncio.wrap_future(self.submit(asyncio.sleep(0)))

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _unexpected(_: asyncio.AbstractEventLoop, context: Mapping[str, Any]) -> None:
    """Log an error that nobody waited for, without its message: a text may be in it."""
    logger.error("unexpected: %s", where(context.get("exception") or RuntimeError()))


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
    """Call `work`, which starts an event loop: in a thread of its own if one is running here, as in a notebook.

    Interrupting the kernel interrupts `work` too, as soon as it runs Python code again.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return work()
    threads = list[int]()

    def noted() -> Result:
        threads.append(threading.get_ident())
        try:
            return work()
        finally:
            threads.clear()

    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(noted)
        try:
            return future.result()
        except KeyboardInterrupt:
            for ident in threads:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(KeyboardInterrupt))
            raise
