"""The total of each customer, with a polling loop written by hand."""

import asyncio
import json
import logging
from collections import Counter
from typing import Any

from aiokafka import AIOKafkaConsumer
from aiokafka.errors import KafkaError

log = logging.getLogger("bench.services.before.totals")


async def connect(topic: str, group: str, servers: str) -> AIOKafkaConsumer:
    """Connect, again and again."""
    delay = 1.0
    while True:
        consumer = AIOKafkaConsumer(
            topic,
            group_id=group,
            bootstrap_servers=servers,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
        )
        try:
            await consumer.start()
        except (KafkaError, OSError) as error:
            log.warning("kafka: cannot connect: %s", error)
            await consumer.stop()
            await asyncio.sleep(delay)
            delay = min(delay * 2, 30.0)
        else:
            return consumer


async def close(consumer: AIOKafkaConsumer) -> None:
    """Close, whatever that raises."""
    try:
        await consumer.stop()
    except (KafkaError, OSError) as error:
        log.warning("kafka: cannot close: %s", error)


totals: Counter[bytes] = Counter()


async def handle(sink: Any, message: Any) -> None:
    """Add one order to its customer's total."""
    try:
        order = json.loads(message.value)
    except ValueError as error:
        log.warning("offset %d is no JSON: %s", message.offset, error)
        return
    try:
        await sink.write(order["n"])
        totals[message.key] += order["amount"]
    except ConnectionError as error:
        log.warning("cannot add offset %d: %s", message.offset, error)


async def run(sink: Any, topic: str, group: str, servers: str, stop: asyncio.Event) -> None:
    """Work until ``stop``."""
    consumer = await connect(topic, group, servers)
    while not stop.is_set():
        try:
            batches = await consumer.getmany(timeout_ms=1000)
            for messages in batches.values():
                for message in messages:
                    await handle(sink, message)
            if batches:
                await consumer.commit()
        except (KafkaError, OSError) as error:
            log.warning("kafka: %s", error)
            await close(consumer)
            await asyncio.sleep(1)
            consumer = await connect(topic, group, servers)
    await close(consumer)
