"""Offsets that a log no longer has, while it is read: told of, counted, and handled as the policy says."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.admin import NewTopic, RecordsToDelete

from streams.resilience.chunks import Out
from streams.resilience.failures import Retryable
from tests.resilience.conftest import Log
from tests.resilience.test_kafka_stage import running, stage

pytestmark = pytest.mark.stack

#: Far more than one fetch brings beyond what waits for the sink.
RECORDS, KEPT_FROM = 6000, 5000


class Sink:
    """A sink that is away until it is told otherwise."""

    def __init__(self) -> None:
        self.away = True
        self.tried = 0
        self.got: list[int] = []

    def take(self, value: bytes, _: Out) -> None:
        """Take one value."""
        self.tried += 1
        if self.away:
            raise Retryable("away")
        self.got.append(int(value))


def numbers(count: int) -> list[bytes]:
    """Return values of about a kilobyte."""
    return [b"%01000d" % number for number in range(count)]


@pytest.mark.parametrize("policy", ["earliest", "latest", "stop"])
async def test_retention_overtakes_a_stage_whose_sink_is_away(
    log: Log, tmp_path: Path, policy: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What is gone is told of and counted once; the stage goes on where it may, or ends."""
    source, letters = await log.topic("in"), await log.topic("errors")
    app: Any = stage(log.servers, f"{log.prefix}{policy}", tmp_path, letters, offset_out_of_range=policy)
    sink, ended = Sink(), []
    app.fatal = ended.append

    @app.agent(app.chunk_topic(source, bytes))
    async def work(stream: Any) -> None:
        async for chunk in stream:
            await chunk.each(sink.take)

    await log.write(source, *numbers(10))
    with caplog.at_level(logging.ERROR):
        async with running(app):
            await log.until(lambda: sink.tried, "the sink is missed")
            await log.write(source, *numbers(RECORDS)[10:])
            await log.admin.delete_records({TopicPartition(source, 0): RecordsToDelete(KEPT_FROM)})
            sink.away = False
            await log.until(lambda: app.accounts.offset_resets, "it is counted")
            if policy == "stop":
                await log.until(lambda: ended, "it ends")
                assert "OFFSET_OUT_OF_RANGE=stop" in str(ended[0])
            else:
                await log.write(source, b"%01000d" % RECORDS)
                await log.until(lambda: RECORDS in sink.got, "it goes on")
                await log.until_committed(app.conf.id, source, RECORDS + 1)
                assert app.accounts.offset_resets == 1
    assert f"{source}[0] in group {app.conf.id}: offset" in caplog.text
    assert "are gone" in caplog.text
    first = range(next(n for n in range(RECORDS) if n not in set(sink.got)))
    assert sink.got[: len(first)] == list(first)
    beyond = sink.got[len(first) :]
    assert beyond == {"earliest": list(range(KEPT_FROM, RECORDS + 1)), "latest": [RECORDS], "stop": []}[policy]


async def test_a_topic_that_is_made_anew(log: Log, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its log begins anew under a stage that has read further: told of, counted, and read from its beginning."""
    source, letters = await log.topic("in"), await log.topic("errors")
    app: Any = stage(log.servers, f"{log.prefix}anew", tmp_path, letters)
    app.conf.consumer_metadata_max_age_ms = 500
    got: list[bytes] = []

    @app.agent(app.chunk_topic(source, bytes))
    async def work(stream: Any) -> None:
        async for chunk in stream:
            await chunk.each(lambda value, _: got.append(value))

    await log.write(source, *numbers(100))
    with caplog.at_level(logging.ERROR):
        async with running(app):
            await log.until_committed(app.conf.id, source, 100)
            await log.admin.delete_topics([source])
            await log.until(lambda: _created(log, source), "the topic is there again")
            await log.write(source, b"new")
            await log.until(lambda: b"new" in got, "the new log is read")
            await log.until(lambda: app.accounts.offset_resets, "it is counted")
            await log.until_committed(app.conf.id, source, 1)
    assert "its log began anew" in caplog.text or "the group has forgotten it" in caplog.text


async def _created(log: Log, topic: str) -> bool:
    (answer,) = (await log.admin.create_topics([NewTopic(topic, 1, 1)])).topic_errors
    return answer[1] == 0
