"""How many requests may be under way at once: as many as the server bears."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager


class Limiter:
    """Additive increase, multiplicative decrease, as TCP shares a line.

    A sign of overload halves the limit; requests that began before a cut do not cut again, since one burst of refusals is
    one sign. Until the first cut every answer raises the limit by one; from then on it takes a limit's worth of answers.

    Attributes:
        limit: requests that may be under way, a fraction counting as none.
        active: requests that are.
    """

    def __init__(self, start: int, most: int) -> None:
        self.limit = float(min(start, most))
        self.active = 0
        self._most = most
        self._cuts = 0
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[Callable[[], None]]:
        """Wait for room and hold it; the value is to be called when the server shows overload."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.active < int(self.limit))
            self.active += 1
        cuts, overloaded = self._cuts, False

        def overload() -> None:
            nonlocal overloaded
            overloaded = True
            if cuts == self._cuts:
                self._cuts += 1
                self.limit = max(1.0, self.limit / 2)

        try:
            yield overload
            if not overloaded:
                self.limit = min(self._most, self.limit + (1 / self.limit if self._cuts else 1))
        finally:
            self.active -= 1
            async with self._changed:
                self._changed.notify_all()
