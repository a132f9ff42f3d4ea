"""The message layer with raw datagrams: what comes twice, gets lost, or is no CoAP."""

from __future__ import annotations

import asyncio
import random
import struct
from typing import Any

import pytest
from aiocoap.message import Message
from aiocoap.numbers import codes
from aiocoap.numbers.types import ACK, CON, NON, RST
from hypothesis import given
from hypothesis import strategies as st

from agents.edges import coap_exchanges as layer
from agents.edges.coap_exchanges import Exchange, Exchanges, Peer
from tests.agents.edges.coap import raw, request, site, until

JSON = b'{"t": 21.5}'


class Bench:
    """A message layer with a clock of its own; ``sent`` is what went out, ``requests`` what came through."""

    def __init__(self, **options: Any) -> None:
        self.now = 0.0
        self.sent: list[bytes] = []
        self.requests: list[tuple[Exchange, Message]] = []
        self.layer = Exchanges(self.take, clock=lambda: self.now, rng=random.Random(1), **options)
        self.peer = Peer("device:1", self.sent.append)

    def take(self, exchange: Exchange, message: Message) -> None:
        """Note a request."""
        self.layer.remember(exchange)
        self.requests.append((exchange, message))

    def later(self, seconds: float) -> None:
        """Let time pass, in steps of the server's."""
        for _ in range(int(seconds * 20)):
            self.now += 0.05
            self.layer.tick()

    def out(self) -> list[Message]:
        """Return what went out since the last call."""
        found = [Message.decode(data) for data in self.sent]
        self.sent.clear()
        return found


def test_a_retransmission_gets_the_same_answer_and_is_no_second_request() -> None:
    """A datagram that comes again is answered with the bytes of the first answer."""
    bench = Bench()
    data = request("m", b"x", mid=77, token=b"tok")
    bench.layer.datagram(data, bench.peer)
    bench.layer.answer(bench.requests[0][0], Message(code=codes.CHANGED, payload=b"yes", content_format=42))
    first = bench.sent.pop()
    for _ in range(3):
        bench.layer.datagram(data, bench.peer)
        assert bench.sent.pop() == first
    assert len(bench.requests) == 1
    assert bench.layer.duplicates == 3


def test_a_slow_request_is_acknowledged_and_answered_apart() -> None:
    """An empty ACK after half a second, at once to a retransmission; then a CON of its own until it is acknowledged."""
    bench = Bench()
    data = request("m", b"x", mid=5, token=b"tok")
    bench.layer.datagram(data, bench.peer)
    bench.later(layer.ACK_DELAY_SECONDS + 0.1)
    (ack,) = bench.out()
    assert (ack.mtype, ack.code, ack.mid) == (ACK, codes.EMPTY, 5)
    bench.layer.datagram(data, bench.peer)
    assert [(m.mtype, m.mid) for m in bench.out()] == [(ACK, 5)]
    bench.layer.answer(bench.requests[0][0], Message(code=codes.CHANGED))
    (answer,) = bench.out()
    assert (answer.mtype, answer.code, answer.token) == (CON, codes.CHANGED, b"tok")
    bench.later(3.1)
    (again,) = bench.out()
    assert again.mid == answer.mid
    bench.layer.datagram(struct.pack("!BBH", 0x60, 0, answer.mid), bench.peer)
    bench.later(60)
    assert bench.out() == []
    assert bench.layer.unconfirmed == 0
    assert len(bench.requests) == 1


def test_an_answer_that_nobody_acknowledges_is_given_up() -> None:
    """Five transmissions, each after twice the time; then the outcome is that it was not delivered."""
    bench = Bench()
    outcomes: list[bool] = []
    bench.layer.datagram(request("m", b"x"), bench.peer)
    bench.layer.answer(bench.requests[0][0], Message(code=codes.CREATED, payload=b"c"), outcomes.append)
    bench.later(120)
    kinds = [message.mtype for message in bench.out()]
    assert kinds == [ACK, CON, CON, CON, CON, CON]
    assert outcomes == [False]


@pytest.mark.parametrize(("kind", "delivered"), [(0x60, True), (0x70, False)])
def test_an_answer_with_an_outcome_tells_whether_it_was_delivered(kind: int, delivered: bool) -> None:
    """An ACK says delivered, a RST says not."""
    bench = Bench()
    outcomes: list[bool] = []
    bench.layer.datagram(request("m", b"x"), bench.peer)
    bench.layer.answer(bench.requests[0][0], Message(code=codes.CREATED, payload=b"c"), outcomes.append)
    answer = bench.out()[-1]
    bench.layer.datagram(struct.pack("!BBH", kind, 0, answer.mid), bench.peer)
    assert outcomes == [delivered]


def test_the_same_id_with_another_token_is_another_request() -> None:
    """A device that begins anew with the message ids that it had before is not taken for its past."""
    bench = Bench()
    bench.layer.datagram(request("m", b"x", mid=1, token=b"a"), bench.peer)
    bench.layer.datagram(request("m", b"y", mid=1, token=b"b"), bench.peer)
    bench.layer.datagram(request("m", b"x", mid=1, token=b"a"), Peer("device:2", bench.sent.append))
    assert len(bench.requests) == 3


def test_exchanges_are_forgotten_after_their_lifetime() -> None:
    """What is older than EXCHANGE_LIFETIME is a new request; memory is free again."""
    bench = Bench()
    data = request("m", b"x")
    bench.layer.datagram(data, bench.peer)
    bench.later(layer.EXCHANGE_LIFETIME_SECONDS - 5)
    bench.layer.datagram(data, bench.peer)
    assert len(bench.requests) == 1
    bench.later(10)
    assert bench.layer.remembered == 0
    bench.layer.datagram(data, bench.peer)
    assert len(bench.requests) == 2


