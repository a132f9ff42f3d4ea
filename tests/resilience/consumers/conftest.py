"""Topics of their own on the session's broker, and what a test asks of it."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

import aiokafka
import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import GroupCoordinatorNotAvailableError

from streams.resilience.consumers import AsyncResilientKafkaConsumer

_numbers = itertools.count()

#: Quick values for tests: everything else is as a user has it.
QUICK: dict[str, Any] = {
    "base_delay": 0.02,
    "max_delay": 0.2,
    "health_check_interval": 0.2,
    "commit_interval": 0.05,
    "session_timeout_ms": 6000,
    "heartbeat_interval_ms": 500,
    "rebalance_timeout_ms": 6000,
    "request_timeout_ms": 18000,
    "metadata_max_age_ms": 1000,
}


async def eventually(condition: Callable[[], Any], what: str, seconds: float = 60.0) -> None:
    """Wait until ``condition()``, which may be a coroutine, is true."""
    until = time.monotonic() + seconds
    while True:
        result = condition()
        if asyncio.iscoroutine(result):
            result = await result
        if result:
            return
        if time.monotonic() > until:
            raise AssertionError(f"not within {seconds:.0f} s: {what}")
        await asyncio.sleep(0.02)


class Broker:
    """What tests do with the broker beside consuming."""

    def __init__(self, servers: str) -> None:
        self.servers = servers
        self.admin: AIOKafkaAdminClient
        self.producer: aiokafka.AIOKafkaProducer

    async def topic(self, name: str = "t", partitions: int = 1) -> str:
        """Create a topic with a name of its own."""
        topic = f"{name}-{next(_numbers)}-{time.time_ns()}"
        await self.admin.create_topics([NewTopic(topic, partitions, 1)])

        async def led() -> bool:
            (described,) = await self.admin.describe_topics([topic])
            return not described["error_code"] and all(p["leader"] >= 0 for p in described["partitions"])

        await eventually(led, f"a leader for {topic}")
        return topic

    def group(self) -> str:
        """Return the name of a group that nobody else has."""
        return f"g-{next(_numbers)}-{time.time_ns()}"

    async def send(
        self,
        topic: str,
        values: Iterable[Any],
        key: Callable[[Any], bytes | None] = lambda _: None,
        partition: int | None = None,
    ) -> None:
        """Send ``values``: bytes as they are, anything else as JSON."""
        futures = [
            await self.producer.send(
                topic, v if isinstance(v, bytes) else json.dumps(v).encode(), key(v), partition=partition
            )
            for v in values
        ]
        await self.producer.flush()
        await asyncio.gather(*futures)

    async def committed(self, group: str) -> dict[tuple[str, int], int]:
        """Return the group's committed offsets."""
        try:
            found = await self.admin.list_consumer_group_offsets(group)
        except GroupCoordinatorNotAvailableError:
            # The broker makes its topic of offsets when it is asked for the first time.
            return {}
        return {(tp.topic, tp.partition): value.offset for tp, value in found.items() if value.offset >= 0}

    async def read(self, topic: str, count: int) -> list[Any]:
        """Return the first ``count`` records of ``topic``."""
        consumer = aiokafka.AIOKafkaConsumer(topic, bootstrap_servers=self.servers, auto_offset_reset="earliest")
        await consumer.start()
        try:
            return [await asyncio.wait_for(consumer.getone(), 30) for _ in range(count)]
        finally:
            await consumer.stop()


@pytest.fixture
async def broker(kafka: str) -> AsyncIterator[Broker]:
    """The session's broker."""
    made = Broker(kafka)
    made.admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
    made.producer = aiokafka.AIOKafkaProducer(bootstrap_servers=kafka, linger_ms=2, max_batch_size=262144)
    await made.admin.start()
    await made.producer.start()
    yield made
    await made.producer.stop()
    await made.admin.close()


@pytest.fixture
async def consuming(broker: Broker) -> AsyncIterator[Callable[..., AsyncResilientKafkaConsumer]]:
    """Start consumers in tasks; they are stopped at the end, and what ended one before is raised."""
    started: list[tuple[AsyncResilientKafkaConsumer, asyncio.Task[None]]] = []

    def start(
        topic: Any,
        handler: Callable[..., Any],
        group: str | None = None,
        *,
        commit_offset: bool = True,
        batch_processing: bool = False,
        **options: Any,
    ) -> AsyncResilientKafkaConsumer:
        servers = options.pop("bootstrap", broker.servers)
        consumer = AsyncResilientKafkaConsumer(topic, group or broker.group(), servers, **{**QUICK, **options})
        task = asyncio.create_task(consumer.consume_messages(handler, commit_offset, batch_processing))
        consumer.task = task  # type: ignore[attr-defined]
        started.append((consumer, task))
        return consumer

    yield start
    for consumer, _ in started:
        await asyncio.wait_for(consumer.stop(), 30)
    ends: list[Awaitable[None]] = [task for _, task in started]
    await asyncio.gather(*ends, return_exceptions=True)
