"""The Faust producer with what Faust leaves open.

Guarantees: an unreachable broker is waited for with backoff, not exited on; records of one partition stay in order and
are not written twice by a retry (idempotent producer); a record that cannot be sent fails its own future and never the
buffer that tables write their changelogs through; whole batches can be sent with :meth:`Producer.send_many`.
"""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import aiokafka
from aiokafka import TopicPartition
from aiokafka.errors import KafkaError, KafkaTimeoutError, MessageSizeTooLargeError, ProducerClosed
from faust.transport import producer as faust_producer
from faust.transport.drivers import aiokafka as driver
from mode import Service

from streams.resilience.bounds import end, within
from streams.resilience.clients import Reach
from streams.resilience.failures import Retryable
from streams.resilience.options import ResilienceOptions
from streams.resilience.sequence import SequencedProducer

Headers = list[tuple[str, bytes]]
#: One record to send: topic, key, value, headers (or None).
Outgoing = tuple[str, bytes | None, bytes | None, Headers | None]

#: Keys whose partition is remembered, per topic; murmur2 in Python costs more than the rest of appending a record.
CACHED_KEYS = 100_000
#: Bytes of batches that may wait for the sender, over all partitions of a topic: enough that it always finds some.
QUEUED_BYTES = 24 * 1024 * 1024
_NO_HEADERS: Headers = []
#: Between two looks whether the client has any broker.
REACH_SECONDS = 2.0
#: Between two warnings that a partition takes nothing.
TELL_SECONDS = 30.0


