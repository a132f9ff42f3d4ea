"""A stage without Kafka: the real app, streams, agents and commit control between a fake log and a fake producer.

async with Rig() as rig:
    @rig.app.agent(rig.topic("in"))
    async def work(stream): ...

    await rig.begin("in")
    await rig.feed("in", 0, b"a", b"b")       # one fetch of partition 0
    await rig.until(lambda: rig.mark("in") == 2)
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, Self

from aiokafka.structs import RecordMetadata, TopicPartition
from faust.types import TP

from streams.resilience.application import App, Listener
from streams.resilience.deadletter import header
from streams.resilience.options import ResilienceOptions
from streams.resilience.producer import Outgoing

LETTERS = "errors"
#: How long a test waits for what must happen; never for how fast.
PATIENCE_SECONDS = 20.0


class Record:
    """A record as aiokafka gives it."""

    timestamp_type = 0
    checksum = None

    def __init__(
        self,
        topic: str,
        offset: int,
        value: bytes | None,
        *,
        key: bytes | None = b"k",
        partition: int = 0,
        headers: tuple[tuple[str, bytes], ...] = (),
    ) -> None:
        self.topic, self.partition, self.offset = topic, partition, offset
        self.key, self.value, self.headers = key, value, headers
        self.timestamp = 1_700_000_000_000 + offset
        self.serialized_key_size = len(key or b"")
        self.serialized_value_size = len(value or b"")


class FakeBuffer:
    """What tables write through: straight to the producer."""

    def __init__(self, producer: FakeProducer) -> None:
        self.producer = producer

    async def wait_until_ebb(self) -> None:
        """Never full."""

    async def flush(self) -> None:
        """Hold nothing."""

    def put(self, fut: Any) -> None:
        """Publish a future message, as Faust's buffer does a little later."""
        asyncio.ensure_future(fut.message.channel.publish_message(fut, wait=False))  # noqa: RUF006


class FakeProducer:
    """Acknowledges at once, unless a test takes the acknowledging into its own hands."""

    usable = True

    def __init__(self) -> None:
        self.sent: list[Outgoing] = []
        self.pending: list[tuple[Outgoing | None, asyncio.Future[Any]]] = []
        self.automatic = True
        #: called for each record: what it returns is what its future raises, what it raises is what the send raises
        self.refuse: Callable[[Outgoing], BaseException | None] = lambda _record: None
        self.buffer = FakeBuffer(self)

    async def maybe_start(self) -> bool:
        """Run already."""
        return False

    def send_soon(self, fut: Any) -> None:
        """Publish through the buffer."""
        self.buffer.put(fut)

    def _take(self, record: Outgoing) -> asyncio.Future[Any]:
        failure = self.refuse(record)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.sent.append(record)
        if failure is not None:
            future.set_exception(failure)
        elif self.automatic:
            self._acknowledge(record, future)
        else:
            self.pending.append((record, future))
        return future

    @staticmethod
    def _acknowledge(record: Outgoing | None, future: asyncio.Future[Any]) -> None:
        topic = record[0] if record else ""
        if not future.done():
            future.set_result(RecordMetadata(topic, 0, TopicPartition(topic, 0), 0, 0, 0, 0))

    def acknowledge(self, count: int | None = None) -> None:
        """Acknowledge the first ``count`` records that wait for it."""
        now, self.pending = self.pending[:count], self.pending[len(self.pending[:count]) :]
        for record, future in now:
            self._acknowledge(record, future)

    def fail(self, exc: BaseException) -> None:
        """Fail all that waits to be acknowledged."""
        now, self.pending = self.pending, []
        for _, future in now:
            future.set_exception(exc)

    async def send_many(self, records: list[Outgoing]) -> list[asyncio.Future[Any]]:
        """Take records as one batch each."""
        return [self._take(record) for record in list(records)]

    async def send(
        self, topic: str, key: bytes | None, value: bytes | None, *_: Any, headers: Any = None, **__: Any
    ) -> asyncio.Future[Any]:
        """Take one record as Faust hands it over."""
        return self._take((topic, key, value, headers))

    async def create_topic(self, **_: Any) -> None:
        """Have every topic."""

    def key_partition(self, topic: str, key: bytes) -> TP:  # noqa: ARG002
        """Everything goes to partition 0."""
        return TP(topic, 0)


class FakeThread:
    """The group's side: an assignment, and commits that are written down."""

    def __init__(self) -> None:
        self.assigned: set[TP] = set()
        self.commits: list[dict[TP, int]] = []
        self.commit_works = True

    def assignment(self) -> set[TP]:
        """Return what the group has given us."""
        return set(self.assigned)

    def highwater(self, _tp: TP) -> int:
        """Return an end of the log."""
        return 1000

    async def commit_offsets(self, offsets: dict[TP, int]) -> bool:
        """Write a commit down."""
        if self.commit_works:
            self.commits.append(dict(offsets))
        return self.commit_works


class Noted(Listener):
    """Notes what a stage tells."""

    def __init__(self) -> None:
        self.retries: list[BaseException] = []
        self.dead: list[tuple[Any, Any]] = []
        self.drops: list[tuple[Any, str]] = []
        self.agent_failures: list[BaseException] = []

    def retry(self, app: App, exc: BaseException, kind: Any, delay_seconds: float) -> None:  # noqa: ARG002
        """Note it."""
        self.retries.append(exc)

    def dead_letter(self, app: App, record: Any, failure: Any) -> None:  # noqa: ARG002
        """Note it."""
        self.dead.append((record, failure))

    def drop(self, app: App, record: Any, reason: str) -> None:  # noqa: ARG002
        """Note it."""
        self.drops.append((record, reason))

    def agent_failure(self, app: App, agent: Any, exc: BaseException) -> None:  # noqa: ARG002
        """Note it."""
        self.agent_failures.append(exc)


