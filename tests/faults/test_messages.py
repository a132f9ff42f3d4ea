"""Messages that are broken, doubled, late, or refused by the database: each has one fate, its neighbours are stored."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import redis

from tests.faults.support import STAGES, settled, wait_for
from tests.faults.topics import LETTER_HEADERS, raw_message, read, write
from tests.faults.worker import Realm, realm
from tools.simulator import Outcome, Plan
from tools.simulator.evidence import dead_letter
from tools.simulator.poison import KINDS
from tools.stack import Stack

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]


def headers(record: Any) -> dict[str, str]:
    """Return a record's headers as text."""
    return {name: value.decode() for name, value in record.headers}


def query(own: Realm, statement: str, *arguments: Any) -> list[Any]:
    """Run one statement in a realm's database."""

    async def run() -> list[Any]:
        connection = await asyncpg.connect(own.env["DATABASE_URL"])
        try:
            return list(await connection.fetch(statement, *arguments))
        finally:
            await connection.close()

    return asyncio.run(run())


def test_poison_of_every_kind_in_the_middle_of_a_chunk(breakable: Stack, tmp_path: Path) -> None:
    """Every kind of unreadable message among readable ones of one partition: one dead letter each, all else stored."""
    with realm(breakable, tmp_path, STAGES="mqtt", TOPIC_PARTITIONS="1") as own:
        connector = own.worker("connector").start()
        fleet = own.fleet(Plan(devices=30, messages=600, rate=0, poison=0.15, seed=3))
        fleet.start()
        assert fleet.join(120)
        connector.wait(lambda: connector.metric("headrace_in_flight") == 0, "idle")
        # all of it stands in the topic before anybody reads it, so that it comes in chunks
        own.worker("reader", STAGES="normalizer,ingestor").start()
        report = settled(own, fleet)
        assert report.clean, report.text()
        poison = {key: entry for key, entry in fleet.book.entries.items() if entry.expect is Outcome.DEAD}
        assert {entry.poison for entry in poison.values()} == set(KINDS), "the seed must make every kind"
        assert report.dead_lettered == len(poison)
        letters = read(own, "iot_errors")
        counted = Counter((letter.device_id, letter.digest) for letter in map(dead_letter, letters))
        assert counted == Counter((device, entry.digest) for (device, _), entry in poison.items())
        for letter in letters:
            assert headers(letter).keys() >= LETTER_HEADERS
        connector.stop()


def test_records_that_are_no_messages(breakable: Stack, tmp_path: Path) -> None:
    """Garbage in Kafka itself: one dead letter each, key and value unchanged, with where it was; neighbours stored."""
    garbage: list[tuple[bytes | None, bytes | None]] = [
        (b"a", b""),
        (b"b", None),
        (b"c", b"{"),
        (b"d", b"\xff\xfe\x00"),
        (b"\x00\xff", b'"text"'),
        (None, b"[1, 2, 3]"),
        (b"e", b'{"device_id": ' + b"[" * 20_000 + b"]" * 20_000 + b"}"),
        (b"f", b'{"request_id": 7}'),
        (b"g", b'{"request_id": "x", "timestamp": NaN}'),
        (b"h", b"1" * 100_000),
        (b"i", b"x" * (1 << 20)),
        (b"j", raw_message("dev-j", 0, '{"t": 1}', topic="nobody/knows/this")),
    ]
    with realm(breakable, tmp_path, STAGES="normalizer,ingestor", TOPIC_PARTITIONS="1") as own:
        worker = own.worker().start()
        values: list[tuple[bytes | None, bytes | None]] = []
        for number, bad in enumerate(garbage):
            values += [
                (b"dev", raw_message("dev", number, json.dumps({"ts": 1_700_000_000 + number, "t": number}))),
                bad,
            ]
        offsets = dict(zip([value for _, value in values], write(own, "iot_raw_data", values, 0), strict=True))
        wait_for(
            "all rows and dead letters",
            lambda: (
                worker.metric("headrace_dead_letters_total", stage="normalizer") == len(garbage)
                and worker.metric("headrace_forwarded_total", stage="ingestor") == len(garbage)
            ),
        )
        worker.wait(lambda: worker.metric("headrace_in_flight") == 0, "idle")
        letters = read(own, "iot_errors")
        assert Counter((letter.key, letter.value) for letter in letters) == Counter(garbage)
        for letter in letters:
            found = headers(letter)
            assert found.keys() >= LETTER_HEADERS
            assert found["dlq-topic"] == own.places.topic("iot_raw_data")
            assert (found["dlq-partition"], found["dlq-offset"]) == ("0", str(offsets[letter.value]))
            assert found["dlq-class"] == ("rejected" if letter.key == b"j" else "poison")
        assert worker.metric("headrace_received_total", stage="normalizer") == 2 * len(garbage)
        assert len(query(own, "SELECT * FROM readings WHERE device_id = 'dev'")) == len(garbage)


