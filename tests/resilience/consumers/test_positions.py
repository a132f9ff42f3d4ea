"""Where a resilient consumer goes on when a log does not have what is to be read next, or nothing was committed."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.admin import RecordsToDelete
from aiokafka.errors import NoOffsetForPartitionError

from streams.resilience import Retryable
from tests.resilience.consumers.conftest import eventually

#: Far more than one fetch brings beyond what is tried again and again.
RECORDS, KEPT_FROM = 6000, 5000


@pytest.mark.parametrize("policy", ["earliest", "latest"])
async def test_retention_overtakes_a_handler(
    broker: Any, consuming: Any, policy: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What is gone is told of, in the log and to the callback; what is there is handled, as the policy says."""
    topic, group = await broker.topic(), broker.group()
    away, got, told = True, [], []

    async def handle(message: Any) -> bool:
        if away and message.offset:
            raise Retryable("away")
        got.append(message.offset)
        return True

    await broker.send(topic, ["x" * 1000] * 2)
    with caplog.at_level(logging.ERROR):
        consumer = consuming(
            topic,
            handle,
            group,
            on_error_callback=lambda exc, message: told.append(exc) if message is None else None,
            in_flight_bytes=4000,
        )
        await eventually(lambda: broker.committed(group), "the first one's commit")
        if policy == "latest":
            consumer.options.config["auto_offset_reset"] = "latest"
        await broker.send(topic, ["x" * 1000] * (RECORDS - 2))
        await broker.admin.delete_records({TopicPartition(topic, 0): RecordsToDelete(KEPT_FROM)})
        away = False
        await eventually(lambda: told, "the callback is told")
        await broker.send(topic, ["x"])
        await eventually(lambda: RECORDS in got, "it goes on")
    assert "are gone" in caplog.text
    beyond = [offset for offset in got if offset >= KEPT_FROM]
    assert beyond == (list(range(KEPT_FROM, RECORDS + 1)) if policy == "earliest" else [RECORDS])
    assert len(told) == 1


async def test_the_end_is_committed_where_it_begins_there(broker: Any, consuming: Any) -> None:
    """A new group that begins at the end commits it: what comes before its first message is done is not passed over."""
    topic, group = await broker.topic(), broker.group()
    seen: list[str] = []

    async def never(message: Any) -> bool:
        seen.append(message.value)
        return False

    await broker.send(topic, ["old"] * 5)
    first = consuming(topic, never, group, auto_offset_reset="latest")
    await eventually(lambda: broker.committed(group), "the commit of the beginning")
    assert await broker.committed(group) == {(topic, 0): 5}
    await broker.send(topic, ["a"])
    await eventually(lambda: seen, "the message")
    await first.stop()
    await broker.send(topic, ["b"])
    got: list[str] = []
    consuming(topic, lambda message: got.append(message.value), group, auto_offset_reset="latest")
    await eventually(lambda: len(got) == 2, "both")
    assert got == ["a", "b"]
    assert set(seen) == {"a"}


async def test_without_a_policy_a_group_without_offsets_is_an_error(broker: Any, consuming: Any) -> None:
    """``auto_offset_reset="none"``: nothing is chosen for the caller; consume_messages raises."""
    consumer = consuming(await broker.topic(), lambda _: True, auto_offset_reset="none")
    await eventually(consumer.task.done, "the end")
    with pytest.raises(NoOffsetForPartitionError):
        consumer.task.result()
