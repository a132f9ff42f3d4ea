"""Tables come back from their changelogs on Apache Kafka, whatever store and callbacks they have."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiokafka
import pytest
from yarl import URL

from streams.resilience.recovery import Recovery
from tests.resilience.conftest import Log
from tests.resilience.test_kafka_stage import running, stage

pytestmark = pytest.mark.stack

PARTITIONS = 2
CHANGES = 6000


def change(number: int) -> tuple[int, bytes, bytes | None]:
    """Return partition, key and value of the n-th change: keys are written many times, some taken back at last."""
    partition, key = number % PARTITIONS, number % 500
    gone = key % 7 == 0 and number >= CHANGES - 500
    return partition, b"k%d" % key, None if gone else b"v%d" % number


async def write(log: Log, topic: str, first: int, end: int) -> None:
    """Write changes to a changelog."""
    async with aiokafka.AIOKafkaProducer(bootstrap_servers=log.servers, linger_ms=5) as producer:
        for partition, key, value in map(change, range(first, end)):
            await producer.send(topic, value, key=key, partition=partition)


def expected(end: int) -> dict[bytes, bytes]:
    """Return what a table holds after the first ``end`` changes."""
    rows = {key: value for _, key, value in map(change, range(end))}
    return {key: value for key, value in rows.items() if value is not None}


@pytest.mark.parametrize("case", ["rocksdb", "memory", "callback"])
async def test_a_table_comes_back(log: Log, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All partitions, the last value of each key and no row that was taken back; again with the folder, and more."""
    source, letters = await log.topic("in", PARTITIONS), await log.topic("errors")
    group = f"{log.prefix}{case}"
    changelog = f"{group}-rows-changelog"
    at_once: list[bool] = []
    take = Recovery.take

    def spy(self: Recovery, tp: Any, records: Any) -> bool:
        at_once.append(take(self, tp, records))
        return at_once[-1]

    monkeypatch.setattr(Recovery, "take", spy)
    seen: list[Any] = []

    async def look(event: Any) -> None:
        seen.append(event)

    await log.topic(f"{case}-rows-changelog", PARTITIONS, **{"cleanup.policy": "compact"})
    await write(log, changelog, 0, 4000)
    for end in (4000, CHANGES):
        app = stage(log.servers, group, tmp_path, letters)
        app.conf.store = URL("memory://" if case == "memory" else "rocksdb://")
        options = {"on_changelog_event": look} if case == "callback" else {}
        table = app.Table("rows", key_type=bytes, value_type=bytes, partitions=PARTITIONS, **options)

        @app.agent(app.chunk_topic(source, bytes))
        async def work(stream: Any) -> None:
            async for _chunk in stream:
                pass

        if end == CHANGES:
            await write(log, changelog, 4000, CHANGES)
        async with running(app):
            await log.until(lambda app=app: app.tables.recovery.completed.is_set() and app.assigned, "it is ready")
            if case == "memory":
                rows = dict(table.data.items())
            else:
                # what Faust keeps in the same database begins with an underscore
                pairs = [pair for database in table.data._dbs.values() for pair in database.items()]
                rows = {key: value for key, value in pairs if not key.startswith(b"__")}
        assert rows == expected(end)
    assert set(at_once) == {case == "rocksdb"}
    assert len(seen) == (CHANGES if case == "callback" else 0)


async def test_an_assignment_that_takes_longer_than_the_session(log: Log, tmp_path: Path) -> None:
    """The member stays one while its tables are opened: heartbeats go on, and it does not join again and again."""
    source, letters = await log.topic("in"), await log.topic("errors")
    app = stage(log.servers, f"{log.prefix}slow", tmp_path, letters)
    assignments: list[set[Any]] = []

    @app.on_partitions_assigned.connect
    async def open_tables(_app: Any, assigned: set[Any], **_: Any) -> None:
        assignments.append(assigned)
        await asyncio.sleep(2 * app.conf.broker_session_timeout)

    @app.agent(app.chunk_topic(source, bytes))
    async def work(stream: Any) -> None:
        async for chunk in stream:
            await chunk.each(lambda _value, _out: None)

    await log.write(source, b"a", b"b")
    async with running(app):
        await log.until_committed(app.conf.id, source, 2)
        assert app.consumer_generation_id == 1
    assert len(assignments) == 1
