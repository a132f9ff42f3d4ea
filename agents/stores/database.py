"""A pool of PostgreSQL connections in which no call waits for ever.

- Nothing connects before the first call; a connection that died is replaced by the next call.
- Each piece of work has one deadline, from taking the connection to COMMIT. A connection whose work did not end
  cleanly (deadline, cancellation, lost socket) is thrown away, never handed to the next one. The server's
  ``statement_timeout`` is shorter, so that a slow statement is normally ended by the server, with an error that says
  so.
- The schema is brought up to date once per store, before its first work, and again after the server has said that a
  table is missing (a database restored or made anew while we run).
- What only these items can be blamed for is :class:`ItemsRefused`; all else is the library's own exception.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

import asyncpg
from asyncpg.exceptions import _base as asyncpg_base

from agents.stores.base import BadRow
from agents.stores.migrate import is_current, migrate

__all__ = ["Connection", "Database", "ItemsRefused"]

logger = logging.getLogger(__name__)

Connection = Any  # asyncpg's pool hands out proxies that its stubs do not call Connection
Item = TypeVar("Item")

# Classes of SQLSTATE (PostgreSQL manual, appendix A) that blame the data: 22 data exception, 23 integrity constraint,
# 54 program limit (a key too long for an index).
_REFUSED_SQLSTATES = ("22", "23", "54")
# Undefined table, undefined column, undefined schema: what a database made anew answers.
_SCHEMA_GONE = ("42P01", "42703", "3F000")
# A migration may go through a large table, and others may have to wait for it.
_MIGRATION_SECONDS = 600.0


class ItemsRefused(Exception):
    """PostgreSQL, or the encoder of its wire format, refused at least one of the items; ``reason`` is its exception."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(str(reason))
        self.reason = reason


def blames_items(exc: BaseException) -> bool:
    """Return whether ``exc`` can only be cured by leaving out an item."""
    if isinstance(exc, asyncpg.PostgresError):
        return (exc.sqlstate or "").startswith(_REFUSED_SQLSTATES)
    if isinstance(exc, asyncpg.InterfaceError):
        return isinstance(exc, asyncpg_base.DataError)
    return isinstance(exc, ValueError | OverflowError)


