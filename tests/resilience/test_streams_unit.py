"""Ordinary Faust agents under commit control, without Kafka."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import Any

import pytest
from aiokafka.errors import KafkaConnectionError, MessageSizeTooLargeError, RequestTimedOutError
from faust.types import TP

from streams.resilience.failures import Fatal, Poison, Rejected, Retryable
from tests.resilience.harness import LETTERS, Rig, numbered


async def test_an_event_is_complete_once_the_body_asks_for_the_next() -> None:
    """Nothing may be committed while the body has the only event in hand; all of it once it is back."""
    gate = asyncio.Event()
    async with Rig() as rig:

        @rig.app.agent(rig.topic("in"))
        async def work(stream: Any) -> None:
            async for _ in stream:
                await gate.wait()

        await rig.begin("in")
        await rig.feed("in", 0, *numbered(3))
        await rig.settle()
        assert rig.mark("in") is None
        assert rig.app.accounts.in_flight == 3
        gate.set()
        await rig.until(lambda: rig.mark("in") == 3)
        assert rig.app.accounts.forwarded == 3
        assert rig.balanced()


async def test_a_body_that_raises_gets_the_same_event_again_and_order_holds() -> None:
    """Infrastructure that is away twice costs nothing and changes no order; the mark waits."""
    seen: dict[int, list[bytes]] = defaultdict(list)
    done: dict[int, list[bytes]] = defaultdict(list)
    async with Rig() as rig:

        @rig.app.agent(rig.topic("in"))
        async def work(stream: Any) -> None:
            async for event in stream.events():
                partition = event.message.partition
                seen[partition].append(event.value)
                if event.value == b"v1" and partition == 0 and seen[0].count(b"v1") < 3:
                    raise KafkaConnectionError
                done[partition].append(event.value)

        await rig.begin("in")
        await rig.feed("in", 0, *numbered(4))
        await rig.feed("in", 1, *numbered(4))
        await rig.until(lambda: rig.mark("in", 0) == 4 and rig.mark("in", 1) == 4)
    assert done[0] == done[1] == list(numbered(4))
    assert seen[0].count(b"v1") == 3
    assert not rig.letters()
    assert len(rig.told.agent_failures) == 2


async def test_other_partitions_go_on_while_one_waits() -> None:
    """A retry of partition 0 is pending for ever; partition 1 is done meanwhile, and partition 0 is not read."""
    async with Rig(retry_base_seconds=3600, retry_cap_seconds=3600) as rig:

        @rig.app.agent(rig.topic("in"))
        async def work(stream: Any) -> None:
            async for event in stream.events():
                if event.message.partition == 0:
                    raise Retryable("away")

        await rig.begin("in")
        await rig.feed("in", 0, *numbered(3))
        await rig.feed("in", 1, *numbered(50))
        await rig.until(lambda: rig.mark("in", 1) == 50)
        assert rig.mark("in", 0) is None
        assert TP("in", 0) in rig.consumer.held
        assert TP("in", 0) not in rig.consumer._readable()
        assert TP("in", 1) in rig.consumer._readable()
        assert rig.app.accounts.in_flight == 3
        assert rig.balanced()


@pytest.mark.parametrize(("error", "kind"), [(Poison("bad"), "poison"), (Rejected("no profile"), "rejected")])
async def test_poison_is_one_dead_letter_and_its_neighbours_go_on(error: Exception, kind: str) -> None:
    """The guilty message becomes one letter, bytes unchanged, at the first attempt; all others are handled once."""
    handled: list[bytes] = []
    async with Rig() as rig:

        @rig.app.agent(rig.topic("in"))
        async def work(stream: Any) -> None:
            async for value in stream:
                if value == b"v2":
                    raise error
                handled.append(value)

        await rig.begin("in")
        await rig.feed("in", 0, *numbered(5))
        await rig.until(lambda: rig.mark("in") == 5)
        ((value, headers),) = rig.letters()
        assert handled == [b"v0", b"v1", b"v3", b"v4"]
        assert value == b"v2"
        assert headers["dlq-class"] == kind
        assert headers["dlq-offset"] == "2"
        assert headers["dlq-attempts"] == "1"
        assert rig.app.accounts.dead_lettered == {kind: 1}
        assert rig.app.accounts.forwarded == 4
        assert rig.balanced()


async def test_what_nobody_classified_is_exhausted_after_its_attempts() -> None:
    """An unknown exception is tried max_attempts times, then the message is a letter of class exhausted."""
    tries = 0
    async with Rig(max_attempts=4) as rig:

        @rig.app.agent(rig.topic("in"))
        async def work(stream: Any) -> None:
            nonlocal tries
            async for value in stream:
                if value == b"v1":
                    tries += 1
                    raise ZeroDivisionError

        await rig.begin("in")
        await rig.feed("in", 0, *numbered(3))
        await rig.until(lambda: rig.mark("in") == 3)
        ((_, headers),) = rig.letters()
    assert tries == 4
    assert headers["dlq-class"] == "exhausted"
    assert headers["dlq-attempts"] == "4"
    assert headers["dlq-exception"] == "builtins.ZeroDivisionError"


async def test_a_dead_letter_counts_only_once_kafka_has_it() -> None:
    """The mark stays before a poison message whose letter is not acknowledged; the body goes on meanwhile."""
    async with Rig() as rig:

        @rig.app.agent(rig.topic("in"))
        async def work(stream: Any) -> None:
            async for value in stream:
                if value == b"v1":
                    raise Poison("bad")

        await rig.begin("in")
        rig.producer.automatic = False
        await rig.feed("in", 0, *numbered(3))
        await rig.until(lambda: rig.app.accounts.in_flight == 1)
        assert rig.mark("in") == 1
        rig.producer.acknowledge()
        await rig.until(lambda: rig.mark("in") == 3)


async def test_the_dead_letter_topic_that_is_away_is_waited_for() -> None:
    """A letter that cannot be written is tried until it can, once is enough, and the commit waits."""
    away = True
    async with Rig() as rig:
        rig.producer.refuse = lambda record: RequestTimedOutError() if away and record[0] == LETTERS else None

        @rig.app.agent(rig.topic("in"))
        async def work(stream: Any) -> None:
            async for value in stream:
                if value == b"v0":
                    raise Poison("bad")

        await rig.begin("in")
        await rig.feed("in", 0, *numbered(2))
        await rig.until(lambda: len(rig.letters()) >= 3)
        assert rig.mark("in") is None
        away = False
        await rig.until(lambda: rig.mark("in") == 2)
        assert rig.app.accounts.dead_lettered == {"poison": 1}
        assert rig.balanced()


async def test_a_letter_that_its_topic_refuses_as_too_large_is_cut() -> None:
    """The broker refuses the whole value: its first bytes, its size and its hash are written, and nothing loops."""
    async with Rig() as rig:
        rig.producer.refuse = lambda record: (
            MessageSizeTooLargeError() if record[0] == LETTERS and len(record[2] or b"") > 2000 else None
        )

        @rig.app.agent(rig.topic("in"))
        async def work(stream: Any) -> None:
            async for _ in stream:
                raise Poison("bad")

        await rig.begin("in")
        await rig.feed("in", 0, b"x" * 5000)
        await rig.until(lambda: rig.mark("in") == 1)
        (_, _), (value, headers) = rig.letters()
    assert value == b"x" * 1024
    assert headers["dlq-truncated"] == "1"
    assert headers["dlq-size"] == "5000"
    assert headers["dlq-class"] == "poison"


async def test_an_output_that_did_not_arrive_has_its_event_delivered_again() -> None:
    """The event waits for its output's acknowledgement, and comes again when that fails."""
    out = []
    async with Rig() as rig:
        target = rig.topic("out")

        @rig.app.agent(rig.topic("in"))
        async def work(stream: Any) -> None:
            async for value in stream:
                out.append(value)
                await target.send(key=b"k", value=value)

        await rig.begin("in")
        rig.producer.automatic = False
        await rig.feed("in", 0, *numbered(2))
        await rig.until(lambda: len(rig.producer.pending) == 2)
        assert rig.mark("in") is None
        rig.producer.acknowledge(1)
        await rig.until(lambda: rig.mark("in") == 1)
        rig.producer.fail(RequestTimedOutError())
        await rig.until(lambda: len(rig.producer.pending) == 1)
        assert rig.mark("in") == 1
        rig.producer.acknowledge()
        await rig.until(lambda: rig.mark("in") == 2)
    assert out == [b"v0", b"v1", b"v1"]
    assert rig.balanced()


