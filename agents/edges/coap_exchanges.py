"""CoAP's message layer of a server (RFC 7252 section 4): message ids, acknowledgements, retransmission. No socket.

Guarantees: a message that comes again (same endpoint, message id and token, within ``EXCHANGE_LIFETIME_SECONDS``) never
reaches the application again: while the first one is worked on it is acknowledged, afterwards it gets the very answer
that the first one got. A confirmable request is answered in its acknowledgement, or, when that takes longer than
``ACK_DELAY_SECONDS``, acknowledged first and answered by a confirmable message of its own, which is sent again until
the device acknowledges it. What is not CoAP is rejected (RST) or ignored, and never raises. Memory is bounded by
``MAX_REMEMBERED`` exchanges, about 200 bytes each; the oldest are forgotten first.

Messages are aiocoap's. Its own message layer is not used: it keeps a timer and whole messages for each request for four
minutes (1 GB at 1,500/s) and searches all exchanges at the end of each.
"""

from __future__ import annotations

import heapq
import itertools
import random
import struct
from collections import deque
from collections.abc import Callable
from typing import Final

from aiocoap import error
from aiocoap.message import Message
from aiocoap.numbers.codes import EMPTY, Code
from aiocoap.numbers.types import ACK, CON, NON, RST

from agents.edges.coap_wire import Decoder, Request

# RFC 7252 section 4.8
ACK_TIMEOUT_SECONDS: Final = 2.0
ACK_RANDOM_FACTOR: Final = 1.5
MAX_RETRANSMIT: Final = 4
EXCHANGE_LIFETIME_SECONDS: Final = 247.0
# A quarter of the time after which a device would send its request again.
ACK_DELAY_SECONDS: Final = 0.5
# Four minutes at 1,600 requests/s.
MAX_REMEMBERED: Final = 400_000
# Answers without mid and token that are shared between exchanges.
MAX_SHARED: Final = 4_096

_HEADER: Final = struct.Struct("!BBH")
_ANSWERED_APART: Final = b""

Send = Callable[[bytes], None]
Outcome = Callable[[bool], None]


class Peer:
    """An endpoint: ``where`` names it (``host:port``), ``device_id`` is whom its transport's security names."""

    __slots__ = ("device_id", "next_mid", "send", "where")

    def __init__(self, where: str, send: Send, device_id: str | None = None, *, first_mid: int = 0) -> None:
        self.where = where
        self.send = send
        self.device_id = device_id
        self.next_mid = first_mid & 0xFFFF

    def new_mid(self) -> int:
        """Return a message id that this endpoint has not seen for the last 65,535 messages."""
        mid = self.next_mid
        self.next_mid = (mid + 1) & 0xFFFF
        return mid


Received = Callable[[bytes, Peer], None]


class Exchange:
    """One request that is to be answered; ``protect`` makes of an answer what may go out over the network."""

    __slots__ = ("acknowledged", "answered", "confirmable", "no_response", "peer", "protect", "wire_id")

    def __init__(self, peer: Peer, wire_id: bytes, *, confirmable: bool) -> None:
        self.peer = peer
        #: message id and token as they stand in the message
        self.wire_id = wire_id
        self.confirmable = confirmable
        self.acknowledged = False
        self.answered = False
        #: classes of answers that the device does not want (RFC 7967), a bit each
        self.no_response = 0
        self.protect: Callable[[Message], Message] | None = None

    @property
    def mid(self) -> int:
        """The request's message id."""
        return int.from_bytes(self.wire_id[:2], "big")

    @property
    def token(self) -> bytes:
        """The request's token."""
        return self.wire_id[2:]


class _Confirmable:
    """An answer of ours that waits for its acknowledgement."""

    __slots__ = ("data", "interval_seconds", "outcome", "peer", "sent")

    def __init__(self, peer: Peer, data: bytes, interval_seconds: float, outcome: Outcome | None) -> None:
        self.peer = peer
        self.data = data
        self.interval_seconds = interval_seconds
        self.outcome = outcome
        self.sent = 1


