"""librdkafka in batches, the limit of what Python can do beside it: consume(n), produce, flush, commit."""

from __future__ import annotations

import signal
import sys
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition

from bench.work import make_expand

BATCH = 5000


def main(bootstrap: str, source: str, target: str, group: str, compression: str) -> None:
    """Run until SIGTERM."""
    expand = make_expand()
    running = True

    def stop(*_: object) -> None:
        nonlocal running
        running = False

    signal.signal(signal.SIGTERM, stop)
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": group,
            "enable.auto.commit": False,
            "auto.offset.reset": "earliest",
            "fetch.wait.max.ms": 100,
        }
    )
    failed: list[KafkaError] = []

    def failure(error: KafkaError | None, _message: Message) -> None:
        if error is not None:
            failed.append(error)

    producer = Producer(
        {
            "bootstrap.servers": bootstrap,
            "acks": "all",
            "enable.idempotence": True,
            "compression.type": compression,
            "linger.ms": 5,
            "partitioner": "murmur2_random",
            "queue.buffering.max.messages": 1_000_000,
            # failures alone: a callback in Python for each success would cost more than the sending
            "delivery.report.only.error": True,
            "on_delivery": failure,
        }
    )
    consumer.subscribe([source])
    while running:
        messages: list[Any] = consumer.consume(BATCH, timeout=0.2)
        done: dict[int, int] = {}
        for message in messages:
            if message.error():
                raise KafkaException(message.error())
            for key, value in expand(message.value()):
                producer.produce(target, value, key)
            done[message.partition()] = message.offset() + 1
        if done:
            producer.flush()
            if failed:
                raise KafkaException(failed[0])
            consumer.commit(offsets=[TopicPartition(source, p, o) for p, o in done.items()], asynchronous=False)
    consumer.close()


if __name__ == "__main__":
    main(*sys.argv[1:6])
