"""Writes of several callers as one: what comes while the store is busy goes into the next write together.

Guarantees: a caller hears of its own rows alone, once they are stored or refused; what a write raises, all of its
callers get. A store that is quick gets each write at once; one that is slow gets fewer and larger ones, since a
transaction costs the same for one row as for a hundred.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

from agents.stores.base import BadRow, Row

__all__ = ["GatheredWrites"]

Write = Callable[[Sequence[Row]], Awaitable[list[BadRow]]]


class GatheredWrites:
    """Puts up to ``limit_rows`` rows of waiting callers into one call of ``write``; ``writers`` calls at a time."""

    def __init__(self, write: Write, limit_rows: int, writers: int = 1) -> None:
        self._write = write
        self._limit_rows = limit_rows
        self._writers = writers
        self._waiting: deque[tuple[Sequence[Row], asyncio.Future[list[BadRow]]]] = deque()
        self._running: set[asyncio.Task[None]] = set()

    async def __call__(self, rows: Sequence[Row]) -> list[BadRow]:
        """Store ``rows``; return those that can never be stored. Raises what the write raises."""
        future: asyncio.Future[list[BadRow]] = asyncio.get_running_loop().create_future()
        self._waiting.append((rows, future))
        if len(self._running) < self._writers:
            task = asyncio.create_task(self._run())
            self._running.add(task)
            task.add_done_callback(self._running.discard)
        return await future

    async def _run(self) -> None:
        try:
            await self._write_waiting()
        finally:
            # Here and not with the callback, which comes a turn of the loop later: who calls in between would wait for
            # a writer that has gone.
            self._running.discard(asyncio.current_task())  # type: ignore[arg-type]

    async def _write_waiting(self) -> None:
        while self._waiting:
            together = [self._waiting.popleft()]
            count = len(together[0][0])
            while self._waiting and count + len(self._waiting[0][0]) <= self._limit_rows:
                together.append(self._waiting.popleft())
                count += len(together[-1][0])
            try:
                refused = await self._write([row for rows, _ in together for row in rows])
            except Exception as exc:
                for _, future in together:
                    if not future.done():
                        future.set_exception(exc)
            else:
                for rows, future in together:
                    if not future.done():
                        mine = {id(row) for row in rows} if refused else ()
                        future.set_result([entry for entry in refused if id(entry.row) in mine])