def test_remembered_exchanges_are_bounded() -> None:
    """However many requests come, no more than the bound are known."""
    bench = Bench(max_remembered=2000)
    for number in range(10_000):
        bench.layer.datagram(request("m", b"x", mid=number, kind=NON), bench.peer)
        assert bench.layer.remembered <= 2000
    bench.later(1000)
    assert bench.layer.remembered == 0


def test_an_answer_that_is_not_wanted_is_not_sent() -> None:
    """No-Response (RFC 7967) of a CON leaves the acknowledgement alone."""
    bench = Bench()
    bench.layer.datagram(request("m", b"x"), bench.peer)
    exchange = bench.requests[0][0]
    exchange.no_response = 2
    bench.layer.answer(exchange, Message(code=codes.CHANGED))
    assert [(m.mtype, m.code) for m in bench.out()] == [(ACK, codes.EMPTY)]


BROKEN = {
    "truncated option": b"\x40\x02\x00\x09\xb9tel",
    "truncated extended length": b"\x40\x02\x00\x09\xbe\x01",
    "reserved delta": b"\x40\x02\x00\x09\xf1a",
    "token longer than the message": b"\x48\x02\x00\x09abc",
    "token length 9": b"\x49\x02\x00\x09abcdefghi",
    "payload marker without payload": b"\x40\x02\x00\x09\xb1m\xff",
    "reserved class": b"\x40\x22\x00\x09",
    "response without request": b"\x40\x45\x00\x09",
    "path that is no UTF-8": b"\x40\x02\x00\x09\xb2\xff\xfe\xffx",
    "ping": b"\x40\x00\x00\x09",
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN.keys())
def test_what_is_no_message_is_rejected(data: bytes) -> None:
    """A CON that breaks the format gets RST, a NON gets nothing, and none is a request."""
    bench = Bench()
    bench.layer.datagram(data, bench.peer)
    (answer,) = bench.out()
    assert (answer.mtype, answer.mid, answer.code) == (RST, 9, codes.EMPTY)
    bench.layer.datagram(bytes((data[0] | 0x10,)) + data[1:], bench.peer)
    assert bench.out() == []
    assert bench.requests == []


def test_an_option_that_ends_in_ff_is_no_payload_marker() -> None:
    """0xFF at the end of an option's value is part of it."""
    bench = Bench()
    message = Message(code=codes.POST, _mtype=CON, _mid=3, _token=b"")
    message.opt.uri_path = ("m",)
    message.opt.request_tag = (b"\xff",)
    bench.layer.datagram(message.encode(), bench.peer)
    assert len(bench.requests) == 1


@given(st.binary(max_size=64))
def test_no_bytes_crash_it(data: bytes) -> None:
    """Whatever comes, the layer goes on."""
    bench = Bench()
    bench.layer.datagram(data, bench.peer)
    bench.layer.datagram(bytes((0x40 | (data[0] & 0x3F if data else 0),)) + data[1:], bench.peer)
    bench.later(0.1)


async def test_a_flood_of_non_is_bounded_and_counted() -> None:
    """While Kafka stands, NON beyond the bound are dropped as `overload`; what was taken is stored in the end."""
    async with site(max_pending=100) as here, raw(here.server.address) as device:
        here.kafka.working = False
        for number in range(3000):
            device.send(request("telemetry/d1", b'{"n": %d}' % number, mid=number, token=b"", kind=NON))
            if number % 50 == 0:
                await asyncio.sleep(0.005)
        await until(lambda: here.counts["overload"] > 1000)
        assert here.server.pending == 100
        assert here.server.exchanges.remembered == 100
        here.kafka.working = True
        here.kafka.acknowledge()
        await until(lambda: here.server.pending == 0)
        assert [arrival.payload for arrival in here.kafka.records] == [b'{"n": %d}' % n for n in range(100)]


async def test_a_lost_ack_costs_no_second_record() -> None:
    """The device that did not hear its ACK sends again, also while Kafka is slow: one record, the same answer."""
    async with site() as here, raw(here.server.address) as device:
        data = request("telemetry/d1", JSON, mid=9, token=b"tok", content_format=50)
        here.kafka.working = False
        for _ in range(3):
            device.send(data)
        await until(lambda: here.kafka.held)
        assert (await device.next()).mtype == ACK
        assert (await device.next()).code == codes.EMPTY
        here.kafka.working = True
        here.kafka.acknowledge()
        answer = await device.next()
        assert (answer.mtype, answer.code, answer.token) == (CON, codes.CHANGED, b"tok")
        device.send(struct.pack("!BBH", 0x60, 0, answer.mid))
        device.send(data)
        assert ((await device.next()).mtype, len(here.kafka.records)) == (ACK, 1)


async def test_a_quick_answer_stands_in_the_acknowledgement() -> None:
    """2.04 in the ACK; every retransmission gets the same bytes."""
    async with site() as here, raw(here.server.address) as device:
        data = request("telemetry/d1", JSON, mid=9, token=b"tok")
        device.send(data)
        first = await device.received.get()
        device.send(data)
        assert await device.received.get() == first
        answer = Message.decode(first)
        assert (answer.mtype, answer.mid, answer.code, answer.token) == (ACK, 9, codes.CHANGED, b"tok")
        assert len(here.kafka.records) == 1
