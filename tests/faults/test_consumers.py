"""Both resilient consumers through a broker's death, its pause, and a handler that fails at random.

10,000 messages (FAULTS=short: 2,000) go in while the broker is killed (SIGKILL) and started again, and is stopped
(SIGSTOP) for 40 s (short: 8 s). Each is handled, none is skipped, each key is in order, and what is committed in the
end is the end of the log. A worker that is killed between two deliveries of one message loses nothing.
"""

from __future__ import annotations

import asyncio
import json
import random
import secrets
import signal
import sys
import threading
from typing import Any

import aiokafka
import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaError

from settings import environment
from streams.resilience import AsyncResilientKafkaConsumer, ResilientKafkaConsumer, Retryable
from tests.resilience.consumers.conftest import Broker, eventually
from tools.stack import Part, Stack

pytestmark = pytest.mark.faults

SHORT = environment().get("FAULTS") == "short"
MESSAGES = 2_000 if SHORT else 10_000
PAUSE_SECONDS = 8 if SHORT else 40
KEYS = 20
SEED = 20_251_107


@pytest.fixture
def kafka_part(breakable: Stack) -> Part:
    """A broker that may be killed."""
    return breakable.part("kafka")


@pytest.fixture
async def topic(kafka_part: Part) -> str:
    """A topic of four partitions; its name serves as a group's, too."""
    name = f"faults-{secrets.token_hex(4)}"
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka_part.address())
    await admin.start()
    await admin.create_topics([NewTopic(name, 4, 1)])
    await admin.close()
    return name


async def produce(servers: str, topic: str, sent: list[int]) -> None:
    """Send MESSAGES numbers, each key in order, through whatever happens to the broker."""
    producer = aiokafka.AIOKafkaProducer(
        bootstrap_servers=servers, enable_idempotence=True, request_timeout_ms=120_000, metadata_max_age_ms=1000
    )
    await producer.start()
    try:
        for start in range(0, MESSAGES, 50):
            numbers = range(start, start + 50)
            await asyncio.gather(
                *[await producer.send(topic, json.dumps(n).encode(), key=str(n % KEYS).encode()) for n in numbers]
            )
            sent.extend(numbers)
            await asyncio.sleep(0.05)
    finally:
        await producer.stop()


async def plan(part: Part, sent: list[int]) -> None:
    """Kill the broker after a quarter of the messages, stop it after half of them."""
    await eventually(lambda: len(sent) > MESSAGES // 4, "a quarter of the messages", 120)
    await asyncio.to_thread(part.kill, signal.SIGKILL)
    await asyncio.sleep(3)
    await asyncio.to_thread(part.start)
    await eventually(lambda: len(sent) > MESSAGES // 2, "half of the messages", 240)
    await asyncio.to_thread(part.pause)
    await asyncio.sleep(PAUSE_SECONDS)
    await asyncio.to_thread(part.resume)


class Handler:
    """Fails at random for 5 % of the calls, in the ways that come again; keeps what it has handled."""

    def __init__(self) -> None:
        self.rng = random.Random(SEED)
        self.lock = threading.Lock()
        self.done: list[int] = []

    def __call__(self, message: Any) -> bool:
        """Handle one message."""
        with self.lock:
            if self.rng.random() < 0.05:
                if self.rng.random() < 0.5:
                    raise Retryable("at random")
                return False
            self.done.append(message.value)
            return True


def check(done: list[int], sent: list[int]) -> None:
    """Each message is handled; repeats aside, each key is in order."""
    assert set(done) == set(sent), f"seed {SEED}: {len(set(sent) - set(done))} lost"
    assert len(sent) == MESSAGES
    for key in range(KEYS):
        highest = -1
        for number in (n for n in done if n % KEYS == key):
            # A repeat goes back to where a commit was not acknowledged and then in order again; it never jumps ahead.
            assert number <= highest + KEYS or highest < 0, f"seed {SEED}: {number} after {highest}: one was skipped"
            highest = max(highest, number)
    print(f"consumers through faults: {len(sent)} sent, {len(done)} handled, {len(done) - len(set(done))} repeats")


async def committed_all(servers: str, group: str) -> bool:
    """Whether the group has committed the end of the log."""
    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    try:
        await admin.start()
        found = await admin.list_consumer_group_offsets(group)
        return sum(value.offset for value in found.values()) == MESSAGES
    except (KafkaError, OSError):
        return False
    finally:
        await admin.close()


OPTIONS: dict[str, Any] = {"base_delay": 0.05, "max_delay": 1.0, "health_check_interval": 2.0}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", [AsyncResilientKafkaConsumer, ResilientKafkaConsumer])
async def test_every_message_through_faults(kafka_part: Part, topic: str, kind: Any) -> None:
    """Broker killed, broker paused, handler failing: each message handled, none skipped, each key in order."""
    servers = kafka_part.address()
    handler = Handler()
    sent: list[int] = []
    consumer = kind(topic, topic, servers, metadata_max_age_ms=1000, **OPTIONS)
    if kind is AsyncResilientKafkaConsumer:

        async def handle(message: Any) -> bool:
            return handler(message)

        running = asyncio.create_task(consumer.consume_messages(handle))
    else:
        consumer.start(handler)
    faults = asyncio.create_task(plan(kafka_part, sent))
    await produce(servers, topic, sent)
    await faults
    await eventually(lambda: len(set(handler.done)) == MESSAGES, f"all messages (seed {SEED})", 180)
    await eventually(lambda: committed_all(servers, topic), "the end committed", 60)
    check(handler.done, sent)
    if kind is AsyncResilientKafkaConsumer:
        assert consumer.is_healthy()
        await consumer.stop()
        await running
    else:
        assert await asyncio.to_thread(consumer.is_healthy)
        assert await asyncio.to_thread(consumer.stop, 60)


WORKER = """
import asyncio, sys
from streams.resilience import AsyncResilientKafkaConsumer
seen = []
async def handle(message):
    seen.append(message.value)
    print(message.value, flush=True)
    return message.value != 1 or len(sys.argv) > 3
asyncio.run(AsyncResilientKafkaConsumer(sys.argv[1], sys.argv[1], sys.argv[2], base_delay=0.2, max_delay=0.2,
    session_timeout_ms=6000, heartbeat_interval_ms=1000, rebalance_timeout_ms=6000).consume_messages(handle))
"""


async def test_killed_between_deliveries(kafka_part: Part, topic: str) -> None:
    """A worker that is killed while a message comes again and again: the next worker gets it, and what is behind it."""
    servers = kafka_part.address()
    broker = Broker(servers)
    broker.producer = aiokafka.AIOKafkaProducer(bootstrap_servers=servers)
    await broker.producer.start()
    await broker.send(topic, [0, 1, 2], partition=0)
    await broker.producer.stop()

    async def run(*more: str, until: str) -> tuple[list[str], Any]:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", WORKER, topic, servers, *more, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        lines: list[str] = []
        while not lines or lines[-3:] != until.split():
            lines.append((await asyncio.wait_for(process.stdout.readline(), 90)).decode().strip())
        return lines, process

    first, process = await run(until="1 1 1")
    process.kill()
    await process.wait()
    assert first[0] == "0"
    assert "2" not in first
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", WORKER, topic, servers, "done", stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    second = []
    while not second or second[-1] != "2":
        second.append((await asyncio.wait_for(process.stdout.readline(), 90)).decode().strip())
    process.terminate()
    await process.wait()
    assert second[-2:] == ["1", "2"]
