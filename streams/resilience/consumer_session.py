"""One aiokafka consumer from its creation to its end: fetch, commit, rebalances, health.

Guarantees: a commit never passes the low-water mark of what is complete; a partition that is revoked is drained within
a bound and committed before it goes, and what was not complete is received again; a handler that takes long, an idle
topic and a partition that is held never cost the group membership.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable
from typing import Any

import aiokafka
from aiokafka import ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import CommitFailedError, ConsumerStoppedError, IllegalStateError, KafkaError

from streams.resilience.bounds import end, within
from streams.resilience.clients import NO_POSITION, Reach, close_consumer, without_position
from streams.resilience.commits import Ledgers
from streams.resilience.consumer_batches import Batches, BatchPartition
from streams.resilience.consumer_options import ConsumerOptions
from streams.resilience.consumer_work import Partition, Work
from streams.resilience.failures import FailureClass, classify
from streams.resilience.judgement import (
    Remedy,
    Verdict,
    View,
    is_member,
    is_reachable,
    judge,
    position_of,
    since_reachable,
    view_partition,
)

log = logging.getLogger("streams.resilience.consumers")

FETCH_WAIT_MS = 500
#: While some partitions have no room, the others are asked again this soon.
FETCH_WAIT_CROWDED_MS = 50
IDLE_GUARD_SECONDS = 2.0
CLOSE_SECONDS = 5.0
#: How long a group may take to settle, over and above its rebalance timeout.
JOIN_GRACE_SECONDS = 30.0


class Session(ConsumerRebalanceListener):
    """The life of one aiokafka consumer."""

    def __init__(self, options: ConsumerOptions, work: Work, *, commit: bool, batches: bool) -> None:
        self.options = options
        self.work = work
        self.commits = commit
        self.consumer: aiokafka.AIOKafkaConsumer | None = None
        self.ledgers: Ledgers[TopicPartition] = Ledgers(options.resilience.in_flight_bytes)
        self.parts: dict[TopicPartition, Partition] = {}
        self.batches = Batches(work, self.parts) if batches else None
        self.fetch_failures = 0
        self.last_fetch_at = self.last_commit_at = time.monotonic()
        self.settled = False
        self.running = False
        self.halted = False
        self._room = asyncio.Event()
        self._committing = asyncio.Lock()
        self._changed: dict[str, float] = {}
        self._ending: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        work.on_room = self._on_room

    def _on_room(self) -> None:
        self._room.set()

    async def open(self) -> None:
        """Connect and subscribe; raises what aiokafka raises, TimeoutError after ``connect_seconds``."""
        # What a log does not have is said and decided here, never passed over in silence.
        config = {**self.options.config, "auto_offset_reset": "none"}
        self.consumer = consumer = aiokafka.AIOKafkaConsumer(**config)
        try:
            await within(consumer.start(), self.options.connect_seconds)
            if self.options.pattern is not None:
                consumer.subscribe(pattern=self.options.pattern, listener=self)
            else:
                consumer.subscribe(topics=list(self.options.topics), listener=self)
        except BaseException:
            await close_consumer(consumer, CLOSE_SECONDS)
            raise

    async def run(self, stop: asyncio.Event) -> str | None:
        """Work until ``stop`` (None), or until this consumer is to be created anew (why). Raises what is fatal."""
        loops = [self._fetch(), self._guard(), self._watch()]
        if self.commits:
            loops.append(self._commit_regularly())
        if self.batches is not None:
            loops.append(self.batches.run())
        tasks = [asyncio.create_task(loop) for loop in loops]
        waiter = asyncio.create_task(stop.wait())
        self.running = True
        try:
            awaited: list[asyncio.Future[Any]] = [*tasks, waiter, self._ending, self.work.fatal]
            await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
            if self.work.fatal.done():
                self.work.fatal.result()
            if stop.is_set():
                return None
            if self._ending.done():
                return self._ending.result()
            broken = next(task for task in tasks if task.done())
            problem = broken.exception()
            log.error("A loop of the consumer of group %s ended: %r", self.options.group_id, problem)
            return f"{type(problem).__name__}: {problem}"
        finally:
            self.running = False
            try:
                await end(*tasks, waiter)
            finally:
                await self.close()

    def refuse(self) -> None:
        """Begin nothing more; may be called from any thread, where ``halt`` follows in the loop."""
        self.halted = True
        for part in list(self.parts.values()):
            part.taking = False

    def halt(self) -> None:
        """Begin nothing more; what runs may end."""
        self.refuse()
        for part in self.parts.values():
            part.end()

    def end(self, why: str) -> None:
        """Have this consumer closed and another one created."""
        if not self._ending.done():
            self._ending.set_result(why)

    async def close(self) -> None:
        """Drain, commit and leave the group, each within a bound."""
        await self._give_up(list(self.parts))
        if self.consumer is not None:
            await close_consumer(self.consumer, CLOSE_SECONDS)

    # -- reading ----------------------------------------------------------------------------------------------------

    async def _fetch(self) -> None:
        consumer = self.consumer
        assert consumer is not None
        backoff = self.options.retry_backoff()
        missing: BaseException | None = None
        while True:
            assigned = consumer.assignment() if self.settled else frozenset()
            readable = self.ledgers.with_room(assigned)
            if not readable:
                self._room.clear()
                await self._wait_for_room(0.1)
                continue
            crowded = len(readable) < len(assigned)
            try:
                if missing is not None:
                    await self._find_positions(consumer, missing)
                    missing = None
                records = await consumer.getmany(
                    *readable, timeout_ms=FETCH_WAIT_CROWDED_MS if crowded else FETCH_WAIT_MS
                )
            except ConsumerStoppedError as exc:
                await self.work.letters.tell(exc, None)
                self.end("the consumer is closed")
                return
            except NO_POSITION as exc:
                missing = exc
                if self.options.config["auto_offset_reset"] not in ("earliest", "latest"):
                    self.work.die(exc)
                    return
                continue
            except (KafkaError, OSError, TimeoutError) as exc:
                self.fetch_failures += 1
                delay = backoff.next()
                log.warning(
                    "Fetch failed in group %s (%s: %s), %d in a row; trying again in %.1f s",
                    self.options.group_id,
                    type(exc).__name__,
                    exc,
                    self.fetch_failures,
                    delay,
                )
                await self.work.letters.tell(exc, None)
                await asyncio.sleep(delay)
                continue
            self.last_fetch_at = time.monotonic()
            self.fetch_failures = 0
            backoff.healthy()
            if self.settled and not self.halted:
                self._deliver(records)
                self._pass_gaps(consumer)
            # With everything in the buffer getmany never waits; handlers and heartbeats get their turn here.
            await asyncio.sleep(0)

    async def _find_positions(self, consumer: Any, missing: BaseException) -> None:
        """Go on where a log does not have the offset that is to be read next, as ``auto_offset_reset`` says.

        Records that are gone are told of, in the log and to ``on_error_callback``. Where nothing was committed yet and
        the end is where to begin, that end is what is committed: a restart would otherwise begin at a later one.
        """
        policy, bound = self.options.config["auto_offset_reset"], self.options.resilience.commit_timeout_seconds
        for tp, offset in without_position(missing).items():
            if tp not in consumer.assignment():
                continue
            first = (await within(consumer.beginning_offsets([tp]), bound))[tp]
            last = (await within(consumer.end_offsets([tp]), bound))[tp]
            wanted = last if policy == "latest" else first
            if offset is None:
                ledger = self.ledgers.open(tp)
                if policy == "latest" and ledger.read_to is None:
                    ledger.read_to = ledger.mark = wanted
            elif not first <= offset <= last:
                log.error(
                    "%s[%d] in group %s: offset %d, the next to be read, is out of range (%d … %d): %s; "
                    "auto_offset_reset=%s",
                    tp.topic,
                    tp.partition,
                    self.options.group_id,
                    offset,
                    first,
                    last,
                    f"{first - offset} record(s) are gone" if offset < first else "its log began anew",
                    policy,
                )
                if offset > last:
                    part = self.parts.pop(tp, None)
                    if part is not None:
                        part.end()
                    self.work.accounts.give_back(self.ledgers.close([tp]))
            else:
                wanted = offset
            consumer.seek(tp, wanted)
            if offset is not None and wanted != offset:
                await self.work.letters.tell(missing, None)

    def _pass_gaps(self, consumer: Any) -> None:
        """Pass over what has no record behind what was delivered: markers of transactions, what compaction has left."""
        for tp, ledger in self.ledgers.items():
            position = position_of(consumer._fetcher, tp)
            if position is not None and ledger.read_to is not None:
                ledger.pass_over(ledger.read_to, position)

    async def _wait_for_room(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._room.wait()

    def _deliver(self, fetched: dict[TopicPartition, list[Any]]) -> None:
        for tp, records in fetched.items():
            part = self.parts.get(tp)
            ledger = self.ledgers.open(tp)
            if part is None:
                kind = Partition if self.batches is None else BatchPartition
                part = self.parts[tp] = kind(tp, ledger, self.work)
            count = 0
            for record in records:
                span = ledger.deliver(record.offset, record.offset, 1, _size_of(record))
                if span is not None:
                    part.put(record, span)
                    count += 1
            self.work.accounts.deliver(count)
            part.begin()
        if self.batches is not None:
            self.batches.wake()

    # -- committing -------------------------------------------------------------------------------------------------

    async def _commit_regularly(self) -> None:
        while True:
            await asyncio.sleep(self.options.commit_interval_seconds)
            await self.commit()

    async def commit(self) -> bool:
        """Commit the mark of every partition that has moved; True when the broker has all of them."""
        consumer = self.consumer
        if consumer is None:
            return False
        async with self._committing:
            held = consumer.assignment()
            offsets = {tp: offset for tp, offset in self.ledgers.committable().items() if tp in held}
            if not offsets:
                return True
            group = self.options.group_id
            try:
                await within(consumer.commit(offsets), self.options.resilience.commit_timeout_seconds)
            except (CommitFailedError, IllegalStateError) as exc:
                log.info("Commit refused in group %s, the group is rebalancing: %s", group, exc)
            except (KafkaError, OSError, TimeoutError) as exc:
                log.warning("Commit failed in group %s (%s: %s); it is tried again", group, type(exc).__name__, exc)
                await self.work.letters.tell(exc, None)
            else:
                self.ledgers.committed(offsets)
                self.last_commit_at = time.monotonic()
                self.work.accounts.commits += 1
                return True
            return False

    # -- rebalances -------------------------------------------------------------------------------------------------

    async def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        """Drain within a bound, commit, and forget the partitions."""
        self.settled = False
        await self._give_up(list(revoked))

    async def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        """Begin to read."""
        self.settled = True
        self.last_fetch_at = time.monotonic()
        log.debug("Group %s: assigned %s", self.options.group_id, sorted(assigned))

    async def _give_up(self, tps: list[TopicPartition]) -> None:
        parts = [self.parts[tp] for tp in tps if tp in self.parts]
        for part in parts:
            part.end()
        if self.batches is not None:
            self.batches.wake()
        current = asyncio.current_task()
        tasks = {task for part in parts for task in part.tasks if task is not current}
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=self.options.resilience.drain_seconds)
            if late:
                log.warning(
                    "%d handler(s) of group %s still run after %.1f s (drain_timeout); what they do is not committed "
                    "and will be received again",
                    len(late),
                    self.options.group_id,
                    self.options.resilience.drain_seconds,
                )
                for task in late:
                    task.cancel()
                await asyncio.wait(late, timeout=1.0)
        if self.commits and parts and self.consumer is not None and is_reachable(self.consumer):
            with contextlib.suppress(TimeoutError):
                await within(self.commit(), CLOSE_SECONDS)
        self.work.accounts.give_back(self.ledgers.close(tps))
        for tp in tps:
            self.parts.pop(tp, None)

    # -- health -----------------------------------------------------------------------------------------------------

    def verdict(self, changed: dict[str, float] | None = None) -> Verdict:
        """Judge this consumer as it is now."""
        resilience = self.options.resilience
        join = self.options.config["rebalance_timeout_ms"] / 1000 + JOIN_GRACE_SECONDS
        changed = dict(self._changed) if changed is None else changed
        view = self._look(time.monotonic(), changed)
        return judge(view, stuck_seconds=resilience.stuck_seconds, join_seconds=join)

    def _look(self, now: float, changed: dict[str, float]) -> View:
        consumer = self.consumer
        partitions = []
        for tp, ledger in self.ledgers.items():
            part = self.parts.get(tp)
            try:
                end = consumer.highwater(tp) or 0 if consumer is not None else 0
            except Exception:
                end = 0
            held = part is not None and part.held
            name = f"{tp.topic}[{tp.partition}]"
            partitions.append(view_partition(name, ledger, end, held=held, now=now, changed=changed))
        # A pattern that matches no topic yet has nothing to join for.
        idle = self.options.pattern is not None and consumer is not None and not consumer.subscription()
        settled = self.settled or idle
        self._since(changed, "unsettled", not settled, now)
        pending = self.commits and any(partition.committable for partition in partitions)
        self._since(changed, "pending", pending, now)
        coordinator = getattr(consumer, "_coordinator", None)
        view = View(
            started_age=now - changed.setdefault("started", now),
            rebalancing_age=None if settled else now - changed["unsettled"],
            member=idle or is_member(coordinator, now, changed),
            partitions=tuple(partitions),
            commit_age=now - max(self.last_commit_at, changed.get("pending", now)),
            fetch_age=now - self.last_fetch_at,
            fetch_failures=self.fetch_failures,
            producer_usable=True,
            broker_reachable=consumer is not None and is_reachable(consumer),
        )
        return since_reachable(view, now, changed)

    @staticmethod
    def _since(changed: dict[str, float], name: str, is_so: bool, now: float) -> None:
        if is_so:
            changed.setdefault(name, now)
        else:
            changed.pop(name, None)

    async def _watch(self) -> None:
        unreachable = 0.0
        while True:
            await asyncio.sleep(self.options.resilience.health_interval_seconds)
            verdict = self.verdict(self._changed)
            consumer = self.consumer
            closed = consumer is None or consumer._closed
            # aiokafka remembers the addresses that brokers advertised and never asks its bootstrap servers again: a
            # cluster that came back elsewhere is found only by a new client.
            away = consumer is not None and not is_reachable(consumer)
            unreachable = unreachable + self.options.resilience.health_interval_seconds if away else 0.0
            if (
                closed
                or verdict.remedy is Remedy.RECREATE_CONSUMER
                or unreachable > self.options.resilience.stuck_seconds
            ):
                why = verdict.reason or "the consumer is closed"
                log.warning("Consumer health check failed for topic '%s', triggering reconnection", self.options.label)
                log.warning("Consumer of group %s: %s", self.options.group_id, why)
                self.end(why)
                return
            if not verdict.well:
                log.warning("Consumer of group %s is not well: %s", self.options.group_id, verdict.reason)

    async def _guard(self) -> None:
        """Tell aiokafka that this consumer is alive although nothing is fetched just now, and hear what its group says.

        Its ``max_poll_interval_ms`` takes a consumer without room, or without partitions, for dead. An error that it
        does not retry by itself (a group that is not allowed) stops its coordination until somebody asks for it.
        """
        consumer, reach = self.consumer, Reach()
        assert consumer is not None
        while True:
            await asyncio.sleep(IDLE_GUARD_SECONDS)
            await reach.look(consumer._client, time.monotonic())
            with consumer._subscription.fetch_context():
                pass
            try:
                if consumer._coordinator is not None:
                    consumer._coordinator.check_errors()
            except Exception as exc:
                log.warning("Group %s: %s: %s", self.options.group_id, type(exc).__name__, exc)
                await self.work.letters.tell(exc, None)
                if classify(exc) is FailureClass.FATAL:
                    self.work.die(exc)


def _size_of(record: Any) -> int:
    # 500 bytes stand for aiokafka's record object and the objects around key and value (tracemalloc, CPython 3.11)
    return int(record.serialized_key_size) + int(record.serialized_value_size) + 500
