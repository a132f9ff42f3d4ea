"""Chunks: one bad message among many, retries in order, drops, sinks; with a fake owner and through a stream."""

from __future__ import annotations

import asyncio
import gc
import weakref
from typing import Any

import msgspec
import pytest
from aiokafka.errors import KafkaConnectionError, MessageSizeTooLargeError, RequestTimedOutError
from faust.types import TP

from streams.resilience.chunks import Chunk, Out, request_id_of
from streams.resilience.failures import FailureClass, Poison, Rejected, Retryable, classify
from tests.resilience.harness import Record, Rig, numbered


class FakeOwner:
    """What a chunk asks of its stream: poison is a letter, everything else is held back."""

    condemned: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self.judged: list[int] = []
        self.drops: list[tuple[int, str]] = []
        self.outgoing: list[Any] = []
        self.letters: list[Any] = []
        self.failure: BaseException | None = None
        self.refuse: BaseException | None = None
        self.holds = True

    def judge(self, record: Any, exc: BaseException, delivery: Any) -> Any:  # noqa: ARG002
        self.judged.append(record.offset)
        if classify(exc) in (FailureClass.POISON, FailureClass.REJECTED):
            return ("errors", record.key, record.value, [("dlq-class", b"poison")])
        return None

    def dropped(self, record: Any, reason: str, delivery: Any) -> None:  # noqa: ARG002
        self.drops.append((record.offset, reason))

    async def forward(self, chunk: Chunk, outgoing: Any, letters: Any, rest: list[int], failure: Any) -> bool:
        if self.refuse is not None:
            raise self.refuse
        self.outgoing += outgoing
        self.letters += letters
        chunk.pending, self.failure = rest, failure
        return self.holds


def chunk_of(*values: bytes | None, decode: Any = bytes) -> tuple[Chunk, FakeOwner]:
    """Return a chunk of ``values`` with its owner."""
    owner = FakeOwner()
    return Chunk([Record("t", n, value) for n, value in enumerate(values)], decode, owner), owner


def echo(value: bytes, out: Out) -> None:
    """Send what came."""
    out.send("out", value, "k")


def sent(owner: FakeOwner) -> list[Any]:
    """Return the values that were sent."""
    return [value for _, _, value, _ in owner.outgoing]


async def test_each_sends_what_every_message_gives() -> None:
    """Order is the log's; bytes go as they are, anything else as JSON; text keys become bytes."""
    chunk, owner = chunk_of(b"a", b"b")
    await chunk.each(lambda value, out: out.send("out", {"v": value.decode()}, "key", [("h", b"1")]))
    assert owner.outgoing == [
        ("out", b"key", b'{"v":"a"}', [("h", b"1")]),
        ("out", b"key", b'{"v":"b"}', [("h", b"1")]),
    ]
    assert not chunk.pending


async def test_a_chunk_that_was_given_away_is_left() -> None:
    """What comes of a long chunk is handed on bit by bit; once its partition is somebody else's, the rest is let be."""
    chunk, owner = chunk_of(*numbered(1000))
    owner.holds = False
    await chunk.each(echo)
    assert 0 < len(owner.outgoing) < 1000
    assert len(chunk.pending) == 1000 - len(owner.outgoing)


async def test_one_bad_among_many() -> None:
    """999 of 1,000 go on; the bad one is one letter with its bytes, and what it had sent before raising is not sent."""
    chunk, owner = chunk_of(*numbered(1000))

    def work(value: bytes, out: Out) -> None:
        out.send("out", value)
        if value == b"v500":
            raise Poison("bad")

    await chunk.each(work)
    assert sent(owner) == [value for value in numbered(1000) if value != b"v500"]
    assert [value for _, _, value, _ in owner.letters] == [b"v500"]
    assert owner.failure is None


@pytest.mark.parametrize("bad", [b"{", b"\xff", b"", None])
async def test_what_does_not_decode_is_a_letter(bad: bytes | None) -> None:
    """Whatever the bytes are, they are one letter and their neighbours go on."""
    chunk, owner = chunk_of(b"1", bad, b"2", decode=msgspec.json.Decoder(int).decode)
    seen: list[int] = []
    await chunk.each(lambda value, out: seen.append(value))  # noqa: ARG005
    assert seen == [1, 2]
    assert [value for _, _, value, _ in owner.letters] == [bad]


