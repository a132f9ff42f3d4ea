"""The CoAP server as real clients see it: aiocoap, libcoap's, raw datagrams, a network that loses a third."""

from __future__ import annotations

import asyncio
import json
import random
import struct
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiocoap
import pytest
import pytest_asyncio
from aiocoap import error
from aiocoap.message import Message
from aiocoap.numbers import codes
from aiocoap.numbers.optionnumbers import OptionNumber
from aiocoap.numbers.types import ACK, CON, NON

from agents.edges.coap_arrivals import Event
from devices.efento import messages
from devices.registry import Registry
from devices.timing import STRIKES, DriverTimes
from tests.agents.edges import clients
from tests.agents.edges.coap import CONFIG, REGISTRY, Lossy, Site, raw, request, site, until

VECTORS = json.loads((Path(__file__).parents[3] / "devices" / "efento" / "vectors.json").read_text())
JSON = b'{"t": 21.5}'


SERIAL = bytes.fromhex("282c02424eed")
EFENTO = {
    "m": bytes.fromhex(VECTORS["measurements"][0]["hex"]),
    "i": bytes.fromhex(VECTORS["device_info"][0]["hex"]),
    "c": messages.CONFIG(serial_number=SERIAL, hash=7).SerializeToString(),
}


@pytest_asyncio.fixture
async def client() -> AsyncIterator[aiocoap.Context]:
    """A client of aiocoap's."""
    context = await aiocoap.Context.create_client_context()
    yield context
    await context.shutdown()


async def ask(client: aiocoap.Context, here: Site, path: str, payload: bytes = b"", **options: Any) -> Message:
    """Send a request and return its answer."""
    options.setdefault("code", codes.POST)
    message = Message(uri=f"{here.uri}/{path}", payload=payload, **options)
    return await asyncio.wait_for(client.request(message).response, 30)


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


REFUSED = {
    "4.00 no protobuf": ("m", b"\xff\xff\xff", {}, "4.00"),
    "4.00 no serial number": ("m", b"", {}, "4.00"),
    "4.00 no JSON": ("telemetry/d1", b"not json", {}, "4.00"),
    "4.00 no payload": ("telemetry/d1", b"", {}, "4.00"),
    "4.04 no such path": ("nowhere/at/all", JSON, {}, "4.04"),
    "4.05 GET": ("m", b"", {"code": codes.GET}, "4.05"),
    "4.05 DELETE": ("telemetry/d1", b"", {"code": codes.DELETE}, "4.05"),
    "4.13 too large": ("telemetry/d1", b'"' + b"x" * 70_000 + b'"', {}, "4.13"),
    "4.15 XML": ("telemetry/d1", b"<t>1</t>", {"content_format": 41}, "4.15"),
    "4.15 CBOR": ("telemetry/d1", b"\xa1at\x01", {"content_format": 60}, "4.15"),
}


@pytest.mark.parametrize(("path", "payload", "options", "code"), REFUSED.values(), ids=REFUSED.keys())
async def test_refusals_say_why(
    client: aiocoap.Context, path: str, payload: bytes, options: dict[str, Any], code: str
) -> None:
    """Each has its code and a diagnostic text, is counted, and is no record."""
    async with site() as here:
        answer = await ask(client, here, path, payload, **options)
        assert str(answer.code)[:4] == code
        assert len(answer.payload.decode()) > 10
        assert here.kafka.records == []
        assert Event.RECEIVED not in here.counts
        assert here.counts.total() >= 1


async def test_critical_options_that_nobody_understands_are_refused() -> None:
    """4.02 for an unknown critical option, 5.05 for a proxy's."""
    async with site() as here, raw(here.server.address) as device:
        device.send(request("telemetry/d1", JSON, mid=1, uri_path_abbrev=5))
        assert (await device.next()).code == codes.BAD_OPTION
        device.send(request("telemetry/d1", JSON, mid=2, proxy_scheme="coap"))
        assert (await device.next()).code == codes.PROXYING_NOT_SUPPORTED
        device.send(request("telemetry/d1", JSON, mid=3, if_none_match=True))
        assert (await device.next()).code == codes.BAD_OPTION
        device.send(request("telemetry/d1", JSON, mid=4, if_match=[b"etag"]))
        assert (await device.next()).code == codes.BAD_OPTION
        assert here.kafka.records == []


