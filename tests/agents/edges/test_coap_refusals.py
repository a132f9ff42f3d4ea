"""Which requests are refused, how, and that none breaks the server: RFC 7252, 7959 and 7967 as a device sees them."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from typing import Any

import aiocoap
import pytest
from aiocoap import error
from aiocoap.message import Message
from aiocoap.numbers import codes
from aiocoap.numbers.optionnumbers import OptionNumber
from aiocoap.numbers.types import CON, NON

from agents.edges.coap_arrivals import Event
from tests.agents.edges.coap import EFENTO, JSON, REGISTRY, ask, raw, request, site, until

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
