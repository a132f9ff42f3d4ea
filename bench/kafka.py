"""What the measurements ask of Kafka: topics, a filled input, how far a group and an output are."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import GroupCoordinatorNotAvailableError, NotCoordinatorForGroupError
from aiokafka.partitioner import DefaultPartitioner

from bench.work import PARTITIONS

T = TypeVar("T")
MAX_BATCH_BYTES = 262_144


def partition_of(key: bytes) -> int:
    """Return the partition that Kafka's own partitioner gives ``key``."""
    everything = list(range(PARTITIONS))
    return int(DefaultPartitioner()(key, everything, everything))


class Broker:
    """A broker as the measuring process sees it, over one event loop that only runs inside these calls."""

    def __init__(self, bootstrap: str) -> None:
        self.bootstrap = bootstrap
        self._runner = asyncio.Runner()
        self._consumer: AIOKafkaConsumer | None = None

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine to its end."""
        return self._runner.run(work)

    def close(self) -> None:
        """Close what is connected."""
        if self._consumer is not None:
            self.run(self._consumer.stop())
        self._runner.close()

    def create(self, *topics: str, partitions: int = PARTITIONS) -> None:
        """Create topics that take Headrace's largest records."""

        async def work() -> None:
            admin = AIOKafkaAdminClient(bootstrap_servers=self.bootstrap)
            await admin.start()
            try:
                config = {"max.message.bytes": "8388608"}
                made = [NewTopic(name, partitions, 1, topic_configs=config) for name in topics]
                await admin.create_topics(made)
                while any(
                    any(part["leader"] < 0 for part in topic["partitions"]) or topic["error_code"]
                    for topic in await admin.describe_topics(list(topics))
                ):
                    await asyncio.sleep(0.1)
            finally:
                await admin.close()

        self.run(work())

    def fill(self, topic: str, records: Iterable[tuple[bytes, bytes]]) -> None:
        """Write ``records`` in full batches, lz4, each key in its partition."""

        async def work() -> None:
            producer = AIOKafkaProducer(
                bootstrap_servers=self.bootstrap,
                compression_type="lz4",
                acks="all",
                max_batch_size=MAX_BATCH_BYTES,
                linger_ms=20,
            )
            places: dict[bytes, int] = {}
            async with producer:
                last: dict[int, asyncio.Future[Any]] = {}
                for number, (key, value) in enumerate(records):
                    place = places.get(key)
                    if place is None:
                        place = places[key] = partition_of(key)
                    last[place] = await producer.send(topic, value, key=key, partition=place)
                    if number % 2000 == 0:
                        await asyncio.sleep(0)
                await producer.flush()
                await asyncio.gather(*last.values())

        self.run(work())

    async def _reader(self) -> AIOKafkaConsumer:
        if self._consumer is None:
            self._consumer = AIOKafkaConsumer(bootstrap_servers=self.bootstrap, enable_auto_commit=False)
            await self._consumer.start()
        return self._consumer

    def ends(self, topic: str) -> list[int]:
        """Return the end offset of each partition."""

        async def work() -> list[int]:
            consumer = await self._reader()
            partitions = [TopicPartition(topic, number) for number in range(PARTITIONS)]
            found = await consumer.end_offsets(partitions)
            return [found[tp] for tp in partitions]

        return self.run(work())

    def committed(self, group: str, topic: str) -> list[int]:
        """Return the offset that ``group`` has committed of each partition, 0 where it has none."""

        async def work() -> list[int]:
            admin = AIOKafkaAdminClient(bootstrap_servers=self.bootstrap)
            await admin.start()
            try:
                found = await admin.list_consumer_group_offsets(group)
            except (GroupCoordinatorNotAvailableError, NotCoordinatorForGroupError):
                # the first group of a new broker: the topic that keeps offsets is being made
                found = {}
            finally:
                await admin.close()
            offsets = {tp.partition: meta.offset for tp, meta in found.items() if tp.topic == topic}
            return [max(0, offsets.get(number, 0)) for number in range(PARTITIONS)]

        return self.run(work())

    def digest(self, topic: str, starts: list[int], count: int) -> tuple[int, int]:
        """Return number and checksum (any order) of the ``count`` records of each partition from ``starts`` on."""

        async def work() -> tuple[int, int]:
            consumer = AIOKafkaConsumer(
                bootstrap_servers=self.bootstrap, enable_auto_commit=False, max_partition_fetch_bytes=4 << 20
            )
            async with consumer:
                partitions = [TopicPartition(topic, number) for number in range(PARTITIONS)]
                consumer.assign(partitions)
                ends = {}
                for tp, start in zip(partitions, starts, strict=True):
                    consumer.seek(tp, start)
                    ends[tp] = min(start + count, (await consumer.end_offsets([tp]))[tp])
                seen = total = 0
                while [tp for tp in partitions if await consumer.position(tp) < ends[tp]]:
                    for tp, records in (await consumer.getmany(timeout_ms=500)).items():
                        for record in records:
                            if record.offset < ends[tp]:
                                seen += 1
                                total += checksum(record.key, record.value)
                return seen, total % 2**64

        return self.run(work())


def checksum(key: bytes, value: bytes) -> int:
    """Return a number that stands for one record."""
    return zlib.crc32(value, zlib.crc32(key)) * 0x9E3779B97F4A7C15 % 2**64


def digest_of(records: Iterable[bytes], expand: Callable[[bytes], list[tuple[bytes, bytes]]]) -> tuple[int, int]:
    """Return what :meth:`Broker.digest` has to find for inputs ``records``."""
    seen = total = 0
    for record in records:
        for key, value in expand(record):
            seen += 1
            total += checksum(key, value)
    return seen, total % 2**64
