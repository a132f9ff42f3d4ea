"""A UDP socket that hands on datagrams with the endpoint they came from.

Guarantees: reads a burst at a time and leaves the event loop to others after ``BURST`` datagrams; what the system
cannot take or deliver is lost, as anything over UDP may be, and never raises. Endpoints are remembered, bounded.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from typing import Any, Final

from agents.edges.coap_exchanges import Peer, Received

BURST: Final = 64
BUFFER_BYTES: Final = 4 * 1024 * 1024
MAX_DATAGRAM_BYTES: Final = 65_535
MAX_PEERS: Final = 50_000


class UdpSocket:
    """One bound socket; ``open()`` binds it, ``address`` tells where."""

    def __init__(self, host: str, port: int, received: Received, *, rng: random.Random) -> None:
        self._bind = (host, port)
        self._received = received
        self._rng = rng
        self._peers: dict[Any, Peer] = {}
        self._socket: socket.socket | None = None

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that it is bound to."""
        if self._socket is None:
            raise RuntimeError("open() comes first")
        name = self._socket.getsockname()
        return name[0], name[1]

    async def open(self) -> None:
        """Bind and begin to read; raises OSError where the address is taken or not ours."""
        loop = asyncio.get_running_loop()
        host, port = self._bind
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_DGRAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setblocking(False)
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
            if family == socket.AF_INET6:
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            sock.bind(address)
        except OSError:
            sock.close()
            raise
        self._socket = sock
        loop.add_reader(sock, self._readable)

    def close(self) -> None:
        """Read and send no more."""
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None

    def _readable(self) -> None:
        for _ in range(BURST):
            sock = self._socket
            if sock is None:
                return
            try:
                data, address = sock.recvfrom(MAX_DATAGRAM_BYTES)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:  # an ICMP message about something sent before
                continue
            peer = self._peers.get(address)
            if peer is None:
                if len(self._peers) >= MAX_PEERS:
                    self._peers.clear()
                peer = self._peers[address] = self._peer(address)
            self._received(data, peer)

    def _peer(self, address: Any) -> Peer:
        host, port = address[0], address[1]

        def send(data: bytes) -> None:
            if self._socket is not None:
                with contextlib.suppress(OSError):
                    self._socket.sendto(data, address)

        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        return Peer(where, send, first_mid=self._rng.randrange(65_536))
