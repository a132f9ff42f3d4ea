"""The total of each customer, with the class."""

import asyncio
from collections import Counter
from typing import Any

from streams.resilience import AsyncResilientKafkaConsumer


async def run(sink: Any, topic: str, group: str, servers: str, stop: asyncio.Event) -> None:
    """Work until ``stop``."""

    totals: Counter[bytes] = Counter()

    async def handle(message: Any) -> None:
        await sink.write(message.value["n"])
        totals[message.key] += message.value["amount"]

    consumer = AsyncResilientKafkaConsumer(
        topic, group, servers, on_error_callback=sink.told, dead_letter_topic=f"{topic}-errors"
    )
    async with consumer:
        task = asyncio.create_task(consumer.consume_messages(handle))
        await stop.wait()
    await task
