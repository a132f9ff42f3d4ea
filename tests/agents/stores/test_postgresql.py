"""Readings into PostgreSQL, and out of it."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest

from agents.stores.base import Row
from agents.stores.postgresql import ReadingStore
from streams.resilience.failures import FailureClass, classify

NOON = datetime(2024, 5, 1, 12, tzinfo=UTC)


def row(second: float, value: float | None = 1.0, device: str = "d", index: str = "1", label: str = "a") -> Row:
    """Return a row whose sample was taken ``second`` seconds after noon."""
    text = "on" if value is None else None
    return (device, index, label, NOON + timedelta(seconds=second), value, text, "V", "r")


async def test_the_first_value_of_a_key_stays(store: ReadingStore, connection: asyncpg.Connection) -> None:
    """Within a chunk and across chunks, another value for the same sample changes nothing."""
    await store.write_readings([row(1, 1.0), row(2, 9.0), row(1, 2.0), row(1, 3.0)])
    await store.write_readings([row(1, 4.0)])
    stored = await connection.fetch("SELECT time, value FROM readings ORDER BY time")
    assert [one["value"] for one in stored] == [1.0, 9.0]


async def test_times_keep_their_microseconds(store: ReadingStore) -> None:
    """Two samples a microsecond apart are two rows."""
    await store.write_readings([row(0.000001), row(0.000002)])
    assert [one["time"].microsecond for one in await store.readings("d")] == [2, 1]


async def test_a_constraint_of_the_users_own_refuses_only_its_row(
    store: ReadingStore, connection: asyncpg.Connection
) -> None:
    """What a check on the table forbids is handed back with the server's reason, which is poison."""
    await connection.execute("ALTER TABLE readings ADD CHECK (value < 100)")
    rows = [row(n, 250.0 if n in (0, 17, 18, 63) else 1.0) for n in range(64)]
    bad = await store.write_readings(rows)
    assert [entry.row for entry in bad] == [rows[0], rows[17], rows[18], rows[63]]
    assert {type(entry.exception) for entry in bad} == {asyncpg.CheckViolationError}
    assert {classify(entry.exception) for entry in bad} == {FailureClass.POISON}
    assert await connection.fetchval("SELECT count(*) FROM readings") == 60


async def test_every_reason_for_a_bad_row_is_poison(store: ReadingStore) -> None:
    """NUL, lone surrogates, and a key too long for the index are classified as the message's fault."""
    incompressible = "".join(chr(0x4E00 + n * 7919 % 20000) for n in range(3000))
    for label in ("a\x00", "\udfff", incompressible):
        (bad,) = await store.write_readings([row(1), row(2, label=label), row(3)])
        assert classify(bad.exception) is FailureClass.POISON


async def test_what_is_nobodys_fault_is_an_exception(store: ReadingStore, connection: asyncpg.Connection) -> None:
    """A missing privilege, a full disk, a lock are not blamed on rows."""
    await connection.execute("ALTER TABLE readings RENAME COLUMN unit TO units")
    with pytest.raises(asyncpg.UndefinedColumnError) as caught:
        await store.write_readings([row(1)])
    assert classify(caught.value) is FailureClass.RETRY
    await connection.execute("ALTER TABLE readings RENAME COLUMN units TO unit")
    assert await store.write_readings([row(1)]) == []


async def test_a_lock_ends_at_the_statement_timeout(store: ReadingStore, connection: asyncpg.Connection) -> None:
    """A table that somebody holds is a retryable error within the bound, and the connection is good afterwards."""
    impatient = ReadingStore(store._url, pool_size=1, statement_timeout_seconds=2)
    await impatient.start()
    async with connection.transaction():
        await connection.execute("LOCK TABLE readings")
        with pytest.raises(asyncpg.QueryCanceledError) as caught:
            await impatient.write_readings([row(1)])
    assert classify(caught.value) is FailureClass.RETRY
    assert await impatient.write_readings([row(1)]) == []
    await impatient.stop()


async def test_a_connection_that_the_server_ended_is_replaced(
    store: ReadingStore, connection: asyncpg.Connection
) -> None:
    """An administrator's pg_terminate_backend costs nothing or one retryable error, never more."""
    for second in range(3):
        await store.write_readings([row(second)])
        await connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'headrace'"
        )
        failures = []
        try:
            await store.write_readings([row(second + 10)])
        except Exception as exc:
            failures.append(classify(exc))
            await store.write_readings([row(second + 10)])
        assert failures in ([], [FailureClass.RETRY])
    assert await connection.fetchval("SELECT count(*) FROM readings") == 6


