"""A topic read whole, by every worker that needs it: rules, devices, what is down.

Guarantee: :meth:`Feed.ready` returns once everything that was in the topic at the start has been handed over; from then
on each new record is, in order per partition. No group is joined and nothing is committed; an absent broker is waited
for, and a consumer that fails is made anew and reads on from where it was. A record that does not decode is logged and
passed over: it must not keep the good ones from being used.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError
from mode import Service

from settings import Settings
from streams.resilience.backoff import Backoff
from streams.topics import Declaration

#: Called with key and decoded value; None for a record that takes its key back (a tombstone).
OnRecord = Callable[[str, Any], None]


class Feeds:
    """The feeds that an app's agents wait for; its services set :attr:`all`. Under ``test_context`` there are none."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self.all: list[Feed] = []

    async def ready(self) -> None:
        """Return once all that the topics held at the start has been handed over."""
        if self._app.testing:
            return
        while not self.all:
            await asyncio.sleep(0.05)
        for feed in self.all:
            await feed.ready()


class Feed(Service):
    """Follows one topic. ``on_caught_up`` is called each time that the end has been reached after new records."""

    def __init__(
        self,
        settings: Settings,
        declaration: Declaration,
        on_record: OnRecord,
        *,
        on_caught_up: Callable[[], None] = lambda: None,
        **kwargs: Any,
    ) -> None:
        self.settings = settings
        self.declaration = declaration
        self._on_record = on_record
        self._on_caught_up = on_caught_up
        self._positions: dict[TopicPartition, int] = {}
        self._caught_up: asyncio.Event | None = None
        super().__init__(**kwargs)

    @property
    def caught_up(self) -> bool:
        """Whether all that the topic held at the start has been handed over."""
        return self._caught_up is not None and self._caught_up.is_set()

    async def ready(self) -> None:
        """Wait until all that the topic held at the start has been handed over."""
        if self._caught_up is None:
            self._caught_up = asyncio.Event()
        await self._caught_up.wait()

    @Service.task
    async def _follow(self) -> None:
        backoff = Backoff(self.settings.retry_base_seconds, self.settings.broker.reconnect_backoff_max_seconds)
        while not self.should_stop:
            consumer = AIOKafkaConsumer(**self.settings.kafka_client_options(), enable_auto_commit=False)
            try:
                await consumer.start()
                await self._read(consumer)
            except (KafkaError, OSError, TimeoutError) as exc:
                delay = backoff.next()
                self.log.warning("%s cannot be read (%r); trying again in %.1f s", self.declaration.name, exc, delay)
                await self.sleep(delay)
            finally:
                await consumer.stop()

    async def _read(self, consumer: AIOKafkaConsumer) -> None:
        name = self.declaration.name
        await consumer._client.set_topics([name])
        await consumer._client.force_metadata_update()
        partitions = [TopicPartition(name, number) for number in sorted(consumer.partitions_for_topic(name) or ())]
        if not partitions:
            raise TimeoutError(f"{name} has no partitions yet")
        consumer.assign(partitions)
        first = await consumer.beginning_offsets(partitions)
        ends = await consumer.end_offsets(partitions)
        for partition in partitions:
            # a topic that was made anew begins again
            at = self._positions.get(partition, first[partition])
            consumer.seek(partition, at if first[partition] <= at <= ends[partition] else first[partition])
        behind = {partition for partition in partitions if ends[partition] > first[partition]}
        if not behind:
            self._reached()
        while not self.should_stop:
            batches = await consumer.getmany(timeout_ms=200)
            for partition, records in batches.items():
                for record in records:
                    self._hand_over(record)
                self._positions[partition] = await consumer.position(partition)
            for partition in list(behind):
                if await consumer.position(partition) >= ends[partition]:
                    behind.discard(partition)
            if batches and not behind:
                self._reached()

    def _reached(self) -> None:
        if self._caught_up is None:
            self._caught_up = asyncio.Event()
        self._on_caught_up()
        self._caught_up.set()

    def _hand_over(self, record: Any) -> None:
        key = (record.key or b"").decode("utf-8", "replace")
        try:
            value = None if record.value is None else self.declaration.decode(record.value)
            self._on_record(key, value)
        except (msgspec.MsgspecError, ValueError, TypeError) as exc:
            self.log.warning(
                "%s[%d]@%d of key %r is passed over: %s", record.topic, record.partition, record.offset, key, exc
            )
