"""A cluster that comes back at other addresses than it told: found again through the bootstrap servers."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from streams.resilience import AsyncResilientKafkaConsumer
from streams.resilience.chunks import Out
from tests.faults.proxy import Proxy
from tests.resilience.conftest import Log, _admin
from tests.resilience.consumers.conftest import QUICK
from tests.resilience.harness import numbered
from tests.resilience.test_kafka_stage import running, stage
from tools.stack import Stack, ports

pytestmark = [pytest.mark.stack, pytest.mark.timeout(200)]


async def test_brokers_that_have_moved(own_stack: Stack, tmp_path: Path) -> None:
    """A stage's consumer and producer, and a resilient consumer, go on: the same ones, nothing is created anew."""
    kafka = own_stack.part("kafka")
    await asyncio.to_thread(own_stack.start, "kafka")
    with Proxy("127.0.0.1", kafka.port()) as proxy:
        log = Log(kafka.address())
        log.admin = await _admin(log.servers)
        source, target, letters = await log.topic("in"), await log.topic("out"), await log.topic("errors")
        await log.admin.close()
        bootstrap = f"127.0.0.1:{proxy.port}"
        app: Any = stage(bootstrap, f"{log.prefix}moved", tmp_path, letters)
        beside: list[Any] = []
        consumer = AsyncResilientKafkaConsumer(
            source, f"{log.prefix}beside", bootstrap, raw=True, stuck_after=3600, **QUICK
        )

        def forward(value: bytes, out: Out) -> None:
            out.send(target, value, "k")

        @app.agent(app.chunk_topic(source, bytes))
        async def work(stream: Any) -> None:
            async for chunk in stream:
                await chunk.each(forward)

        async def handle(message: Any) -> bool:
            beside.append(message.value)
            return True

        await log.write(source, *numbered(10))
        async with running(app):
            consuming = asyncio.create_task(consumer.consume_messages(handle))
            await log.until_committed_by(app, source, 10)
            await log.until(lambda: len(set(beside)) == 10, "the consumer beside has read")
            await asyncio.to_thread(kafka.stop)
            kafka.state.put("ports", "kafka.port", ports.choose(set(), random.SystemRandom()))
            await asyncio.to_thread(kafka.start)
            proxy.lead_to("127.0.0.1", kafka.port())
            log.servers = kafka.address()
            await log.write(source, *[b"w%d" % number for number in range(10)])
            await log.until_committed_by(app, source, 20)
            await log.until(lambda: len(set(beside)) == 20, "the consumer beside reads on")
            assert app.accounts.recreations == consumer.recreations == 0
            await consumer.stop()
            await consuming
        assert len(await log.read(target, 20)) == 20