async def test_a_retry_holds_the_rest_back_in_order() -> None:
    """What came before is sent, what failed and all behind it is still to do; the second time it is handled."""
    chunk, owner = chunk_of(*numbered(5))
    away = True

    def work(value: bytes, out: Out) -> None:
        if value == b"v2" and away:
            raise Retryable("away")
        out.send("out", value)

    await chunk.each(work)
    assert sent(owner) == [b"v0", b"v1"]
    assert chunk.pending == [2, 3, 4]
    assert isinstance(owner.failure, Retryable)
    away = False
    await chunk.each(work)
    assert sent(owner) == list(numbered(5))
    assert not chunk.pending


async def test_async_handlers_are_awaited() -> None:
    """A coroutine function, and a function that returns something to wait for."""

    async def work(value: bytes, out: Out) -> None:
        await asyncio.sleep(0)
        out.send("out", value)

    chunk, owner = chunk_of(*numbered(3))
    await chunk.each(work)
    again, other = chunk_of(*numbered(3))
    await again.each(lambda value, out: work(value, out))  # noqa: PLW0108 - no coroutine function itself
    assert sent(owner) == sent(other) == list(numbered(3))


async def test_a_drop_is_told_with_its_reason() -> None:
    """A handler may say that nothing comes of a message; that is not carried over to the next one."""
    chunk, owner = chunk_of(*numbered(3))
    await chunk.each(lambda value, out: out.drop("no_readings") if value == b"v1" else out.send("out", value))
    assert owner.drops == [(1, "no_readings")]
    assert sent(owner) == [b"v0", b"v2"]


async def test_a_drop_of_a_handler_that_then_raises_does_not_count() -> None:
    """Neither its drop nor its output, for itself or for the next message."""
    chunk, owner = chunk_of(*numbered(2))

    def work(value: bytes, out: Out) -> None:
        out.drop("no_readings")
        out.send("out", value)
        if value == b"v0":
            raise Poison("bad")

    await chunk.each(work)
    assert owner.drops == [(1, "no_readings")]
    assert sent(owner) == [b"v1"]


async def test_what_cannot_be_sent_leaves_the_chunk_as_it_was() -> None:
    """An output that Kafka can never take: the chunk is still to do as a whole, so nothing of it is lost."""
    chunk, owner = chunk_of(*numbered(3))
    owner.refuse = MessageSizeTooLargeError()
    with pytest.raises(MessageSizeTooLargeError):
        await chunk.each(echo)
    assert chunk.pending == [0, 1, 2]


async def test_cancelled_in_the_middle_leaves_the_chunk_as_it_was() -> None:
    """A stop within a handler: nothing sent, everything still to do."""
    chunk, owner = chunk_of(*numbered(3))

    async def work(value: bytes, out: Out) -> None:
        out.send("out", value)
        if value == b"v1":
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await chunk.each(work)
    assert chunk.pending == [0, 1, 2]
    assert not owner.outgoing


# -- sinks ------------------------------------------------------------------------------------------------------------


async def test_all_gives_everything_at_once() -> None:
    """One call with all messages that decode, in order; those that do not are letters."""
    chunk, owner = chunk_of(b"1", b"{", b"3", decode=msgspec.json.Decoder(int).decode)
    calls: list[list[int]] = []

    async def store(messages: list[int]) -> None:
        calls.append(messages)

    await chunk.all(store)
    assert calls == [[1, 3]]
    assert [value for _, _, value, _ in owner.letters] == [b"{"]
    assert not chunk.pending


async def test_all_buries_what_the_sink_names() -> None:
    """Positions are those of the list that the sink got, in any order."""
    chunk, owner = chunk_of(b"{", b"1", b"2", b"3", decode=msgspec.json.Decoder(int).decode)

    async def store(messages: list[int]) -> list[tuple[int, BaseException]]:  # noqa: ARG001
        return [(2, Rejected("third")), (0, Poison("first"))]

    await chunk.all(store)
    assert [value for _, _, value, _ in owner.letters] == [b"{", b"1", b"3"]
    assert not chunk.pending


async def test_all_finds_the_guilty_message_by_itself() -> None:
    """A sink that raises for one row is called again row by row: one letter, the rest stored."""
    stored: list[bytes] = []

    async def store(messages: list[bytes]) -> None:
        if b"v2" in messages:
            raise Poison("bad row")
        stored.extend(messages)

    chunk, owner = chunk_of(*numbered(5))
    await chunk.all(store)
    assert stored == [b"v0", b"v1", b"v3", b"v4"]
    assert [value for _, _, value, _ in owner.letters] == [b"v2"]


