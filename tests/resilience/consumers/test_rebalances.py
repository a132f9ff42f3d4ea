"""Members that come and go, and clients that are created anew under running handlers."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from typing import Any

from tests.resilience.consumers.conftest import eventually


async def test_members_come_and_go(broker: Any, consuming: Any) -> None:
    """Each message is handled, the commits reach the end, and a key never runs in two members at a time."""
    topic, group = await broker.topic(partitions=4), broker.group()
    overlaps: list[int] = []
    running: set[int] = set()
    done: list[int] = []

    async def handle(message: Any) -> bool:
        key = message.value % 12
        overlaps.extend([key] if key in running else [])
        running.add(key)
        try:
            await asyncio.sleep(0.005)
        finally:
            running.discard(key)
        done.append(message.value)
        return True

    rng = random.Random(11)
    members = [consuming(topic, handle, group)]
    for start in range(0, 1200, 200):
        await broker.send(topic, range(start, start + 200), key=lambda n: str(n % 12).encode())
        if len(members) < 3:
            members.append(consuming(topic, handle, group))
        else:
            await members.pop(rng.randrange(len(members))).stop()
        await asyncio.sleep(0.3)
    await eventually(lambda: len(set(done)) == 1200, "1200 messages", 120)

    async def committed() -> bool:
        return sum((await broker.committed(group)).values()) == 1200

    await eventually(committed, "all committed")
    assert overlaps == []
    for member in members:
        assert not member.task.done()
        assert member.accounts()["balance"] == 0


async def test_a_new_client_waits_for_the_old_ones_thread(broker: Any, consuming: Any) -> None:
    """A message whose plain handler still runs is not handled a second time before that has ended."""
    topic, group = await broker.topic(), broker.group()
    await broker.send(topic, [1, 2])
    release = threading.Event()
    events: list[str] = []

    def handle(message: Any) -> None:
        events.append(f"begin {message.value}")
        if message.value == 1:
            release.wait(60)
        events.append(f"end {message.value}")

    consumer = consuming(topic, handle, group, drain_timeout=0.2)
    await eventually(lambda: events, "the first message")
    await consumer._session.consumer.stop()
    await eventually(
        lambda: consumer.recreations == 1 and consumer._session and consumer._session.parts, "a new client"
    )
    until = time.monotonic() + 1
    while time.monotonic() < until:
        assert events == ["begin 1"]
        await asyncio.sleep(0.05)
    release.set()
    await eventually(lambda: events[-1] == "end 2", "the second message")
    assert events == ["begin 1", "end 1", "begin 1", "end 1", "begin 2", "end 2"]


async def test_a_topic_that_comes_later(broker: Any, consuming: Any) -> None:
    """A pattern that matches nothing yet is waited for, and no reason to create a client anew."""
    import re

    prefix = f"later-{time.time_ns()}"
    seen: list[int] = []
    consumer = consuming(re.compile(f"^{prefix}.*"), lambda m: seen.append(m.value))
    await eventually(lambda: consumer._session, "a client")
    topic = await broker.topic(prefix)
    await broker.send(topic, [1])
    await eventually(lambda: seen == [1], "its message")
    assert consumer.recreations == 0
