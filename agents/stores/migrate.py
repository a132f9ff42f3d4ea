"""Brings a database to the schema that this Headrace knows.

Migrations are the files ``migrations/NNNN_name.sql``, applied in order, all in one transaction, each once. The table
``headrace_schema(version, name, checksum, applied_at)`` remembers them. An advisory lock lets several workers start
at once: one migrates, the others wait and find the work done. A database that is up to date is only read, never
locked, so that a reader can be pointed at a standby.

Raises :class:`~streams.resilience.failures.Fatal` when the database is newer than this program, or when a migration
that was applied had another content: going on would write into tables that mean something else.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import re
from dataclasses import dataclass
from importlib import resources

import asyncpg

from streams.resilience.failures import Fatal

__all__ = ["Migration", "is_current", "known_migrations", "migrate"]

logger = logging.getLogger(__name__)

# Any constant does; it is the first eight bytes of SHA-256("headrace schema"), as a signed 64 bit integer.
_LOCK = int.from_bytes(hashlib.sha256(b"headrace schema").digest()[:8], "big", signed=True)
_FILE = re.compile(r"(\d{4})_(\w+)\.sql")

_CREATE_SCHEMA_TABLE = """
CREATE TABLE headrace_schema (
    version    integer PRIMARY KEY,
    name       text NOT NULL,
    checksum   text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
)
"""
# A chunk of seven days is TimescaleDB's own default; create_default_indexes is off because the key and the block range
# index are there already.
_MAKE_HYPERTABLE = """
SELECT create_hypertable('readings', 'time', chunk_time_interval => INTERVAL '7 days', if_not_exists => true,
                         migrate_data => true, create_default_indexes => false)
"""


@dataclass(frozen=True, slots=True)
class Migration:
    """One numbered step of the schema."""

    version: int
    name: str
    sql: str

    @property
    def checksum(self) -> str:
        """SHA-256 of the SQL with ``\\n`` line ends, so that a checkout's line endings do not matter."""
        return hashlib.sha256("\n".join(self.sql.splitlines()).encode()).hexdigest()


@functools.cache
def known_migrations() -> tuple[Migration, ...]:
    """Return the migrations beside this module, in order. Raises :class:`Fatal` when their numbers have a gap."""
    found = []
    for entry in resources.files(__package__).joinpath("migrations").iterdir():
        match = _FILE.fullmatch(entry.name)
        if match:
            found.append(Migration(int(match[1]), match[2], entry.read_text(encoding="utf-8")))
    found.sort(key=lambda migration: migration.version)
    if [migration.version for migration in found] != list(range(1, len(found) + 1)):
        raise Fatal(
            f"agents/stores/migrations is incomplete: it holds {[m.version for m in found]}; install Headrace anew"
        )
    return tuple(found)


async def is_current(connection: asyncpg.Connection[asyncpg.Record]) -> bool:
    """Return whether the database has exactly the known schema; raise :class:`Fatal` like :func:`migrate`."""
    return await _pending(connection, known_migrations()) == []


async def migrate(
    connection: asyncpg.Connection[asyncpg.Record], migrations: tuple[Migration, ...] | None = None
) -> list[int]:
    """Bring the database behind ``connection`` up to date and return the versions that were applied (often none).

    When this is cancelled or raises anything but asyncpg's ``PostgresError``, the connection still has the lock and the
    transaction: terminate it. (Asking a server that does not answer to roll back would wait for it.)
    """
    migrations = known_migrations() if migrations is None else migrations
    if await _pending(connection, migrations) == []:
        return []
    await connection.execute("SELECT pg_advisory_lock($1)", _LOCK)
    try:
        applied = await _apply(connection, migrations)
    except asyncpg.PostgresError:
        if not connection.is_closed():
            await connection.execute("ROLLBACK")
            await connection.execute("SELECT pg_advisory_unlock($1)", _LOCK)
        raise
    await connection.execute("SELECT pg_advisory_unlock($1)", _LOCK)
    if applied:
        logger.info("database schema brought to version %d", applied[-1])
    return applied


async def _apply(connection: asyncpg.Connection[asyncpg.Record], migrations: tuple[Migration, ...]) -> list[int]:
    pending = await _pending(connection, migrations)
    if pending == []:
        return []
    timescale = await _timescale(connection)
    await connection.execute("BEGIN")
    # A step may have a large table to go through; the caller's bound is what holds.
    await connection.execute("SET LOCAL statement_timeout = 0")
    if pending is None:
        await connection.execute(_CREATE_SCHEMA_TABLE)
        pending = list(migrations)
    for migration in pending:
        await connection.execute(migration.sql)
        await connection.execute(
            "INSERT INTO headrace_schema (version, name, checksum) VALUES ($1, $2, $3)",
            migration.version,
            migration.name,
            migration.checksum,
        )
    if timescale and any(migration.name == "readings" for migration in pending):
        await _make_hypertable(connection)
    await connection.execute("COMMIT")
    return [migration.version for migration in pending]


async def _make_hypertable(connection: asyncpg.Connection[asyncpg.Record]) -> None:
    await connection.execute("SAVEPOINT hypertable")
    try:
        await connection.execute(_MAKE_HYPERTABLE)
    except asyncpg.PostgresError as exc:
        await connection.execute("ROLLBACK TO hypertable")
        logger.warning("TimescaleDB cannot make readings a hypertable (%s); it stays an ordinary table", exc)
    else:
        logger.info("readings is a TimescaleDB hypertable")


async def _pending(
    connection: asyncpg.Connection[asyncpg.Record], migrations: tuple[Migration, ...]
) -> list[Migration] | None:
    """Return what is still to be applied; None when not even the table of versions is there."""
    if await connection.fetchval("SELECT to_regclass('headrace_schema')") is None:
        return None
    rows = await connection.fetch("SELECT version, name, checksum FROM headrace_schema ORDER BY version")
    applied = {row["version"]: row for row in rows}
    newest = max(applied, default=0)
    if newest > len(migrations):
        raise Fatal(
            f"the database (DATABASE_URL) has schema version {newest}, this Headrace knows up to {len(migrations)}: "
            "a newer Headrace has been here; install that version, or point DATABASE_URL at another database"
        )
    for migration in migrations:
        row = applied.get(migration.version)
        if row is not None and row["checksum"] != migration.checksum:
            raise Fatal(
                f"migration {migration.version} ({row['name']}) was applied to the database with another "
                "content than this Headrace has: migrations must not be edited; restore agents/stores/migrations"
            )
    return [migration for migration in migrations if migration.version not in applied]


async def _timescale(connection: asyncpg.Connection[asyncpg.Record]) -> bool:
    """Return whether TimescaleDB is there, creating the extension where it is installed on the server and we may."""
    present = "SELECT count(*) > 0 FROM pg_extension WHERE extname = 'timescaledb'"
    if await connection.fetchval(present):
        return True
    if not await connection.fetchval("SELECT count(*) > 0 FROM pg_available_extensions WHERE name = 'timescaledb'"):
        return False
    try:
        await connection.execute("CREATE EXTENSION IF NOT EXISTS timescaledb")
    except asyncpg.PostgresError as exc:
        # Not preloaded, or no privilege: a plain table keeps the same promises.
        logger.warning("TimescaleDB is installed but cannot be created (%s); readings will be an ordinary table", exc)
    return bool(await connection.fetchval(present))
