"""The thread's side of commit control: what a fetch, a commit and a seek do when aiokafka fails or hangs."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.errors import CommitFailedError, ConsumerStoppedError, IllegalStateError, KafkaConnectionError
from aiokafka.structs import TopicPartition
from faust.types import TP

from streams.resilience.consumer_thread import ConsumerThread
from streams.resilience.options import ResilienceOptions

P0, P1, LOG = TopicPartition("in", 0), TopicPartition("in", 1), TopicPartition("changelog", 0)


class FakeConsumer:
    """aiokafka's consumer as far as the thread touches it."""

    def __init__(self) -> None:
        self.answer: Callable[[], Any] = lambda: None
        self.positions: dict[TopicPartition, int] = {}
        self.offsets: dict[TopicPartition, int] = {}
        self._coordinator = self
        self._fetcher = self
        self._subscriptions = self
        self.subscription = SimpleNamespace(assignment=self)
        #: what is read next
        self.reads: dict[TopicPartition, int] = {}
        self.records: dict[TopicPartition, list[str]] = {}
        self.slow = threading.Event()
        self.slow.set()
        self.asked = threading.Event()

    def state_value(self, tp: TopicPartition) -> Any:
        return SimpleNamespace(_position=self.reads.get(tp))

    async def commit(self, offsets: Any) -> None:  # noqa: ARG002
        found = self.answer()
        if asyncio.iscoroutine(found):
            await found

    def assignment(self) -> set[TopicPartition]:
        return {P0, P1, LOG}

    async def fetch_committed_offsets(self, partitions: Any) -> dict[TopicPartition, Any]:
        return {tp: SimpleNamespace(offset=self.offsets[tp]) for tp in partitions if tp in self.offsets}

    async def beginning_offsets(self, partitions: Any) -> dict[TopicPartition, int]:
        return dict.fromkeys(partitions, 3)

    def seek(self, tp: TopicPartition, offset: int) -> None:
        self.positions[tp] = offset

    def fetch_context(self) -> Any:
        import contextlib

        return contextlib.nullcontext()

    @property
    def _records(self) -> dict[TopicPartition, list[str]]:
        return self.records

    async def fetched_records(
        self,
        partitions: Any,
        timeout: float,  # noqa: ARG002
        max_records: int,
    ) -> dict[TopicPartition, list[Entry]]:
        self.asked.set()
        while not self.slow.is_set():
            await asyncio.sleep(0.001)
        found: dict[TopicPartition, list[Entry]] = {}
        for tp in [tp for tp in self.records if tp in partitions]:
            found[tp], rest = [Entry(text) for text in self.records[tp][:max_records]], self.records[tp][max_records:]
            self.records = {other: kept for other, kept in self.records.items() if other != tp} | (
                {tp: rest} if rest else {}
            )
            max_records -= len(found[tp])
            if not max_records:
                break
        return found


class Entry(str):
    """A record of 8 KiB."""

    __slots__ = ()
    offset = 7
    serialized_key_size, serialized_value_size = 0, 8192


@pytest.fixture
def thread() -> Iterator[Any]:
    """A consumer thread on a loop of its own, around a fake consumer."""
    loop = asyncio.new_event_loop()
    runner = threading.Thread(target=loop.run_forever)
    runner.start()
    made = object.__new__(ConsumerThread)
    app = SimpleNamespace(
        resilience=ResilienceOptions(stage="s", dead_letter_topic="e", commit_timeout_seconds=0.2),
        conf=SimpleNamespace(id="group", consumer_auto_offset_reset="earliest"),
        consumer_generation_id=1,
        rebalancing=False,
        tables=SimpleNamespace(changelog_topics={"changelog"}),
        on_fetched=lambda *_: None,
    )
    made.__dict__.update(
        app=app,
        thread_loop=loop,
        _consumer=FakeConsumer(),
        _fetched=deque(),
        _fetched_lock=threading.Lock(),
        _record_bytes={},
        gaps={},
        consumer=SimpleNamespace(flow_active=True),
        log=logging.getLogger("test"),
    )
    yield made
    loop.call_soon_threadsafe(loop.stop)
    runner.join()
    loop.close()


def raising(exc: BaseException) -> Callable[[], Any]:
    """Return a function that raises ``exc``."""

    def work() -> Any:
        raise exc

    return work


