"""What a handler's answer does to its message, against Apache Kafka."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import re
import threading
import time
from typing import Any

import aiokafka
import pytest

from streams.resilience import Fatal, Poison, Rejected, Retryable
from streams.resilience.deadletter import header
from tests.resilience.consumers.conftest import eventually
from tools.stack.ports import choose


async def test_false_five_times(broker: Any, consuming: Any) -> None:
    """False five times and then True: delivered six times, committed once, the next message after it."""
    topic, group = await broker.topic(), broker.group()
    await broker.send(topic, ["a", "b"])
    seen: list[str] = []
    commits: list[int] = []

    async def handle(message: Any) -> bool:
        seen.append(message.value)
        return message.value != "a" or seen.count("a") == 6

    consumer = consuming(topic, handle, group)
    await eventually(lambda: consumer._session, "a session")
    client = consumer._session.consumer
    commit = client.commit
    client.commit = lambda offsets: commits.extend(offsets.values()) or commit(offsets)
    await eventually(lambda: broker.committed(group), "a commit")
    await eventually(lambda: seen[-1] == "b", "the next message")
    await consumer.stop()
    assert seen == ["a"] * 6 + ["b"]
    assert commits in ([1, 2], [2])
    assert await broker.committed(group) == {(topic, 0): 2}


@pytest.mark.parametrize("turns", range(6))
async def test_a_stop_right_behind_a_commit(broker: Any, consuming: Any, turns: int) -> None:
    """It ends in whatever turn of the event loop it comes, and the commit has counted."""
    topic, group = await broker.topic(), broker.group()
    await broker.send(topic, ["a"])
    consumer = consuming(topic, lambda _: True, group)
    await eventually(lambda: consumer._session, "a session")
    client = consumer._session.consumer
    commit = client.commit
    stopping: list[asyncio.Task[None]] = []

    async def commit_and_stop(offsets: Any) -> None:
        await commit(offsets)
        if not stopping:
            stopping.append(asyncio.create_task(consumer.stop()))
            for _ in range(turns):
                await asyncio.sleep(0)

    client.commit = commit_and_stop
    await eventually(lambda: stopping and stopping[0].done(), "the end")
    assert await broker.committed(group) == {(topic, 0): 1}


@pytest.mark.parametrize("batches", [False, True])
async def test_a_cancellation_within_a_plain_handler(broker: Any, consuming: Any, batches: bool) -> None:
    """A pool cancels what the coroutine of a plain handler waits for: the same message again, nothing before it."""
    topic, group = await broker.topic(), broker.group()
    await broker.send(topic, ["a", "b"])
    seen: list[str] = []

    async def work(values: list[str]) -> bool:
        seen.extend(values)
        if seen == values:
            raise asyncio.CancelledError
        return True

    def handle(given: Any) -> Any:
        found = [record for records in given.values() for record in records] if batches else [given]
        return work([record.value for record in found])

    consuming(topic, handle, group, batch_processing=batches)

    async def all_done() -> bool:
        return bool(await broker.committed(group) == {(topic, 0): 2})

    await eventually(all_done, "both are committed")
    assert seen[0] == "a"
    assert seen[-2:] == ["a", "b"] or seen == ["a", "a", "b"]


async def test_a_callback_that_stops_its_consumer(consuming: Any) -> None:
    """Told that Kafka is away, it may stop the consumer that tells it; neither waits for the other."""
    stopping: list[bool] = []

    async def stop(_exc: BaseException, _message: Any) -> None:
        await consumer.stop()
        stopping.append(True)

    consumer = consuming("t", lambda _: True, on_error_callback=stop, bootstrap=f"127.0.0.1:{choose(set(), random)}")
    await eventually(consumer.task.done, "the end")
    assert stopping == [True]


async def test_a_log_that_ends_with_a_marker(broker: Any, consuming: Any) -> None:
    """Messages written in transactions: what is committed in the end is the end of the log, markers included."""
    topic, group = await broker.topic(), broker.group()
    seen: list[str] = []

    async def handle(message: Any) -> bool:
        seen.append(message.value)
        return True

    consuming(topic, handle, group)
    async with aiokafka.AIOKafkaProducer(bootstrap_servers=broker.servers, transactional_id=group) as producer:
        for number in range(3):
            async with producer.transaction():
                await producer.send_and_wait(topic, json.dumps(number).encode())
    await eventually(lambda: len(seen) == 3, "every message")

    async def at_the_end() -> bool:
        found: dict[tuple[str, int], int] = await broker.committed(group)
        return found == {(topic, 0): 6}

    await eventually(at_the_end, "the end committed")


async def test_other_partitions_go_on(broker: Any, consuming: Any) -> None:
    """A message that is not done holds its partition alone."""
    topic, group = await broker.topic(partitions=2), broker.group()
    await broker.send(topic, [0, 1, 2], partition=0)
    await broker.send(topic, [10, 11, 12], partition=1)
    seen: list[int] = []
    release = asyncio.Event()

    async def handle(message: Any) -> bool:
        seen.append(message.value)
        return message.value != 0 or release.is_set()

    consuming(topic, handle, group)
    await eventually(lambda: {10, 11, 12} <= set(seen) and seen.count(0) > 3, "the other partition")
    assert 1 not in seen
    release.set()
    await eventually(lambda: 2 in seen, "the partition that was held")

    async def committed() -> bool:
        return await broker.committed(group) == {(topic, 0): 3, (topic, 1): 3}

    await eventually(committed, "all committed")


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_every_message_is_handled(broker: Any, consuming: Any, kind: str, batch: bool) -> None:
    """Handlers that fail at random now and then get every message, each key in order, none committed before."""
    topic, group = await broker.topic(partitions=3), broker.group()
    await broker.send(topic, range(600), key=lambda n: str(n % 10).encode())
    rng = random.Random(7)
    done: list[int] = []

    def one(message: Any) -> bool:
        if rng.random() < 0.05:
            if rng.random() < 0.5:
                raise Retryable("now and then")
            return False
        done.append(message.value)
        return True

    def many(batches: Any) -> Any:
        if rng.random() < 0.05:
            raise Retryable("now and then")
        counts = {}
        for tp, messages in batches.items():
            counts[tp] = rng.randint(0, len(messages))
            done.extend(message.value for message in messages[: counts[tp]])
        return counts

    function = many if batch else one

    async def handle(given: Any) -> Any:
        await asyncio.sleep(0)
        return function(given)

    consuming(topic, handle if kind == "async" else function, group, batch_processing=batch, max_delay=0.02)
    await eventually(lambda: len(done) >= 600, "600 messages")

    async def committed() -> bool:
        return sum((await broker.committed(group)).values()) == 600

    await eventually(committed, "all committed")
    assert sorted(done) == list(range(600))
    for key in range(10):
        mine = [n for n in done if n % 10 == key]
        assert mine == sorted(mine)


async def test_poison_and_exhausted(broker: Any, consuming: Any) -> None:
    """Exceptions go by the failure table, and dead letters have the original bytes and say why."""
    topic, letters, group = await broker.topic(), await broker.topic("dead"), broker.group()
    values = [b'{"n": 1}', b"{broken", b'{"n": "poison"}', b'{"n": "odd"}', b'{"n": "refused"}', b"\xff\xfe", b"null"]
    await broker.send(topic, values, key=lambda v: v[:3])
    told: list[tuple[str, Any]] = []
    seen: list[Any] = []

    def handle(message: Any) -> None:
        seen.append(message.value)
        n = message.value and message.value["n"]
        if n == "poison":
            raise Poison("never")
        if n == "refused":
            raise Rejected("not mine")
        if n == "odd":
            raise KeyError("x")

    consumer = consuming(
        topic,
        handle,
        group,
        dead_letter_topic=letters,
        max_attempts=3,
        on_error_callback=lambda exc, message: told.append((type(exc).__name__, message.offset)),
    )
    found = await broker.read(letters, 5)
    assert [(r.value, header(r.headers, "dlq-class"), header(r.headers, "dlq-attempts")) for r in found] == [
        (values[1], "poison", "1"),
        (values[2], "poison", "1"),
        (values[3], "exhausted", "3"),
        (values[4], "rejected", "1"),
        (values[5], "poison", "1"),
    ]
    assert [header(r.headers, "dlq-offset") for r in found] == ["1", "2", "3", "4", "5"]
    assert header(found[0].headers, "dlq-group") == group
    assert found[0].key == values[1][:3]

    async def committed() -> bool:
        return await broker.committed(group) == {(topic, 0): 7}

    await eventually(committed, "all committed")
    assert seen[-1] is None
    assert [name for name, _ in told] == ["Undecodable", "Poison", *["KeyError"] * 3, "Rejected", "Undecodable"]
    assert consumer.accounts()["balance"] == 0


async def test_undecodable_goes_to_the_callback(broker: Any, consuming: Any, caplog: Any) -> None:
    """Without a dead-letter topic the callback is told of a value that does not decode, and the group goes on."""
    topic, group = await broker.topic(), broker.group()
    await broker.send(topic, [b"{", 1])
    told: list[Any] = []
    seen: list[Any] = []

    async def callback(exc: BaseException, message: Any) -> None:
        told.append((str(exc), message.value))
        raise RuntimeError("what a callback raises changes nothing")

    consuming(topic, lambda m: seen.append(m.value), group, on_error_callback=callback)
    await eventually(lambda: seen == [1], "the message behind it")
    assert told[0][1] == b"{"
    assert f"{topic}[0] offset 0: does not decode" in told[0][0]
    assert "no dead_letter_topic is given" in caplog.text


@pytest.mark.parametrize("batch", [False, True])
async def test_nothing_is_skipped_without_a_place(broker: Any, consuming: Any, caplog: Any, batch: bool) -> None:
    """With neither dead letters nor callback, what does not decode holds its partition and says what to set."""
    topic, group = await broker.topic(), broker.group()
    await broker.send(topic, [1, b"{", 2])
    seen: list[Any] = []

    def handle(given: Any) -> None:
        messages = [message for part in given.values() for message in part] if batch else [given]
        seen.extend(message.value for message in messages)

    consuming(topic, handle, group, batch_processing=batch)
    await eventually(lambda: caplog.text.count("holds its partition") > 2, "the log")
    assert seen == [1]

    async def committed() -> bool:
        return await broker.committed(group) == {(topic, 0): 1}

    await eventually(committed, "what is before it")


async def test_fatal_ends_the_call(broker: Any, consuming: Any) -> None:
    """A fatal exception comes out of consume_messages, and its message is not committed."""
    topic, group = await broker.topic(), broker.group()
    await broker.send(topic, [1, 2])

    async def handle(message: Any) -> None:
        if message.value == 2:
            raise Fatal("wrong deployment")

    consumer = consuming(topic, handle, group)
    with pytest.raises(Fatal, match="wrong deployment"):
        await asyncio.wait_for(consumer.task, 30)
    assert await broker.committed(group) == {(topic, 0): 1}


async def test_order_per_key_in_parallel(broker: Any, consuming: Any) -> None:
    """`concurrency` handlers run at a time, no more, and messages of one key never overlap or overtake."""
    topic = await broker.topic(partitions=2)
    await broker.send(topic, range(200), key=lambda n: str(n % 8).encode())
    overlaps: list[int] = []
    running: set[int] = set()
    most = 0
    done: list[int] = []
    rng = random.Random(3)

    async def handle(message: Any) -> bool:
        nonlocal most
        key = message.value % 8
        overlaps.extend([key] if key in running else [])
        running.add(key)
        most = max(most, len(running))
        await asyncio.sleep(rng.random() * 0.01)
        running.remove(key)
        if rng.random() < 0.05:
            return False
        done.append(message.value)
        return True

    consuming(topic, handle, concurrency=4)
    await eventually(lambda: len(done) == 200, "200 messages")
    assert overlaps == []
    assert 2 <= most <= 4
    for key in range(8):
        mine = [n for n in done if n % 8 == key]
        assert mine == sorted(mine)


async def test_raw_and_own_decoders(broker: Any, consuming: Any) -> None:
    """raw=True leaves bytes; own deserializers are used; several topics and a pattern are read."""
    first, second = await broker.topic("raw-a"), await broker.topic("raw-b")
    await broker.send(first, [b"{x"], key=lambda _: b"k")
    await broker.send(second, [b"[1]"])
    seen: list[Any] = []
    consuming([first, second], lambda m: seen.append(m.value), raw=True)
    await eventually(lambda: sorted(seen) == [b"[1]", b"{x"], "both topics")
    shown: list[Any] = []
    consuming(
        re.compile(f"^{re.escape(first)}$|^{re.escape(second)}$"),
        lambda m: shown.append((m.key, m.value)),
        value_deserializer=lambda b: b.decode().upper(),
        key_deserializer=bytes.decode,
    )
    await eventually(lambda: len(shown) == 2, "a pattern")
    assert sorted(shown, key=str) == [("k", "{X"), (None, "[1]")]


async def test_a_slow_sync_handler_keeps_the_membership(broker: Any, consuming: Any) -> None:
    """A sync handler that sleeps beyond the session runs in a thread: no rebalance, no second delivery."""
    topic, group = await broker.topic(), broker.group()
    await broker.send(topic, [1, 2])
    seen: list[tuple[int, int]] = []

    def handle(message: Any) -> None:
        seen.append((message.value, threading.get_ident()))
        if message.value == 1:
            time.sleep(8)

    consumer = consuming(topic, handle, group)
    await eventually(lambda: seen, "the first message")
    generation = consumer._session.consumer._coordinator.generation
    await eventually(lambda: len(seen) > 1, "the second message")
    assert [value for value, _ in seen] == [1, 2]
    assert seen[0][1] != threading.get_ident()
    assert consumer._session.consumer._coordinator.generation == generation
    assert consumer.recreations == 0


async def test_stop_within_a_handler(broker: Any, consuming: Any) -> None:
    """A handler may stop its own consumer; its message is committed, the next one is not begun."""
    topic, group = await broker.topic(), broker.group()
    await broker.send(topic, [1, 2])
    seen: list[int] = []

    async def handle(message: Any) -> None:
        seen.append(message.value)
        await consumer.stop()

    consumer = consuming(topic, handle, group)
    await asyncio.wait_for(consumer.task, 30)
    assert seen == [1]
    assert await broker.committed(group) == {(topic, 0): 1}


async def test_no_commit_when_told_so(broker: Any, consuming: Any) -> None:
    """commit_offset=False commits nothing; commit() does when it is called."""
    topic, group = await broker.topic(), broker.group()
    await broker.send(topic, [1, 2])
    seen: list[int] = []
    consumer = consuming(topic, lambda m: seen.append(m.value), group, commit_offset=False)
    await eventually(lambda: len(seen) == 2, "both messages")
    assert await broker.committed(group) == {}
    assert await consumer.commit()
    assert await broker.committed(group) == {(topic, 0): 2}


async def test_batches_isolate_the_guilty(broker: Any, consuming: Any) -> None:
    """One bad record in a batch becomes a dead letter alone; its neighbours are done."""
    topic, letters, group = await broker.topic(), await broker.topic("dead"), broker.group()
    await broker.send(topic, [0, 1, b"{", 2, 3, 4])
    done: list[int] = []

    async def handle(batch: Any) -> None:
        values = [message.value for messages in batch.values() for message in messages]
        if 3 in values:
            raise ValueError("three")
        done.extend(values)

    consuming(topic, handle, group, batch_processing=True, dead_letter_topic=letters, max_attempts=2)
    found = await broker.read(letters, 2)
    assert [r.value for r in found] == [b"{", b"3"]
    assert header(found[1].headers, "dlq-class") == "exhausted"

    async def committed() -> bool:
        return await broker.committed(group) == {(topic, 0): 6}

    await eventually(committed, "all committed")
    assert done == [0, 1, 2, 4]


async def test_log_lines(broker: Any, consuming: Any, caplog: Any) -> None:
    """A client that was closed behind its back is found, and created anew; the log lines are word for word."""
    caplog.set_level(logging.INFO)
    topic = await broker.topic()
    seen: list[int] = []
    consumer = consuming(topic, lambda m: seen.append(m.value))
    await eventually(consumer.is_healthy, "health")
    assert f"AsyncResilientKafkaConsumer successfully created for topic '{topic}'" in caplog.messages
    await consumer._session.consumer.stop()
    await eventually(lambda: consumer.recreations == 1 and consumer.is_healthy(), "a new consumer")
    assert "Successfully recreated consumer after error (attempt 1)" in caplog.messages
    await broker.send(topic, [1])
    await eventually(lambda: seen == [1], "a message")
    # A member that the group has lost: the health check is what notices.
    consumer._session.settled = False
    consumer._session._changed["unsettled"] = 0.0
    await eventually(lambda: consumer.recreations == 2 and consumer.is_healthy(), "a second new consumer")
    assert f"Consumer health check failed for topic '{topic}', triggering reconnection" in caplog.messages
