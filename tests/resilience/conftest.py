"""A broker with topics of the test's own, and small apps as child processes."""

from __future__ import annotations

import asyncio
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import aiokafka
import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import GroupCoordinatorNotAvailableError, KafkaError
from faust.types import TP

from tools.stack import Stack

ROOT = Path(__file__).resolve().parents[2]
#: How long a test waits for what must happen; never for how fast.
PATIENCE_SECONDS = 90.0


class Log:
    """What a test does with a broker."""

    def __init__(self, servers: str) -> None:
        self.servers = servers
        self.prefix = f"t{secrets.token_hex(4)}-"
        self.admin: Any = None

    async def topic(self, name: str, partitions: int = 1, **config: str) -> str:
        """Create a topic of this test and return its whole name."""
        whole = self.prefix + name
        await self.admin.create_topics([NewTopic(whole, partitions, 1, topic_configs=config)])
        return whole

    async def write(self, topic: str, *values: bytes, partition: int = 0) -> None:
        """Write records and wait until they are acknowledged."""
        async with aiokafka.AIOKafkaProducer(
            bootstrap_servers=self.servers, linger_ms=5, max_request_size=4_000_000
        ) as producer:
            sent = [await producer.send(topic, value, key=b"k", partition=partition) for value in values]
            await asyncio.gather(*sent)

    async def read(self, topic: str, count: int) -> list[Any]:
        """Return the records of a topic, once there are ``count``, or as many as there are when patience ends."""
        records: list[Any] = []
        async with aiokafka.AIOKafkaConsumer(
            topic, bootstrap_servers=self.servers, auto_offset_reset="earliest", group_id=None
        ) as consumer:
            until = time.monotonic() + PATIENCE_SECONDS
            while time.monotonic() < until:
                wait_ms = 200 if len(records) >= count else 1000
                found = await consumer.getmany(timeout_ms=wait_ms)
                records += [record for partition in found.values() for record in partition]
                if len(records) >= count and not found:
                    break
        return records

    async def committed(self, group: str) -> dict[tuple[str, int], int]:
        """Return what a group has committed."""
        try:
            found = await self.admin.list_consumer_group_offsets(group)
        except (GroupCoordinatorNotAvailableError, KafkaError):
            return {}
        return {(tp.topic, tp.partition): entry.offset for tp, entry in found.items() if entry.offset >= 0}

    @staticmethod
    async def until(condition: Callable[[], Any], what: str = "it happened") -> Any:
        """Wait until ``condition()``, a plain or a coroutine function, holds, and return what it gave."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            found = condition()
            if asyncio.iscoroutine(found):
                found = await found
            if found:
                return found
            if time.monotonic() > deadline:
                raise AssertionError(f"waited {PATIENCE_SECONDS:.0f} s in vain until {what}")
            await asyncio.sleep(0.05)

    async def until_committed_by(self, app: Any, topic: str, offset: int, partition: int = 0) -> None:
        """Wait until ``app``, which runs in this process, has committed ``offset``; asks no broker."""
        await self.until(
            lambda: app.consumer.reached.get(TP(topic, partition)) == offset, f"{topic}@{offset} is committed"
        )

    async def until_committed(self, group: str, topic: str, offset: int, partition: int = 0) -> None:
        """Wait until a group has committed ``offset``."""

        async def there() -> bool:
            return (await self.committed(group)).get((topic, partition)) == offset

        await self.until(there, f"{group} has committed {topic}[{partition}]@{offset}")


async def _admin(servers: str) -> Any:
    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    await admin.start()
    return admin


@pytest.fixture
async def log(kafka: str) -> AsyncIterator[Log]:
    """The session's broker, with topics of this test's own."""
    made = Log(kafka)
    made.admin = await _admin(kafka)
    yield made
    await made.admin.close()


@pytest.fixture(scope="session")
def own_stack() -> Iterator[Stack]:
    """A broker of this room's own, to kill and to start again."""
    stack = Stack.temporary(parts={"kafka"})
    try:
        stack.start("kafka")
        yield stack
    finally:
        stack.stop(discard=True)


class SmallApp:
    """``tests.resilience.small_app`` as a child process."""

    def __init__(self, servers: str, folder: Path, group: str, transport: str = "ours") -> None:
        self.servers, self.group, self.transport = servers, group, transport
        self.notes = folder / f"{group}.notes"
        self.log = folder / f"{group}.log"
        self.data = folder / f"{group}.data"
        self.child: subprocess.Popen[bytes] | None = None

    def start(self, *topics: str, hang: bool = False, retry_seconds: float = 0.2) -> None:
        """Start it on ``topic=kind`` entries."""
        command = [sys.executable, "-m", "tests.resilience.small_app"]
        for name in ("transport", "servers", "group", "data"):
            command += [f"--{name}", str(getattr(self, name))]
        command += ["--log", str(self.notes), "--retry-seconds", str(retry_seconds)]
        command += [part for topic in topics for part in ("--topic", topic)] + (["--hang"] if hang else [])
        with self.log.open("ab") as output:
            self.child = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)

    def noted(self, what: str, topic: str) -> list[str]:
        """Return the values that were noted for ``topic``."""
        lines = self.notes.read_text().splitlines() if self.notes.exists() else []
        return [value for kind, name, value in map(str.split, lines) if kind == what and name == topic]

    def alive(self) -> bool:
        """Tell whether it runs; one that ended by itself is an error that shows its log."""
        return self.child is not None and self.child.poll() is None

    def kill(self) -> None:
        """SIGKILL."""
        if self.child is not None:
            self.child.kill()
            self.child.wait(PATIENCE_SECONDS)

    async def terminate(self) -> int:
        """SIGTERM; return the exit code."""
        assert self.child is not None
        self.child.send_signal(signal.SIGTERM)
        return await asyncio.to_thread(self.child.wait, PATIENCE_SECONDS)


@pytest.fixture
def small_app(kafka: str, tmp_path: Path) -> Iterator[Callable[..., SmallApp]]:
    """Make small apps; each is killed at the end of the test."""
    made: list[SmallApp] = []

    def make(group: str, transport: str = "ours") -> SmallApp:
        app = SmallApp(kafka, tmp_path, group, transport)
        made.append(app)
        return app

    yield make
    for app in made:
        app.kill()