async def test_an_output_that_kafka_can_never_take_is_a_dead_letter() -> None:
    """A record that the broker refuses as too large is its message's fault, not a reason to try for ever."""
    async with Rig() as rig:
        target = rig.topic("out")
        rig.producer.refuse = lambda record: (
            MessageSizeTooLargeError() if record[0] == "out" and record[2] == b"v1" else None
        )

        @rig.app.agent(rig.topic("in"))
        async def work(stream: Any) -> None:
            async for value in stream:
                await target.send(key=b"k", value=value)

        await rig.begin("in")
        await rig.feed("in", 0, *numbered(3))
        await rig.until(lambda: rig.mark("in") == 3)
        assert [value for value, _ in rig.letters()] == [b"v1"]
        assert rig.app.accounts.dead_lettered == {"poison": 1}


async def test_changelog_records_of_a_table_are_debts() -> None:
    """An event that changed a table is complete once the changelog has it."""
    async with Rig() as rig:
        table = rig.app.Table("counts", default=int)

        @rig.app.agent(rig.topic("in"))
        async def work(stream: Any) -> None:
            async for value in stream:
                table[value] += 1

        await rig.begin("in")
        rig.producer.automatic = False
        await rig.feed("in", 0, b"a")
        await rig.until(lambda: len(rig.producer.pending) == 1)
        await rig.settle()
        assert rig.mark("in") is None
        rig.producer.fail(RequestTimedOutError())
        await rig.until(lambda: len(rig.producer.pending) == 1)
        rig.producer.acknowledge()
        await rig.until(lambda: rig.mark("in") == 1)


