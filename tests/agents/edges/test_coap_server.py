"""The CoAP server as real clients see it: aiocoap, libcoap's, raw datagrams, a network that loses a third."""

from __future__ import annotations

import asyncio
import json
import random
import struct
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiocoap
import pytest
from aiocoap.message import Message
from aiocoap.numbers import codes
from aiocoap.numbers.types import ACK, CON, NON

from agents.edges.coap_arrivals import Event
from agents.edges.coap_server import PARALLEL_BATCHES
from devices.driver import Reply
from devices.plain_json.driver import PlainJsonDriver
from devices.registry import Registry
from devices.timing import STRIKES, DriverTimes
from tests.agents.edges import clients
from tests.agents.edges.coap import CONFIG, EFENTO, JSON, REGISTRY, SERIAL, Lossy, ask, raw, request, site, until


async def test_plain_json_is_answered_once_kafka_has_it(client: aiocoap.Context) -> None:
    """2.04 comes after the acknowledgement and not before; the arrival says where it came from."""
    async with site() as here:
        here.kafka.working = False
        answer = asyncio.ensure_future(ask(client, here, "telemetry/dev-1", JSON, content_format=50))
        await until(lambda: here.kafka.held)
        assert not answer.done()
        here.kafka.acknowledge()
        assert (await answer).code == codes.CHANGED
        (arrival,) = here.kafka.records
        assert (arrival.device_id, arrival.payload) == ("dev-1", JSON)
        assert arrival.metadata["uri_path"] == "telemetry/dev-1"
        assert arrival.metadata["method"] == "POST"
        assert arrival.metadata["source"].startswith("127.0.0.1:")
        assert here.counts == {Event.RECEIVED: 1, Event.ACKNOWLEDGED: 1}


@pytest.mark.parametrize("route", ["m", "i", "c"])
async def test_efento_messages_are_their_devices(client: aiocoap.Context, route: str) -> None:
    """The device is the serial number of the payload; the answer is what the device expects."""
    payload = EFENTO[route]
    async with site() as here:
        answer = await ask(client, here, route, payload)
        (arrival,) = here.kafka.records
        assert arrival.device_id == REGISTRY.device_id("coap", route, payload)
        assert str(answer.code)[:4] == ("2.01" if route == "m" else "2.05")
        assert bool(answer.payload) == (route == "m")


@pytest.mark.parametrize("code", [codes.GET, codes.POST])
async def test_the_time_is_four_bytes(client: aiocoap.Context, code: Any) -> None:
    """`/t` is answered with the Unix time, big endian, whether or not Kafka is there."""
    async with site() as here:
        here.kafka.working = False
        answer = await ask(client, here, "t", code=code)
        assert answer.code == codes.CONTENT
        assert abs(struct.unpack("!I", answer.payload)[0] - datetime.now(UTC).timestamp()) < 30
        assert here.kafka.records == []


async def test_devices_of_a_driver_that_is_set_aside_come_again_later() -> None:
    """5.03 with Max-Age and no record while the driver is set aside; devices of other families are served."""
    now = 0.0

    def wall() -> float:
        nonlocal now
        now += 1.0
        return now

    async with site(times=DriverTimes(0.5, 1000.0, wall=wall)) as here, raw(here.server.address) as device:
        for mid in range(STRIKES):
            taken = len(here.kafka.records)
            device.send(request("m", EFENTO["m"], mid=mid))
            answer = await device.next()
            if answer.code == codes.SERVICE_UNAVAILABLE:
                break
        assert 0 < answer.opt.max_age <= 1000
        assert len(here.kafka.records) == taken
        device.send(request("telemetry/d1", JSON, mid=101))
        assert (await device.next()).code == codes.CHANGED
        assert here.counts["unavailable"] == 1


async def test_large_messages_come_in_blocks(client: aiocoap.Context) -> None:
    """A body of 40 KiB is one record, byte by byte."""
    payload = json.dumps({f"f{n}": n for n in range(4000)}).encode()
    async with site() as here:
        assert (await ask(client, here, "telemetry/d1", payload)).code == codes.CHANGED
        assert [arrival.payload for arrival in here.kafka.records] == [payload]


