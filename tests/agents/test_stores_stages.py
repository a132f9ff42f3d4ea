"""The ingestor and the caching stage under ``test_context``, with stores that are doubles."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pytest

from agents import caching, ingestor
from agents.stores.base import BadRow
from streams import topics
from streams.messages import AlertAction, Reading, decoder, encode
from streams.resilience.chunks import Chunk
from streams.resilience.deadletter import header
from streams.resilience.failures import Poison


def reading(value: object, *, label: str = "a", persist: bool = True, device: str = "d1") -> Reading:
    """Return a reading of one value."""
    return Reading(
        request_id=f"r-{label}",
        timestamp=datetime(2026, 1, 2, tzinfo=UTC),
        device_id=device,
        index="T",
        values=[value],  # type: ignore[list-item]
        labels=[label],
        display_names=[label],
        metadata={"units": ["°C"], "persist": [persist]},
    )


class Rows:
    """A store that keeps rows in memory and refuses those whose label is ``bad``."""

    def __init__(self) -> None:
        self.rows: list[Any] = []
        self.failures: list[BaseException] = []

    async def write_readings(self, rows: Any) -> list[BadRow]:
        """Keep ``rows``, or raise what the test has planned."""
        if self.failures:
            raise self.failures.pop(0)
        self.rows += [row for row in rows if row[2] != "bad"]
        return [BadRow(row, Poison("cannot be stored")) for row in rows if row[2] == "bad"]


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Rows:
    """Give the ingestor a store in memory."""
    store = Rows()
    monkeypatch.setattr(ingestor, "_ingest", ingestor.Ingest(store, 2))  # type: ignore[arg-type]
    return store


async def test_the_ingestor_stores_what_is_to_be_kept(rows: Rows) -> None:
    """Each value to be kept is a row, more rows than one write takes included; the rest is left out."""
    async with ingestor.ingest.test_context() as agent:
        for label in "abc":
            await agent.put(reading(1.5, label=label))
        await agent.put(reading(2.5, label="d", persist=False))
        await agent.put(encode(reading(True, label="e")))
    assert [(row[2], row[4]) for row in rows.rows] == [("a", 1.5), ("b", 1.5), ("c", 1.5), ("e", 1.0)]


async def test_one_bad_reading_in_a_chunk_is_one_dead_letter(rows: Rows, records: Any) -> None:
    """A reading that the database can never hold is the only one that becomes a dead letter."""
    values = [encode(reading(float(n), label=label)) for n, label in enumerate(["a", "bad", "b", "c"])]
    async with ingestor.ingest.test_context() as agent:
        await agent.put(Chunk(records(*values), decoder(Reading).decode))
    assert [row[2] for row in rows.rows] == ["a", "b", "c"]
    ((topic, _, value, headers),) = ingestor.ingest.app.captured
    assert topic == topics.errors.name
    assert value == values[1]
    assert header(headers or [], "dlq-stage") == "ingestor"
    assert header(headers or [], "dlq-class") == "poison"


async def test_a_failure_of_many_is_narrowed_down(rows: Rows, records: Any) -> None:
    """When a whole chunk fails for a reason that is a message's, it is tried one by one and only the guilty one
    goes.
    """
    rows.failures = [Poison("somewhere in there"), Poison("this one")]
    values = [encode(reading(float(n), label=label)) for n, label in enumerate(["a", "b", "c"])]
    async with ingestor.ingest.test_context() as agent:
        await agent.put(Chunk(records(*values), decoder(Reading).decode))
    assert [row[2] for row in rows.rows] == ["b", "c"]
    assert [value for _, _, value, _ in ingestor.ingest.app.captured] == [values[0]]


async def test_acknowledgements_are_stored(monkeypatch: pytest.MonkeyPatch, rows: Rows, records: Any) -> None:
    """Who has acknowledged an alert, and why, gets to the database."""
    stored: list[AlertAction] = []

    async def write(actions: Sequence[AlertAction]) -> list[BadRow]:
        stored.extend(actions)
        return []

    monkeypatch.setattr(rows, "write_alert_actions", write, raising=False)
    action = AlertAction(
        alert_id="a1", device_id="d1", action="ack", user="ann", comment="seen", timestamp=datetime.now(UTC)
    )
    async with ingestor.ingest_alert_actions.test_context() as agent:
        await agent.put(Chunk(records(encode(action)), decoder(AlertAction).decode))
    assert stored == [action]
    assert topics.alert_actions in ingestor.ingestor.consumes


class Latest:
    """A cache that keeps readings in memory."""

    def __init__(self) -> None:
        self.readings: list[Reading] = []

    async def write(self, readings: Any) -> Any:
        """Keep ``readings``; the label ``bad`` cannot be cached."""
        self.readings += [one for one in readings if one.labels != ["bad"]]
        bad = [BadRow(one, Poison("cannot be cached")) for one in readings if one.labels == ["bad"]]
        return type("Count", (), {"bad": bad})


async def test_the_cache_gets_every_reading(monkeypatch: pytest.MonkeyPatch, records: Any) -> None:
    """Readings reach the cache in order, one that cannot be cached is the only dead letter."""
    latest = Latest()
    monkeypatch.setattr(caching, "_store", latest)
    values = [encode(reading(float(n), label=label)) for n, label in enumerate(["a", "bad", "b"])]
    async with caching.cache.test_context() as agent:
        await agent.put(reading(9.0, label="first"))
        await agent.put(Chunk(records(*values), decoder(Reading).decode))
    assert [one.labels for one in latest.readings] == [["first"], ["a"], ["b"]]
    assert [value for _, _, value, _ in caching.cache.app.captured] == [values[1]]
