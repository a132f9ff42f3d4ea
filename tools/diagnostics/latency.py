"""How long does a record take: produced, acknowledged, consumed; on a topic of its own that is deleted afterwards."""

import asyncio
import contextlib
import statistics
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import aiokafka
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import for_code

from streams.resilience.bounds import within
from tools.diagnostics.findings import Finding, Level

PREFIX = "headrace-diagnostics-"
SLOW_SECONDS = 1.0


@contextlib.asynccontextmanager
async def own_topic(admin: AIOKafkaAdminClient) -> AsyncIterator[str]:
    """Create a topic that nobody else has, and delete it whatever happens."""
    name = PREFIX + uuid.uuid4().hex
    response = await admin.create_topics([NewTopic(name, 1, 1)])
    for _, code, message in (entry[:3] for entry in response.topic_errors):
        if code:
            raise for_code(code)(message)
    try:
        for _ in range(100):
            (described,) = await admin.describe_topics([name])
            if not described["error_code"] and all(p["leader"] >= 0 for p in described["partitions"]):
                break
            await asyncio.sleep(0.05)
        yield name
    finally:
        await admin.delete_topics([name])


async def measure(servers: list[str], connection: dict[str, Any], topic: str, seconds: float) -> dict[str, Any]:
    """Send a record every 50 ms for ``seconds``; return counts and seconds of acknowledgement and delivery."""
    producer = aiokafka.AIOKafkaProducer(bootstrap_servers=servers, acks="all", **connection)
    consumer = aiokafka.AIOKafkaConsumer(bootstrap_servers=servers, auto_offset_reset="earliest", **connection)
    acknowledged: list[float] = []
    delivered: list[float] = []
    try:
        await producer.start()
        await consumer.start()
        consumer.assign([TopicPartition(topic, 0)])
        begun = time.monotonic()
        while not acknowledged or time.monotonic() - begun < seconds:
            at = time.monotonic()
            await producer.send_and_wait(topic, str(at).encode())
            acknowledged.append(time.monotonic() - at)
            message = await within(consumer.getone(), 10)
            delivered.append(time.monotonic() - float(message.value))
            await asyncio.sleep(0.05)
    finally:
        await producer.stop()
        await consumer.stop()
    return {"records": len(delivered), "acknowledged": _summary(acknowledged), "delivered": _summary(delivered)}


def _summary(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "median_ms": round(statistics.median(ordered) * 1000, 2),
        "p99_ms": round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))] * 1000, 2),
        "max_ms": round(ordered[-1] * 1000, 2),
    }


def check(measured: dict[str, Any]) -> list[Finding]:
    """Judge what was measured."""
    median = measured["delivered"]["median_ms"]
    if median <= SLOW_SECONDS * 1000:
        return []
    what = f"a record takes {median:g} ms from producer to consumer (median of {measured['records']})"
    return [
        Finding(Level.WARNING, "latency", what, "Look at the brokers' disks, at the network, and at acks and replicas.")
    ]
