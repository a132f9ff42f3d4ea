"""The thread that aiokafka's consumer lives in, so that a busy agent never costs the group membership.

Guarantees: an unreachable broker is waited for; fetches and commits go straight to the thread's loop, each with a
bound (Faust's method queue has two workers, and two calls that hang stop all others); an idle fetch never makes
aiokafka leave the group for good (its ``max_poll_interval_ms`` counts a paused or unassigned consumer as dead, and it
then never comes back); the consumer can be swapped for a new one while thread and app live on.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from collections import deque
from collections.abc import Coroutine, Iterable, Mapping
from typing import Any, TypeVar

import aiokafka
from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaError
from faust.transport import consumer as faust_consumer
from faust.transport.drivers import aiokafka as driver
from faust.types import TP
from mode import Service

from streams.resilience.bounds import END_SECONDS, within
from streams.resilience.clients import NO_POSITION, Reach, close_consumer, without_position
from streams.resilience.judgement import position_of
from streams.resilience.options import ResilienceOptions

T = TypeVar("T")
Records = Mapping[TP, list[Any]]

#: Seconds between two signs of life to aiokafka's poll-interval check.
IDLE_GUARD_SECONDS = 2.0
CLOSE_SECONDS = 5.0
#: What is taken of one partition at once, about; more than a chunk of usual records.
TAKEN_BYTES = 4 * 1024 * 1024
#: For how large a record is taken before one was seen.
FIRST_RECORD_BYTES = 16 * 1024


class ConsumerThread(driver.AIOKafkaConsumerThread):
    """Owns the aiokafka consumer of one app."""

    app: Any

    swapping = False
    last_failure: str | None = None
    #: attempts that the present consumer took to connect
    attempts = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        #: what fetches brought and nobody has collected yet, with the generation of the group that it belongs to
        self._fetched: deque[tuple[int, TP, list[Any]]] = deque()
        self._record_bytes: dict[str, int] = {}
        #: the last stretch of each log, (generation, first, to), in which a fetch has found no record: markers of
        #: transactions, what compaction has left
        self.gaps: dict[TP, tuple[int, int, int]] = {}
        self._fetched_lock = threading.Lock()
        #: partitions that cannot be read on: the offset that their log does not have, None where none is known
        self.without_position: dict[TP, int | None] = {}

    @property
    def options(self) -> ResilienceOptions:
        """The options of the app that owns this consumer."""
        options: ResilienceOptions = self.app.resilience
        return options

    async def on_start(self) -> None:
        """Connect, however long it takes for a broker to be there."""
        self.time_started = asyncio.get_running_loop().time()
        self._consumer = await self._connect()

    async def _connect(self) -> aiokafka.AIOKafkaConsumer | None:
        backoff = self.options.infrastructure_backoff()
        self.attempts = 0
        while not self.should_stop:
            self.attempts += 1
            consumer = self._create_consumer(loop=self.thread_loop)
            try:
                await consumer.start()
            except (KafkaError, OSError, TimeoutError) as exc:
                await close_consumer(consumer, CLOSE_SECONDS)
                delay = backoff.next()
                self.last_failure = f"{type(exc).__name__}: {exc}"
                self.log.warning(
                    "Kafka cannot be reached for group %s (%s: %s); trying again in %.1f s",
                    self.app.conf.id,
                    type(exc).__name__,
                    exc,
                    delay,
                )
                await self._pause(delay)
            else:
                self.last_failure = None
                return consumer
        return None

    async def _pause(self, seconds: float) -> None:
        # Service.sleep waits on an event of the parent's loop; here a short step that looks at the flag is enough.
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while not self.should_stop and loop.time() < until:
            await asyncio.sleep(min(0.2, seconds))

    def _create_worker_consumer(self, transport: Any) -> aiokafka.AIOKafkaConsumer:
        conf = self.app.conf
        tables = bool(self.app.tables.changelog_topics)
        self._assignor = self.app.assignor if tables or conf.table_standby_replicas > 0 else RoundRobinPartitionAssignor
        arguments: dict[str, Any] = {
            "client_id": conf.broker_client_id,
            "group_id": conf.id,
            "group_instance_id": conf.consumer_group_instance_id,
            "bootstrap_servers": driver.server_list(transport.url, transport.default_port),
            "partition_assignment_strategy": [self._assignor],
            "enable_auto_commit": False,
            # What the log does not have is said and decided here, never passed over in silence.
            "auto_offset_reset": "none",
            "max_poll_records": None,
            "max_poll_interval_ms": int(conf.broker_max_poll_interval * 1000),
            "max_partition_fetch_bytes": conf.consumer_max_fetch_size,
            "request_timeout_ms": int(conf.broker_request_timeout * 1000),
            "check_crcs": conf.broker_check_crcs,
            "session_timeout_ms": int(conf.broker_session_timeout * 1000),
            "rebalance_timeout_ms": int(conf.broker_rebalance_timeout * 1000),
            "heartbeat_interval_ms": int(conf.broker_heartbeat_interval * 1000),
            "metadata_max_age_ms": conf.consumer_metadata_max_age_ms,
            "connections_max_idle_ms": conf.consumer_connections_max_idle_ms,
        }
        given = {**arguments, **self.options.client, **self.options.consumer, "auto_offset_reset": "none"}
        return aiokafka.AIOKafkaConsumer(**given)

    @Service.task
    async def _idle_guard(self) -> None:
        """Tell aiokafka that this consumer is alive although nothing is fetched just now, and hear what its group says.

        An error that it does not retry by itself (a group that is not allowed, an instance id that is fenced) stops its
        coordination until somebody asks for it.
        """
        reach = Reach()
        while not self.should_stop:
            await self._pause(IDLE_GUARD_SECONDS)
            consumer = self._consumer
            if consumer is None:
                continue
            await reach.look(consumer._client, time.monotonic())
            with consumer._subscription.fetch_context():
                pass
            try:
                if consumer._coordinator is not None:
                    consumer._coordinator.check_errors()
            except Exception as exc:
                self.last_failure = f"{type(exc).__name__}: {exc}"
                self.log.warning("Group %s: %s", self.app.conf.id, self.last_failure)

    async def call(self, coroutine: Coroutine[Any, Any, T], bound_seconds: float) -> T:
        """Run ``coroutine`` in the thread's loop; raises TimeoutError after ``bound_seconds``."""
        future: concurrent.futures.Future[T] = asyncio.run_coroutine_threadsafe(
            within(coroutine, bound_seconds), self.thread_loop
        )
        # The second bound is for a thread whose loop does not run at all.
        async with asyncio.timeout(bound_seconds + END_SECONDS + 5.0):
            return await asyncio.wrap_future(future)

    async def fetch(self, partitions: set[TP], timeout_seconds: float) -> Records:
        """Return all that fetches brought of the current generation; waits up to ``timeout_seconds`` for the first.

        Positions that a rebalance has still to set bring nothing: what was read too early is given up.
        """
        consumer = self._consumer
        if consumer is None or self.swapping:
            return {}
        found = self._collect()
        if not found:
            await self.call(self._fetch(consumer, partitions, timeout_seconds), timeout_seconds + 15.0)
            found = self._collect()
        return found

    async def _fetch(self, consumer: Any, partitions: set[TP], timeout: float) -> None:
        if not self.consumer.flow_active or consumer is not self._consumer:
            return
        fetcher: Any = self._ensure_consumer()._fetcher
        with fetcher._subscriptions.fetch_context():
            # Partition by partition: aiokafka's own bound on records would empty the first and starve the others, and
            # without one a fetch that is small on the wire is unpacked as a whole, fifty times its size.
            taken = 0
            for tp in [tp for tp in fetcher._records if tp in partitions]:
                taken += await self._take(fetcher, {tp}, 0.0, self._bound(tp.topic))
            if not taken:
                await self._take(fetcher, partitions, timeout, min(self._bound(tp.topic) for tp in partitions))

    async def _take(self, fetcher: Any, partitions: set[TP], timeout: float, bound: int) -> int:
        before = {tp: position_of(fetcher, tp) for tp in partitions}
        try:
            records: Records = await fetcher.fetched_records(partitions, timeout=timeout, max_records=bound)
        except NO_POSITION as exc:
            for tp, offset in without_position(exc).items():
                self.without_position[TP(tp.topic, tp.partition)] = offset
            return 0
        generation = self.app.consumer_generation_id
        # aiokafka's position is past these records now. They are handed over here and not as a result, because nobody
        # hears a result that comes after the call has timed out.
        for tp, found in records.items():
            self._fetched.append((generation, TP(tp.topic, tp.partition), found))
            before[TP(tp.topic, tp.partition)] = found[-1].offset + 1
            some = found[:: len(found) // 64 + 1]
            size = sum([record.serialized_key_size + record.serialized_value_size for record in some])
            self._record_bytes[tp.topic] = max(1, size // len(some))
        for tp, first in before.items():
            to = position_of(fetcher, tp)
            if first is not None and to is not None and to > first:
                self.gaps[tp] = (generation, first, to)
        return len(records)

    def _bound(self, topic: str) -> int:
        """Return how many records of one partition are taken at once, by the size of those of ``topic`` so far."""
        seen = self._record_bytes.get(topic, FIRST_RECORD_BYTES)
        return max(1, min(self.options.chunk_records, TAKEN_BYTES // seen))

    def _collect(self) -> Records:
        if not self._fetched:
            return {}
        collected: dict[TP, list[Any]] = {}
        waiting = []
        with self._fetched_lock:
            while self._fetched:
                generation, tp, records = self._fetched.popleft()
                if generation != self.app.consumer_generation_id:
                    continue
                if self.app.rebalancing and not self._is_changelog(tp):
                    waiting.append((generation, tp, records))
                else:
                    collected.setdefault(tp, []).extend(records)
            self._fetched.extendleft(reversed(waiting))
        return collected

    def _is_changelog(self, tp: TP) -> bool:
        return tp.topic in self.app.tables.changelog_topics

    async def end_offsets(self, tps: list[TP], bound_seconds: float) -> dict[TP, int]:
        """Ask for the ends of logs; nothing while there is no consumer to ask with."""
        consumer = self._consumer
        if consumer is None or self.swapping:
            return {}
        found = await self.call(consumer.end_offsets(list(map(driver.ensure_aiokafka_TP, tps))), bound_seconds)
        return {TP(tp.topic, tp.partition): offset for tp, offset in found.items()}

    async def ranges(self, tps: list[TP], bound_seconds: float) -> dict[TP, tuple[int, int]]:
        """Ask for the first offset and the end of logs; nothing while there is no consumer to ask with."""
        consumer = self._consumer
        if consumer is None or self.swapping or not tps:
            return {}
        wanted = list(map(driver.ensure_aiokafka_TP, tps))
        first = await self.call(consumer.beginning_offsets(wanted), bound_seconds)
        ends = await self.call(consumer.end_offsets(wanted), bound_seconds)
        return {TP(tp.topic, tp.partition): (first[tp], ends[tp]) for tp in wanted}

    async def seek_to_committed(self) -> Mapping[TP, Any]:
        """Set the positions of all partitions but changelogs to what is committed, or to where the app begins.

        aiokafka's own leaves a partition without a commit where it is, past what was read and never handled. Not
        through Faust's method queue: a call that hangs there stops others.
        """
        return await self.call(self._seek_to_committed(self._ensure_consumer()), self.options.commit_timeout_seconds)

    async def _seek_to_committed(self, consumer: Any) -> Mapping[TP, Any]:
        partitions = [tp for tp in consumer.assignment() if not self._is_changelog(tp)]
        if not partitions:
            return {}
        found = await consumer._coordinator.fetch_committed_offsets(partitions)
        committed = {tp: found[tp].offset if tp in found and found[tp].offset >= 0 else None for tp in partitions}
        missing = [tp for tp, offset in committed.items() if offset is None]
        begin = consumer.beginning_offsets if self.from_beginning else consumer.end_offsets
        first = await begin(missing) if missing else {}
        # One step, no await in it: what a fetch still brings of the old positions is given up together with them.
        with self._fetched_lock:
            for tp, offset in committed.items():
                position = first.get(tp) if offset is None else offset
                if position is not None:
                    consumer.seek(tp, position)
            self._fetched = deque(entry for entry in self._fetched if self._is_changelog(entry[1]))
        return {TP(tp.topic, tp.partition): offset for tp, offset in committed.items()}

    @property
    def from_beginning(self) -> bool:
        """Whether a partition that nothing was committed of is read from its beginning, and not from its end."""
        return bool(self.app.conf.consumer_auto_offset_reset == "earliest")

    async def commit_offsets(self, offsets: Mapping[TP, int]) -> bool:
        """Commit within the bound of the options; False when it did not succeed, for any reason but a revocation."""
        consumer = self._consumer
        if consumer is None or self.swapping:
            return False
        wanted = {driver.ensure_aiokafka_TP(tp): offset for tp, offset in offsets.items()}
        try:
            await self.call(consumer.commit(wanted), self.options.commit_timeout_seconds)
        except TimeoutError:
            self.last_failure = "commit timed out"
            self.log.warning(
                "Commit of %d partition(s) in group %s not done within %.0f s; it is tried again",
                len(offsets),
                self.app.conf.id,
                self.options.commit_timeout_seconds,
            )
        except (CommitFailedError, IllegalStateError) as exc:
            # The group has moved on: these partitions are somebody else's, or come again from the committed offset.
            self.last_failure = f"{type(exc).__name__}: {exc}"
            self.log.info("Commit refused in group %s, the group is rebalancing: %s", self.app.conf.id, exc)
        except KafkaError as exc:
            self.last_failure = f"{type(exc).__name__}: {exc}"
            self.log.warning("Commit failed in group %s: %r; it is tried again", self.app.conf.id, exc)
        except Exception as exc:
            # A consumer that is being closed; nothing of it may end the worker.
            self.last_failure = f"{type(exc).__name__}: {exc}"
            self.log.warning("Commit failed in group %s: %r; it is tried again", self.app.conf.id, exc)
        else:
            return True
        return False

    async def subscribe(self, topics: Any) -> None:
        """Subscribe, as Faust does whenever its topics change."""
        await super().subscribe(topics)
        if topics:
            self._tell_created(topics)

    def _tell_created(self, topics: Iterable[str]) -> None:
        self.log.info("AsyncResilientKafkaConsumer successfully created for topic '%s'", ",".join(sorted(topics)))

    async def swap(self) -> None:
        """Close the consumer and subscribe a new one to the same topics. The caller has stopped the flow."""
        self.swapping = True
        try:
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._swap(), self.thread_loop))
        finally:
            self.swapping = False

    async def _swap(self) -> None:
        old = self._consumer
        topics: set[str] = set(old.subscription()) if old is not None else set()
        if old is not None:
            await close_consumer(old, CLOSE_SECONDS)
        new = await self._connect()
        if new is None:
            return
        self._fetched.clear()
        self.without_position.clear()
        self._consumer = new
        if topics:
            new.subscribe(topics=topics, listener=self._rebalance_listener)
            self._tell_created(topics)

    async def on_thread_stop(self) -> None:
        """Leave the group within a bound; a broker that is away must not hold up the end of the worker."""
        consumer, self._consumer = self._consumer, None
        await faust_consumer.ConsumerThread.on_thread_stop(self)
        if consumer is not None:
            await close_consumer(consumer, CLOSE_SECONDS)