def test_a_row_that_the_database_refuses(breakable: Stack, tmp_path: Path) -> None:
    """PostgreSQL refuses some rows of a chunk: they alone become dead letters of the ingestor, the rest is stored."""
    messages, every = 400, 50
    with realm(breakable, tmp_path, STAGES="normalizer,ingestor", TOPIC_PARTITIONS="1") as own:
        worker = own.worker().start()
        query(own, "ALTER TABLE readings ADD CONSTRAINT not_refused CHECK (label <> 'refused')")
        values = []
        for number in range(messages):
            fields = {"ts": 1_700_000_000 + number, "t": number}
            if number % every == 0:
                fields["refused"] = 1
            values.append((b"dev", raw_message("dev", number, json.dumps(fields))))
        write(own, "iot_raw_data", values, 0)
        refused = messages // every
        wait_for(
            "rows and dead letters",
            lambda: (
                worker.metric("headrace_dead_letters_total", stage="ingestor") == refused
                and worker.metric("headrace_forwarded_total", stage="ingestor") == messages
            ),
        )
        letters = read(own, "iot_errors")
        assert len(letters) == refused
        for letter in letters:
            assert headers(letter).keys() >= LETTER_HEADERS
            assert headers(letter)["dlq-stage"] == "ingestor"
            assert json.loads(letter.value)["index"] == "refused"
        rows = query(own, "SELECT label, count(*) FROM readings GROUP BY label")
        assert [tuple(row) for row in rows] == [("t", messages)]


def test_duplicates_and_late_data(breakable: Stack, tmp_path: Path) -> None:
    """Some sent twice, some late, the worker killed: rows are unique, the cache holds the newest sample of each."""
    with realm(breakable, tmp_path, STAGES=STAGES) as own:
        worker = own.worker().start()
        fleet = own.fleet(Plan(devices=60, messages=4000, rate=500, duplicates=0.2, late=0.1, poison=0.01))
        fleet.start()
        wait_for("something stored", lambda: worker.metric("headrace_forwarded_total", stage="caching") > 500)
        worker.kill()
        worker.start()
        report = settled(own, fleet)
        assert not report.disordered, report.text()
        assert not report.survived and not report.unexpected_dead, report.text()
        newest = {
            (row["device_id"], row["index"]): row["time"]
            for row in query(own, "SELECT device_id, index, max(time) AS time FROM readings GROUP BY 1, 2")
        }
        wait_for("the cache has caught up", lambda: cached(own, newest) == newest)


def cached(own: Realm, wanted: dict[tuple[str, str], datetime]) -> dict[tuple[str, str], datetime]:
    """Return the sample time of what the cache holds under each of ``wanted``'s (device, index)."""
    client = redis.Redis.from_url(own.env["REDIS_URL"])
    found: dict[tuple[str, str], datetime] = {}
    try:
        for device in {device for device, _ in wanted}:
            for category in client.smembers(f"device:{device}:categories"):
                kept = client.hgetall(f"device:{device}:category:{category.decode()}:readings")
                for index, value in kept.items():
                    at = datetime.fromisoformat(json.loads(value)["timestamp"]).astimezone(UTC)
                    name = (device, index.decode())
                    if name in wanted:
                        found[name] = max(at, found.get(name, at))
    finally:
        client.close()
    return found