async def test_all_holds_everything_while_the_sink_is_away() -> None:
    """Infrastructure: nothing is a letter, all comes again."""

    async def store(messages: list[bytes]) -> None:  # noqa: ARG001
        raise KafkaConnectionError

    chunk, owner = chunk_of(*numbered(3))
    await chunk.all(store)
    assert chunk.pending == [0, 1, 2]
    assert isinstance(owner.failure, KafkaConnectionError)
    assert not owner.letters


async def test_all_keeps_a_message_whose_decoder_fails_for_a_reason_unknown() -> None:
    """It is neither stored nor lost: it and those behind it come again, those before it are stored."""
    stored: list[bytes] = []

    def decode(value: bytes) -> bytes:
        if value == b"v1":
            raise ZeroDivisionError
        return value

    async def store(messages: list[bytes]) -> None:
        stored.extend(messages)

    chunk, owner = chunk_of(*numbered(3), decode=decode)
    await chunk.all(store)
    assert stored == [b"v0"]
    assert chunk.pending == [1, 2]
    assert isinstance(owner.failure, ZeroDivisionError)


async def test_all_stops_at_the_row_that_is_to_be_tried_again() -> None:
    """Row by row, the sink goes away in the middle: what was done is done, the rest comes again in order."""
    calls = 0

    async def store(messages: list[bytes]) -> None:
        nonlocal calls
        calls += 1
        if len(messages) > 1:
            raise Poison("one of them")
        if messages == [b"v2"]:
            raise Retryable("away")

    chunk, owner = chunk_of(*numbered(4))
    await chunk.all(store)
    assert chunk.pending == [2, 3]
    assert isinstance(owner.failure, Retryable)
    assert calls == 4


def test_the_request_id_is_read_where_there_is_one() -> None:
    """Of JSON objects with a text request_id; of nothing else, and nothing is raised."""
    values = [b'{"request_id":"r"}', b'{"request_id":7}', b"[]", b"\xff", b"", None]
    assert [request_id_of(Record("t", 0, value)) for value in values] == ["r", None, None, None, None, None]


# -- through a stream -------------------------------------------------------------------------------------------------


async def test_a_chunk_is_complete_when_its_outputs_are_acknowledged() -> None:
    """Several chunks are in flight; each is committed with what it sent, in order."""
    async with Rig() as rig:

        @rig.app.agent(rig.chunk_topic("in"))
        async def work(stream: Any) -> None:
            async for chunk in stream:
                await chunk.each(echo)

        await rig.begin("in")
        rig.producer.automatic = False
        await rig.feed("in", 0, *numbered(3))
        await rig.feed("in", 0, *numbered(2))
        await rig.until(lambda: len(rig.producer.pending) == 5)
        assert rig.mark("in") is None
        rig.producer.acknowledge(2)
        await rig.settle()
        assert rig.mark("in") is None
        rig.producer.acknowledge(1)
        await rig.until(lambda: rig.mark("in") == 3)
        rig.producer.acknowledge()
        await rig.until(lambda: rig.mark("in") == 5)
        assert rig.balanced()


async def test_a_chunk_that_is_done_is_freed_without_the_garbage_collector() -> None:
    """A chunk that kept itself alive would keep all records of a fetch, until a full collection some minutes later."""
    async with Rig() as rig:
        records: list[weakref.ref[Any]] = []

        @rig.app.agent(rig.chunk_topic("in"))
        async def work(stream: Any) -> None:
            async for chunk in stream:
                records.append(weakref.ref(chunk.records[0]))
                await chunk.each(echo)

        await rig.begin("in")
        gc.disable()
        try:
            for number in (1, 2):  # the body still has the last one in hand
                await rig.feed("in", 0, *numbered(3))
                await rig.until(lambda number=number: rig.mark("in") == 3 * number)
            await rig.until(lambda: records[0]() is None)
        finally:
            gc.enable()
        assert len(records) == 2


async def test_a_retry_in_a_chunk_keeps_order_and_counts_once() -> None:
    """Handler away twice at one message: outputs in the order of the log, each once; drops and letters counted once."""
    tries = 0

    def handler(value: bytes, out: Out) -> None:
        nonlocal tries
        if value == b"v4":
            tries += 1
            if tries < 3:
                raise Retryable("away")
        if value == b"v1":
            out.drop("no_readings")
        elif value == b"v2":
            raise Poison("bad")
        else:
            out.send("out", value)

    async with Rig() as rig:

        @rig.app.agent(rig.chunk_topic("in"))
        async def work(stream: Any) -> None:
            async for chunk in stream:
                await chunk.each(handler)

        await rig.begin("in")
        await rig.feed("in", 0, *numbered(6))
        await rig.feed("in", 0, b"v6", b"v7")
        await rig.until(lambda: rig.mark("in") == 8)
        accounts = rig.app.accounts
        assert rig.outputs() == [b"v0", b"v3", b"v4", b"v5", b"v6", b"v7"]
        assert (accounts.forwarded, accounts.dead_lettered, accounts.dropped) == (6, {"poison": 1}, {"no_readings": 1})
        assert rig.balanced()


