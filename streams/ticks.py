"""Time as records: a stage with timers over a table gets a tick in each partition that it holds, as an event of it.

Guarantee: a tick is handled under commit control like any record, so what a timer changes in a table is complete, or
comes again, with it. A tick that cannot be written is none: time counts from the next one.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

import msgspec
from aiokafka.structs import TopicPartition
from faust.types import TP

from streams.messages import encode
from streams.topics import Declaration

TICK_SECONDS: Final = 1.0


class Tick(msgspec.Struct):
    """A moment, as a record of one partition."""

    at: datetime
    partition: int


async def write_ticks(app: Any, ticks: Declaration) -> None:
    """Write one tick to each partition that ``app`` holds; none while its group has not settled."""
    mine = [tp.partition for tp in app.assigned or () if tp.topic == ticks.name]
    if not mine:
        return
    now = datetime.now(UTC)
    producer = await app.maybe_start_producer()
    for number in mine:
        await producer.send(ticks.name, None, encode(Tick(now, number)), number, None, None)


class Reach(NamedTuple):
    """How far the records of a partition have been handled, and how far there are any (offsets)."""

    done: int
    end: int


def reach(app: Any, source: Declaration, number: int) -> Reach | None:
    """Return how far partition ``number`` of ``source`` has been handled; None where nothing was fetched of it yet."""
    consumer = app.typed_consumer
    if consumer is None:
        # under test_context
        return Reach(0, 0)
    try:
        client = consumer._thread._ensure_consumer()
        state = client._subscription.subscription.assignment.state_value(TopicPartition(source.name, number))
    except Exception as exc:
        app.log.debug("no position in %s[%d]: %r", source.name, number, exc)
        return None
    if state is None or state.highwater is None:
        return None
    ledger = consumer.ledgers.get(TP(source.name, number))
    done = ledger.mark if ledger is not None and ledger.mark is not None else -1
    if state.has_valid_position and (ledger is None or not ledger.in_flight):
        # markers of transactions and what compaction took away are passed without a record
        done = max(done, state.position)
    return Reach(done, state.highwater)