async def test_bytes_that_do_not_decode_never_reach_the_body() -> None:
    """A value of the wrong form is a dead letter with its bytes unchanged; the body sees its neighbours only."""
    seen = []
    async with Rig() as rig:

        @rig.app.agent(rig.app.topic("in", value_type=int, value_serializer="json", key_serializer="raw"))
        async def work(stream: Any) -> None:
            async for value in stream:
                seen.append(value)  # noqa: PERF401

        await rig.begin("in")
        await rig.feed("in", 0, b"1", b"{oops", b"2")
        await rig.until(lambda: rig.mark("in") == 3)
        ((value, headers),) = rig.letters()
    assert [int(value) for value in seen] == [1, 2]
    assert value == b"{oops"
    assert headers["dlq-class"] == "poison"
    assert rig.app.accounts.dead_lettered == {"poison": 1}


async def test_a_body_that_fails_at_every_second_event_never_ends() -> None:
    """Hundreds of failures, each after the last: the agent is alive, order is kept, nothing is left over."""
    tries: dict[bytes, int] = defaultdict(int)
    done = []
    async with Rig(attempt_base_seconds=0.0001, attempt_cap_seconds=0.0002) as rig:

        @rig.app.agent(rig.topic("in"))
        async def work(stream: Any) -> None:
            async for value in stream:
                tries[value] += 1
                if tries[value] == 1 and int(value[1:]) % 2:
                    raise ValueError(value)
                done.append(value)

        await rig.begin("in")
        await rig.feed("in", 0, *numbered(300))
        await rig.until(lambda: rig.mark("in") == 300)
    assert done == list(numbered(300))


async def test_processors_of_a_body_are_not_added_twice() -> None:
    """A body that ran again and built filter and group_by anew sends each message once."""
    failed = False
    seen: list[Any] = []
    async with Rig() as rig:

        @rig.app.agent(rig.topic("in"))
        async def work(stream: Any) -> None:
            nonlocal failed
            calls = 0

            def keep(value: bytes) -> bool:
                nonlocal calls
                calls += 1
                return value != b"v0"

            async for value in stream.filter(keep):
                seen.append((value, calls))
                if not failed:
                    failed = True
                    raise Retryable("away")

        await rig.begin("in")
        await rig.feed("in", 0, *numbered(4))
        await rig.until(lambda: rig.mark("in") == 4)
    assert seen == [(b"v1", 2), (b"v1", 1), (b"v2", 2), (b"v3", 3)]