async def test_an_unclassified_message_of_a_chunk_is_exhausted() -> None:
    """It is tried max_attempts times, with those behind it waiting; then one letter, and they go on."""
    async with Rig(max_attempts=3) as rig:

        @rig.app.agent(rig.chunk_topic("in"))
        async def work(stream: Any) -> None:
            async for chunk in stream:
                await chunk.each(lambda value, out: echo(value, out) if value != b"v1" else 1 / 0)

        await rig.begin("in")
        await rig.feed("in", 0, *numbered(4))
        await rig.until(lambda: rig.mark("in") == 4)
        ((value, headers),) = rig.letters()
        assert (value, headers["dlq-class"], headers["dlq-attempts"]) == (b"v1", "exhausted", "3")
        assert rig.outputs() == [b"v0", b"v2", b"v3"]
        assert len(rig.told.retries) == 2


async def test_an_output_too_large_is_one_letter_and_the_rest_of_its_chunk_goes_on() -> None:
    """The producer refuses one record before anything is sent: the guilty message shows itself, none is lost."""
    async with Rig() as rig:

        async def send_many(records: Any) -> Any:
            records = list(records)
            if any(len(value or b"") > 100 for topic, _, value, _ in records if topic == "out"):
                raise MessageSizeTooLargeError
            return await take(records)

        take, rig.producer.send_many = rig.producer.send_many, send_many  # type: ignore[method-assign]

        @rig.app.agent(rig.chunk_topic("in"))
        async def work(stream: Any) -> None:
            async for chunk in stream:
                await chunk.each(lambda value, out: out.send("out", value * (60 if value == b"v2" else 1)))

        await rig.begin("in")
        await rig.feed("in", 0, *numbered(5))
        await rig.until(lambda: rig.mark("in") == 5)
        assert [value for value, _ in rig.letters()] == [b"v2"]
        assert sorted(rig.outputs()) == [b"v0", b"v1", b"v3", b"v4"]
        assert rig.app.accounts.dead_lettered == {"poison": 1}
        assert rig.balanced()


async def test_outputs_that_did_not_arrive_come_again() -> None:
    """A batch that Kafka did not take: the chunk is handled anew, and counted once."""
    async with Rig() as rig:

        @rig.app.agent(rig.chunk_topic("in"))
        async def work(stream: Any) -> None:
            async for chunk in stream:
                await chunk.each(lambda value, out: echo(value, out) if value != b"v1" else out.drop("muted"))

        await rig.begin("in")
        rig.producer.automatic = False
        await rig.feed("in", 0, *numbered(3))
        await rig.until(lambda: len(rig.producer.pending) == 2)
        rig.producer.fail(RequestTimedOutError())
        await rig.until(lambda: len(rig.producer.pending) == 2)
        assert rig.mark("in") is None
        rig.producer.acknowledge()
        await rig.until(lambda: rig.mark("in") == 3)
        assert rig.app.accounts.dropped == {"muted": 1}
        assert rig.app.accounts.forwarded == 2
        assert rig.balanced()


async def test_a_body_that_raises_beside_each_takes_the_chunk_apart() -> None:
    """A body with code of its own: its failure is found message by message, all others are done."""
    async with Rig() as rig:
        target = rig.topic("out")

        @rig.app.agent(rig.chunk_topic("in"))
        async def work(stream: Any) -> None:
            async for chunk in stream:
                for value in chunk:
                    if value == b"v1":
                        raise Poison("bad")
                    await target.send(key=b"k", value=value)

        await rig.begin("in")
        await rig.feed("in", 0, *numbered(4))
        await rig.until(lambda: rig.mark("in") == 4)
        assert [value for value, _ in rig.letters()] == [b"v1"]
        assert set(rig.outputs()) == {b"v0", b"v2", b"v3"}
        assert rig.app.accounts.forwarded == 3
        assert rig.balanced()