@pytest.mark.parametrize(
    "answer",
    [
        raising(CommitFailedError("rebalanced")),
        raising(IllegalStateError("not assigned")),
        raising(KafkaConnectionError()),
        raising(ConsumerStoppedError()),
        raising(RuntimeError("closed")),
        lambda: asyncio.sleep(3600),
    ],
    ids=["generation", "assignment", "connection", "stopped", "anything", "hangs"],
)
async def test_a_commit_that_fails_is_told_and_ends_nothing(thread: Any, answer: Callable[[], Any]) -> None:
    """Whatever aiokafka does, the answer is False within the bound, and the next commit can succeed."""
    thread._consumer.answer = answer
    assert not await thread.commit_offsets({TP("in", 0): 5})
    assert thread.last_failure
    thread._consumer.answer = lambda: None
    assert await thread.commit_offsets({TP("in", 0): 5})


async def test_a_large_fetch_is_taken_bit_by_bit(thread: Any) -> None:
    """Of each partition as much as is bounded in bytes, none of them starved; the rest stays with aiokafka."""
    thread._consumer.records = {P0: ["a"] * 1000, P1: ["b"] * 1000}
    taken = [await thread.fetch({P0, P1}, 1.0) for _ in range(2)]
    first, second = ({tp: len(found) for tp, found in records.items()} for records in taken)
    assert first.keys() == second.keys() == {P0, P1}
    assert all(0 < count <= 512 for count in (*first.values(), *second.values()))
    assert thread._consumer.records.keys() <= {P0, P1}


async def test_what_a_fetch_finds_no_record_in_is_told(thread: Any) -> None:
    """Markers behind the last record, and markers alone: from where, and up to where."""
    thread._consumer.records = {P0: ["a"]}
    thread._consumer.reads = {P0: 9, P1: 3}
    await thread.fetch({P0, P1}, 1.0)
    assert thread.gaps == {P0: (1, 8, 9)}
    thread._consumer.slow.clear()
    thread._consumer.asked.clear()
    waiting = asyncio.ensure_future(thread.fetch({P1}, 1.0))
    await asyncio.to_thread(thread._consumer.asked.wait, 30)
    thread._consumer.reads[P1] = 4
    thread._consumer.slow.set()
    await waiting
    assert thread.gaps[P1] == (1, 3, 4)


async def test_records_of_a_fetch_that_nobody_waited_for_are_not_lost(thread: Any) -> None:
    """aiokafka's position is past them: the next fetch brings them, once."""
    thread._consumer.records = {P0: ["a", "b"]}
    thread._consumer.slow.clear()
    waiting = asyncio.ensure_future(thread.fetch({TP("in", 0)}, 1.0))
    await asyncio.sleep(0.02)
    inner = asyncio.run_coroutine_threadsafe(thread._fetch(thread._consumer, {TP("in", 0)}, 1.0), thread.thread_loop)
    waiting.cancel()
    thread._consumer.slow.set()
    await asyncio.wrap_future(inner)
    assert await thread.fetch({TP("in", 0)}, 0.0) == {TP("in", 0): ["a", "b"]}
    assert await thread.fetch({TP("in", 0)}, 0.0) == {}


async def test_records_of_an_earlier_generation_are_given_up(thread: Any) -> None:
    """They come again from the committed offset."""
    thread._fetched.append((0, TP("in", 0), ["old"]))
    assert await thread.fetch({TP("in", 0)}, 0.0) == {}


async def test_while_the_group_rebalances_only_changelogs_are_handed_over(thread: Any) -> None:
    """What was read of other topics waits for the end of the rebalance."""
    thread.app.rebalancing = True
    thread._consumer.records = {P0: ["a"], LOG: ["row"]}
    assert await thread.fetch({TP("in", 0), TP("changelog", 0)}, 0.0) == {TP("changelog", 0): ["row"]}
    thread.app.rebalancing = False
    assert await thread.fetch({TP("in", 0)}, 0.0) == {TP("in", 0): ["a"]}


async def test_a_partition_without_a_commit_is_set_back_to_its_beginning(thread: Any) -> None:
    """aiokafka leaves it where it is, past what was read and never handled. Changelogs are left alone."""
    thread._consumer.offsets = {P1: 7}
    thread._consumer.positions = {P0: 100, P1: 100, LOG: 100}
    thread._fetched.extend([(1, TP("in", 0), ["too early"]), (1, TP("changelog", 0), ["row"])])
    found = await thread.seek_to_committed()
    assert found == {TP("in", 0): None, TP("in", 1): 7}
    assert thread._consumer.positions == {P0: 3, P1: 7, LOG: 100}
    assert [tp for _, tp, _ in thread._fetched] == [TP("changelog", 0)]
