"""agents.mail.webhook against a real HTTP server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import msgspec
import pytest
from aiohttp import web
from multidict import CIMultiDictProxy

from agents.mail.send import Fate
from agents.mail.webhook import DELIVERY, SIGNATURE, TIMESTAMP, WebhookSender, sign, verify
from devices.alarms.model import Alert
from tests.agents.mail.conftest import make_alert

NOW = 1_750_000_000.0


@dataclass
class Receiver:
    """An HTTP server that remembers requests and answers as it is told."""

    status: int = 204
    headers: dict[str, str] = field(default_factory=dict)
    delay_seconds: float = 0
    requests: list[tuple[str, CIMultiDictProxy[str], bytes]] = field(default_factory=list)
    url: str = ""

    async def handle(self, request: web.Request) -> web.Response:
        self.requests.append((request.path_qs, request.headers, await request.read()))
        await asyncio.sleep(self.delay_seconds)
        return web.Response(status=self.status, headers=self.headers, text="" if self.status == 204 else "why " * 200)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    made = Receiver()
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", made.handle)
    runner = web.AppRunner(application, shutdown_timeout=0.01)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}/hook?x=1"
    yield made
    await runner.cleanup()


@pytest.fixture
async def sender() -> AsyncIterator[WebhookSender]:
    made = WebhookSender("secret", timeout_seconds=30, clock=lambda: NOW)
    yield made
    await made.stop()


async def test_signed(receiver: Receiver, sender: WebhookSender) -> None:
    """The body is the alert; the signature covers it and the time; a repetition has the same delivery id."""
    alert = make_alert()
    for _ in range(2):
        assert (await sender.send(receiver.url, alert)).fate is Fate.SENT
    (path, headers, body), (_, again, _) = receiver.requests
    assert path == "/hook?x=1"
    assert headers["Content-Type"] == "application/json"
    assert msgspec.json.decode(body, type=Alert) == alert
    assert headers[DELIVERY] == again[DELIVERY] == alert.metadata["transition_id"]
    assert verify("secret", headers[TIMESTAMP], body, headers[SIGNATURE], now=NOW + 299)
    assert not verify("secret", headers[TIMESTAMP], body, headers[SIGNATURE], now=NOW + 301)
    assert not verify("other", headers[TIMESTAMP], body, headers[SIGNATURE], now=NOW)
    assert not verify("secret", headers[TIMESTAMP], body + b" ", headers[SIGNATURE], now=NOW)
    assert not verify("secret", "1750000001", body, headers[SIGNATURE], now=NOW)
    assert not verify("secret", "soon", body, "é", now=NOW)


def test_the_signature_is_the_one_that_the_manual_gives() -> None:
    """A known value, so that receivers elsewhere go on working."""
    assert sign("secret", 1750000000, b"{}") == (
        "sha256=3fdabae93ac0fe8268882d2fd7845e468dd959a74561c9900a0af5b0a1bcc50a"
    )


async def test_without_a_secret(receiver: Receiver) -> None:
    """Without a secret there is no signature, rather than one that anybody can make."""
    sender = WebhookSender("", timeout_seconds=30, clock=lambda: NOW)
    await sender.send(receiver.url, make_alert())
    assert SIGNATURE not in receiver.requests[0][1]
    await sender.stop()


@pytest.mark.parametrize(
    ("status", "fate"),
    [
        (200, Fate.SENT),
        (202, Fate.SENT),
        (302, Fate.REFUSED),
        (400, Fate.REFUSED),
        (404, Fate.REFUSED),
        (410, Fate.REFUSED),
        (408, Fate.LATER),
        (429, Fate.LATER),
        (500, Fate.LATER),
        (503, Fate.LATER),
    ],
)
async def test_answers(receiver: Receiver, sender: WebhookSender, status: int, fate: Fate) -> None:
    """What a status means; a redirect is not followed, and what is kept of an answer is short."""
    receiver.status = status
    receiver.headers = {"Location": receiver.url} if status == 302 else {}
    outcome = await sender.send(receiver.url, make_alert())
    assert (outcome.fate, outcome.code, len(outcome.reply) <= 200) == (fate, status, True)
    assert len(receiver.requests) == 1


async def test_nobody_there(receiver: Receiver, sender: WebhookSender) -> None:
    """No server, no name, no answer in time: later. What is no URL: never."""
    assert (await sender.send("http://127.0.0.1:1/", make_alert())).fate is Fate.LATER
    assert (await sender.send("http://nowhere.invalid/", make_alert())).fate is Fate.LATER
    assert (await sender.send("http://", make_alert())).fate is Fate.REFUSED
    impatient = WebhookSender("s", timeout_seconds=0.1, clock=lambda: NOW)
    receiver.delay_seconds = 60
    outcome = await impatient.send(receiver.url, make_alert())
    assert outcome.fate is Fate.LATER
    assert "Timeout" in outcome.reply
    await impatient.stop()


async def test_ids_add_no_header(receiver: Receiver, sender: WebhookSender) -> None:
    """A transition id from elsewhere cannot add a header."""
    await sender.send(receiver.url, make_alert(metadata={"transition_id": "a\r\nX-Evil: 1\x00é"}))
    headers = receiver.requests[0][1]
    assert "X-Evil" not in headers
    assert headers[DELIVERY].startswith("a")