async def test_a_body_that_raises_after_each_loses_nothing() -> None:
    """What each() has done is done; the body gets the same chunk again, and nothing is sent twice."""
    failed = False
    async with Rig() as rig:

        @rig.app.agent(rig.chunk_topic("in"))
        async def work(stream: Any) -> None:
            nonlocal failed
            async for chunk in stream:
                await chunk.each(echo)
                if not failed:
                    failed = True
                    raise Retryable("the summary's sink is away")

        await rig.begin("in")
        await rig.feed("in", 0, *numbered(3))
        await rig.until(lambda: rig.mark("in") == 3)
        assert rig.outputs() == list(numbered(3))


async def test_two_chunk_agents_on_one_topic_have_a_chunk_each() -> None:
    """What one has handled the other has still to handle, also where Faust gives one event to both."""
    first: list[bytes] = []
    second: list[bytes] = []
    async with Rig(faust={"cython_optimizations": True}) as rig:
        topic = rig.chunk_topic("in")

        @rig.app.agent(topic)
        async def one(stream: Any) -> None:
            async for chunk in stream:
                await chunk.each(lambda value, out: first.append(value))  # noqa: ARG005

        @rig.app.agent(topic)
        async def two(stream: Any) -> None:
            async for chunk in stream:
                await chunk.each(lambda value, out: second.append(value))  # noqa: ARG005

        await rig.begin("in")
        await rig.feed("in", 0, *numbered(3))
        await rig.until(lambda: rig.mark("in") == 3)
    assert first == second == list(numbered(3))
    assert rig.app.accounts.forwarded == 3


async def test_a_large_fetch_comes_in_chunks_of_a_bounded_size() -> None:
    """chunk_records bounds a chunk; order and completeness are as if it were one."""
    sizes: list[int] = []
    async with Rig(chunk_records=10) as rig:

        @rig.app.agent(rig.chunk_topic("in"))
        async def work(stream: Any) -> None:
            async for chunk in stream:
                sizes.append(len(chunk))
                await chunk.each(echo)

        await rig.begin("in")
        await rig.feed("in", 0, *numbered(25))
        await rig.until(lambda: rig.mark("in") == 25)
        assert sizes == [10, 10, 5]
        assert rig.outputs() == list(numbered(25))


async def test_a_chunk_whose_partition_goes_sends_nothing_more() -> None:
    """Revoked while its handler runs: its outputs are not sent, its new owner sends them; nothing is kept."""
    gate = asyncio.Event()

    async def handler(value: bytes, out: Out) -> None:
        await gate.wait()
        out.send("out", value)

    async with Rig() as rig:

        @rig.app.agent(rig.chunk_topic("in"))
        async def work(stream: Any) -> None:
            async for chunk in stream:
                await chunk.each(handler)

        await rig.begin("in")
        await rig.feed("in", 0, *numbered(3))
        await rig.until(lambda: rig.consumer.busy)
        await rig.revoke()
        assert rig.app.accounts.returned == 3
        gate.set()
        await rig.settle()
        assert not rig.outputs()
        assert not rig.app.captured
        await rig.assign({TP("in", 0)})
        await rig.feed("in", 0, *numbered(3))
        await rig.until(lambda: rig.mark("in") == 3)
        assert rig.outputs() == list(numbered(3))


# -- test_context -----------------------------------------------------------------------------------------------------


async def test_a_chunk_agent_takes_one_message_and_a_chunk_under_test_context() -> None:
    """put() returns when the body has done the value; what it sends is captured, letters too."""
    async with Rig() as rig:

        @rig.app.agent(rig.chunk_topic("in", msgspec.json.Decoder(int).decode))
        async def work(stream: Any) -> None:
            async for chunk in stream:
                await chunk.each(lambda value, out: out.send("out", value + 1))

        async with work.test_context() as agent:
            await agent.put(1)
            await agent.put(b"2")
            await agent.put(Chunk([Record("in", 0, b"3"), Record("in", 1, b"oops")], msgspec.json.Decoder(int).decode))
        captured = rig.app.captured
    assert [(topic, value) for topic, _, value, _ in captured] == [
        ("out", b"2"),
        ("out", b"3"),
        ("out", b"4"),
        ("errors", b"oops"),
    ]


async def test_a_record_that_ended_the_worker_twice_reaches_no_handler() -> None:
    """A condemned record is a dead letter before any handler sees it; its neighbours are handled."""
    chunk, owner = chunk_of(b"a", b"b", b"c")
    guilty = chunk.records[1]
    owner.condemned = frozenset({f"{guilty.topic}:{guilty.partition}:{guilty.offset}"})
    seen: list[Any] = []
    await chunk.each(lambda message, _out: seen.append(message))
    assert seen == [b"a", b"c"]
    assert owner.judged == [guilty.offset]