class Lanes:
    """The partitions of one topic, and the one that each key goes to. ``room``: batches that may wait for each."""

    __slots__ = ("by_key", "choices", "partitions", "room")

    def __init__(self, topic: str, partitions: list[int], batch_bytes: int) -> None:
        self.partitions = [TopicPartition(topic, number) for number in partitions]
        self.choices = partitions
        self.by_key: dict[bytes | None, TopicPartition] = {}
        self.room = max(1, QUEUED_BYTES // batch_bytes // len(partitions))

    def choose(self, key: bytes | None, partitioner: Any) -> TopicPartition:
        """Return the partition of ``key``, one at random where there is none."""
        chosen = self.partitions[self.choices.index(partitioner(key, self.choices, self.choices))]
        if key is not None:
            self.by_key[key] = chosen
        return chosen


class Buffer(faust_producer.ProducerBuffer):
    """The buffer that tables and ``send_soon`` write through; one record that cannot go out does not end it."""

    async def on_stop(self) -> None:
        """Leave what is still buffered: the app flushed before, and what was not acknowledged is not committed."""

    async def _send_pending(self, fut: Any) -> None:
        try:
            await super()._send_pending(fut)
        except asyncio.CancelledError:
            raise
        except Exception as exc:
            # Faust lets this end the buffer and with it the worker. The record's future carries the failure to
            # whoever owes the record.
            if not fut.done():
                fut.set_exception(exc)


class Producer(driver.Producer):
    """aiokafka's producer under Faust, created anew when it fails."""

    app: Any
    transport: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        buffer = Buffer(loop=self.loop, beacon=self.beacon)
        buffer.app = self.app
        self.buffer = buffer
        self._topics: dict[str, Lanes] = {}
        self._recreating: asyncio.Lock = asyncio.Lock()
        self.recreations = 0
        self.last_failure: str | None = None

    @property
    def options(self) -> ResilienceOptions:
        """The options of the app that owns this producer."""
        options: ResilienceOptions = self.app.resilience
        return options

    @property
    def usable(self) -> bool:
        """Tell whether the client works or is about to be connected; a fenced or failed one does not."""
        return self._producer is None or _usable(self._producer)

    @property
    def _producer_type(self) -> type[aiokafka.AIOKafkaProducer]:
        return SequencedProducer

    @property
    def client(self) -> aiokafka.AIOKafkaClient | None:
        """aiokafka's client of the present producer, None while there is none that works."""
        producer = self._producer
        return producer.client if producer is not None and _usable(producer) else None

    def _settings_extra(self) -> Mapping[str, Any]:
        return {**super()._settings_extra(), **self.options.client, **self.options.producer}

    async def on_start(self) -> None:
        """Connect, however long it takes for a broker to be there."""
        await faust_producer.Producer.on_start(self)
        producer = await self._connect()
        if producer is not None:
            self._producer = producer

    async def _connect(self) -> aiokafka.AIOKafkaProducer | None:
        backoff = self.options.infrastructure_backoff()
        while not self.should_stop:
            producer = self._new_producer()
            try:
                await producer.start()
            except (KafkaError, OSError, TimeoutError) as exc:
                await _quietly(producer.stop())
                delay = backoff.next()
                self.last_failure = f"{type(exc).__name__}: {exc}"
                self.log.warning(
                    "Kafka cannot be reached for producing (%s: %s); trying again in %.1f s. "
                    "KAFKA_BOOTSTRAP_SERVERS=%s",
                    type(exc).__name__,
                    exc,
                    delay,
                    ",".join(self._settings_default()["bootstrap_servers"]),
                )
                await self.sleep(delay)
            except BaseException:
                await _quietly(producer.stop())
                raise
            else:
                self.last_failure = None
                return producer
        return None

    @Service.task
    async def _keep_in_reach(self) -> None:
        reach = Reach()
        while not self.should_stop:
            await self.sleep(REACH_SECONDS)
            await reach.look(self.client, time.monotonic())

    async def recreate(self, why: str) -> None:
        """Close the producer and build a new one; what was not acknowledged fails and is sent again by its owner."""
        async with self._recreating:
            old = self._producer
            if old is not None and _usable(old):
                return
            self.log.warning("Recreating the producer of stage %s: %s", self.options.stage, why)
            if old is not None:
                await _abandon(old)
            new = await self._connect()
            if new is not None:
                self._producer = new
                self.recreations += 1
                self.app.accounts.recreations += 1
                self.log.info("Successfully recreated producer after error (attempt %d)", self.recreations)

    async def _ready(self) -> aiokafka.AIOKafkaProducer:
        producer = self._producer
        if producer is None:
            if self.should_stop:
                raise ProducerClosed
            raise Retryable("the producer is not connected yet")
        if not _usable(producer):
            await self.recreate("it was fenced or failed")
            producer = self._producer
            if producer is None:
                raise Retryable("the producer is being created anew")
        return producer

    async def send(self, topic: str, key: bytes | None, value: bytes | None, *args: Any, **kwargs: Any) -> Any:
        """Send one record as Faust does, through a producer that works."""
        await self._ready()
        return await super().send(topic, key, value, *args, **kwargs)

    async def send_record(self, record: Outgoing) -> asyncio.Future[Any]:
        """Hand one record to the producer; the future resolves when Kafka has acknowledged it."""
        producer = await self._ready()
        topic, key, value, headers = record
        future: asyncio.Future[Any] = await producer.send(topic, value, key=key, headers=headers)
        return future

    async def _lanes(self, producer: aiokafka.AIOKafkaProducer, topic: str) -> Lanes:
        partitions = producer.client.cluster.partitions_for_topic(topic)
        if not partitions:
            partitions = await producer.partitions_for(topic)
        lanes = self._topics.get(topic)
        if lanes is None or len(lanes.partitions) != len(partitions) or len(lanes.by_key) > CACHED_KEYS:
            lanes = self._topics[topic] = Lanes(topic, sorted(partitions), producer._message_accumulator._batch_size)
        return lanes

    async def send_many(self, records: Sequence[Outgoing]) -> list[asyncio.Future[Any]]:
        """Hand records over; each future resolves when Kafka has acknowledged a batch that some of them are in.

        What several calls send to a partition shares its batches: aiokafka has one request a broker under way, and a
        request takes one batch of each partition, so that small batches of their own would queue up. Order is kept per
        partition. Waits while the queue of a partition is full, which is the back-pressure of a slow broker. Raises
        ``MessageSizeTooLargeError`` before anything is sent when one record is larger than a request may be.
        """
        producer = await self._ready()
        self._refuse_oversize(records, producer._max_request_size)
        accumulator = producer._message_accumulator
        queues = accumulator._batches
        futures: dict[asyncio.Future[Any], None] = {}
        builders: dict[TopicPartition, Any] = {}
        known: dict[str, Lanes] = {}
        now_ms = int(time.time() * 1000)
        builder: Any = None
        last_topic: str | None = None
        last_key: bytes | None = None
        for topic, key, value, headers in records:
            # The outputs of one message mostly share topic and key, the very objects.
            if key is None or key is not last_key or topic is not last_topic:
                if topic not in known:
                    builders.clear()
                    known[topic] = await self._lanes(producer, topic)
                lanes = known[topic]
                tp = lanes.by_key.get(key) or lanes.choose(key, producer._partitioner)
                builder = builders.get(tp)
                last_topic, last_key = topic, key
            # A batch takes records until the sender takes it off its queue; no await may come between.
            if builder is not None:
                # what BatchBuilder.append does, at half its cost
                count = builder._relative_offset
                if builder._builder.append(count, now_ms, key, value, headers or _NO_HEADERS) is not None:
                    builder._relative_offset = count + 1
                    continue
                builder.close()
            queue = queues.get(tp)
            batch: Any = queue[-1] if queue else None
            record = {"timestamp": now_ms, "key": key, "value": value, "headers": headers or _NO_HEADERS}
            if batch is None or batch._builder.append(**record) is None:
                if queue and len(queue) >= lanes.room:
                    builders.clear()
                    await self._wait_for_room(producer, tp, lanes.room)
                batch = accumulator._append_batch(accumulator.create_builder(), tp)
                batch._builder.append(**record)
            builder = builders[tp] = batch._builder
            futures[batch.future] = None
        # The futures are shared: what cancels its wait must not cancel the others'.
        return [asyncio.shield(future) for future in futures]

    @staticmethod
    def _refuse_oversize(records: Sequence[Outgoing], limit: int) -> None:
        if max([len(record[2]) for record in records if record[2] is not None], default=0) <= limit:
            return
        topic, size = next((record[0], len(record[2])) for record in records if record[2] and len(record[2]) > limit)
        raise MessageSizeTooLargeError(f"a record of {size} bytes for {topic} is larger than max_request_size={limit}")

    async def _wait_for_room(self, producer: aiokafka.AIOKafkaProducer, tp: TopicPartition, room: int) -> None:
        accumulator = producer._message_accumulator
        started = told = time.monotonic()
        while True:
            if accumulator._closed:
                raise ProducerClosed
            if accumulator._exception is not None:
                raise copy.copy(accumulator._exception)
            queue = accumulator._batches.get(tp)
            if not queue or len(queue) < room:
                return
            await queue[0].wait_drain(timeout=1.0)
            now = time.monotonic()
            if now - told >= TELL_SECONDS:
                told = now
                self.log.warning(
                    "Kafka has not taken a batch for %s[%d] for %.0f s", tp.topic, tp.partition, now - started
                )

    async def send_to(
        self, topic: str, partition: int, records: Iterable[tuple[bytes, bytes | None]]
    ) -> list[tuple[int, asyncio.Future[Any]]]:
        """Hand keys and values to one partition as whole batches; returns how many each holds, and its future."""
        producer = await self._ready()
        batches = []
        batch, count = producer.create_batch(), 0
        for key, value in records:
            if batch.append(key=key, value=value, timestamp=None) is None:
                batches.append((count, batch))
                batch, count = producer.create_batch(), 0
                if batch.append(key=key, value=value, timestamp=None) is None:
                    raise MessageSizeTooLargeError(f"a record of {len(value or b'')} bytes for {topic}")
            count += 1
        if count:
            batches.append((count, batch))
        return [(count, await self._send_batch(producer, (topic, partition), batch)) for count, batch in batches]

    async def _send_batch(
        self, producer: aiokafka.AIOKafkaProducer, where: tuple[str, int], batch: Any
    ) -> asyncio.Future[Any]:
        topic, partition = where
        batch.close()
        started = time.monotonic()
        while True:
            try:
                future: asyncio.Future[Any] = await producer.send_batch(batch, topic, partition=partition)
            except KafkaTimeoutError:
                # The queue of this partition stayed full: nothing of this batch was taken, so offering it again
                # cannot repeat it. aiokafka counts the time that it waited twice, which is why this comes early.
                if not _usable(producer) or self.should_stop:
                    raise
                self.log.warning(
                    "Kafka has not taken a batch for %s[%d] for %.0f s", topic, partition, time.monotonic() - started
                )
            else:
                return future

    async def flush(self) -> None:
        """Send out what is buffered, within the bound of a request."""
        await self.buffer.flush()
        if self._producer is not None:
            try:
                await within(self._producer.flush(), self.options.drain_seconds)
            except TimeoutError:
                self.log.warning(
                    "Producer of stage %s: flush not done within %.0f s (DRAIN_SECONDS); what was not acknowledged is "
                    "not committed and comes again",
                    self.options.stage,
                    self.options.drain_seconds,
                )

    async def on_stop(self) -> None:
        """Stop within a bound: aiokafka waits for a broker that is away for as long as it is away."""
        self.transport._topic_waiters.clear()
        producer, self._producer = self._producer, None
        if producer is not None:
            await _abandon(producer, self.options.drain_seconds)


def _usable(producer: aiokafka.AIOKafkaProducer) -> bool:
    if producer._closed:
        return False
    if (
        producer._sender is not None
        and producer._sender.sender_task is not None
        and producer._sender.sender_task.done()
    ):
        return False
    if isinstance(producer, SequencedProducer) and producer.out_of_sequence is not None:
        return False
    return producer._message_accumulator._exception is None


async def _abandon(producer: aiokafka.AIOKafkaProducer, seconds: float = 5.0) -> None:
    """Close ``producer`` whatever state it is in; all that it has not delivered fails, so that its owners hear of it.

    aiokafka's own ``stop`` waits for a broker that is away; cut short, it leaves the sender running.
    """
    await _quietly(within(producer.stop(), seconds))
    sender = producer._sender
    if sender is not None and sender.sender_task is not None and not sender.sender_task.done():
        await end(sender.sender_task)
    producer._message_accumulator.fail_all(ProducerClosed())
    await _quietly(within(producer.client.close(), seconds))
    # Whoever waits for metadata of a client that is closed would wait for ever.
    waited_for = producer.client._md_update_fut
    if waited_for is not None and not waited_for.done():
        waited_for.set_exception(ProducerClosed())
        waited_for.exception()  # seen: mostly nobody waits


async def _quietly(awaitable: Any) -> None:
    """Await the end of something that is given up; how it ends changes nothing any more."""
    try:
        await awaitable
    except asyncio.CancelledError:
        raise
    except Exception as exc:
        driver.logger.debug("while giving up a client: %r", exc)
