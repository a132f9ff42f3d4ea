"""``coaps``: CoAP over DTLS 1.2 with pre-shared keys, by tinydtls (DTLSSocket, an extra).

Guarantees: a datagram reaches the server only deciphered, from an endpoint whose key's device is known; a device that
begins anew from its old address gets a session of its own, and the old one ends when the new one is established.
Sessions are bounded; the one that was silent for longest goes first.
"""

from __future__ import annotations

import logging
import random
from collections import OrderedDict
from typing import Any, Final

from agents.edges.coap_exchanges import Peer, Received
from agents.edges.coap_udp import UdpSocket

MAX_SESSIONS: Final = 5_000
_HANDSHAKE: Final = 22
_APPLICATION_DATA: Final = 23
_CLIENT_HELLO: Final = 1
# tinydtls's event codes, as aiocoap's transports.tinydtls has them.
_CONNECTED: Final = 0x01DE
_FATAL: Final = 2

_log = logging.getLogger(__name__)


class _Keys:
    """The keys as DTLSSocket asks for them; remembers which identity was asked for last."""

    def __init__(self, identities: dict[bytes, tuple[str, bytes]]) -> None:
        self._identities = identities
        self.device_id: str | None = None

    def keys(self) -> _Keys:
        """Return what `in` is asked of."""
        return self

    def __contains__(self, identity: bytes) -> bool:
        return identity in self._identities

    def __getitem__(self, identity: bytes) -> bytes:
        self.device_id, key = self._identities[identity]
        return key


class _Session:
    """One DTLS session of one endpoint."""

    def __init__(
        self, outer: Peer, number: int, identities: dict[bytes, tuple[str, bytes]], received: Received
    ) -> None:
        from DTLSSocket import dtls

        self._keys = _Keys(identities)
        self._outer = outer
        self._received = received
        self.connected = self.ended = False
        self.peer = Peer(f"{outer.where}#{number}", self._send, first_mid=number * 7919)
        # tinydtls passes an address around that nobody here looks at.
        self._session = dtls.Session("::1", 1)
        self._dtls = dtls.DTLS(
            read=self._plain, write=self._cipher, event=self._event, pskId=b"server", pskStore=self._keys
        )

    def datagram(self, data: bytes) -> None:
        """Take a datagram of the endpoint."""
        self._dtls.handleMessage(self._session, data)

    def _send(self, data: bytes) -> None:
        if not self.ended:
            self._dtls.write(self._session, data)

    def _plain(self, _sender: Any, data: bytes) -> int:
        if self.connected and self.peer.device_id is not None:
            self._received(bytes(data), self.peer)
        return len(data)

    def _cipher(self, _recipient: Any, data: bytes) -> int:
        self._outer.send(bytes(data))
        return len(data)

    def _event(self, level: int, code: int) -> None:
        if code == _CONNECTED:
            self.connected = True
            self.peer.device_id = self._keys.device_id
        elif level == _FATAL or code == 0:
            self.ended = True


class DtlsListener:
    """Serves an address; hands on what devices send, deciphered."""

    def __init__(self, host: str, port: int, identities: dict[bytes, tuple[str, bytes]], received: Received) -> None:
        self._identities = identities
        self._received = received
        self._socket = UdpSocket(host, port, self._datagram, rng=random.Random())
        self._sessions: OrderedDict[str, _Session] = OrderedDict()
        self._fresh: OrderedDict[str, _Session] = OrderedDict()
        self._number = 0

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that it serves."""
        return self._socket.address

    async def start(self) -> None:
        """Bind the address; raises OSError where it is taken."""
        await self._socket.open()

    def stop(self) -> None:
        """Serve no more."""
        self._socket.close()
        self._sessions.clear()
        self._fresh.clear()

    def _datagram(self, data: bytes, outer: Peer) -> None:
        if len(data) < 14:
            return
        where = outer.where
        first_epoch = data[3:5] == b"\x00\x00"
        if first_epoch and data[0] == _HANDSHAKE and data[13] == _CLIENT_HELLO and where not in self._fresh:
            self._number += 1
            self._fresh[where] = _Session(outer, self._number, self._identities, self._received)
            if len(self._fresh) > MAX_SESSIONS:
                self._fresh.popitem(last=False)
        fresh, old = self._fresh.get(where), self._sessions.get(where)
        session = old if old is not None and (fresh is None or data[0] == _APPLICATION_DATA) else fresh
        if session is None:
            return
        try:
            session.datagram(data)
        except Exception:
            _log.debug("DTLS datagram from %s not understood", where, exc_info=True)
        if session is fresh and fresh.connected:
            del self._fresh[where]
            self._sessions[where] = fresh
            if len(self._sessions) > MAX_SESSIONS:
                self._sessions.popitem(last=False)
        if session.ended:
            for sessions in (self._sessions, self._fresh):
                if sessions.get(where) is session:
                    del sessions[where]
        elif where in self._sessions:
            self._sessions.move_to_end(where)
