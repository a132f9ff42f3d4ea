"""The schema of the database."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from unittest.mock import AsyncMock

import asyncpg
import pytest

from agents.stores import migrate as migrate_module
from agents.stores.migrate import Migration, known_migrations, migrate
from agents.stores.postgresql import ReadingStore
from streams.resilience.failures import Fatal

READINGS = {
    "device_id": "text",
    "index": "text",
    "label": "text",
    "time": "timestamp with time zone",
    "value": "double precision",
    "value_text": "text",
    "unit": "text",
    "request_id": "text",
}


async def test_readings_are_the_table_of_the_contract(connection: asyncpg.Connection) -> None:
    """Columns, types, order and primary key are those that others rely on."""
    columns = await connection.fetch(
        "SELECT column_name, data_type FROM information_schema.columns WHERE table_name = 'readings' "
        "ORDER BY ordinal_position"
    )
    assert dict(columns) == READINGS
    assert [row[0] for row in columns] == list(READINGS)
    key = await connection.fetchval(
        "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid = 'readings'::regclass AND contype = 'p'"
    )
    assert key == 'PRIMARY KEY (device_id, index, label, "time")'


async def test_workers_that_start_together_migrate_once(empty_database_url: str) -> None:
    """Of many stores that meet an empty database at the same time, one migrates and all work."""
    stores = [ReadingStore(empty_database_url, pool_size=1) for _ in range(8)]
    for store in stores:
        await store.start()
    await asyncio.gather(*(store.ping() for store in stores))
    for store in stores:
        await store.stop()
    connection = await asyncpg.connect(empty_database_url)
    versions = await connection.fetch("SELECT version, checksum FROM headrace_schema ORDER BY version")
    locks = await connection.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'")
    await connection.close()
    assert [tuple(row) for row in versions] == [(m.version, m.checksum) for m in known_migrations()]
    assert locks == 0


async def test_a_database_of_today_is_left_alone(connection: asyncpg.Connection) -> None:
    """Nothing is applied to a database that is up to date."""
    assert await migrate(connection) == []


async def test_a_later_migration_is_applied_to_an_older_database(connection: asyncpg.Connection) -> None:
    """Only what is missing is applied."""
    later = Migration(len(known_migrations()) + 1, "later", "CREATE TABLE later (n int)")
    assert await migrate(connection, (*known_migrations(), later)) == [later.version]
    assert await connection.fetchval("SELECT to_regclass('later')::text") == "later"


async def test_a_migration_that_fails_leaves_nothing_behind(connection: asyncpg.Connection) -> None:
    """All of a run is applied or nothing; the lock is given back."""
    good = Migration(len(known_migrations()) + 1, "good", "CREATE TABLE good (n int)")
    bad = Migration(good.version + 1, "bad", "CREATE TABLE bad (n no_such_type)")
    with pytest.raises(asyncpg.UndefinedObjectError):
        await migrate(connection, (*known_migrations(), good, bad))
    assert await connection.fetchval("SELECT to_regclass('good')") is None
    assert await connection.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == 0


HYPERTABLE = """
CREATE FUNCTION create_hypertable(
    relation regclass, time_column_name name, chunk_time_interval interval, if_not_exists boolean,
    migrate_data boolean, create_default_indexes boolean
) RETURNS void LANGUAGE sql AS $$ CREATE TABLE asked AS SELECT relation, time_column_name, chunk_time_interval $$
"""


@pytest.mark.parametrize("works", [True, False])
async def test_readings_become_a_hypertable_where_they_can(
    empty_database_url: str, monkeypatch: pytest.MonkeyPatch, works: bool
) -> None:
    """TimescaleDB's function (here a stand-in of its signature) is asked; where it fails a plain table will do."""
    monkeypatch.setattr(migrate_module, "_timescale", AsyncMock(return_value=True))
    connection = await asyncpg.connect(empty_database_url)
    if works:
        await connection.execute(HYPERTABLE)
    assert await migrate(connection) == [migration.version for migration in known_migrations()]
    assert await migrate(connection) == []
    assert await connection.fetchval("SELECT to_regclass('readings')::text") == "readings"
    if works:
        assert tuple(await connection.fetchrow("SELECT relation::text, time_column_name FROM asked")) == (
            "readings",
            "time",
        )
    await connection.close()


async def test_a_newer_database_is_fatal(connection: asyncpg.Connection, store: ReadingStore) -> None:
    """A program that does not know the schema says so and does not write."""
    await connection.execute("INSERT INTO headrace_schema (version, name, checksum) VALUES (999, 'future', '')")
    newcomer = ReadingStore(store._url)
    await newcomer.start()
    with pytest.raises(Fatal, match=r"schema version 999.*up to \d.*newer Headrace"):
        await newcomer.ping()
    await newcomer.stop()


async def test_a_migration_that_was_edited_is_fatal(connection: asyncpg.Connection) -> None:
    """What was applied is compared by its checksum; line ends do not count."""
    first, *others = known_migrations()
    assert await migrate(connection, (replace(first, sql=first.sql.replace("\n", "\r\n")), *others)) == []
    with pytest.raises(Fatal, match=r"migration 1 .*another content"):
        await migrate(connection, (replace(first, sql=first.sql + "-- edited"), *others))


async def test_a_database_made_anew_under_a_running_store_gets_its_schema(
    connection: asyncpg.Connection, store: ReadingStore
) -> None:
    """After the first error, which can be retried, the next call brings the schema back."""
    await connection.execute("DROP TABLE readings, alerts, alert_events, commands, command_events, headrace_schema")
    with pytest.raises(asyncpg.UndefinedTableError):
        await store.devices()
    assert await store.devices() == []


async def test_a_reader_without_the_right_to_create_can_use_a_finished_schema(
    connection: asyncpg.Connection, store: ReadingStore
) -> None:
    """A database that is up to date is only read: a read-only connection, as to a standby, will do."""
    assert await connection.fetchval("SELECT 1") == 1
    reader = ReadingStore(store._url + "?default_transaction_read_only=on")
    await reader.start()
    assert await reader.devices() == []
    await reader.stop()
