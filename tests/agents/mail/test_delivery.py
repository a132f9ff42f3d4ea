"""agents.mail.delivery: everybody told, once, in order, under the rate limit, with servers that fail."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from agents.mail.delivery import Delivery, Refusal
from agents.mail.ratelimit import HeldBack, RateLimiter
from agents.mail.render import History, Renderer
from agents.mail.send import SmtpSender
from agents.mail.webhook import WebhookSender
from devices.alarms.model import Alert
from streams.resilience.failures import FailureClass, Retryable, classify
from tests.agents.mail.conftest import START, Certificate, Server, make_alert
from tests.agents.mail.test_webhook import Receiver, receiver

__all__ = ["receiver"]

Make = Callable[..., Certificate]
THREE = "ann@example.org,bob@example.org,eve@example.org"


class Desk:
    """A delivery with a clock of its own, over mappings that outlive it."""

    def __init__(self, server: Server, per_minute: float = 1000, each: float = 1000) -> None:
        self.server = server
        self.rates = (per_minute, each)
        self.time = 1_750_000_000.0
        self.sent: dict[str, float] = {}
        self.store: dict[str, bytes] = {}
        self.refused: list[Refusal] = []
        self.delivery = self.open()

    def open(self, **more: Any) -> Delivery:
        """Start over, as after a crash: what was in memory is gone."""

        async def refuse(refusal: Refusal) -> None:
            self.refused.append(refusal)

        self.delivery = Delivery(
            smtp=SmtpSender(self.server.url, "alerts@example.org", timeout_seconds=30),
            webhooks=WebhookSender("secret", timeout_seconds=30, clock=lambda: self.time),
            renderer=Renderer("alerts@example.org", "http://x"),
            limiter=RateLimiter(*self.rates),
            held=HeldBack(self.store, 300),
            sent=self.sent,
            refuse=refuse,
            now=lambda: self.time,
            clock=lambda: self.time,
            **more,
        )
        return self.delivery

    async def until_told(self, alert: Alert, attempts: int = 50) -> int:
        """Deliver as the stage does, again and again; returns how often."""
        for attempt in range(1, attempts + 1):
            try:
                await self.delivery.deliver(alert)
            except Retryable:
                self.time += 30
            else:
                return attempt
        raise AssertionError("never told")


@pytest.fixture
async def desk(server: Server) -> Any:
    made = Desk(server)
    yield made
    await made.delivery.stop()


def to(server: Server) -> list[list[str]]:
    return [recipients for recipients, _ in server.taken]


async def test_once(server: Server, desk: Desk) -> None:
    """A redelivered alert is not mailed again, after a crash neither."""
    for _ in range(2):
        await desk.delivery.deliver(make_alert(recipients=THREE))
    desk.open()
    await desk.delivery.deliver(make_alert(recipients=THREE))
    assert to(server) == [THREE.split(",")]
    assert desk.refused == []


async def test_nobody_to_tell(server: Server, desk: Desk) -> None:
    """No recipients, a quiet time and an acknowledgement make no mail."""
    await desk.delivery.deliver(make_alert(recipients=""))
    await desk.delivery.deliver(make_alert(metadata={"notify": False}))
    await desk.delivery.deliver(make_alert(transition="acknowledged"))
    assert server.taken == []


async def test_550_for_one_of_three(server: Server, desk: Desk) -> None:
    """The refused one is told to whoever keeps dead letters, once; the others have their mail."""
    server.rcpt["bob@example.org"] = "550 no such user"
    for _ in range(2):
        await desk.delivery.deliver(make_alert(recipients=THREE))
    assert [(one.recipient, one.outcome.code) for one in desk.refused] == [("bob@example.org", 550)]
    assert to(server) == [["ann@example.org", "eve@example.org"]]


async def test_450_for_one_of_three(server: Server, desk: Desk) -> None:
    """The one that is put off is tried again alone; the others are not mailed twice."""
    server.rcpt["bob@example.org"] = "450 greylisted"
    with pytest.raises(Retryable, match="puts off"):
        await desk.delivery.deliver(make_alert(recipients=THREE))
    server.rcpt = {}
    await desk.delivery.deliver(make_alert(recipients=THREE))
    assert to(server) == [["ann@example.org", "eve@example.org"], ["bob@example.org"]]


async def test_450_for_ever(server: Server, desk: Desk) -> None:
    """One recipient that is always put off is given up after half an hour, and holds up nobody else for ever."""
    server.rcpt["bob@example.org"] = "450 busy"
    attempts = await desk.until_told(make_alert(recipients=THREE), 100)
    assert attempts == 61
    (refusal,) = desk.refused
    assert refusal.outcome.reply.startswith("given up after 1800 s")


async def test_down_for_ten_minutes(server: Server, desk: Desk) -> None:
    """While the server is away every attempt is worth another one; afterwards all mails go out, in order, once."""
    await server.stop()
    for attempt in range(20):
        with pytest.raises(Retryable, match="cannot take mails now") as caught:
            await desk.delivery.deliver(make_alert(1, recipients=THREE))
        assert classify(caught.value) is FailureClass.RETRY
        desk.time += 30
        assert desk.refused == [], attempt
    await server.start()
    for number in range(1, 6):
        await desk.delivery.deliver(make_alert(number, recipients=THREE, sensor_name=f"Press {number}"))
    assert [subject.split(":")[0] for subject in server.subjects] == [f"[CRITICAL] Press {n}" for n in range(1, 6)]
    assert desk.store == {}


async def test_an_attempt_takes_one_token(server: Server) -> None:
    """Trying again does not use up the rate: what was admitted stays a mail and goes into no digest."""
    desk = Desk(server, per_minute=1, each=1)
    await server.stop()
    for _ in range(5):
        with pytest.raises(Retryable):
            await desk.delivery.deliver(make_alert())
    await server.start()
    await desk.delivery.deliver(make_alert())
    assert (len(server.taken), len(desk.delivery.held)) == (1, 0)
    await desk.delivery.stop()


@pytest.mark.parametrize("answer", ["421 closing", "451 later"])
async def test_4xx_for_all(server: Server, desk: Desk, answer: str) -> None:
    """A server that closes or puts off everything loses nothing and refuses nobody."""
    server.data = answer
    with pytest.raises(Retryable):
        await desk.delivery.deliver(make_alert(recipients=THREE))
    server.data = None
    await desk.delivery.deliver(make_alert(recipients=THREE))
    assert (len(server.taken), desk.refused) == (1, [])


@pytest.mark.parametrize("fault", ["down", "421 at the greeting", "421 to one of three", "slow", "expired certificate"])
async def test_a_server_of_no_use_is_nobodys_refusal(server: Server, certificates: Make, fault: str) -> None:
    """Nobody is told and nobody refused; once the server is good again each of the three has one mail."""
    desk = Desk(server)
    good, tls = certificates(30), None
    if fault == "expired certificate":
        expired = certificates(-1)
        # Both are known, so that it is the date alone.
        tls = expired.client()
        tls.load_verify_locations(good.cert)
        await server.stop()
        server.tls, server.tls_at_once = expired.server(), True
        await server.start()
    url = server.url.replace("smtp:", "smtps:") if tls else server.url
    desk.delivery.smtp = SmtpSender(url, "alerts@example.org", timeout_seconds=0.5 if fault == "slow" else 30, tls=tls)
    match fault:
        case "down":
            await server.stop()
        case "421 at the greeting":
            server.greeting = "421 busy"
        case "421 to one of three":
            server.rcpt["bob@example.org"] = "421 closing"
        case "slow":
            server.delay_seconds = 60
    for _ in range(3):
        with pytest.raises(Retryable, match="cannot take mails now"):
            await desk.delivery.deliver(make_alert(recipients=THREE))
    assert (server.taken, desk.sent, desk.refused) == ([], {}, [])
    server.greeting, server.rcpt, server.delay_seconds = None, {}, 0
    if fault in ("down", "expired certificate"):
        server.tls = good.server() if tls else None
        await server.stop()
        await server.start()
    desk.delivery.smtp = SmtpSender(url, "alerts@example.org", tls=tls)
    await desk.delivery.deliver(make_alert(recipients=THREE))
    assert (to(server), desk.refused) == ([THREE.split(",")], [])
    assert {key.partition("|")[2] for key in desk.sent} == set(THREE.split(","))
    await desk.delivery.stop()


async def test_a_drop_after_data_is_one_copy_more(server: Server, desk: Desk) -> None:
    """Each lost reply costs one copy at most, and all copies have one Message-ID."""
    server.drop_after_data = 2
    assert await desk.until_told(make_alert(recipients=THREE)) == 3
    assert len(server.taken) == 3
    assert len({message["Message-ID"] for _, message in server.taken}) == 1


async def test_held_back_for_a_digest(server: Server) -> None:
    """Beyond the rate everything waits, in order, through a crash, and comes as one mail; nothing overtakes it."""
    desk = Desk(server, per_minute=100, each=3)
    for number in range(10):
        await desk.delivery.deliver(make_alert(number, sensor_name=f"Press {number}"))
    assert len(server.taken) == 3
    desk.open()
    desk.time += 120
    await desk.delivery.deliver(make_alert(10, sensor_name="Press 10"))
    await desk.delivery.flush_digests()
    assert len(server.taken) == 3
    desk.time += 181
    await desk.delivery.flush_digests()
    await desk.delivery.flush_digests()
    _, digest = server.taken[3]
    text = digest.get_body(("plain",)).get_content()  # type: ignore[union-attr]
    places = [text.index(f"Press {number}:") for number in range(3, 11)]
    assert places == sorted(places)
    assert len(server.taken) == 4
    for number in range(11):
        await desk.delivery.deliver(make_alert(number))
    assert (len(server.taken), desk.store) == (4, {})
    await desk.delivery.deliver(make_alert(11))
    assert len(server.taken) == 5
    await desk.delivery.stop()


async def test_a_storm_under_the_rate(server: Server) -> None:
    """A thousand alerts for two recipients: never more mails than the rate, and each is told by a mail or a digest."""
    desk = Desk(server, per_minute=12, each=6)
    told: dict[str, set[str]] = {"ann@example.org": set(), "bob@example.org": set()}
    times: list[float] = []
    for number in range(1000):
        alert = make_alert(number, recipients="ann@example.org,bob@example.org")
        before = len(server.taken)
        await desk.delivery.deliver(alert)
        await desk.delivery.flush_digests()
        times += [desk.time] * sum(len(recipients) for recipients, _ in server.taken[before:])
        desk.time += 1
    desk.time += 400
    await desk.delivery.flush_digests()
    for recipients, message in server.taken:
        said = message.get_body(("plain",)).get_content()  # type: ignore[union-attr]
        for recipient in recipients:
            told[recipient] |= {f"{n:032x}" for n in range(1000) if f"alert={n:032x}" in said}
    assert [len(found) for found in told.values()] == [1000, 1000]
    for start in times:
        assert sum(1 for moment in times if start <= moment < start + 60) <= 24
    await desk.delivery.stop()


async def test_a_digest_that_is_refused(server: Server) -> None:
    """Where the recipient of a digest is gone, all that it held is told to whoever keeps dead letters."""
    desk = Desk(server, per_minute=100, each=1)
    for number in range(3):
        await desk.delivery.deliver(make_alert(number))
    server.rcpt["ann@example.org"] = "550 gone"
    desk.time += 301
    await desk.delivery.flush_digests()
    assert [(one.recipient, len(one.alerts)) for one in desk.refused] == [("ann@example.org", 2)]
    assert desk.store == {}
    await desk.delivery.stop()


async def test_webhooks_and_mails(server: Server, desk: Desk, receiver: Receiver) -> None:
    """A webhook that is down delays no mail, is tried again alone, and refused where it says so."""
    receiver.status = 503
    alert = make_alert(recipients=f"ann@example.org,{receiver.url}")
    with pytest.raises(Retryable, match="the webhook at"):
        await desk.delivery.deliver(alert)
    assert to(server) == [["ann@example.org"]]
    receiver.status = 200
    await desk.delivery.deliver(alert)
    assert len(receiver.requests) == 2
    receiver.status = 404
    await desk.delivery.deliver(make_alert(2, recipients=receiver.url))
    assert [(one.recipient, one.outcome.code) for one in desk.refused] == [(receiver.url, 404)]
    assert len(server.taken) == 1


async def test_a_mail_server_that_is_down_delays_no_webhook(server: Server, desk: Desk, receiver: Receiver) -> None:
    """And once the server is back the webhook is not called again."""
    await server.stop()
    alert = make_alert(recipients=f"ann@example.org,{receiver.url}")
    with pytest.raises(Retryable):
        await desk.delivery.deliver(alert)
    await server.start()
    await desk.delivery.deliver(alert)
    assert (len(receiver.requests), len(server.taken)) == (1, 1)


History_ = Callable[[Alert], Any]


async def _fails(_alert: Alert) -> History:
    raise OSError("no database")


async def _hangs(_alert: Alert) -> History:
    await asyncio.sleep(60)
    return ()


async def _odd(_alert: Alert) -> Any:
    return [(START, 1), ("not a time", 2)]


@pytest.mark.parametrize("history", [_fails, _hangs, _odd])
async def test_no_chart_delays_no_mail(server: Server, history: History_) -> None:
    """A database that is away, slow or odd costs the chart and not the mail."""
    desk = Desk(server)
    desk.open(history=history, history_timeout_seconds=0.05)
    await desk.delivery.deliver(make_alert())
    assert server.taken[0][1].get_content_type() == "multipart/alternative"
    await desk.delivery.stop()


async def test_forgetting(server: Server, desk: Desk) -> None:
    """What went out a week ago is forgotten, what went out today is not."""
    await desk.delivery.deliver(make_alert(1))
    desk.time += 6 * 86400
    await desk.delivery.deliver(make_alert(2))
    desk.time += 2 * 86400
    assert desk.delivery.forget() == 1
    assert len(desk.sent) == 1
    assert len(server.taken) == 2
