"""The Faust transport that keeps Headrace's promise: delivery, commit control and back-pressure.

Guarantees: a commit never passes a record whose handling is not complete (:mod:`streams.resilience.commits`); what a
fetch brought of one partition goes to agents of a chunk topic as one event, and record by record to all other agents;
what is in flight is bounded in bytes, and reading goes on the moment that there is room; a revocation waits a bounded
time for what is in flight and then commits the mark.

Hooked in by ``app.transport``; nothing of Faust or aiokafka is patched.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable, Mapping
from typing import Any

from aiokafka.errors import ConsumerStoppedError
from faust.exceptions import ConsumerNotStarted
from faust.transport import consumer as faust_consumer
from faust.transport.drivers import aiokafka as driver
from faust.types import TP
from mode import Service

from streams.resilience.bounds import within
from streams.resilience.commits import Ledgers
from streams.resilience.consumer_thread import ConsumerThread
from streams.resilience.delivery import Completing, Delivery
from streams.resilience.positions import Positions
from streams.resilience.producer import Producer

#: Stands for aiokafka's record object and the objects around key and value (tracemalloc, CPython 3.11).
RECORD_BYTES = 500
#: How long a fetch waits for the first record. Short where a partition has no room just now: it may have it soon.
FETCH_WAIT_SECONDS = 1.0
FETCH_WAIT_CROWDED_SECONDS = 0.02
#: After a fetch of so few records the next one waits a little: a fetch costs as much for one record as for hundreds,
#: and at some hundred records a second little else would be done.
FEW_RECORDS = 200
FEW_RECORDS_SECONDS = 0.008
#: How long a revocation, or the end, waits for the answer to its commit; the drain before it has a bound of its own.
LAST_COMMIT_SECONDS = 5.0


class RebalanceListener(driver.ConsumerRebalanceListener):
    """Keeps the membership while an assignment is taken up.

    aiokafka sends heartbeats only once this has returned, and tables are opened meanwhile: where that takes longer than
    the session, the broker forgets the member, which joins again and opens its tables again, and so on.
    """

    async def on_partitions_assigned(self, assigned: Iterable[Any]) -> None:
        """Take up an assignment."""
        coordinator: Any = self._thread._ensure_consumer()._coordinator
        coordinator._start_heartbeat_task()
        await super().on_partitions_assigned(assigned)


class Consumer(Completing, Positions, driver.Consumer):
    """Faust's consumer with commit control of our own."""

    RebalanceListener = RebalanceListener

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ledgers = Ledgers(self.options.in_flight_bytes)
        #: partitions that are not read just now, and the streams that hold them back
        self.held: dict[TP, set[Any]] = {}
        self.busy: set[Delivery] = set()
        self.last_commit_at: float | None = None
        self.last_fetch_at = time.monotonic()
        #: ends of logs as last asked for; a partition that is not read just now does not learn them from fetches
        self.ends = {}
        self.reached = {}
        self.fetch_failures = 0
        self.recreations = 0
        self.last_failure: str | None = None
        self._room: asyncio.Event | None = None
        self._committing: asyncio.Lock | None = None

    def topic_partitions(self, topic: str) -> int | None:
        """Return how many partitions a topic has, None where the client has not seen it yet (0 to aiokafka)."""
        return super().topic_partitions(topic) or None

    def _new_consumer_thread(self) -> ConsumerThread:
        return ConsumerThread(self, loop=self.loop, beacon=self.beacon)

    # -- reading ----------------------------------------------------------------------------------------------------

    def wake_reader(self) -> None:
        """Let the reader look again: there may be room, a partition more, or an end."""
        if self._room is not None:
            self._room.set()

    def hold(self, tp: TP, stream: Any) -> None:
        """Stop fetching ``tp`` while ``stream`` tries its head again; heartbeats and the other partitions go on."""
        self.held.setdefault(tp, set()).add(stream)

    def release(self, tp: TP, stream: Any) -> None:
        """Fetch ``tp`` again, unless another stream holds it back too."""
        streams = self.held.get(tp)
        if streams is not None:
            streams.discard(stream)
            if not streams:
                del self.held[tp]
        self.wake_reader()

    def resume_partitions(self, tps: Iterable[TP]) -> None:
        """Resume fetching from partitions, at once."""
        super().resume_partitions(tps)
        self.wake_reader()

    def resume_flow(self) -> None:
        """Allow delivery, at once."""
        super().resume_flow()
        self.wake_reader()

    def on_buffer_full(self, tp: TP) -> None:
        """Ignore Faust's flow control: the bound in bytes stands for it, and it wakes up at once."""

    def on_buffer_drop(self, tp: TP) -> None:
        """Ignore Faust's flow control."""

    async def _wait_for_room(self, seconds: float) -> None:
        if self._room is None:
            self._room = asyncio.Event()
        self._room.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._room.wait()

    async def _drain_messages(self, fetcher: Any) -> None:
        """Fetch and deliver until the consumer or ``fetcher`` (which recovery stops and starts) ends."""
        try:
            await self._read(fetcher)
        except asyncio.CancelledError:
            # Faust takes a fetcher that is cancelled within a rebalance for one that failed, and ends the worker with
            # an error: also when the cancellation is part of an orderly end.
            if not self.transport.app.should_stop:
                raise

    async def _read(self, fetcher: Any) -> None:
        backoff = self.options.infrastructure_backoff()
        while not (self.should_stop or fetcher.should_stop):
            if not self.flow_active:
                await self._wait_for_room(FETCH_WAIT_SECONDS)
                continue
            active = self._readable()
            readable = self._uncrowded(self.ledgers.with_room(active))
            if not readable:
                await self._wait_for_room(FETCH_WAIT_SECONDS)
                # A fetch that nobody asked for is not overdue.
                self.last_fetch_at = time.monotonic()
                continue
            self.not_waiting_next_records.clear()
            try:
                if self._thread.without_position:
                    await self.find_positions()
                wait = FETCH_WAIT_SECONDS if len(readable) == len(active) else FETCH_WAIT_CROWDED_SECONDS
                records = await self._thread.fetch(readable, wait)
                generation = self.app.consumer_generation_id
                self.last_fetch_at = time.monotonic()
                self.fetch_failures = 0
                backoff.healthy()
            except ConsumerStoppedError:
                if self.should_stop or self.transport.app.should_stop:
                    return
                await self._fetch_failed(ConsumerStoppedError("the consumer is closed"), backoff.next())
                continue
            except Exception as exc:
                await self._fetch_failed(exc, backoff.next())
                continue
            finally:
                self.not_waiting_next_records.set()
            if records:
                await self._deliver_all(records, generation)
                if sum(map(len, records.values())) < FEW_RECORDS:
                    await asyncio.sleep(FEW_RECORDS_SECONDS)
            else:
                await asyncio.sleep(0)
            if self._thread.gaps:
                self._pass_gaps()

    def _readable(self) -> set[TP]:
        """Return the partitions that may be read now.

        While the group rebalances and tables are restored, changelogs only: Faust lets the flow go on before it has
        set the positions of all others and emptied the queues, and what is read too early would never be handled.
        """
        active = self._get_active_partitions() - self.held.keys()
        if self.app.rebalancing:
            acks_enabled_for = self.app.topics.acks_enabled_for
            return {tp for tp in active if not acks_enabled_for(tp.topic)}
        return active

    def _uncrowded(self, tps: set[TP]) -> set[TP]:
        """Leave out partitions with enough chunks under way: small chunks cost as much as large ones."""
        chunked, limit = self.app.chunk_topics, self.options.chunks_in_flight
        return {tp for tp in tps if tp.topic not in chunked or self.ledgers.spans_of(tp) < limit}

    async def _fetch_failed(self, exc: BaseException, delay: float) -> None:
        self.fetch_failures += 1
        self.last_failure = f"{type(exc).__name__}: {exc}"
        self.log.warning(
            "Fetch failed in group %s (%s: %s), %d in a row; trying again in %.1f s",
            self.app.conf.id,
            type(exc).__name__,
            exc,
            self.fetch_failures,
            delay,
        )
        await self.app.on_fetch_failure(exc)
        await self._wait_for_room(delay)

    async def _deliver_all(self, fetched: Mapping[Any, list[Any]], generation: int) -> None:
        acks_enabled_for = self.app.topics.acks_enabled_for
        chunked = self.app.chunk_topics
        size = self.options.chunk_records
        for kafka_tp, records in fetched.items():
            tp = TP(kafka_tp.topic, kafka_tp.partition)
            if not acks_enabled_for(tp.topic):
                if generation == self.app.consumer_generation_id:
                    await self._deliver_changelog(tp, records)
            elif tp.topic in chunked:
                for start in range(0, len(records), size):
                    await self._deliver(tp, records[start : start + size], generation)
            else:
                for number, record in enumerate(records):
                    await self._deliver_one(tp, record, generation)
                    if number % 100 == 99:
                        await asyncio.sleep(0)

    def _pass_gaps(self) -> None:
        """Pass over what fetches have found no record in, once all that is before it was delivered."""
        gaps = self._thread.gaps
        for tp, gap in list(gaps.items()):
            generation, first, to = gap
            ledger = self.ledgers.get(tp)
            if (
                ledger is None
                and first == self._committed_offset.get(tp)
                and self.app.topics.acks_enabled_for(tp.topic)
            ):
                ledger = self.ledgers.open(tp, first)
                ledger.read_to = first
            if ledger is not None and self._deliverable(generation):
                ledger.pass_over(first, to)
            if gaps.get(tp) is gap:
                del gaps[tp]

    def _deliverable(self, generation: int | None) -> bool:
        """Tell whether records of ``generation`` still count; asked right before each hand-over.

        A hand-over can wait, and the partition be revoked meanwhile. What is left of the fetch then comes again from
        the committed offset; delivered all the same it would be taken for the beginning of the next generation.
        """
        return (
            self.flow_active
            and generation == self.app.consumer_generation_id
            and not self.app.rebalancing
            and self.app.flow_control.is_active()
        )

    async def _deliver_changelog(self, tp: TP, records: list[Any]) -> None:
        read = self._read_offset[tp]
        fresh = [record for record in records if read is None or record.offset >= read]
        if not fresh:
            return
        self.app.monitor.track_tp_end_offset(tp, self.highwater(tp))
        if self.app.tables.recovery.take(tp, fresh):
            self._read_offset[tp] = fresh[-1].offset
            return
        for record in fresh:
            await self.callback(self._to_message(tp, record))
            self._read_offset[tp] = record.offset

    async def _deliver(self, tp: TP, records: list[Any], generation: int) -> None:
        last = records[-1]
        size = sum([record.serialized_key_size + record.serialized_value_size for record in records])
        size += RECORD_BYTES * len(records)
        message = Delivery(
            tp.topic,
            tp.partition,
            last.offset,
            last.timestamp / 1000.0,
            last.timestamp_type,
            None,
            None,
            None,
            None,
            0,
            size,
            tp,
            generation_id=generation,
        )
        message.records = records
        await self._hand_over(tp, message, records[0].offset, len(records), size)

    async def _deliver_one(self, tp: TP, record: Any, generation: int) -> None:
        message = Delivery(
            record.topic,
            record.partition,
            record.offset,
            record.timestamp / 1000.0,
            record.timestamp_type,
            record.headers,
            record.key,
            record.value,
            record.checksum,
            record.serialized_key_size,
            record.serialized_value_size,
            tp,
            generation_id=generation,
        )
        size = record.serialized_key_size + record.serialized_value_size + RECORD_BYTES
        await self._hand_over(tp, message, record.offset, 1, size)

    async def _hand_over(self, tp: TP, message: Delivery, first: int, count: int, size: int) -> None:
        if not self._deliverable(message.generation_id):
            return
        ledger = self.ledgers.get(tp)
        if ledger is not None and ledger.read_to is not None and first < ledger.read_to:
            self.log.error(
                "%s[%d] in group %s goes on at offset %d although %d was read: its log was reset, or somebody set the "
                "position back; what follows is handled as new",
                tp.topic,
                tp.partition,
                self.app.conf.id,
                first,
                ledger.read_to - 1,
            )
            self.forget({tp})
            ledger = None
        if ledger is None:
            ledger = self.ledgers.open(tp, self._committed_offset.get(tp))
        span = ledger.deliver(first, message.offset, count, size)
        if span is None:
            return
        self.accounts.deliver(count)
        message.span = span
        message.ledger = ledger
        self._read_offset[tp] = message.offset
        await self.callback(message)

    # -- committing -------------------------------------------------------------------------------------------------

    async def commit(self, topics: Any = None, start_new_transaction: bool = True) -> bool:  # noqa: ARG002
        """Commit the mark of every partition that has moved; what fails is tried again at the next interval."""
        if self.app.client_only:
            return False
        if self._committing is None:
            self._committing = asyncio.Lock()
        async with self._committing:
            offsets = self.ledgers.committable()
            if not offsets:
                return False
            try:
                held = self.assignment()
            except ConsumerNotStarted:
                return False
            offsets = {tp: offset for tp, offset in offsets.items() if tp in held}
            if not offsets or not await self._thread.commit_offsets(offsets):
                return False
            self.ledgers.committed(offsets)
            self._committed_offset.update(offsets)
            self.reached.update(offsets)
            self.last_commit_at = time.monotonic()
            self.accounts.commits += 1
            self.app.tables.on_commit(offsets)
            self.app.monitor.on_tp_commit(offsets)
            return True

    async def drain(self, seconds: float) -> None:
        """Wait, within ``seconds``, until what agents have begun is complete; then commit the mark."""
        until = time.monotonic() + seconds
        while self.busy and time.monotonic() < until:
            await self._wait_for_room(0.1)
        if self.busy:
            self.log.warning(
                "%d message(s) or chunk(s) of stage %s still in flight after %.1f s (DRAIN_SECONDS, SHUTDOWN_SECONDS); "
                "they are not committed and will be received again",
                len(self.busy),
                self.options.stage,
                seconds,
            )
        await self._last_commit()

    async def _last_commit(self) -> None:
        """Commit what is complete before the partitions go; a broker that does not answer holds nobody up for long."""
        try:
            await within(self.commit(), LAST_COMMIT_SECONDS)
        except TimeoutError:
            self.log.warning(
                "Last commit of group %s not answered within %.0f s: what is not committed comes again",
                self.app.conf.id,
                LAST_COMMIT_SECONDS,
            )

    async def wait_empty(self) -> None:
        """Drain; Faust's name for it."""
        await self.drain(self.options.drain_seconds)

    async def on_stop(self) -> None:
        """Commit what is complete; the app has drained before."""
        await self._last_commit()
        self.transport._topic_waiters.clear()

    async def on_task_error(self, exc: BaseException) -> None:
        """Do nothing: an agent's failure is settled where its event is."""

    @Service.transitions_to(faust_consumer.CONSUMER_PARTITIONS_REVOKED)
    async def on_partitions_revoked(self, revoked: set[TP]) -> None:
        """Drain and commit, then forget the partitions: what is in flight comes again where they go."""
        await self._on_partitions_revoked(revoked)
        if self._active_partitions is not None:
            self._active_partitions.difference_update(revoked)
        self._paused_partitions.difference_update(revoked)
        self.forget(revoked)

    async def on_partitions_assigned(self, assigned: set[TP], generation_id: int = 0) -> None:
        """Take up the assignment; nothing that was known of an earlier one counts any more.

        A consumer that was swapped, or fell out of its group unnoticed, was not told of a revocation.
        """
        self.forget(set(self.ledgers))
        await super().on_partitions_assigned(assigned, generation_id)

    def forget(self, tps: Iterable[TP]) -> None:
        """Drop all that is known of partitions which this consumer no longer holds."""
        gone = set(tps)
        self.accounts.give_back(self.ledgers.close(gone))
        self.busy = {message for message in self.busy if message.tp not in gone}
        for tp in gone:
            self._read_offset.pop(tp, None)
            self._committed_offset.pop(tp, None)
            self.ends.pop(tp, None)
        self.app.forget(gone)
        self.wake_reader()

    async def recreate(self, why: str) -> None:
        """Close the aiokafka consumer and build a new one inside the living app; it joins the group as a new member.

        What was in flight is forgotten here and comes again from the committed offset.
        """
        topics = ",".join(sorted({topic for channel in self.app.topics for topic in channel.topics})) or "-"
        self.log.warning("Consumer health check failed for topic '%s', triggering reconnection", topics)
        self.log.warning("Consumer of group %s: %s", self.app.conf.id, why)
        app, assigned = self.app, set(self.ledgers)
        with contextlib.suppress(ConsumerNotStarted):
            assigned |= self.assignment()
        # Before the flag of a rebalance is set: a fetcher that is cancelled within one asks for a supervisor it lacks.
        self.stop_flow()
        await app._stop_fetcher()
        await self.commit()
        app.on_rebalance_start()
        app.flow_control.suspend()
        self.pause_partitions(assigned)
        app.flow_control.clear()
        self.forget(assigned)
        self.fetch_failures = 0
        await self._thread.swap()
        self.last_fetch_at = time.monotonic()
        self.recreations += 1
        self.accounts.recreations += 1
        self.log.info("Successfully recreated consumer after error (attempt %d)", self._thread.attempts)

    def verify_event_path(self, now: float, tp: TP) -> None:
        """Leave this to the health checks, which know a paused partition and a slow handler from a hang."""


class Transport(driver.Transport):
    """``app.transport`` of every Headrace app."""

    Consumer = Consumer
    Producer = Producer
