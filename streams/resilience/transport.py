"""The Faust transport that keeps Headrace's promise: delivery, commit control and back-pressure.

Guarantees: a commit never passes a record whose handling is not complete (:mod:`streams.resilience.commits`); what a
fetch brought of one partition goes to agents of a chunk topic as one event, and record by record to all other agents;
what is in flight is bounded in bytes, and reading goes on the moment that there is room; a revocation waits a bounded
time for what is in flight and then commits the mark.

Hooked in by ``app.transport``; nothing of Faust or aiokafka is patched.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from aiokafka.errors import ConsumerStoppedError
from faust.transport import consumer as faust_consumer
from faust.transport.drivers import aiokafka as driver
from faust.types import TP
from faust.types.tuples import ConsumerMessage
from mode import Service

from streams.resilience.accounts import Accounts
from streams.resilience.commits import Ledgers, PartitionLedger, Span
from streams.resilience.consumer_thread import ConsumerThread
from streams.resilience.options import ResilienceOptions
from streams.resilience.producer import Producer

#: How long a fetch waits for the first record. Short where a partition has no room just now: it may have it soon.
FETCH_WAIT_SECONDS = 1.0
FETCH_WAIT_CROWDED_SECONDS = 0.05


class Delivery(ConsumerMessage):
    """A record, or the records of one chunk (``records``), on its way through agents of this app.

    It is complete when every stream that got it has acknowledged it (``handled``) and everything sent on its behalf has
    been acknowledged by Kafka (``debts`` is 0).
    """

    span: Span | None = None
    ledger: PartitionLedger | None = None
    records: list[Any] | None = None
    handled = False
    debts = 0
    failures: dict[Any, BaseException] | None = None
    dead: dict[str, int] | None = None
    dropped: dict[str, int] | None = None

    def note_dead(self, kind: str) -> None:
        """Count one message of this delivery as a dead letter of class ``kind``."""
        self.dead = self.dead or {}
        self.dead[kind] = self.dead.get(kind, 0) + 1

    def note_dropped(self, reason: str) -> None:
        """Count one message of this delivery as dropped."""
        self.dropped = self.dropped or {}
        self.dropped[reason] = self.dropped.get(reason, 0) + 1


class Consumer(driver.Consumer):
    """Faust's consumer with commit control of our own."""

    _thread: ConsumerThread

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ledgers: Ledgers[TP] = Ledgers(self.options.in_flight_bytes)
        self.held: set[TP] = set()
        self.busy: set[Delivery] = set()
        self.last_commit_at: float | None = None
        self.last_fetch_at = time.monotonic()
        self.fetch_failures = 0
        self.recreations = 0
        self.last_failure: str | None = None
        self._room: asyncio.Event | None = None
        self._committing: asyncio.Lock | None = None

    @property
    def options(self) -> ResilienceOptions:
        """The options of the app that owns this consumer."""
        options: ResilienceOptions = self.transport.app.resilience
        return options

    @property
    def accounts(self) -> Accounts:
        """The accounts of the app that owns this consumer."""
        accounts: Accounts = self.app.accounts
        return accounts

    def _new_consumer_thread(self) -> ConsumerThread:
        return ConsumerThread(self, loop=self.loop, beacon=self.beacon)

    # -- reading ----------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        """Let the reader look again: there may be room, a partition more, or an end."""
        if self._room is not None:
            self._room.set()

    def hold(self, tp: TP) -> None:
        """Stop fetching ``tp`` while its head is tried again; heartbeats and the other partitions go on."""
        self.held.add(tp)

    def release(self, tp: TP) -> None:
        """Fetch ``tp`` again."""
        self.held.discard(tp)
        self._wake()

    def resume_partitions(self, tps: Iterable[TP]) -> None:
        """Resume fetching from partitions, at once."""
        super().resume_partitions(tps)
        self._wake()

    def resume_flow(self) -> None:
        """Allow delivery, at once."""
        super().resume_flow()
        self._wake()

    def on_buffer_full(self, tp: TP) -> None:
        """Ignore Faust's flow control: the bound in bytes stands for it, and it wakes up at once."""

    def on_buffer_drop(self, tp: TP) -> None:
        """Ignore Faust's flow control."""

    async def _wait_for_room(self, seconds: float) -> None:
        if self._room is None:
            self._room = asyncio.Event()
        self._room.clear()
        try:
            await asyncio.wait_for(self._room.wait(), seconds)
        except TimeoutError:
            pass

    async def _drain_messages(self, fetcher: Any) -> None:
        """Fetch and deliver until the consumer or ``fetcher`` (which recovery stops and starts) ends."""
        backoff = self.options.infrastructure_backoff()
        while not (self.should_stop or fetcher.should_stop):
            if not self.flow_active:
                await self._wait_for_room(FETCH_WAIT_SECONDS)
                continue
            active = self._get_active_partitions() - self.held
            readable = self.ledgers.with_room(active)
            if not readable:
                await self._wait_for_room(FETCH_WAIT_SECONDS)
                continue
            generation = self.app.consumer_generation_id
            self.not_waiting_next_records.clear()
            try:
                wait = FETCH_WAIT_SECONDS if len(readable) == len(active) else FETCH_WAIT_CROWDED_SECONDS
                records = await self._thread.fetch(readable, wait)
                self.last_fetch_at = time.monotonic()
                self.fetch_failures = 0
                backoff.healthy()
            except asyncio.CancelledError:
                if self.transport.app.should_stop:
                    return
                raise
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
            else:
                await asyncio.sleep(0)

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
            if not self.flow_active:
                # What was fetched and not delivered must come again.
                await self._rewind()
                return
            if generation != self.app.consumer_generation_id:
                return
            if not acks_enabled_for(tp.topic):
                await self._deliver_changelog(tp, records)
            elif tp.topic in chunked:
                for start in range(0, len(records), size):
                    await self._deliver(tp, records[start : start + size], generation)
            else:
                for number, record in enumerate(records):
                    await self._deliver_one(tp, record, generation)
                    if number % 100 == 99:
                        await asyncio.sleep(0)

    async def _rewind(self) -> None:
        try:
            await asyncio.wait_for(self.perform_seek(), self.options.commit_timeout_seconds)
        except Exception as exc:
            # A rebalance is under way, or the end: either sets the positions itself.
            self.log.info("Positions of group %s not reset: %r", self.app.conf.id, exc)

    async def _deliver_changelog(self, tp: TP, records: list[Any]) -> None:
        for record in records:
            read = self._read_offset[tp]
            if read is None or record.offset >= read:
                self.app.monitor.track_tp_end_offset(tp, self.highwater(tp))
                await self.callback(self._to_message(tp, record))
                self._read_offset[tp] = record.offset

    async def _deliver(self, tp: TP, records: list[Any], generation: int) -> None:
        ledger = self.ledgers.get(tp)
        if ledger is not None and ledger.read_to is not None and records[0].offset < ledger.read_to:
            # the position was set back: what is in flight already is not delivered twice
            records = [record for record in records if record.offset >= ledger.read_to]
            if not records:
                return
        last = records[-1]
        size = sum(map(_size_of, records))
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
        await self._hand_over(tp, message, records[0].offset, last.offset, len(records), size)

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
        await self._hand_over(tp, message, record.offset, record.offset, 1, _size_of(record))

    async def _hand_over(self, tp: TP, message: Delivery, first: int, last: int, count: int, size: int) -> None:
        ledger = self.ledgers.get(tp)
        if ledger is None:
            ledger = self.ledgers.open(tp, self._committed_offset.get(tp))
        span = ledger.deliver(first, last, count, size)
        if span is None:
            return
        self.accounts.deliver(count)
        message.span = span
        message.ledger = ledger
        self._read_offset[tp] = last
        await self.callback(message)

    # -- completing -------------------------------------------------------------------------------------------------

    def ack(self, message: Any) -> bool:
        """Note that every stream is done with ``message``; it is complete once its debts are paid."""
        if message.acked:
            return False
        message.acked = True
        self._unacked_messages.discard(message)
        if isinstance(message, Delivery) and message.span is not None:
            message.handled = True
            self._settle(message)
        return True

    def owe(self, message: Delivery, future: asyncio.Future[Any], owner: Any) -> None:
        """Make ``message`` wait for ``future``; ``owner.delivery_failed(message, exc)`` is called when it fails."""
        message.debts += 1
        future.add_done_callback(partial(self._paid, message, owner))

    def _paid(self, message: Delivery, owner: Any, future: asyncio.Future[Any]) -> None:
        message.debts -= 1
        exc = asyncio.CancelledError() if future.cancelled() else future.exception()
        if exc is not None:
            message.failures = message.failures or {}
            message.failures[owner] = exc
        if message.handled:
            self._settle(message)

    def _settle(self, message: Delivery) -> None:
        if message.debts:
            return
        span, ledger = message.span, message.ledger
        if span is None or ledger is None or span.complete:
            return
        if message.failures:
            failures, message.failures = message.failures, None
            message.handled = False
            message.acked = False
            message.dead = message.dropped = None
            self.busy.discard(message)
            for owner, exc in failures.items():
                owner.delivery_failed(message, exc)
            return
        self.busy.discard(message)
        if ledger.live:
            ledger.complete(span)
            self.accounts.settle(span.count, message.dead, message.dropped)
        self._wake()

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
            except driver.ConsumerNotStarted:
                return False
            offsets = {tp: offset for tp, offset in offsets.items() if tp in held}
            if not offsets or not await self._thread.commit_offsets(offsets):
                return False
            self.ledgers.committed(offsets)
            self._committed_offset.update(offsets)
            self.last_commit_at = time.monotonic()
            self.app.tables.on_commit(offsets)
            self.app.monitor.on_tp_commit(offsets)
            return True

    async def drain(self) -> None:
        """Wait, within DRAIN_SECONDS, until what agents have begun is complete; then commit the mark."""
        until = time.monotonic() + self.options.drain_seconds
        while self.busy and time.monotonic() < until:
            await self._wait_for_room(0.1)
        if self.busy:
            self.log.warning(
                "%d message(s) or chunk(s) of stage %s still in flight after %.1f s (DRAIN_SECONDS); they are not "
                "committed and will be received again",
                len(self.busy),
                self.options.stage,
                self.options.drain_seconds,
            )
        await self.commit()

    async def wait_empty(self) -> None:
        """Drain; Faust's name for it."""
        await self.drain()

    async def on_stop(self) -> None:
        """Commit what is complete; the app has drained before."""
        await self.commit()
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

    def forget(self, tps: Iterable[TP]) -> None:
        """Drop all that is known of partitions which this consumer no longer holds."""
        gone = set(tps)
        self.accounts.give_back(self.ledgers.close(gone))
        self.held -= gone
        self.busy = {message for message in self.busy if message.tp not in gone}
        for tp in gone:
            self._read_offset.pop(tp, None)
            self._committed_offset.pop(tp, None)
        self.app.forget_redeliveries()

    async def recreate(self, why: str) -> None:
        """Close the aiokafka consumer and build a new one inside the living app; it joins the group as a new member.

        What was in flight is forgotten here and comes again from the committed offset.
        """
        topics = ",".join(sorted({topic for channel in self.app.topics for topic in channel.topics})) or "-"
        self.log.warning("Consumer health check failed for topic '%s', triggering reconnection (%s)", topics, why)
        app, assigned = self.app, set(self.ledgers)
        try:
            assigned |= self.assignment()
        except driver.ConsumerNotStarted:
            pass
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
        self.log.info("Successfully recreated consumer after error (attempt %d)", self.recreations)

    def lags(self) -> dict[TP, int]:
        """Return, for each partition read so far, the records between what is committed and the end of the log."""
        found = {}
        for tp, ledger in self.ledgers.items():
            try:
                end = self.highwater(tp)
            except Exception as exc:
                self.log.debug("no end offset of %s: %r", tp, exc)
                continue
            done = ledger.committed if ledger.committed is not None else ledger.mark
            if end is not None and done is not None:
                found[tp] = max(0, end - done)
        return found

    def verify_event_path(self, now: float, tp: TP) -> None:
        """Leave this to the health checks, which know a paused partition and a slow handler from a hang."""


class Transport(driver.Transport):
    """``app.transport`` of every Headrace app."""

    Consumer = Consumer
    Producer = Producer


def _size_of(record: Any) -> int:
    # 500 bytes stand for aiokafka's record object and the objects around key and value (tracemalloc, CPython 3.11)
    return int(record.serialized_key_size) + int(record.serialized_value_size) + 500