class Database:
    """Connections to one PostgreSQL database.

    ``pool_size`` pieces of work run at the same time, further ones wait for their turn, however long that is: those
    before them are bounded. ``statement_timeout_seconds`` bounds each statement on the server, and with some slack
    each piece of work here. ``connect_timeout_seconds`` bounds opening one connection.
    """

    def __init__(
        self,
        url: str,
        *,
        pool_size: int = 2,
        application_name: str = "headrace",
        statement_timeout_seconds: float = 30.0,
        connect_timeout_seconds: float = 5.0,
        slack_seconds: float = 5.0,
    ) -> None:
        self._url = url
        self._pool_size = pool_size
        self._connect_timeout = connect_timeout_seconds
        self._work_seconds = statement_timeout_seconds + connect_timeout_seconds + slack_seconds
        self._ping_seconds = connect_timeout_seconds + slack_seconds
        statement_timeout_ms = str(max(1, round(statement_timeout_seconds * 1000)))
        self._server_settings = {
            "application_name": application_name,
            "statement_timeout": statement_timeout_ms,
            # A worker that was stopped in the middle of a transaction must not hold its locks.
            "idle_in_transaction_session_timeout": statement_timeout_ms,
            "client_min_messages": "warning",
            "timezone": "UTC",
        }
        self._slots = asyncio.Semaphore(pool_size)
        self._pinging = asyncio.Lock()
        self._migrating = asyncio.Lock()
        self._schema_ready = False
        self._pool: Any = None

    async def start(self) -> None:
        """Make ready to connect. Does not connect, and does not fail while the server is away."""
        if self._pool is None:
            self._pool = await asyncpg.create_pool(
                self._url,
                min_size=0,
                max_size=self._pool_size + 1,
                timeout=self._connect_timeout,
                server_settings=self._server_settings,
                # Nothing of a session is changed by the work here, so a reset would be a round trip for nothing.
                reset=_leave_as_it_is,
            )

    async def stop(self) -> None:
        """Close all connections; those that do not close in time are cut."""
        pool, self._pool = self._pool, None
        if pool is None:
            return
        try:
            async with asyncio.timeout(self._connect_timeout):
                await pool.close()
        except (TimeoutError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            pool.terminate()

    async def ping(self) -> None:
        """Return once the server has answered and the schema is up to date; raise the library's exception otherwise.

        Does not queue behind the writes: one connection of the pool is kept for it.
        """
        async with self._pinging:
            if not self._schema_ready:
                await self._prepare_schema()
            async with self._lend(self._ping_seconds) as connection:
                await connection.execute("SELECT 1")

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """Lend a connection to a database with the right schema, until the deadline."""
        async with self._slots:
            if not self._schema_ready:
                await self._prepare_schema()
            async with self._lend(self._work_seconds) as connection:
                yield connection

    async def _prepare_schema(self) -> None:
        async with self._migrating:
            if self._schema_ready:
                return
            async with self._lend(self._work_seconds) as connection:
                current = await is_current(connection)
            if not current:
                async with self._lend(_MIGRATION_SECONDS) as connection:
                    await migrate(connection)
            self._schema_ready = True

    @contextlib.asynccontextmanager
    async def _lend(self, seconds: float) -> AsyncIterator[Connection]:
        pool = self._pool
        if pool is None:
            raise asyncpg.InterfaceError("the store is not started, or stopped already: call start() first")
        async with asyncio.timeout(seconds):
            connection = await pool.acquire()
            clean = False
            try:
                yield connection
                clean = True
            except asyncpg.PostgresError as exc:
                # The server answered: the connection is fit for use, unless the answer was its good-bye.
                clean = not connection.is_closed() and not connection.is_in_transaction()
                if exc.sqlstate in _SCHEMA_GONE:
                    self._schema_ready = False
                raise
            except ItemsRefused:
                clean = not connection.is_in_transaction()
                raise
            finally:
                if not clean:
                    connection.terminate()
                await pool.release(connection)

    @contextlib.asynccontextmanager
    async def transaction(self, begin: str = "BEGIN") -> AsyncIterator[Connection]:
        """Lend a connection with a transaction open, and commit it; ``begin`` may carry further statements.

        Raises :class:`ItemsRefused` for what the data is to blame for.
        """
        async with self.connection() as connection:
            try:
                await connection.execute(begin)
                yield connection
                await connection.execute("COMMIT")
            except Exception as exc:
                # asyncpg's own transaction() would wait for a rollback even when the deadline has passed.
                answered = isinstance(exc, asyncpg.PostgresError)
                if answered and not connection.is_closed():
                    await connection.execute("ROLLBACK")
                if blames_items(exc):
                    raise ItemsRefused(exc) from exc
                raise

    async def write_separating(
        self,
        items: Sequence[Item],
        write: Callable[[Sequence[Item]], Awaitable[None]],
        screen: Callable[[Item], Exception | None] | None = None,
    ) -> list[BadRow]:
        """Call ``write`` with all ``items``; where it raises ItemsRefused, with ever smaller parts, until the bad are
        alone.

        ``screen`` tells at once what can never be written; it is asked only after a first refusal. k bad items among
        n take about 2·k·log2(n/k) further transactions.
        """
        if not items:
            return []
        try:
            await write(items)
        except ItemsRefused as refused:
            if len(items) == 1:
                return [BadRow.because(items[0], refused.reason)]
        else:
            return []
        bad: list[BadRow] = []
        good: Sequence[Item] = items
        if screen is not None:
            good = []
            for item in items:
                reason = screen(item)
                if reason is None:
                    good.append(item)
                else:
                    bad.append(BadRow.because(item, reason))
        # Without a finding, the whole has just been refused: begin with its halves.
        middle = (len(good) + 1) // 2
        pending: list[Sequence[Item]] = [good] if bad else [good[middle:], good[:middle]]
        while pending:
            part = pending.pop()
            if not part:
                continue
            try:
                await write(part)
            except ItemsRefused as refused:
                if len(part) == 1:
                    bad.append(BadRow.because(part[0], refused.reason))
                else:
                    middle = len(part) // 2
                    pending.append(part[middle:])
                    pending.append(part[:middle])
        return bad


async def _leave_as_it_is(_connection: Connection) -> None:
    """Stand in for asyncpg's reset of a connection that goes back to the pool."""
