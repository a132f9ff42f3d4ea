"""The CoAP server: requests become arrivals, arrivals become answers.

Guarantees: an arrival is answered exactly once: with the reply that its device expects, once Kafka has acknowledged its
record, or with 5.03 and Max-Age when that has not happened within ``answer_seconds``. An arrival answered 5.03 before
anybody claimed it never becomes a record; one that may become a record all the same is not written again when its
device comes back with it. Arrivals go on in the order of their requests, in batches, at most ``PARALLEL_BATCHES`` at a
time, so that a batch is as large as Kafka is slow. At most ``max_pending`` arrivals and ``max_pending_bytes`` are in
hand: beyond them a confirmable request gets 5.03, another one is dropped (``overload``).
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, Final

from aiocoap.message import Message
from aiocoap.numbers import codes

from agents.edges.coap_arrivals import Answered, Arrival, Batch, Counting, Downlinks, Event, Shield, State
from agents.edges.coap_blocks import Answers, BlockError, Requests
from agents.edges.coap_exchanges import Exchange, Exchanges, Outcome, Peer
from agents.edges.coap_requests import (
    LINK_FORMAT,
    WELL_KNOWN,
    Found,
    Judge,
    Refusal,
    Routed,
    code_of,
    diagnostic,
    uplink_of,
)
from agents.edges.coap_udp import UdpSocket
from devices.driver import Driver, Reply
from devices.timing import DriverAside
from streams.resilience.bounds import end

TICK_SECONDS: Final = 0.05
PARALLEL_BATCHES: Final = 3
MAX_BATCH: Final = 1_000
MAX_LATE: Final = 5_000

_log = logging.getLogger(__name__)


class CoapServer:
    """Serves one UDP address, and whatever other transports hand in through ``received``.

    ``deliver(batch)`` takes arrivals on; ``count`` is told what becomes of messages.
    """

    def __init__(
        self,
        host: str,
        port: int,
        judge: Judge,
        *,
        deliver: Callable[[Batch], Awaitable[None]],
        count: Counting = lambda _event, _number: None,
        answer_seconds: float = 30.0,
        max_age_seconds: float = 30.0,
        max_pending: int = 5_000,
        max_pending_bytes: int = 64 * 1024 * 1024,
        shield: Shield | None = None,
        downlinks: Downlinks | None = None,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        rng = rng or random.Random()
        self.judge = judge
        self.downlinks = downlinks
        self._deliver = deliver
        self._count = count
        self._answer_seconds, self._max_age_seconds = answer_seconds, max_age_seconds
        self._max_pending, self._max_pending_bytes = max_pending, max_pending_bytes
        self._shield = shield
        self._clock = clock
        self.exchanges = Exchanges(self._request, clock=clock, rng=rng)
        self._bodies = Requests(clock)
        self._answers = Answers(clock)
        self._socket = UdpSocket(host, port, self.exchanges.datagram, rng=rng)
        self._links = judge.links()
        self._waiting: list[Arrival] = []
        self._deadlines: deque[Arrival] = deque()
        self._late: dict[tuple[str, str, bytes], Arrival] = {}
        self.pending = 0
        self.pending_bytes = 0
        self._batches = 0
        self._wanted = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that it serves."""
        return self._socket.address

    @property
    def serving(self) -> bool:
        """Whether requests are taken."""
        return bool(self._tasks) and not any(task.done() for task in self._tasks)

    def received(self, data: bytes, peer: Peer) -> None:
        """Take a datagram of another transport, deciphered."""
        self.exchanges.datagram(data, peer)

    async def start(self) -> None:
        """Bind the address and serve; raises OSError where it is taken."""
        await self._socket.open()
        self._tasks = [asyncio.create_task(self._feed()), asyncio.create_task(self._tick())]

    async def stop(self, drain_seconds: float = 10.0) -> None:
        """Take nothing more: what Kafka has not got is answered with 5.03, what is on its way there is waited for."""
        self._stopping = True
        for arrival in list(self._deadlines):
            if arrival.state is State.WAITING:
                self._give_up(arrival)
        deadline = self._clock() + drain_seconds
        while self.pending and self._clock() < deadline:
            await asyncio.sleep(0.01)
        await end(*self._tasks)
        self._tasks = []
        self._socket.close()

    # requests

    def _request(self, exchange: Exchange, message: Message) -> None:
        # What is beyond the bound costs as little as possible: it is not even remembered.
        if self.pending >= self._max_pending or self.pending_bytes >= self._max_pending_bytes or self._stopping:
            if exchange.confirmable:
                self._count("unavailable", 1)
                self.exchanges.answer(exchange, self._service_unavailable("too many requests in hand; come again"))
            else:
                self._count("overload", 1)
            return
        self.exchanges.remember(exchange)
        identity = exchange.peer.device_id
        try:
            routed = None if message.opt.oscore is not None else self.judge.routed(message)
            if routed is None:
                if self._shield is None:
                    raise Refusal(codes.BAD_OPTION, "no OSCORE here: COAP_OSCORE_KEYS is not set", "bad_key")
                message, identity, exchange.protect = self._shield.open(message)
                exchange.no_response = message.opt.no_response or 0
                routed = self.judge.routed(message)
            elif not routed.plain:
                exchange.no_response = message.opt.no_response or 0
            self._handle(exchange, message, identity, routed)
        except Answered as exc:
            self._count(exc.reason, 1)
            self.exchanges.answer(exchange, exc.message)
        except Refusal as exc:
            self._count(exc.reason, 1)
            exchange.no_response = exchange.no_response or message.opt.no_response or 0
            self.exchanges.answer(exchange, diagnostic(exc))
        except BlockError as exc:
            self._count("blocks", 1)
            answer = diagnostic(Refusal(exc.code, str(exc), "blocks", size1=exc.size1))
            answer.opt.block1 = message.opt.block1
            self.exchanges.answer(exchange, answer)
        except Exception:
            # A driver that breaks its promise; the device hears of it, the others are served.
            _log.exception("CoAP request from %s not handled: %r", exchange.peer.where, message)
            self._count("internal_error", 1)
            self.exchanges.answer(exchange, Message(code=codes.INTERNAL_SERVER_ERROR, payload=b"see the server's log"))

    def _handle(self, exchange: Exchange, message: Message, identity: str | None, routed: Routed) -> None:
        path, method = routed.path, routed.method
        body = message.payload
        if not routed.plain or path == WELL_KNOWN:
            opt = message.opt
            key = (exchange.peer.where, identity, method, path)
            if opt.block2 is not None and opt.block2.block_number > 0 and path != WELL_KNOWN:
                self.exchanges.answer(exchange, self._answers.next(key, message))
                return
            if opt.block1 is not None:
                whole = self._bodies.add((*key, *opt.request_tag), message, self.judge.max_message_bytes)
                if whole is None:
                    self.exchanges.answer(exchange, Message(code=codes.CONTINUE, block1=opt.block1))
                    return
                body = whole
            if path == WELL_KNOWN:
                self.judge.size(len(body))
                self._list(exchange, message, key)
                return
        self.judge.size(len(body))
        found = self.judge.find(path, method, routed.candidates, body, routed.content_format)
        if found.candidate.match.kind == "request":
            self._count("no_readings", 1)
            self._reply(exchange, message, found, identity or "", body)
            return
        device_id = self.judge.device_id(found, body, identity)
        metadata = {**routed.metadata, "source": exchange.peer.where}
        if identity is not None:
            metadata["security"] = "oscore" if exchange.protect is not None else "dtls"
        due = self._clock() + self._answer_seconds
        self._arrive(Arrival(exchange, message, found, device_id, body, metadata, datetime.now(UTC), due))

    def _list(self, exchange: Exchange, message: Message, key: tuple[Any, ...]) -> None:
        if message.opt.accept not in (None, LINK_FORMAT):
            text = f"/{WELL_KNOWN} is there as Content-Format {LINK_FORMAT} only"
            raise Refusal(codes.NOT_ACCEPTABLE, text, "bad_request")
        answer = self._answers.first(key, message, Message(code=codes.CONTENT, payload=self._links))
        if message.opt.block2 is not None and message.opt.block2.block_number > 0:
            answer = self._answers.next(key, message)
        answer.opt.content_format = LINK_FORMAT
        self.exchanges.answer(exchange, answer)

    # arrivals

    def _arrive(self, arrival: Arrival) -> None:
        late = self._late.pop(arrival.same, None) if self._late else None
        if late is not None and (late.state is State.CLAIMED or self._clock() < late.due):
            self._come_again(late, arrival)
            return
        self._count(Event.RECEIVED, 1)
        self.pending += 1
        self.pending_bytes += len(arrival.payload)
        self._waiting.append(arrival)
        self._deadlines.append(arrival)
        self._wanted.set()

    def _come_again(self, late: Arrival, arrival: Arrival) -> None:
        """Answer a device that was told 5.03 and sends once more what has become, or still becomes, a record."""
        self._count("repeated", 1)
        late.exchange, late.request, late.due = arrival.exchange, arrival.request, arrival.due
        if late.state is State.CLAIMED:
            self._deadlines.append(late)
        else:
            self._answer(late)

    async def _feed(self) -> None:
        while True:
            await self._wanted.wait()
            # A turn of the loop, so that a burst of datagrams is one batch.
            await asyncio.sleep(0)
            try:
                await self._feed_once()
            except Exception:
                _log.exception("CoAP: a round of handing over failed; the next one follows")

    async def _feed_once(self) -> None:
        if not self._waiting or self._batches >= PARALLEL_BATCHES:
            self._wanted.clear()
            return
        first, self._waiting = self._waiting[:MAX_BATCH], self._waiting[MAX_BATCH:]
        batch = [arrival for arrival in first if arrival.state is State.WAITING]
        if batch:
            self._batches += 1
            made = Batch(batch, self._finish)
            try:
                await self._deliver(made)
            except Exception:
                _log.exception("CoAP: a batch of %d messages could not be handed over", len(batch))
                made.refuse()

    def _finish(self, arrivals: list[Arrival], taken: bool) -> None:
        self._batches -= 1
        self._wanted.set()
        for arrival in arrivals:
            self.pending -= 1
            self.pending_bytes -= len(arrival.payload)
            arrival.state = State.TAKEN if taken else State.GONE
            if not taken:
                self._late.pop(arrival.same, None)
        for arrival in arrivals:
            if not taken:
                self._unavailable(arrival, "the message store has not taken it; come again")
            elif not arrival.exchange.answered:
                self._answer(arrival)
        if arrivals:
            self._count(Event.ACKNOWLEDGED if taken else Event.RETURNED, len(arrivals))

    def _give_up(self, arrival: Arrival) -> None:
        """Answer 5.03 to an arrival that waits for too long; one that nobody claimed will be no record."""
        self._unavailable(arrival, "the message store does not answer; come again")
        if arrival.state is State.WAITING:
            arrival.state = State.GONE
            self.pending -= 1
            self.pending_bytes -= len(arrival.payload)
            self._count(Event.RETURNED, 1)
            return
        # The device was told when to come again; until then, and as long again, its message is known.
        arrival.due = self._clock() + 2 * self._max_age_seconds
        if len(self._late) >= MAX_LATE:
            del self._late[next(iter(self._late))]
        self._late[arrival.same] = arrival

    # answers

    def _service_unavailable(self, why: str) -> Message:
        return Message(code=codes.SERVICE_UNAVAILABLE, payload=why.encode(), max_age=int(self._max_age_seconds))

    def _unavailable(self, arrival: Arrival, why: str) -> None:
        self._attempt(arrival, lambda: self.exchanges.answer(arrival.exchange, self._service_unavailable(why)))

    def _answer(self, arrival: Arrival) -> None:
        exchange, request, payload = arrival.exchange, arrival.request, arrival.payload
        self._attempt(arrival, lambda: self._reply(exchange, request, arrival.found, arrival.device_id, payload))

    def _attempt(self, arrival: Arrival, answer: Callable[[], None]) -> None:
        """Call ``answer``; what it raises is no matter of the arrival's neighbours, and its device gets 5.00.

        That is not protected, since protecting is what fails (a full disk, for OSCORE), and nothing is in it.
        """
        exchange = arrival.exchange
        try:
            answer()
        except Exception:
            _log.exception("no answer for device %s, its message is %s", arrival.device_id, arrival.state.name)
            exchange.answered, exchange.protect = False, None
            try:
                self.exchanges.answer(exchange, Message(code=codes.INTERNAL_SERVER_ERROR))
            except Exception:
                _log.exception("no way to answer device %s at %s", arrival.device_id, exchange.peer.where)

    def _reply(self, exchange: Exchange, request: Message, found: Found, device_id: str, body: bytes) -> None:
        answer, outcome = self._made(exchange, request, found, device_id, body)
        if answer is None and request.opt.block1 is None:
            self.exchanges.answer_bare(exchange, codes.CHANGED)
            return
        answer = answer or Message(code=codes.CHANGED)
        if request.opt.block1 is not None:
            answer.opt.block1 = request.opt.block1
        self.exchanges.answer(exchange, answer, outcome)

    def _made(
        self, exchange: Exchange, request: Message, found: Found, device_id: str, body: bytes
    ) -> tuple[Message | None, Outcome | None]:
        """Return what the driver answers, None where that is nothing or fails, and who hears of its delivery."""
        reply: Reply | None = None
        try:
            pending = self.downlinks.pending_for(device_id) if self.downlinks is not None and device_id else None
            driver = self.judge.registry.driver(found.candidate.profile)
            if type(driver).reply is Driver.reply:
                return None, None
            now = datetime.now(UTC)
            uplink = uplink_of(found.route, body, device_id=device_id, at=now)
            waits = None if pending is None else pending[0]
            reply = self.judge.times.call(driver.name, driver.reply, uplink, now, waits)
            if reply is None:
                return None, None
            key = (exchange.peer.where, exchange.peer.device_id, found.method, found.route)
            answer = self._answers.first(key, request, said(reply))
            if pending is None or reply.carries is None:
                return answer, None
            # Not before: the acknowledgement of an answer without the command would pass for its delivery.
            if self.downlinks is not None:
                self.downlinks.sent(pending[1])
            return answer, self._outcome(pending[1])
        except DriverAside:
            pass
        except Exception:
            # The message is safe, so the device is told so, if without what it would like to know.
            _log.exception("no reply for device %s on /%s; its driver's is %r", device_id, found.route, reply)
        return None, None

    def _outcome(self, token: Any) -> Outcome:
        def heard(delivered: bool) -> None:
            if delivered and self.downlinks is not None:
                self.downlinks.delivered(token)

        return heard

    async def _tick(self) -> None:
        while True:
            try:
                self._look_at_the_clock(self._clock())
            except Exception:
                _log.exception("CoAP: a round of answers and repetitions failed; the next one follows")
            await asyncio.sleep(TICK_SECONDS)

    def _look_at_the_clock(self, now: float) -> None:
        while self._deadlines and (not self._deadlines[0].open or self._deadlines[0].due <= now):
            arrival = self._deadlines.popleft()
            if arrival.open:
                self._give_up(arrival)
        self.exchanges.tick()


def said(reply: Reply) -> Message:
    """Return a driver's reply as a message; raises ValueError, TypeError or OverflowError for what CoAP cannot say."""
    message = Message(code=code_of(reply.code), payload=bytes(reply.data))
    if not message.code.is_response():
        raise ValueError(f"a reply has a code from 2.00 to 5.31, not {reply.code}")
    if reply.data and reply.content_format is not None:
        message.opt.content_format = reply.content_format
        message.opt.encode()
    return message
