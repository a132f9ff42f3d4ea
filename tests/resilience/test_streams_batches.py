"""Bodies with several events in hand, several bodies, several agents: under commit control, without Kafka."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiokafka.errors import MessageSizeTooLargeError, RequestTimedOutError

from streams.resilience.failures import Poison, Retryable
from tests.resilience.harness import Rig, numbered


async def test_a_batch_that_fails_shows_its_guilty_message() -> None:
    """A poison message in a batch of take() is one letter; the others are handled, in order, and counted."""
    batches: list[list[bytes]] = []
    async with Rig() as rig:

        @rig.app.agent(rig.topic("in"))
        async def work(stream: Any) -> None:
            async for values in stream.take(4, within=0.05):
                if b"v2" in values:
                    raise Poison("bad")
                batches.append(list(values))

        await rig.begin("in")
        await rig.feed("in", 0, *numbered(10))
        await rig.feed("in", 1, b"w0", b"w1")
        await rig.until(lambda: rig.mark("in") == 10 and rig.mark("in", 1) == 2)
        handled = [value for batch in batches for value in batch]
        assert [value for value in handled if value.startswith(b"v")] == [v for v in numbered(10) if v != b"v2"]
        assert [value for value, _ in rig.letters()] == [b"v2"]
        assert rig.app.accounts.forwarded == 11
        assert rig.balanced()


async def test_two_guilty_messages_in_one_batch_of_two_partitions() -> None:
    """Isolation ends, also when partitions are mixed in the batch and others keep coming in."""
    async with Rig() as rig:

        @rig.app.agent(rig.topic("in"))
        async def work(stream: Any) -> None:
            async for values in stream.take(10, within=0.02):
                if any(value.startswith(b"bad") for value in values):
                    raise ZeroDivisionError

        await rig.begin("in")
        for number in range(5):
            await rig.feed("in", 0, b"a", b"bad0" if number == 1 else b"b")
            await rig.feed("in", 1, b"c", b"bad1" if number == 1 else b"d")
        await rig.until(lambda: rig.mark("in") == 10 and rig.mark("in", 1) == 10)
        assert sorted(value or b"" for value, _ in rig.letters()) == [b"bad0", b"bad1"]
        assert {headers["dlq-attempts"] for _, headers in rig.letters()} == {"3"}


async def test_a_batch_whose_sink_is_away_comes_again_whole() -> None:
    """Infrastructure: the same batch again, not one by one, and what came in behind it afterwards."""
    batches: list[list[bytes]] = []
    away = 2
    async with Rig() as rig:

        @rig.app.agent(rig.topic("in"))
        async def work(stream: Any) -> None:
            nonlocal away
            async for values in stream.take(5, within=5):
                if away:
                    away -= 1
                    raise ConnectionRefusedError
                batches.append(list(values))

        await rig.begin("in")
        await rig.feed("in", 0, *numbered(15))
        await rig.until(lambda: rig.mark("in") == 15)
    assert [value for batch in batches for value in batch] == list(numbered(15))
    assert len(batches) == 3


async def test_outputs_of_a_batch_are_debts_of_all_its_events() -> None:
    """What the body of take() sends is waited for before any event of the batch may be committed."""
    async with Rig() as rig:
        target = rig.topic("out")

        @rig.app.agent(rig.topic("in"))
        async def work(stream: Any) -> None:
            async for values in stream.take(3, within=5):
                await target.send(key=b"k", value=b"".join(values))

        await rig.begin("in")
        rig.producer.automatic = False
        await rig.feed("in", 0, *numbered(6))
        await rig.until(lambda: len(rig.producer.pending) == 2)
        await rig.settle()
        assert rig.mark("in") is None
        rig.producer.acknowledge(1)
        await rig.until(lambda: rig.mark("in") == 3)
        rig.producer.acknowledge()
        await rig.until(lambda: rig.mark("in") == 6)


async def test_a_short_batch_comes_when_its_time_is_over() -> None:
    """take() gives what there is after ``within``; take_events and take_with_timestamp likewise."""
    got: list[Any] = []
    async with Rig() as rig:

        @rig.app.agent(rig.topic("in"))
        async def work(stream: Any) -> None:
            async for events in stream.take_events(100, within=0.02):
                got.append([event.message.offset for event in events])  # noqa: PERF401

        @rig.app.agent(rig.app.topic("json", value_serializer="json", key_serializer="raw"))
        async def timed(stream: Any) -> None:
            async for values in stream.take_with_timestamp(1, within=1, timestamp_field_name="at"):
                got.extend(values)

        await rig.begin("in", "json")
        await rig.feed("in", 0, *numbered(3))
        await rig.feed("json", 0, b'{"a":1}')
        await rig.until(lambda: rig.mark("in") == 3 and rig.mark("json") == 1)
    assert [0, 1, 2] in got
    assert {"a": 1, "at": 1_700_000_000.0} in got


async def test_noack_commits_what_the_body_acknowledged_and_nothing_else() -> None:
    """With noack() an event that is never acknowledged holds the mark, whatever comes after it."""
    async with Rig() as rig:

        @rig.app.agent(rig.topic("in"))
        async def work(stream: Any) -> None:
            async for event in stream.noack().events():
                if event.value != b"v1":
                    event.ack()

        await rig.begin("in")
        await rig.feed("in", 0, *numbered(4))
        await rig.until(lambda: rig.app.accounts.in_flight == 1)
        await rig.settle()
        assert rig.mark("in") == 1


async def test_a_noack_body_that_raises_goes_on_where_it_was() -> None:
    """noack(): the event that it failed at is the guilty one; those it had not acknowledged come again, in order."""
    seen = []
    async with Rig() as rig:

        @rig.app.agent(rig.topic("in"))
        async def work(stream: Any) -> None:
            held: list[Any] = []
            async for event in stream.noack().events():
                seen.append(event.value)
                if event.value == b"v2":
                    raise Poison("bad")
                held.append(event)
                if len(held) == 2 or event.value == b"v3":
                    for one in held:
                        one.ack()
                    held.clear()

        await rig.begin("in")
        await rig.feed("in", 0, b"v1")
        await rig.feed("in", 0, b"v2")
        await rig.feed("in", 0, b"v3")
        await rig.until(lambda: rig.mark("in") == 3)
        assert [value for value, _ in rig.letters()] == [b"v2"]
        assert seen == [b"v1", b"v2", b"v1", b"v3"]


async def test_noack_take_isolates_too() -> None:
    """A batch whose body acknowledges by itself is taken apart when it fails."""
    async with Rig() as rig:

        @rig.app.agent(rig.topic("in"))
        async def work(stream: Any) -> None:
            async for events in stream.noack_take(4, within=0.02):
                if any(event.value == b"v1" for event in events):
                    raise Poison("bad")
                for event in events:
                    event.ack()

        await rig.begin("in")
        await rig.feed("in", 0, *numbered(6))
        await rig.until(lambda: rig.mark("in") == 6)
        assert [value for value, _ in rig.letters()] == [b"v1"]


async def test_a_head_in_flight_holds_the_mark_with_two_bodies() -> None:
    """concurrency=2: a later event that is done is not committed past the head that is not."""
    gate = asyncio.Event()
    async with Rig() as rig:

        @rig.app.agent(rig.topic("in"), concurrency=2)
        async def work(stream: Any) -> None:
            async for value in stream:
                if value == b"v0":
                    await gate.wait()

        await rig.begin("in")
        await rig.feed("in", 0, *numbered(5))
        await rig.until(lambda: rig.app.accounts.in_flight == 1)
        await rig.settle()
        assert rig.mark("in") is None
        await rig.consumer.commit()
        assert not rig.thread.commits
        gate.set()
        await rig.until(lambda: rig.mark("in") == 5)


async def test_a_retry_wakes_its_own_body_of_several() -> None:
    """concurrency=3: an event that is due again is not slept through because another body took the wake-up."""
    failing = {b"v0", b"v3", b"v7"}
    async with Rig() as rig:

        @rig.app.agent(rig.topic("in"), concurrency=3)
        async def work(stream: Any) -> None:
            async for value in stream:
                await asyncio.sleep(0.001)
                if value in failing:
                    failing.discard(value)
                    raise Retryable("away")

        await rig.begin("in")
        await rig.feed("in", 0, *numbered(9))
        await rig.until(lambda: rig.mark("in") == 9)
        assert not rig.letters()


@pytest.mark.parametrize("shared", [False, True])
async def test_two_agents_on_one_topic_both_handle_every_message(shared: bool) -> None:
    """An event is complete when both are done, also where both get one event; a failure is its own."""
    first: list[bytes] = []
    second: list[bytes] = []
    async with Rig(faust={"cython_optimizations": shared}) as rig:
        topic = rig.topic("in")

        @rig.app.agent(topic)
        async def one(stream: Any) -> None:
            async for value in stream:
                first.append(value)
                if value == b"v1" and first.count(b"v1") == 1:
                    raise Retryable("away")

        @rig.app.agent(topic)
        async def two(stream: Any) -> None:
            async for value in stream:
                second.append(value)  # noqa: PERF401

        await rig.begin("in")
        await rig.feed("in", 0, *numbered(4))
        await rig.until(lambda: rig.mark("in") == 4)
    assert first == [b"v0", b"v1", b"v1", b"v2", b"v3"]
    assert second == list(numbered(4))
    assert rig.app.accounts.forwarded == 4
    assert rig.balanced()


async def test_two_agents_whose_outputs_both_fail_are_both_heard() -> None:
    """One output can never be taken, the other one not now: a dead letter and a retry, and no commit before both."""
    tries = 0
    async with Rig() as rig:
        topic = rig.topic("in")
        first, second = rig.topic("first"), rig.topic("second")

        @rig.app.agent(topic)
        async def one(stream: Any) -> None:
            async for value in stream:
                await first.send(key=b"k", value=value)

        @rig.app.agent(topic)
        async def two(stream: Any) -> None:
            nonlocal tries
            async for value in stream:
                tries += 1
                await second.send(key=b"k", value=value)

        def refuse(record: Any) -> BaseException | None:
            if record[0] == "first":
                return MessageSizeTooLargeError()
            return RequestTimedOutError() if record[0] == "second" and tries < 5 else None

        rig.producer.refuse = refuse
        await rig.begin("in")
        await rig.feed("in", 0, b"v0")
        await rig.until(rig.letters)
        assert rig.mark("in") is None
        await rig.until(lambda: rig.mark("in") == 1)
        assert tries == 5
        assert len(rig.letters()) == 1
        assert rig.balanced()


async def test_what_is_taken_apart_keeps_its_order() -> None:
    """An output that the broker refuses in the middle of a chunk: the others are written in the order of the log."""
    async with Rig() as rig:

        @rig.app.agent(rig.chunk_topic("in"))
        async def work(stream: Any) -> None:
            async for chunk in stream:
                await chunk.each(lambda value, out: out.send("out", value))

        async def send_many(records: Any) -> list[asyncio.Future[Any]]:
            refused = any(value == b"v5" for topic, _, value, _ in records if topic == "out")
            futures = []
            for record in records:
                future = asyncio.get_running_loop().create_future()
                futures.append(future)
                later = asyncio.get_running_loop().call_later
                if refused:
                    later(0.003, future.set_exception, MessageSizeTooLargeError())
                else:
                    written.append(record[2])
                    later(0.003, future.set_result, None)
            return futures

        written: list[bytes | None] = []
        rig.producer.send_many = send_many  # type: ignore[method-assign]
        await rig.begin("in")
        await rig.feed("in", 0, *numbered(12))
        await rig.until(lambda: rig.mark("in") == 12)
        assert [value for value in written if value != b"v5"] == [value for value in numbered(12) if value != b"v5"]
        assert rig.app.accounts.dead_lettered == {"poison": 1}
        assert rig.balanced()