class Rig:
    """One stage on a fake log."""

    def __init__(self, faust: dict[str, Any] | None = None, **options: Any) -> None:
        self.told = Noted()
        options = {
            "retry_base_seconds": 0.01,
            "retry_cap_seconds": 0.05,
            "attempt_base_seconds": 0.001,
            "attempt_cap_seconds": 0.01,
            "drain_seconds": 0.2,
            "max_attempts": 3,
            "rng": lambda: random.Random(7),
            **options,
        }
        self.app = App(
            f"rig-{random.getrandbits(40):x}",
            resilience=ResilienceOptions(stage="rig", dead_letter_topic=LETTERS, **options),
            listener=self.told,
            broker="kafka://127.0.0.1:9",
            store="memory://",
            env_prefix="RIG_",
            topic_disable_leader=True,
            table_standby_replicas=0,
            key_serializer="raw",
            value_serializer="raw",
            **(faust or {}),
        )
        self.producer = FakeProducer()
        self.app._producer = self.producer
        self.thread = FakeThread()
        self.fatal: list[BaseException] = []
        self.app.fatal = self.fatal.append
        self._next: dict[TP, int] = defaultdict(int)

    async def __aenter__(self) -> Self:
        self.app.finalize()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.app.agents.stop()
        for task in [*self.app.background, *self.app.letters]:
            task.cancel()
        await asyncio.sleep(0)

    @property
    def consumer(self) -> Any:
        """The stage's consumer."""
        return self.app.consumer

    def topic(self, name: str, **options: Any) -> Any:
        """Return an ordinary topic of bytes."""
        return self.app.topic(name, value_type=bytes, value_serializer="raw", key_serializer="raw", **options)

    def chunk_topic(self, name: str, decode: Callable[[bytes], Any] = bytes) -> Any:
        """Return a topic that comes in chunks."""
        return self.app.chunk_topic(name, decode)

    async def begin(self, *topics: str, partitions: int = 2) -> None:
        """Start the agents and assign ``partitions`` of each of ``topics``."""
        real = self.app.consumer._thread
        self.consumer._thread = self.thread
        real.thread_loop.close()
        for agent in self.app.agents.values():
            await agent.maybe_start()
        await self.app.topics._update_indices()
        await self.assign({TP(topic, number) for topic in topics for number in range(partitions)})

    async def assign(self, tps: set[TP]) -> None:
        """Begin a generation of the group with ``tps``."""
        self.app.consumer_generation_id += 1
        self.thread.assigned = set(tps)
        self.consumer.forget(set(self.consumer.ledgers))
        self.consumer._set_active_tps(set(tps))
        await self.app.topics.on_partitions_assigned(set(tps))
        self.app.flow_control.resume()
        self.consumer.resume_flow()
        self.app.rebalancing = False

    async def revoke(self) -> None:
        """End a generation as Faust does: stop the flow, empty the queues, drain, commit, forget."""
        self.app.rebalancing = True
        self.consumer.stop_flow()
        self.app.flow_control.suspend()
        self.app.flow_control.clear()
        await self.consumer.drain(self.app.resilience.drain_seconds)
        self.consumer.forget(set(self.thread.assigned))
        self._next.clear()

    def records(self, topic: str, partition: int, *values: bytes | None, key: bytes = b"k") -> list[Record]:
        """Return the next records of a partition."""
        tp = TP(topic, partition)
        first = self._next[tp]
        self._next[tp] += len(values)
        return [Record(topic, first + n, value, key=key, partition=partition) for n, value in enumerate(values)]

    async def feed(self, topic: str, partition: int, *values: bytes | None) -> None:
        """Deliver what one fetch brought of one partition."""
        await self.deliver({TP(topic, partition): self.records(topic, partition, *values)})

    async def deliver(self, fetched: dict[TP, list[Record]]) -> None:
        """Deliver what one fetch brought."""
        await self.consumer._deliver_all(fetched, self.app.consumer_generation_id)

    def mark(self, topic: str, partition: int = 0) -> int | None:
        """Return the offset that may be committed."""
        ledger = self.consumer.ledgers.get(TP(topic, partition))
        return ledger.mark if ledger is not None else None

    def letters(self) -> list[tuple[bytes | None, dict[str, str]]]:
        """Return value and headers of each dead letter."""
        return [
            (value, {name: header(headers or [], name) or "" for name, _ in headers or []})
            for topic, _, value, headers in self.producer.sent
            if topic == LETTERS
        ]

    def outputs(self, topic: str = "out") -> list[bytes | None]:
        """Return the values that were sent to ``topic``."""
        return [value for name, _, value, _ in self.producer.sent if name == topic]

    @staticmethod
    async def until(condition: Callable[[], Any]) -> None:
        """Wait until ``condition()`` holds."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not condition():
                await asyncio.sleep(0.002)

    @staticmethod
    async def settle() -> None:
        """Let everything run that can run now."""
        for _ in range(50):
            await asyncio.sleep(0)

    def balanced(self) -> bool:
        """Tell whether the accounts add up."""
        return bool(self.app.accounts.balance() == 0)


def numbered(count: int) -> Iterator[bytes]:
    """Yield distinct values."""
    return (f"v{number}".encode() for number in range(count))