async def test_blocks_without_a_beginning_are_refused() -> None:
    """4.08 for a block whose predecessors are unknown; 4.13 as soon as the size is announced."""
    async with site() as here, raw(here.server.address) as device:
        device.send(request("telemetry/d1", b"x" * 16, mid=1, block1=(3, True, 0)))
        assert (await device.next()).code == codes.REQUEST_ENTITY_INCOMPLETE
        device.send(request("telemetry/d1", b"x" * 16, mid=2, block1=(0, True, 0), size1=70_000))
        answer = await device.next()
        assert (answer.code, answer.opt.size1) == (codes.REQUEST_ENTITY_TOO_LARGE, 64 * 1024)


class Waiting:
    """What waits for devices, as the commands stage would know it."""

    def __init__(self, **payloads: bytes) -> None:
        self.payloads = payloads
        self.acknowledged: list[Any] = []
        self.handed_out: list[Any] = []

    def pending_for(self, device_id: str) -> tuple[bytes, Any] | None:
        """Return what waits."""
        payload = self.payloads.get("device")
        return None if payload is None else (payload, f"token of {device_id}")

    def sent(self, token: Any) -> None:
        """Note that an answer carries it."""
        self.handed_out.append(token)

    def delivered(self, token: Any) -> None:
        """Note a delivery."""
        self.acknowledged.append(token)


async def test_a_pending_command_goes_into_the_answer_and_is_delivered_when_that_is_acknowledged() -> None:
    """The answer is a CON of its own; only the device's ACK to it says delivered."""
    waiting = Waiting(device=b"\x08\x01")
    async with site(downlinks=waiting) as here, raw(here.server.address) as device:
        device.send(request("m", EFENTO["m"]))
        assert (await device.next()).code == codes.EMPTY
        answer = await device.next()
        assert (answer.mtype, answer.code) == (CON, codes.CREATED)
        assert (len(waiting.handed_out), waiting.acknowledged) == (1, [])
        device.send(struct.pack("!BBH", 0x60, 0, answer.mid))
        await until(lambda: waiting.acknowledged)
        assert waiting.acknowledged == [f"token of {SERIAL.hex()}"]


async def test_a_large_answer_comes_in_blocks(client: aiocoap.Context) -> None:
    """A pending configuration above 1 KiB is handed out in blocks, and the message stays one record."""
    # An unknown field of 3,000 bytes survives the driver's stamp.
    config = b"\xfa\x7f\xb8\x17" + b"\x00" * 3000
    async with site(downlinks=Waiting(device=config)) as here:
        answer = await ask(client, here, "m", EFENTO["m"])
        assert len(answer.payload) >= 3000
        assert len(here.kafka.records) == 1


async def test_503_while_kafka_cannot(client: aiocoap.Context) -> None:
    """After COAP_ANSWER_SECONDS: 5.03 with Max-Age; what nobody had claimed never becomes a record."""
    async with site(answer_seconds=0.6, max_age_seconds=7) as here:
        here.kafka.claiming = False
        answer = await ask(client, here, "telemetry/d1", JSON)
        assert (answer.code, answer.opt.max_age) == (codes.SERVICE_UNAVAILABLE, 7)
        assert here.counts[Event.RETURNED] == 1
        here.kafka.claiming = True
        for batch in here.kafka.unclaimed:
            assert batch.claim() == []
            batch.acknowledge()
        assert here.server.pending == 0
        assert (await ask(client, here, "telemetry/d1", JSON)).code == codes.CHANGED
        assert len(here.kafka.records) == 1


async def test_a_message_that_was_late_is_not_written_twice(client: aiocoap.Context) -> None:
    """Kafka had it after the device was told 5.03: the device's next attempt is answered 2.04 and is no new record."""
    async with site(answer_seconds=0.3) as here:
        here.kafka.working = False
        assert (await ask(client, here, "telemetry/d1", JSON)).code == codes.SERVICE_UNAVAILABLE
        second = asyncio.ensure_future(ask(client, here, "telemetry/d1", JSON))
        await until(lambda: here.counts["repeated"] == 1)
        here.kafka.working = True
        here.kafka.acknowledge()
        assert (await second).code == codes.CHANGED
        assert len(here.kafka.records) == 1
        assert (await ask(client, here, "telemetry/d1", JSON)).code == codes.CHANGED
        assert len(here.kafka.records) == 2


async def test_a_batch_that_kafka_refuses_is_503(client: aiocoap.Context) -> None:
    """A failure of the producer is told at once."""
    async with site() as here:
        here.kafka.working = False
        answer = asyncio.ensure_future(ask(client, here, "telemetry/d1", JSON))
        await until(lambda: here.kafka.held)
        here.kafka.refuse()
        assert (await answer).code == codes.SERVICE_UNAVAILABLE


