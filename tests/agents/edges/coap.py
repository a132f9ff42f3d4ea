"""A CoAP server on loopback with a Kafka that does as it is told, raw datagrams, and a lossy network."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiocoap
from aiocoap.message import Message
from aiocoap.numbers import codes
from aiocoap.numbers.types import CON

from agents.edges.coap_arrivals import Arrival, Batch, Event
from agents.edges.coap_requests import Judge
from agents.edges.coap_server import CoapServer
from devices.efento import messages
from devices.registry import Registry

CONFIG = Path(__file__).parents[3] / "config"
REGISTRY = Registry.load(CONFIG)

VECTORS = json.loads((Path(__file__).parents[3] / "devices" / "efento" / "vectors.json").read_text())
JSON = b'{"t": 21.5}'
SERIAL = bytes.fromhex("282c02424eed")
EFENTO = {
    "m": bytes.fromhex(VECTORS["measurements"][0]["hex"]),
    "i": bytes.fromhex(VECTORS["device_info"][0]["hex"]),
    "c": messages.CONFIG(serial_number=SERIAL, hash=7).SerializeToString(),
}


class Kafka:
    """Takes batches: at once, or when it is told to; ``records`` are what it has acknowledged."""

    def __init__(self) -> None:
        self.working = True
        self.records: list[Arrival] = []
        self.held: list[tuple[Batch, list[Arrival]]] = []
        self.unclaimed: list[Batch] = []
        self.claiming = True

    async def take(self, batch: Batch) -> None:
        """Take a batch as the agent does."""
        if not self.claiming:
            self.unclaimed.append(batch)
            return
        self.held.append((batch, batch.claim()))
        if self.working:
            self.acknowledge()

    def acknowledge(self) -> None:
        """Acknowledge all that is held."""
        held, self.held = self.held, []
        for batch, arrivals in held:
            self.records += arrivals
            batch.acknowledge()

    def refuse(self) -> None:
        """Fail all that is held."""
        held, self.held = self.held, []
        for batch, _ in held:
            batch.refuse()


class Site:
    """A server, its Kafka, and what it counted."""

    def __init__(self, server: CoapServer, kafka: Kafka, counts: Counter[Any]) -> None:
        self.server, self.kafka, self.counts = server, kafka, counts

    @property
    def uri(self) -> str:
        """Where clients find it."""
        host, port = self.server.address
        return f"coap://{host}:{port}"


@asynccontextmanager
async def site(registry: Registry = REGISTRY, **options: Any) -> AsyncIterator[Site]:
    """A server that serves; ``options`` are `Judge`'s and `CoapServer`'s."""
    kafka, counts = Kafka(), Counter[Any]()
    mine = {name: options.pop(name) for name in ("known", "secured", "max_message_bytes", "times") if name in options}
    judge = Judge(registry, **{"max_message_bytes": 64 * 1024, **mine})

    def count(event: Event | str, number: int) -> None:
        counts[event] += number

    options.setdefault("rng", random.Random(1))
    server = CoapServer(options.pop("host", "127.0.0.1"), 0, judge, deliver=kafka.take, count=count, **options)
    await server.start()
    try:
        yield Site(server, kafka, counts)
    finally:
        await server.stop(0.2)


class Raw(asyncio.DatagramProtocol):
    """A UDP client that sends what it is given; ``received`` is what came back."""

    def __init__(self) -> None:
        self.received: asyncio.Queue[bytes] = asyncio.Queue()
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:
        """Keep the transport."""
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:  # noqa: ARG002
        """Keep what came."""
        self.received.put_nowait(data)

    def send(self, data: bytes) -> None:
        """Send a datagram."""
        self.transport.sendto(data)

    async def next(self, seconds: float = 10.0) -> Message:
        """Return the next message that came."""
        return Message.decode(await asyncio.wait_for(self.received.get(), seconds))

    async def nothing(self, seconds: float = 0.2) -> bool:
        """Tell whether nothing comes for a while."""
        await asyncio.sleep(seconds)
        return self.received.empty()


@asynccontextmanager
async def raw(address: tuple[str, int]) -> AsyncIterator[Raw]:
    """A raw client of ``address``."""
    transport, protocol = await asyncio.get_running_loop().create_datagram_endpoint(Raw, remote_addr=address)
    try:
        yield protocol
    finally:
        transport.close()


def request(
    path: str,
    payload: bytes,
    *,
    mid: int = 1,
    token: bytes = b"t",
    kind: Any = CON,
    code: Any = codes.POST,
    **options: Any,
) -> bytes:
    """Return a request's datagram."""
    message = Message(code=code, payload=payload, _mtype=kind, _mid=mid, _token=token, **options)
    message.opt.uri_path = path.split("/")
    return message.encode()


class LossyThread:
    """A `Lossy` proxy with an event loop and a thread of its own, for clients that are no coroutines."""

    def __init__(self, target: tuple[str, int], loss: float, seed: int) -> None:
        self.network = Lossy(target, loss, seed)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="lossy network", daemon=True)

    def __enter__(self) -> Lossy:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self.network.open(), self._loop).result(10)
        return self.network

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self.network.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


class Lossy:
    """A UDP proxy that loses a share of the datagrams, either way; one socket for each client."""

    def __init__(self, target: tuple[str, int], loss: float, seed: int) -> None:
        self._target, self._loss, self._rng = target, loss, random.Random(seed)
        self._ways: dict[Any, asyncio.DatagramTransport] = {}
        self._front: Any = None
        self.lost = self.passed = 0

    @property
    def address(self) -> tuple[str, int]:
        """Where clients send to."""
        host, port = self._front.get_extra_info("sockname")
        return host, port

    def _lose(self) -> bool:
        lost = self._rng.random() < self._loss
        self.lost += lost
        self.passed += not lost
        return lost

    async def open(self) -> None:
        """Begin to pass datagrams on."""
        loop, outer = asyncio.get_running_loop(), self
        tasks: dict[Any, asyncio.Future[Any]] = {}

        class Front(asyncio.DatagramProtocol):
            def datagram_received(self, data: bytes, addr: Any) -> None:
                if outer._lose():
                    return
                if addr in outer._ways:
                    outer._ways[addr].sendto(data)
                    return

                class Back(asyncio.DatagramProtocol):
                    def datagram_received(self, data: bytes, _addr: Any) -> None:
                        if not outer._lose():
                            outer._front.sendto(data, addr)

                async def way() -> None:
                    made, _ = await loop.create_datagram_endpoint(Back, remote_addr=outer._target)
                    outer._ways.setdefault(addr, made).sendto(data)

                if addr not in tasks:
                    tasks[addr] = asyncio.ensure_future(way())

        self._front, _ = await loop.create_datagram_endpoint(Front, local_addr=("127.0.0.1", 0))

    def close(self) -> None:
        """Pass nothing more."""
        for transport in (self._front, *self._ways.values()):
            transport.close()


async def until(condition: Callable[[], Any], seconds: float = 30.0) -> None:
    """Wait for a condition."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


async def ask(client: aiocoap.Context, here: Site, path: str, payload: bytes = b"", **options: Any) -> Message:
    """Send a request and return its answer."""
    options.setdefault("code", codes.POST)
    message = Message(uri=f"{here.uri}/{path}", payload=payload, **options)
    return await asyncio.wait_for(client.request(message).response, 30)