async def test_a_ping_does_not_wait_for_writes(connection: asyncpg.Connection, store: ReadingStore) -> None:
    """While every writer waits for a lock, the database still shows that it answers."""
    async with connection.transaction():
        await connection.execute("LOCK TABLE readings")
        writers = [asyncio.create_task(store.write_readings([row(second)])) for second in range(4)]
        waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
        while await connection.fetchval(waiting) < 2:
            await asyncio.sleep(0.01)
        await store.ping()
        assert await connection.fetchval(waiting) == 2
    assert await asyncio.gather(*writers) == [[]] * 4


async def test_devices_are_listed_in_pages(store: ReadingStore) -> None:
    """Each device once, in order, after the one that was named."""
    await store.write_readings([row(n, device=f"d{n % 5}", label=f"l{n % 3}") for n in range(60)])
    assert await store.devices() == ["d0", "d1", "d2", "d3", "d4"]
    assert await store.devices(after="d1", limit=2) == ["d2", "d3"]


async def test_a_device_shows_the_latest_of_each_series(store: ReadingStore) -> None:
    """One entry for each index and label, with its last value."""
    await store.write_readings(
        [row(n, float(n), index=i, label=lab) for n in range(5) for i in ("1", "2") for lab in ("a", "b")]
        + [row(9, None, label="z"), row(50, device="e")]
    )
    device = await store.device("d")
    assert device is not None
    assert device["last_time"] == NOON + timedelta(seconds=9)
    assert [(s["index"], s["label"], s["value"], s["value_text"]) for s in device["series"]] == [
        ("1", "a", 4.0, None),
        ("1", "b", 4.0, None),
        ("1", "z", None, "on"),
        ("2", "a", 4.0, None),
        ("2", "b", 4.0, None),
    ]
    assert await store.device("unknown") is None


async def test_readings_are_chosen_by_series_and_time(store: ReadingStore) -> None:
    """The window takes its start and not its end; the newest come first, over all series."""
    await store.write_readings([row(n, float(n), index=i, label=lab) for n in range(9) for i in "12" for lab in "ab"])

    async def seen(**chosen: object) -> list[tuple[str, str, float]]:
        rows = await store.readings("d", **chosen)  # type: ignore[arg-type]
        return [(one["index"], one["label"], one["value"]) for one in rows]

    assert await seen(limit=3) == [("1", "a", 8.0), ("1", "b", 8.0), ("2", "a", 8.0)]
    assert await seen(index="2", label="b", limit=2) == [("2", "b", 8.0), ("2", "b", 7.0)]
    window = {"since": NOON + timedelta(seconds=2), "until": NOON + timedelta(seconds=4)}
    assert await seen(index="1", label="a", **window) == [("1", "a", 3.0), ("1", "a", 2.0)]
    assert await seen(label="none") == []


@pytest.mark.parametrize(
    ("aggregate", "values"),
    [
        ("avg", [7.0, 2.0]),
        ("min", [5.0, 0.0]),
        ("max", [9.0, 4.0]),
        ("sum", [35.0, 10.0]),
        ("count", [5.0, 5.0]),
        ("first", [5.0, 0.0]),
        ("last", [9.0, 4.0]),
    ],
)
async def test_readings_are_summed_up_in_buckets(store: ReadingStore, aggregate: str, values: list[float]) -> None:
    """A bucket begins at a multiple of its length since the epoch; texts are left out."""
    await store.write_readings([row(n, float(n)) for n in range(10)] + [row(n + 0.5, None) for n in range(10)])
    found = await store.readings("d", bucket_seconds=5, aggregate=aggregate)
    assert [one["value"] for one in found] == values
    assert [one["time"] for one in found] == [NOON + timedelta(seconds=5), NOON]
    assert [one["count"] for one in found] == [5, 5]


async def test_a_question_that_makes_no_sense_is_an_error(store: ReadingStore) -> None:
    """Unknown aggregates and empty buckets are refused before anything is asked."""
    with pytest.raises(ValueError, match=r"median.*avg"):
        await store.readings("d", bucket_seconds=5, aggregate="median")
    with pytest.raises(ValueError, match="bucket_seconds"):
        await store.readings("d", bucket_seconds=0)