async def test_a_reply_that_is_none_costs_nobody_anything(
    client: aiocoap.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver makes a reply that does not encode: its device hears that its message is safe, its neighbours too."""

    def reply(_driver: Any, uplink: Any, *_: Any) -> Reply | None:
        return Reply(code="no code", data="text") if b"bad" in uplink.data else None  # type: ignore[arg-type]

    monkeypatch.setattr(PlainJsonDriver, "reply", reply)
    async with site() as here:
        here.kafka.working = False
        bodies = [JSON] * PARALLEL_BATCHES + [JSON, b'{"bad": 1}', JSON, JSON]
        answers = []
        for number, body in enumerate(bodies):
            answers.append(asyncio.ensure_future(ask(client, here, f"telemetry/d{number}", body)))
            await until(lambda number=number: here.server.pending > number)
        here.kafka.acknowledge()
        await until(lambda: here.kafka.held)
        assert [len(arrivals) for _, arrivals in here.kafka.held] == [4]
        here.kafka.acknowledge()
        assert [(await answer).code for answer in answers] == [codes.CHANGED] * len(bodies)
        assert here.server.pending == here.server.pending_bytes == 0


async def test_what_cannot_be_handed_over_is_503_and_ends_nothing(client: aiocoap.Context) -> None:
    """An error on the way to Kafka is its batch's: the next message is taken."""
    async with site() as here:
        take = here.server._deliver

        async def fail(_batch: Any) -> None:
            here.server._deliver = take
            raise LookupError("no way")

        here.server._deliver = fail
        assert (await ask(client, here, "telemetry/d1", JSON)).code == codes.SERVICE_UNAVAILABLE
        assert (await ask(client, here, "telemetry/d2", JSON)).code == codes.CHANGED
        assert here.server.serving
        assert here.server.pending == 0


UNSAYABLE = {
    "code of a request": Reply(code="0.02"),
    "code beyond a byte": Reply(code="9.99"),
    "negative content format": Reply(code="2.05", data=b"x", content_format=-1),
    "text": Reply(code="2.05", data="text"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("made", UNSAYABLE.values(), ids=UNSAYABLE.keys())
async def test_a_reply_that_coap_cannot_say_is_204_and_logged(
    client: aiocoap.Context, made: Reply, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The device hears that its message is safe, without payload; the log names it and what its driver made."""
    monkeypatch.setattr(PlainJsonDriver, "reply", lambda *_: made)
    async with site() as here:
        answer = await ask(client, here, "telemetry/d1", JSON)
        assert (answer.code, answer.payload) == (codes.CHANGED, b"")
        assert here.server.pending == 0
    assert "d1" in caplog.text
    assert made.code in caplog.text


async def test_a_command_in_a_reply_that_coap_cannot_say_is_not_delivered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command was not in the answer, so that nothing counts as its delivery: it still waits."""
    monkeypatch.setattr(PlainJsonDriver, "reply", lambda *_: Reply(code="9.99", data=b"on", carries=b"on"))
    waiting = Waiting(device=b"on")
    async with site(downlinks=waiting) as here, raw(here.server.address) as device:
        device.send(request("telemetry/d1", JSON))
        answer = await device.next()
        assert (answer.mtype, answer.code) == (ACK, codes.CHANGED)
        assert (waiting.handed_out, waiting.acknowledged) == ([], [])


async def test_an_answer_that_cannot_be_protected_is_500_and_costs_its_neighbours_nothing() -> None:
    """A full disk under OSCORE's numbers: 5.00 in plain for that device, 2.04 for the others of its batch."""

    def full(_answer: Message) -> Message:
        raise OSError("no space left on device")

    async with site() as here, raw(here.server.address) as device:
        here.kafka.working = False
        for mid in range(PARALLEL_BATCHES):
            device.send(request("telemetry/d1", b'{"n":%d}' % mid, mid=mid))
            await until(lambda mid=mid: len(here.kafka.held) > mid)
        for mid in range(10, 13):
            device.send(request("telemetry/d1", b'{"n":%d}' % mid, mid=mid))
        await until(lambda: here.server.pending == PARALLEL_BATCHES + 3)
        here.server._waiting[1].exchange.protect = full
        here.kafka.acknowledge()
        await until(lambda: here.kafka.held)
        here.kafka.acknowledge()
        answers = {answer.mid: answer.code for answer in [await device.next() for _ in range(PARALLEL_BATCHES + 3)]}
        assert answers == {
            **dict.fromkeys([*range(PARALLEL_BATCHES), 10, 12], codes.CHANGED),
            11: codes.INTERNAL_SERVER_ERROR,
        }
        assert here.server.pending == here.server.pending_bytes == 0


async def test_a_round_that_fails_ends_no_task(client: aiocoap.Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in handing over or at the clock is logged; the next message is taken, a late one still gets 5.03."""
    async with site(answer_seconds=0.3) as here:
        count, tick, failures = here.server._count, here.server.exchanges.tick, iter([LookupError("once")])

        def fail_once(*_: Any) -> None:
            for failure in failures:
                raise failure

        async def no_way(_batch: Any) -> None:
            raise LookupError("no way")

        with monkeypatch.context() as broken:
            broken.setattr(here.server, "_deliver", no_way)
            broken.setattr(here.server, "_count", lambda event, _: fail_once() if event is Event.RETURNED else None)
            assert (await ask(client, here, "telemetry/d1", JSON)).code == codes.SERVICE_UNAVAILABLE
            await until(lambda: here.server.pending == 0)
        assert here.server._count is count
        failures = iter([LookupError("twice")])

        def fail_then_tick() -> None:
            fail_once()
            tick()

        monkeypatch.setattr(here.server.exchanges, "tick", fail_then_tick)
        assert (await ask(client, here, "telemetry/d2", JSON)).code == codes.CHANGED
        here.kafka.claiming = False
        assert (await ask(client, here, "telemetry/d3", JSON)).code == codes.SERVICE_UNAVAILABLE
        assert next(failures, None) is None
        assert here.server.serving
        assert here.server.pending == here.server.pending_bytes == 0


async def test_con_beyond_the_bound_get_503() -> None:
    """With all hands full a confirmable request is refused at once, and is not remembered."""
    async with site(max_pending=1) as here, raw(here.server.address) as device:
        here.kafka.working = False
        device.send(request("telemetry/d1", JSON, mid=1))
        await until(lambda: here.kafka.held)
        device.send(request("telemetry/d2", JSON, mid=2))
        answer = await device.next()
        assert (answer.mtype, answer.mid, answer.code) == (ACK, 2, codes.SERVICE_UNAVAILABLE)
        assert here.counts["unavailable"] == 1


async def test_non_is_answered_with_non() -> None:
    """A NON is stored and answered as what it is; its copy is ignored."""
    async with site() as here, raw(here.server.address) as device:
        for _ in range(2):
            device.send(request("telemetry/d1", JSON, kind=NON))
        answer = await device.next()
        assert (answer.mtype, answer.code, answer.token) == (NON, codes.CHANGED, b"t")
        assert await device.nothing()
        assert len(here.kafka.records) == 1


async def test_thousands_of_requests_are_in_flight() -> None:
    """3,000 confirmable requests of 20 devices wait for Kafka together; one answer and one record each."""
    async with site() as here, AsyncExitStack() as stack:
        here.kafka.working = False
        devices = [await stack.enter_async_context(raw(here.server.address)) for _ in range(20)]
        for number in range(150):
            for which, device in enumerate(devices):
                payload = b'{"n":%d}' % number
                device.send(request(f"telemetry/many-{which}", payload, mid=number, token=b"%d" % number))
            await until(lambda least=(number + 1) * 20: here.server.pending >= least)
        assert here.server.pending == 3000
        here.kafka.working = True
        here.kafka.acknowledge()

        async def answers(device: Any) -> set[bytes]:
            tokens: set[bytes] = set()
            while len(tokens) < 150:
                answer = await device.next(30)
                if answer.mtype == CON:
                    device.send(struct.pack("!BBH", 0x60, 0, answer.mid))
                if answer.code == codes.CHANGED:
                    tokens.add(answer.token)
            return tokens

        await asyncio.gather(*(answers(device) for device in devices))
        assert len({(a.device_id, a.payload) for a in here.kafka.records}) == len(here.kafka.records) == 3000
        for which in range(20):
            mine = [a.payload for a in here.kafka.records if a.device_id == f"many-{which}"]
            assert mine == [b'{"n":%d}' % number for number in range(150)]


async def test_each_device_is_in_order() -> None:
    """The arrivals of a device go to Kafka as they came, over many batches."""
    async with site() as here, raw(here.server.address) as device:
        for number in range(400):
            device.send(request("telemetry/d1", b'{"n":%d}' % number, mid=number, token=b""))
            if number % 20 == 0:
                await asyncio.sleep(0)
        await until(lambda: len(here.kafka.records) == 400)
        assert [arrival.payload for arrival in here.kafka.records] == [b'{"n":%d}' % n for n in range(400)]


async def test_ipv6_is_served() -> None:
    """An address of IPv6 is bound, and named in brackets."""
    async with site(host="::1") as here, raw(here.server.address) as device:
        device.send(request("telemetry/six", JSON))
        assert (await device.next()).code == codes.CHANGED
        assert here.kafka.records[0].metadata["source"].startswith("[::1]:")


async def test_unknown_devices_can_be_refused(client: aiocoap.Context) -> None:
    """UNKNOWN_DEVICES=reject: 4.03 to whom nobody has configured."""
    async with site(known={"mine"}.__contains__) as here:
        assert (await ask(client, here, "telemetry/other", JSON)).code == codes.FORBIDDEN
        assert (await ask(client, here, "telemetry/mine", JSON)).code == codes.CHANGED
        assert here.counts["unknown_device"] == 1


async def test_devices_that_a_profile_does_not_allow(client: aiocoap.Context, tmp_path: Path) -> None:
    """4.03 and counted for a device that no profile of the path allows; the allowed one gets in."""
    text = (CONFIG / "profiles" / "plain_json.yaml").read_text()
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "mine.yaml").write_text(
        text.replace("path: telemetry/{device_id}", "path: telemetry/{device_id}\n    devices: ['mine-*']")
    )
    async with site(Registry.load(tmp_path)) as here:
        assert (await ask(client, here, "telemetry/other", JSON)).code == codes.FORBIDDEN
        assert (await ask(client, here, "telemetry/mine-1", JSON)).code == codes.CHANGED
        assert here.counts["device_not_allowed"] == 1


async def test_thirty_percent_loss_costs_no_message_and_no_copy() -> None:
    """30 devices over a network that loses 30 % each way: each of their messages gets its 2.04, one record each."""
    async with site() as here:
        network = Lossy(here.server.address, 0.3, seed=5)
        await network.open()
        answers: list[Any] = []

        async def device(number: int) -> None:
            async with raw(network.address) as mine:
                rng = random.Random(number)
                for seq in range(5):
                    data = request(f"telemetry/lossy-{number}", b'{"n":%d}' % seq, mid=seq, token=b"%d" % seq)
                    answers.append(await confirmed(mine, data, rng))

        await asyncio.gather(*(device(number) for number in range(30)))
        network.close()
        assert answers == [codes.CHANGED] * 150
        assert network.lost > 50
        for number in range(30):
            mine = [a.payload for a in here.kafka.records if a.device_id == f"lossy-{number}"]
            assert mine == [b'{"n":%d}' % seq for seq in range(5)]


async def confirmed(device: Any, data: bytes, rng: random.Random) -> Any:
    """Send a CON as RFC 7252 asks, but ten times as impatient, and more patient; return the answer's code."""
    wait = rng.uniform(0.2, 0.3)
    for _ in range(40):
        device.send(data)
        try:
            async with asyncio.timeout(wait):
                while True:
                    answer = Message.decode(await device.received.get())
                    if answer.mtype == CON:
                        device.send(struct.pack("!BBH", 0x60, 0, answer.mid))
                    if answer.token == data[4 : 4 + (data[0] & 15)] and answer.code != codes.EMPTY:
                        return answer.code
        except TimeoutError:
            wait = min(wait * 1.5, 2.0)
    return None


@pytest.mark.parametrize("confirmable", [True, False], ids=["CON", "NON"])
async def test_a_client_program_is_served(confirmable: bool, tmp_path: Path) -> None:
    """libcoap's client: JSON, a body in blocks, a refusal and the list of resources."""
    small, large = tmp_path / "small.json", tmp_path / "large.json"
    small.write_bytes(JSON)
    large.write_text(json.dumps({f"f{n}": n for n in range(3000)}))
    async with site() as here:
        await clients.post(f"{here.uri}/telemetry/lib-1", small, confirmable=confirmable)
        await clients.post(f"{here.uri}/telemetry/lib-2", large, confirmable=confirmable, block_bytes=512)
        assert [(a.device_id, a.payload) for a in here.kafka.records] == [
            ("lib-1", JSON),
            ("lib-2", large.read_bytes()),
        ]
        assert "4.04" in await clients.post(f"{here.uri}/nowhere", small, confirmable=confirmable)
        links = await clients.get(f"{here.uri}/.well-known/core", confirmable=confirmable, block_bytes=64)
        assert "</telemetry/>" in links
