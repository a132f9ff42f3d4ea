"""A mail for each large order, with the class."""

import asyncio
from typing import Any

from streams.resilience import AsyncResilientKafkaConsumer


async def run(sink: Any, topic: str, group: str, servers: str, stop: asyncio.Event) -> None:
    """Work until ``stop``."""

    async def handle(message: Any) -> None:
        if message.value["amount"] >= 0:
            await sink.write(message.value["n"])

    consumer = AsyncResilientKafkaConsumer(
        topic, group, servers, on_error_callback=sink.told, dead_letter_topic=f"{topic}-errors"
    )
    async with consumer:
        task = asyncio.create_task(consumer.consume_messages(handle))
        await stop.wait()
    await task