async def test_well_known_core_lists_the_resources(client: aiocoap.Context) -> None:
    """All paths of the profiles, in link format; in blocks where the client asks for small ones."""
    async with site() as here:
        answer = await ask(client, here, ".well-known/core", code=codes.GET)
        assert (answer.code, answer.opt.content_format) == (codes.CONTENT, 40)
        for path in ("</m>", "</i>", "</c>", "</t>", "</telemetry/>"):
            assert path in answer.payload.decode()
        small = await ask(client, here, ".well-known/core", code=codes.GET, block2=(0, False, 2))
        assert small.payload == answer.payload
        assert (await ask(client, here, ".well-known/core")).code == codes.METHOD_NOT_ALLOWED


async def test_the_list_of_resources_in_another_format_is_not_to_be_had(client: aiocoap.Context) -> None:
    """Accept: 4.06 for anything but link format."""
    async with site() as here:
        assert (await ask(client, here, ".well-known/core", code=codes.GET, accept=40)).code == codes.CONTENT
        assert (await ask(client, here, ".well-known/core", code=codes.GET, accept=60)).code == codes.NOT_ACCEPTABLE


async def test_a_refusal_that_is_not_wanted_is_not_sent() -> None:
    """No-Response (RFC 7967) with the bit of 4.xx: a CON is acknowledged empty, a NON gets nothing; counted."""
    async with site() as here, raw(here.server.address) as device:
        device.send(request("nowhere", JSON, mid=1, kind=NON, no_response=8))
        device.send(request("nowhere", JSON, mid=2, no_response=8))
        answer = await device.next()
        assert (answer.code, answer.mid) == (codes.EMPTY, 2)
        device.send(request("telemetry/d1", JSON, mid=3, no_response=8))
        assert (await device.next()).code == codes.CHANGED
        assert here.counts["not_found"] == 2


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


async def test_requests_of_any_options_and_payload_break_nothing() -> None:
    """Thousands of well-formed and ill-formed requests to every path: answered or ignored, never a 5.00."""
    rng = random.Random(7)
    paths = [path.format(device_id="d1").split("/") for path in REGISTRY.coap_paths()] + [
        [".well-known", "core"],
        ["x"],
    ]
    real = [*EFENTO.values(), JSON, b"", b"[]", b"\xa1at\x01"]
    async with site(max_message_bytes=5_000) as here, raw(here.server.address) as device:
        for number in range(3_000):
            message = Message(
                code=rng.choice((1, 2, 2, 2, 3, 4, 5, 9)), _mid=number, _token=rng.randbytes(rng.randrange(5))
            )
            message.mtype = rng.choice((CON, NON))
            message.payload = rng.choice((rng.choice(real), rng.randbytes(rng.randrange(80))))
            message.opt.uri_path = rng.choice(paths)
            if rng.random() < 0.3:
                message.opt.block1 = (rng.randrange(3), rng.random() < 0.5, rng.randrange(8))
            if rng.random() < 0.3:
                message.opt.block2 = (rng.randrange(3), False, rng.randrange(8))
            for _ in range(rng.randrange(3)):
                kind = OptionNumber(rng.choice((4, 6, 9, 12, 17, 28, 60, 65_001, 65_002, 258, 252, 292)))
                with suppress(ValueError, error.Error):
                    message.opt.add_option(kind.create_option(decode=rng.randbytes(rng.randrange(9))))
            data = message.encode()
            if rng.random() < 0.2:
                data = data[: rng.randrange(len(data))]
            device.send(data)
            if number % 50 == 0:
                await asyncio.sleep(0)
        device.send(request("telemetry/last", JSON, mid=60_000))
        await until(lambda: any(arrival.device_id == "last" for arrival in here.kafka.records))
        assert here.counts["internal_error"] == 0


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
