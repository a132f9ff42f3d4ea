"""What the connector's tests play against: a real mosquitto of their own, and a proxy that writes down what passes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import aiomqtt

from agents.edges.mqtt_client import Batch, MqttSource, SourceEvent, SourceState
from streams.resilience.backoff import Backoff
from tools.stack.machine import find_mosquitto

TYPES = {
    1: "CONNECT",
    2: "CONNACK",
    3: "PUBLISH",
    4: "PUBACK",
    5: "PUBREC",
    6: "PUBREL",
    7: "PUBCOMP",
    8: "SUBSCRIBE",
    9: "SUBACK",
    14: "DISCONNECT",
}


def free_port() -> int:
    """Return a TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


async def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait until ``condition()`` is true; fails after a generous bound."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


class Mosquitto:
    """A mosquitto on a port that stays the same through restarts."""

    def __init__(self, folder: Path, *, persistence: bool = True, extra: str = "") -> None:
        self.port = free_port()
        self._config = folder / "mosquitto.conf"
        self._log = folder / "mosquitto.log"
        self._database = folder / "mosquitto.db"
        user = "user root\n" if os.geteuid() == 0 else ""
        anonymous = "" if "allow_anonymous" in extra else "allow_anonymous true\n"
        kept = f"persistence true\npersistence_location {folder}/\nautosave_interval 1\n"
        self._config.write_text(
            f"{user}listener {self.port} 127.0.0.1\n{anonymous}max_queued_messages 0\nmax_inflight_messages 0\n"
            f"{kept if persistence else ''}{extra}\n"
        )
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self.port}"

    async def start(self) -> None:
        program = find_mosquitto()
        assert program, "these tests need mosquitto (make install, or apt-get install mosquitto)"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen([program, "-c", str(self._config)], stderr=log, stdout=log)
        async with asyncio.timeout(20):
            while True:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                except OSError:
                    assert self._process.poll() is None, self._log.read_text()
                    await asyncio.sleep(0.01)
                else:
                    writer.close()
                    return

    async def saved(self) -> None:
        """Wait until all that is there now is on disk (autosave_interval 1)."""
        for _ in range(2):  # one save may have begun before
            before = self._database.stat().st_mtime_ns if self._database.exists() else 0
            await until(lambda before=before: self._database.exists() and self._database.stat().st_mtime_ns > before)

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(20)
            self._process = None


class Packet(NamedTuple):
    """One packet as it passed: ``up`` to the broker or down to the client."""

    up: bool
    kind: str
    mid: int


@dataclass
class Passage:
    """One connection through the recorder."""

    client_id: str = ""
    version: int = 0
    packets: list[Packet] = field(default_factory=list)
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    def mids(self, kind: str, *, up: bool) -> list[int]:
        return [packet.mid for packet in self.packets if packet.up is up and packet.kind == kind]


class Recorder:
    """A TCP proxy before the broker that notes every packet; ``refusal`` is what it answers to MQTT 5 with."""

    def __init__(self, port: int, refusal: bytes | None = None) -> None:
        self._target = port
        self._refusal = refusal
        self.passages: list[Passage] = []
        self._speaking = asyncio.Event()
        self._speaking.set()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"mqtt://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def of(self, client_id: str) -> list[Passage]:
        return [passage for passage in self.passages if passage.client_id == client_id]

    def cut(self, client_id: str | None = None) -> None:
        for passage in self.passages:
            if client_id in {None, passage.client_id}:
                for writer in passage.writers:
                    writer.transport.abort()

    def mute(self) -> None:
        """Let nothing pass any more, without closing anything."""
        self._speaking.clear()

    def unmute(self) -> None:
        """Let all pass again."""
        self._speaking.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        passage = Passage(writers=[writer])
        self.passages.append(passage)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head, body = await read_packet(reader)
            self.note(passage, head, body, up=True)
            if passage.version == 5 and self._refusal is not None:
                writer.write(self._refusal)
                await writer.drain()
                writer.close()
                return
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
            passage.writers.append(far_writer)
            far_writer.write(_frame(head, body))
            for source, target, up in ((reader, far_writer, True), (far_reader, writer, False)):
                task = asyncio.create_task(self._pump(passage, source, target, up=up))
                self._tasks.add(task)

    async def _pump(
        self, passage: Passage, source: asyncio.StreamReader, target: asyncio.StreamWriter, *, up: bool
    ) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head, body = await read_packet(source)
                await self._speaking.wait()
                self.note(passage, head, body, up=up)
                target.write(_frame(head, body))
                await target.drain()
        for writer in passage.writers:
            writer.close()

    @staticmethod
    def note(passage: Passage, head: int, body: bytes, *, up: bool) -> None:
        kind = TYPES.get(head >> 4, str(head >> 4))
        mid = 0
        if kind == "CONNECT":
            passage.version = body[6]
            at = 10 + (1 + body[10] if passage.version == 5 else 0)
            passage.client_id = body[at + 2 : at + 2 + int.from_bytes(body[at : at + 2], "big")].decode()
        elif kind == "PUBLISH" and head & 6:
            at = 2 + int.from_bytes(body[:2], "big")
            mid = int.from_bytes(body[at : at + 2], "big")
        elif kind.startswith("PUB"):
            mid = int.from_bytes(body[:2], "big")
        passage.packets.append(Packet(up, kind, mid))