class Exchanges:
    """The message layer. ``on_request(exchange, message)`` gets each request once; ``tick()`` is called often."""

    def __init__(
        self,
        on_request: Callable[[Exchange, Request], None],
        *,
        clock: Callable[[], float],
        rng: random.Random,
        max_remembered: int = MAX_REMEMBERED,
    ) -> None:
        self._on_request = on_request
        self._clock = clock
        self._rng = rng
        self._max_remembered = max_remembered
        self._decoder = Decoder()
        self._known: dict[tuple[str, bytes], Exchange | bytes] = {}
        self._added = self._removed = 0
        self._marks: deque[tuple[float, int]] = deque()
        self._shared: dict[bytes, bytes] = {}
        self._to_acknowledge: deque[tuple[float, Exchange]] = deque()
        self._confirmables: dict[tuple[str, int], _Confirmable] = {}
        self._due: list[tuple[float, int, tuple[str, int]]] = []
        self._numbers = itertools.count()
        #: messages that came again, messages that were none
        self.duplicates = 0
        self.malformed = 0

    @property
    def remembered(self) -> int:
        """How many exchanges are known for the sake of messages that come again."""
        return len(self._known)

    @property
    def unconfirmed(self) -> int:
        """How many answers wait for their acknowledgement."""
        return len(self._confirmables)

    def datagram(self, data: bytes, peer: Peer) -> None:
        """Take what has arrived from ``peer``."""
        if len(data) < 4 or data[0] >> 6 != 1:
            self.malformed += 1
            return
        kind, code, token_bytes = data[0] >> 4 & 3, data[1], data[0] & 15
        if kind >= ACK:
            self._acknowledgement(peer, int.from_bytes(data[2:4], "big"), delivered=kind == ACK)
            return
        if code == 0:
            # An empty CON is a ping; anything but a header in it is a format error, which is rejected the same way.
            if kind == CON:
                self._send_empty(peer, RST, data[2:4])
            return
        wire_id = data[2 : 4 + token_bytes]
        if code >> 5 or token_bytes > 8 or len(wire_id) != 2 + token_bytes:
            self._reject(peer, data)
            return
        found = self._known.get((peer.where, wire_id))
        if found is not None:
            self._duplicate(peer, wire_id, found, confirmable=kind == CON)
            return
        try:
            message = self._decoder.decode(data)
        except (error.Error, ValueError, IndexError):
            self._reject(peer, data)
            return
        exchange = Exchange(peer, wire_id, confirmable=kind == CON)
        if exchange.confirmable:
            self._to_acknowledge.append((self._clock() + ACK_DELAY_SECONDS, exchange))
        self._on_request(exchange, message)

    def remember(self, exchange: Exchange) -> None:
        """Have ``exchange`` known from now on; without that it would be a new one when it comes again."""
        if len(self._known) >= self._max_remembered:
            self._forget(min(1024, len(self._known)))
        self._known[exchange.peer.where, exchange.wire_id] = exchange
        self._added += 1

    def answer(self, exchange: Exchange, message: Message, outcome: Outcome | None = None) -> None:
        """Send the answer to a request; a second answer is ignored.

        With ``outcome`` the answer is a confirmable message of its own, and ``outcome`` is told whether the device has
        acknowledged it.
        """
        if exchange.answered:
            return
        exchange.answered = True
        peer = exchange.peer
        key = (peer.where, exchange.wire_id)
        if exchange.no_response & 1 << (message.code >> 5) - 1 and outcome is None:
            if exchange.confirmable and not exchange.acknowledged:
                self._acknowledge(exchange)
            self._answered(key, _ANSWERED_APART)
            return
        if exchange.protect is not None:
            message = exchange.protect(message)
        message.token = exchange.token
        if exchange.confirmable and not exchange.acknowledged and outcome is None:
            message.mtype, message.mid = ACK, exchange.mid
            data = message.encode()
            peer.send(data)
            exchange.acknowledged = True
            rest = data[1:2] + data[2 + len(exchange.wire_id) :]
            if len(self._shared) >= MAX_SHARED:
                self._shared.clear()
            self._answered(key, self._shared.setdefault(rest, rest))
            return
        if exchange.confirmable and not exchange.acknowledged:
            self._acknowledge(exchange)
        message.mid = peer.new_mid()
        if exchange.confirmable or outcome is not None:
            message.mtype = CON
            data = message.encode()
            self._confirm(peer, message.mid, data, outcome)
        else:
            message.mtype = NON
            data = message.encode()
        self._answered(key, _ANSWERED_APART)
        peer.send(data)

    def answer_bare(self, exchange: Exchange, code: Code) -> None:
        """Send an answer that is a code alone: as :meth:`answer` does, at a tenth of the price where that can be."""
        if (
            exchange.answered
            or exchange.acknowledged
            or not exchange.confirmable
            or exchange.no_response
            or exchange.protect is not None
        ):
            self.answer(exchange, Message(code=code))
            return
        exchange.answered = exchange.acknowledged = True
        wire_id, peer = exchange.wire_id, exchange.peer
        rest = bytes((code,))
        peer.send(_HEADER.pack(0x40 | ACK << 4 | len(wire_id) - 2, code, exchange.mid) + wire_id[2:])
        self._answered((peer.where, wire_id), self._shared.setdefault(rest, rest))

    def tick(self) -> None:
        """Do what has become due: acknowledgements, retransmissions, forgetting."""
        now = self._clock()
        while self._to_acknowledge and self._to_acknowledge[0][0] <= now:
            exchange = self._to_acknowledge.popleft()[1]
            if not exchange.answered and not exchange.acknowledged:
                self._acknowledge(exchange)
        while self._due and self._due[0][0] <= now:
            self._again(heapq.heappop(self._due)[2], now)
        if not self._marks or now - self._marks[-1][0] >= 1.0:
            self._marks.append((now, self._added))
        while self._marks and self._marks[0][0] <= now - EXCHANGE_LIFETIME_SECONDS:
            self._forget(max(0, self._marks.popleft()[1] - self._removed))

    # incoming

    def _reject(self, peer: Peer, data: bytes) -> None:
        self.malformed += 1
        if data[0] >> 4 & 3 == CON:
            self._send_empty(peer, RST, data[2:4])

    def _duplicate(self, peer: Peer, wire_id: bytes, found: Exchange | bytes, *, confirmable: bool) -> None:
        self.duplicates += 1
        if not confirmable:
            return
        if isinstance(found, Exchange):
            self._acknowledge(found)
        elif found == _ANSWERED_APART:
            self._send_empty(peer, ACK, wire_id[:2])
        else:
            header = _HEADER.pack(0x40 | ACK << 4 | len(wire_id) - 2, found[0], int.from_bytes(wire_id[:2], "big"))
            peer.send(header + wire_id[2:] + found[1:])

    def _acknowledgement(self, peer: Peer, mid: int, *, delivered: bool) -> None:
        waiting = self._confirmables.pop((peer.where, mid), None)
        if waiting is not None and waiting.outcome is not None:
            waiting.outcome(delivered)

    # outgoing

    def _send_empty(self, peer: Peer, kind: int, mid: bytes) -> None:
        peer.send(bytes((0x40 | kind << 4, EMPTY)) + mid)

    def _acknowledge(self, exchange: Exchange) -> None:
        exchange.acknowledged = True
        self._send_empty(exchange.peer, ACK, exchange.wire_id[:2])

    def _confirm(self, peer: Peer, mid: int, data: bytes, outcome: Outcome | None) -> None:
        first = self._rng.uniform(ACK_TIMEOUT_SECONDS, ACK_TIMEOUT_SECONDS * ACK_RANDOM_FACTOR)
        key = (peer.where, mid)
        self._confirmables[key] = _Confirmable(peer, data, first, outcome)
        heapq.heappush(self._due, (self._clock() + first, next(self._numbers), key))

    def _again(self, key: tuple[str, int], now: float) -> None:
        waiting = self._confirmables.get(key)
        if waiting is None:
            return
        if waiting.sent > MAX_RETRANSMIT:
            del self._confirmables[key]
            if waiting.outcome is not None:
                waiting.outcome(False)
            return
        waiting.sent += 1
        waiting.interval_seconds *= 2
        waiting.peer.send(waiting.data)
        heapq.heappush(self._due, (now + waiting.interval_seconds, next(self._numbers), key))

    # memory

    def _answered(self, key: tuple[str, bytes], value: bytes) -> None:
        if key in self._known:
            self._known[key] = value

    def _forget(self, count: int) -> None:
        count = min(count, len(self._known))
        for key in list(itertools.islice(self._known, count)):
            del self._known[key]
        self._removed += count
