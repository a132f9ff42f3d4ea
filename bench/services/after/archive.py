"""Orders to an archive in batches, with the class."""

import asyncio
from typing import Any

from streams.resilience import AsyncResilientKafkaConsumer


async def run(sink: Any, topic: str, group: str, servers: str, stop: asyncio.Event) -> None:
    """Work until ``stop``."""

    async def handle(batches: Any) -> dict[Any, int]:
        done = dict.fromkeys(batches, 0)
        for partition, messages in batches.items():
            for message in messages:
                try:
                    await sink.write(message.value["n"])
                except ConnectionError:
                    return done
                done[partition] += 1
        return done

    consumer = AsyncResilientKafkaConsumer(
        topic, group, servers, on_error_callback=sink.told, dead_letter_topic=f"{topic}-errors"
    )
    async with consumer:
        task = asyncio.create_task(consumer.consume_messages(handle, batch_processing=True))
        await stop.wait()
    await task