async def test_group_by_repartitions_and_survives_both_sides() -> None:
    """A key that cannot be made is a dead letter; a body that raises gets its event again; both topics count."""
    seen: list[bytes] = []
    async with Rig() as rig:
        target = rig.topic("by-first", partitions=1)

        def key_of(value: bytes) -> bytes:
            if value == b"v1":
                raise Poison("no key")
            return value[:1]

        @rig.app.agent(rig.topic("in"))
        async def work(stream: Any) -> None:
            async for value in stream.group_by(key_of, name="first", topic=target):
                seen.append(value)
                if value == b"v2" and seen.count(value) == 1:
                    raise Retryable("away")

        await rig.begin("in")
        await rig.settle()
        await rig.app.topics._update_indices()
        await rig.assign({TP("in", 0), TP("by-first", 0)})
        await rig.feed("in", 0, *numbered(4))
        await rig.until(lambda: rig.mark("in") == 4)
        assert rig.outputs("by-first") == [b"v0", b"v2", b"v3"]
        await rig.feed("by-first", 0, b"v0", b"v2", b"v3")
        await rig.until(lambda: rig.mark("by-first") == 3)
    assert seen == [b"v0", b"v2", b"v2", b"v3"]
    assert [value for value, _ in rig.letters()] == [b"v1"]


async def test_a_yielding_agent_and_its_sinks_count() -> None:
    """A sink that raises leaves the event undone; it comes again."""
    got: list[bytes] = []
    tries = 0

    async def sink(value: bytes) -> None:
        nonlocal tries
        tries += 1
        if tries == 2:
            raise Retryable("the sink is away")
        got.append(value)

    async with Rig() as rig:

        @rig.app.agent(rig.topic("in"), sink=[sink])
        async def work(stream: Any) -> Any:
            async for value in stream:
                yield value

        await rig.begin("in")
        await rig.feed("in", 0, *numbered(3))
        await rig.until(lambda: rig.mark("in") == 3)
    assert got == list(numbered(3))


async def test_something_cancelled_within_a_body_is_a_retry() -> None:
    """A body that awaited a cancelled future is not ended by it, and its event is not lost."""
    tries = 0
    async with Rig() as rig:

        @rig.app.agent(rig.topic("in"))
        async def work(stream: Any) -> None:
            nonlocal tries
            async for _ in stream:
                tries += 1
                if tries == 1:
                    gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                    gone.cancel()
                    await gone

        await rig.begin("in")
        await rig.feed("in", 0, *numbered(2))
        await rig.until(lambda: rig.mark("in") == 2)
    assert tries == 3


async def test_a_fatal_failure_ends_the_worker_and_commits_nothing() -> None:
    """Fatal: the stage is told, the event is neither acknowledged nor a dead letter."""
    async with Rig() as rig:

        @rig.app.agent(rig.topic("in"))
        async def work(stream: Any) -> None:
            async for _ in stream:
                raise Fatal("wrong schema")

        await rig.begin("in")
        await rig.feed("in", 0, b"a")
        await rig.until(lambda: rig.fatal)
        assert rig.mark("in") is None
        assert not rig.letters()


async def test_a_body_that_cannot_begin_is_tried_again_and_ends_the_worker_at_last() -> None:
    """A set-up that fails: infrastructure is waited for; what is nobody's infrastructure ends the worker."""
    tries = 0
    async with Rig(max_attempts=3) as rig:

        @rig.app.agent(rig.topic("in"))
        async def work(stream: Any) -> None:  # noqa: ARG001
            nonlocal tries
            tries += 1
            if tries < 6:
                raise ConnectionRefusedError
            raise KeyError("setting")

        await rig.begin("in")
        await rig.until(lambda: rig.fatal)
    assert tries >= 6
