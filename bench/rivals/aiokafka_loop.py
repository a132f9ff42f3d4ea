"""A handwritten aiokafka loop: all that is there, a send for each reading, one gather and one commit a batch."""

from __future__ import annotations

import asyncio
import signal
import sys

import uvloop
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from bench.work import make_expand


async def main(bootstrap: str, source: str, target: str, group: str, compression: str) -> None:
    """Run until SIGTERM."""
    expand = make_expand()
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    consumer = AIOKafkaConsumer(
        source,
        bootstrap_servers=bootstrap,
        group_id=group,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        fetch_max_wait_ms=100,
    )
    producer = AIOKafkaProducer(
        bootstrap_servers=bootstrap,
        acks="all",
        enable_idempotence=True,
        compression_type=compression,
        linger_ms=5,
        max_batch_size=1_048_576,
    )
    async with consumer, producer:
        while not stopped.is_set():
            fetched = await consumer.getmany(timeout_ms=200, max_records=2000)
            sent = [
                await producer.send(target, value, key=key)
                for records in fetched.values()
                for record in records
                for key, value in expand(record.value)
            ]
            if sent:
                await asyncio.gather(*sent)
                await consumer.commit()


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:6]))