async def read_packet(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = (await reader.readexactly(1))[0]
    length = shift = 0
    while True:
        byte = (await reader.readexactly(1))[0]
        length |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return head, await reader.readexactly(length)


def _frame(head: int, body: bytes) -> bytes:
    length, encoded = len(body), bytearray()
    while True:
        length, byte = divmod(length, 128)
        encoded.append(byte | (0x80 if length else 0))
        if not length:
            return bytes([head]) + bytes(encoded) + body


class Rig:
    """A source that runs, what it delivered and counted. ``keep``: nobody acknowledges, as while Kafka is away."""

    def __init__(
        self, url: str, *, keep: bool = False, topics: tuple[str, ...] = ("devices/+/telemetry",), **more: Any
    ) -> None:
        self.batches: list[Batch] = []
        self.events: dict[SourceEvent, int] = {}
        self.keep = keep
        more.setdefault("client_id", "headrace-mqtt")
        more.setdefault("backoff", Backoff(base_seconds=0.01, cap_seconds=0.1))
        self.source = MqttSource(url, topics, on_event=self._count, **more)
        self.task: asyncio.Task[None]

    def _count(self, event: SourceEvent, count: int) -> None:
        self.events[event] = self.events.get(event, 0) + count

    async def _deliver(self, batch: Batch) -> None:
        self.batches.append(batch)
        if not self.keep:
            batch.acknowledge()

    @property
    def state(self) -> SourceState:
        return self.source.status().state

    @property
    def payloads(self) -> list[str]:
        return [message.payload.decode() for batch in self.batches for message in batch.messages]

    def start(self) -> Rig:
        self.task = asyncio.create_task(self.source.run(self._deliver))
        return self

    async def active(self) -> Rig:
        await until(lambda: self.state is SourceState.ACTIVE)
        return self

    async def __aenter__(self) -> Self:
        return await self.start().active()

    async def __aexit__(self, *exc: object) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        events = self.events
        settled = (SourceEvent.ACKNOWLEDGED, SourceEvent.DONE_QOS0, SourceEvent.STALE, SourceEvent.DROPPED_QOS0)
        assert events.get(SourceEvent.RECEIVED, 0) == sum(events.get(event, 0) for event in settled), events


async def publish(
    url: str,
    payloads: Sequence[str | bytes],
    *,
    topic: str = "devices/a/telemetry",
    qos: int = 1,
    retain: bool = False,
) -> None:
    """Publish as a device would, in order, and return once the broker has acknowledged all of it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
    writer.write(b"\x10\x0c\x00\x04MQTT\x04\x02\x00\x00\x00\x00")  # 3.1.1, clean session, no keep-alive, no client id
    assert (await read_packet(reader)) == (0x20, b"\0\0")
    name = len(topic).to_bytes(2, "big") + topic.encode()
    for start in range(0, len(payloads), 500):
        some = payloads[start : start + 500]
        for mid, payload in enumerate(some, 1):
            data = payload.encode() if isinstance(payload, str) else payload
            writer.write(_frame(0x30 | qos << 1 | retain, name + mid.to_bytes(2, "big") + data))
        left = len(some)
        while left:
            head, body = await read_packet(reader)
            if head == 0x50:
                writer.write(b"\x62\x02" + body)
            else:
                assert head in {0x40, 0x70}
                left -= 1
    writer.write(b"\xe0\x00")
    await writer.drain()
    writer.close()


async def make_session(url: str, client_id: str, *, qos: int) -> None:
    """Leave a persistent session (3.1.1) with a subscription behind."""
    port = int(url.rpartition(":")[2])
    async with aiomqtt.Client("127.0.0.1", port, identifier=client_id, clean_session=False) as client:
        await client.subscribe("devices/+/telemetry", qos=qos)
