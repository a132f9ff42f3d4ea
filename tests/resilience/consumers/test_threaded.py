"""The consumer for threads, against Apache Kafka."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest

from streams.resilience import Fatal, KafkaUnavailable, ResilientKafkaConsumer
from tests.resilience.consumers.conftest import QUICK, eventually
from tools.stack.ports import choose


async def test_start_stop_join(broker: Any) -> None:
    """start() consumes in a thread; is_healthy() answers from any thread; stop() commits and ends it."""
    topic, group = await broker.topic(), broker.group()
    await broker.send(topic, range(20))
    seen: list[tuple[int, str]] = []

    def handle(message: Any) -> bool:
        seen.append((message.value, threading.current_thread().name))
        return True

    consumer = ResilientKafkaConsumer(topic, group, broker.servers, **QUICK)
    assert not consumer.is_healthy()
    consumer.start(handle)
    await eventually(lambda: len(seen) == 20, "20 messages")
    assert await asyncio.to_thread(consumer.is_healthy)
    assert consumer.why_unhealthy() == ""
    with pytest.raises(RuntimeError, match="before"):
        consumer.start(handle)
    assert await asyncio.to_thread(consumer.stop, 30)
    assert consumer.join(5)
    assert not consumer.is_healthy()
    assert [value for value, _ in seen] == list(range(20))
    assert all(name.startswith(f"kafka-{group}") for _, name in seen)
    assert await broker.committed(group) == {(topic, 0): 20}
    consumer.consume_messages(handle)


async def test_blocking_and_stopped_by_its_handler(broker: Any) -> None:
    """consume_messages blocks its thread; a handler may stop it and does not wait for itself."""
    topic, group = await broker.topic(), broker.group()
    await broker.send(topic, [1, 2, 3])
    seen: list[int] = []
    with ResilientKafkaConsumer(topic, group, broker.servers, **QUICK) as consumer:

        def handle(message: Any) -> None:
            seen.append(message.value)
            if message.value == 2:
                assert not consumer.stop()

        await asyncio.wait_for(asyncio.to_thread(consumer.consume_messages, handle), 60)
    assert seen == [1, 2]
    assert await broker.committed(group) == {(topic, 0): 2}


async def test_join_raises_what_ended_it(broker: Any) -> None:
    """join() raises what a handler raised of class fatal."""
    topic = await broker.topic()
    await broker.send(topic, [1])

    def handle(_: Any) -> None:
        raise Fatal("stop here")

    consumer = ResilientKafkaConsumer(topic, broker.group(), broker.servers, **QUICK).start(handle)
    with pytest.raises(Fatal, match="stop here"):
        await asyncio.to_thread(consumer.join, 60)


async def test_no_broker() -> None:
    """max_retries attempts, each told to the callback, and then an error that names the servers."""
    import random

    told: list[BaseException] = []
    port = choose(set(), random.Random())
    consumer = ResilientKafkaConsumer(
        "t", "g", f"127.0.0.1:{port}", max_retries=3, on_error_callback=lambda exc, _: told.append(exc), **QUICK
    )
    with pytest.raises(KafkaUnavailable, match=f"3 attempt.*127.0.0.1:{port}"):
        await asyncio.to_thread(consumer.consume_messages, lambda _: None)
    assert len(told) == 3


async def test_stop_while_there_is_no_broker() -> None:
    """stop() ends the wait for a broker at once."""
    import random

    port = choose(set(), random.Random())
    consumer = ResilientKafkaConsumer("t", "g", f"127.0.0.1:{port}", base_delay=60, max_delay=60)
    consumer.start(lambda _: None)
    await eventually(lambda: consumer._loop is not None, "its loop")
    assert await asyncio.to_thread(consumer.stop, 30)


async def test_a_handler_that_hangs(broker: Any) -> None:
    """stop(timeout) returns False while a handler does not end, and its message is not committed."""
    topic, group = await broker.topic(), broker.group()
    await broker.send(topic, [1])
    begun, release = threading.Event(), threading.Event()

    def handle(_: Any) -> None:
        begun.set()
        release.wait(60)

    consumer = ResilientKafkaConsumer(topic, group, broker.servers, **{**QUICK, "drain_timeout": 0.5}).start(handle)
    await asyncio.to_thread(begun.wait, 60)
    before = time.monotonic()
    ended = await asyncio.to_thread(consumer.stop, 20)
    release.set()
    assert ended
    assert time.monotonic() - before < 60
    assert await broker.committed(group) == {}
