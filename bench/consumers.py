"""Messages a second through the resilient consumer, beside a handwritten aiokafka loop with the same commits.

``python -m bench.consumers [--messages N] [--turns N]`` starts its own Apache Kafka, fills a topic of four partitions,
and reads it in turns: a handwritten loop (one handler call per message, decoded from JSON, a commit a second), the
class with one call per message (coroutine; plain function in a thread), and the class in batches. Aims: one by one at
least 0.8 ×, batches at least 1.5 × the handwritten loop.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiokafka
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from streams.resilience import AsyncResilientKafkaConsumer, get_optimized_consumer_config
from tools.stack import Stack

TOPIC = "bench-consumers"


async def fill(servers: str, messages: int) -> None:
    """Create the topic and write ``messages`` readings to it."""
    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    await admin.start()
    await admin.create_topics([NewTopic(TOPIC, 4, 1)])
    await admin.close()
    producer = aiokafka.AIOKafkaProducer(bootstrap_servers=servers, linger_ms=5, max_batch_size=262144)
    await producer.start()
    for n in range(messages):
        value = {"device_id": f"device-{n % 300}", "n": n, "values": [n * 0.25, 230.1], "labels": ["power", "voltage"]}
        await producer.send(TOPIC, json.dumps(value).encode(), key=f"device-{n % 300}".encode())
    await producer.stop()


async def by_hand(servers: str, group: str, messages: int, handler: Callable[[Any], Awaitable[bool]]) -> float:
    """Read all messages with a loop as one writes it by hand; return seconds from the first message to the last."""
    options = get_optimized_consumer_config(group, bootstrap_servers=servers)
    consumer = aiokafka.AIOKafkaConsumer(TOPIC, **options)
    await consumer.start()
    begun, seen, committed = 0.0, 0, time.monotonic()
    try:
        async for message in consumer:
            begun = begun or time.perf_counter()
            message.value = json.loads(message.value)
            if await handler(message):
                seen += 1
            if time.monotonic() - committed >= 1.0:
                await consumer.commit()
                committed = time.monotonic()
            if seen == messages:
                break
        await consumer.commit()
        return time.perf_counter() - begun
    finally:
        await consumer.stop()


async def by_class(servers: str, group: str, messages: int, kind: str) -> float:
    """Read all messages with the class; return seconds from the first message to the last."""
    seen, begun, took = 0, 0.0, 0.0
    loop = asyncio.get_running_loop()
    done = asyncio.Event()

    def count(number: int) -> None:
        nonlocal seen, begun, took
        begun = begun or time.perf_counter()
        seen += number
        if seen == messages:
            took = time.perf_counter() - begun
            loop.call_soon_threadsafe(done.set)

    async def one(message: Any) -> bool:
        assert message.value["n"] >= 0
        count(1)
        return True

    def plain(message: Any) -> bool:
        assert message.value["n"] >= 0
        count(1)
        return True

    async def batch(batches: Any) -> None:
        for records in batches.values():
            for message in records:
                assert message.value["n"] >= 0
            count(len(records))

    handler: Any = {"one by one": one, "one by one, plain function": plain, "batches": batch}[kind]
    async with AsyncResilientKafkaConsumer(TOPIC, group, servers) as consumer:
        task = asyncio.create_task(consumer.consume_messages(handler, batch_processing=kind == "batches"))
        await done.wait()
        await consumer.stop()
        await task
    return took


async def measure(servers: str, messages: int, turns: int) -> dict[str, list[float]]:
    """Return messages a second of each way, one number a turn; the ways take turns, so that a busy machine is fair."""
    await fill(servers, messages)

    async def handler(message: Any) -> bool:
        assert message.value["n"] >= 0
        return True

    rates: dict[str, list[float]] = {}
    for turn in range(turns):
        rates.setdefault("handwritten loop", []).append(
            messages / await by_hand(servers, f"hand-{turn}", messages, handler)
        )
        for kind in ("one by one", "one by one, plain function", "batches"):
            rates.setdefault(kind, []).append(
                messages / await by_class(servers, f"{kind[:3]}{len(kind)}-{turn}", messages, kind)
            )
    return rates


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--messages", type=int, default=60_000)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    stack = Stack.temporary({"kafka"})
    try:
        stack.start()
        rates = asyncio.run(measure(stack.env["KAFKA_BOOTSTRAP_SERVERS"], options.messages, options.turns))
    finally:
        stack.stop(discard=True)
    base = statistics.median(rates["handwritten loop"])
    print(f"| {'way':28} | messages/s (median of {options.turns}) | × handwritten |\n| --- | ---: | ---: |")
    for way, found in rates.items():
        rate = statistics.median(found)
        print(f"| {way:28} | {rate:,.0f} | {rate / base:.2f} |")


if __name__ == "__main__":
    main()
