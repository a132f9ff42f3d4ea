"""agents.mail.send against a real SMTP server that misbehaves."""

from __future__ import annotations

import asyncio
import smtplib
import ssl
from collections.abc import AsyncIterator, Callable, Sequence

import aiosmtplib
import pytest

from agents.mail.render import Renderer
from agents.mail.send import Fate, SmtpAddress, SmtpSender
from tests.agents.mail.conftest import START, Certificate, Server, make_alert

MAIL = Renderer("Headrace <alerts@example.org>", "http://x").alert(make_alert(), START)
THREE = ["ann@example.org", "bob@example.org", "eve@example.org"]


@pytest.fixture
async def sender(server: Server) -> AsyncIterator[SmtpSender]:
    made = SmtpSender(server.url, "alerts@example.org", timeout_seconds=30)
    yield made
    await made.stop()


def fates(outcomes: dict[str, object]) -> dict[str, Fate]:
    return {one: outcome[0] for one, outcome in outcomes.items()}  # type: ignore[index]


async def test_one_mail_to_three_over_a_kept_connection(server: Server, sender: SmtpSender) -> None:
    """Three recipients are one transaction, the next mail goes over the same connection."""
    for _ in range(3):
        outcomes = await sender.send(MAIL.bytes_to, THREE)
        assert set(fates(outcomes).values()) == {Fate.SENT}
    assert server.sessions == sender.connections == 1
    recipients, message = server.taken[0]
    assert recipients == THREE
    assert message["To"] == ", ".join(THREE)
    assert message["Message-ID"] == MAIL.message_id
    assert server.senders[0] == "alerts@example.org"


async def test_550_for_one_of_three(server: Server, sender: SmtpSender) -> None:
    """The one is refused with the server's words, the two others have the mail, and it is addressed to them alone."""
    server.rcpt["bob@example.org"] = "550 5.1.1 no such user"
    outcomes = await sender.send(MAIL.bytes_to, THREE)
    assert fates(outcomes) == {THREE[0]: Fate.SENT, THREE[1]: Fate.REFUSED, THREE[2]: Fate.SENT}
    assert outcomes[THREE[1]][1:] == (550, "5.1.1 no such user")
    assert server.taken[0][0] == [THREE[0], THREE[2]]
    assert server.taken[0][1]["To"] == f"{THREE[0]}, {THREE[2]}"


async def test_450_for_one_of_three(server: Server, sender: SmtpSender) -> None:
    """The one is put off, the others have it; asked again for the one alone, it has it too."""
    server.rcpt["bob@example.org"] = "450 4.2.0 greylisted"
    assert fates(await sender.send(MAIL.bytes_to, THREE))["bob@example.org"] is Fate.LATER
    del server.rcpt["bob@example.org"]
    assert fates(await sender.send(MAIL.bytes_to, ["bob@example.org"])) == {"bob@example.org": Fate.SENT}
    assert [recipients for recipients, _ in server.taken] == [[THREE[0], THREE[2]], ["bob@example.org"]]
    assert server.sessions == 1


async def test_nobody_accepted(server: Server, sender: SmtpSender) -> None:
    """Where every recipient is refused no data is sent, and the connection is good for the next mail."""
    server.rcpt = dict.fromkeys(THREE, "550 no")
    assert set(fates(await sender.send(MAIL.bytes_to, THREE)).values()) == {Fate.REFUSED}
    server.rcpt = {}
    assert set(fates(await sender.send(MAIL.bytes_to, THREE)).values()) == {Fate.SENT}
    assert (server.sessions, len(server.taken)) == (1, 1)


@pytest.mark.parametrize(("answer", "fate"), [("451 4.3.0 try later", Fate.LATER), ("554 5.7.1 spam", Fate.REFUSED)])
async def test_the_answer_to_the_data_is_everybodys(
    server: Server, sender: SmtpSender, answer: str, fate: Fate
) -> None:
    """What the server says after DATA holds for all whom it had accepted, and not for those it had not."""
    server.data = answer
    server.rcpt["bob@example.org"] = "550 no"
    outcomes = fates(await sender.send(MAIL.bytes_to, THREE))
    assert outcomes == {THREE[0]: fate, THREE[1]: Fate.REFUSED, THREE[2]: fate}


@pytest.mark.parametrize("where", ["mail", "rcpt", "data"])
async def test_421_is_about_the_server(server: Server, sender: SmtpSender, where: str) -> None:
    """421 anywhere raises, and the next mail gets a new connection."""
    closing = "421 4.3.2 shutting down"
    if where == "mail":
        server.mail = closing
    elif where == "rcpt":
        server.rcpt["bob@example.org"] = closing
    else:
        server.data = closing
    with pytest.raises(aiosmtplib.SMTPResponseException, match="shutting down"):
        await sender.send(MAIL.bytes_to, THREE)
    server.mail = server.data = None
    server.rcpt = {}
    await sender.send(MAIL.bytes_to, THREE)
    assert len(server.taken) == 1
    assert server.sessions >= 2


async def test_a_sender_that_is_not_taken_is_nobodys_refusal(server: Server, sender: SmtpSender) -> None:
    """5xx to MAIL is for an administrator: it raises, so that no mail is given up for it."""
    server.mail = "550 5.7.1 sender not allowed"
    with pytest.raises(aiosmtplib.SMTPSenderRefused):
        await sender.send(MAIL.bytes_to, THREE)


@pytest.mark.parametrize("greeting", ["421 too busy", "554 go away"])
async def test_a_greeting_that_is_none(server: Server, sender: SmtpSender, greeting: str) -> None:
    """A server that will not talk raises."""
    server.greeting = greeting
    with pytest.raises((aiosmtplib.SMTPException, OSError)):
        await sender.send(MAIL.bytes_to, THREE)


async def test_down_and_up_again(server: Server, sender: SmtpSender) -> None:
    """Away raises, back again sends; a kept connection that ended meanwhile is replaced without a word."""
    await sender.send(MAIL.bytes_to, THREE)
    await server.stop()
    with pytest.raises((aiosmtplib.SMTPException, OSError)):
        await sender.send(MAIL.bytes_to, THREE)
    await server.start()
    await sender.send(MAIL.bytes_to, THREE)
    server.end_connections()
    await sender.send(MAIL.bytes_to, THREE)
    assert len(server.taken) == 3


async def test_a_drop_after_data_raises_and_can_be_told_by_its_message_id(server: Server, sender: SmtpSender) -> None:
    """The server had the mail and its reply was lost: that raises, and the second copy has the same Message-ID."""
    server.drop_after_data = 1
    with pytest.raises((aiosmtplib.SMTPException, OSError)):
        await sender.send(MAIL.bytes_to, THREE)
    await sender.send(MAIL.bytes_to, THREE)
    assert len({message["Message-ID"] for _, message in server.taken}) == 1
    assert len(server.taken) == 2


async def test_slow(server: Server) -> None:
    """A server that does not answer in time raises, and the dialogue is not taken up where it hung."""
    sender = SmtpSender(server.url, "alerts@example.org", timeout_seconds=0.2)
    server.delay_seconds = 60
    with pytest.raises(TimeoutError):
        await sender.send(MAIL.bytes_to, THREE)
    server.delay_seconds = 0
    await sender.send(MAIL.bytes_to, THREE)
    assert (server.sessions, len(server.taken)) == (2, 1)
    await sender.stop()


async def test_cancelled_in_the_middle(server: Server, sender: SmtpSender) -> None:
    """A mail that is cancelled leaves no half dialogue to the next one."""
    server.delay_seconds = 60
    task = asyncio.create_task(sender.send(MAIL.bytes_to, THREE))
    while not server.senders:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    server.delay_seconds = 0
    await sender.send(MAIL.bytes_to, THREE)
    assert len(server.taken) == 1


async def test_many_at_once_take_turns(server: Server, sender: SmtpSender) -> None:
    """Mails that are sent at the same time go one after the other over one connection."""
    await asyncio.gather(*(sender.send(MAIL.bytes_to, THREE) for _ in range(20)))
    assert (server.sessions, len(server.taken)) == (1, 20)


Make = Callable[..., Certificate]


@pytest.mark.parametrize("scheme", ["smtps", "smtp+starttls"])
async def test_encrypted_and_logged_in(server: Server, certificates: Make, scheme: str) -> None:
    """TLS from the start and STARTTLS, with user and password as the URL has them."""
    await server.stop()
    good = certificates(30)
    server.tls, server.tls_at_once, server.users = good.server(), scheme == "smtps", {"me@x": "p@ss:/word"}
    server.port = 0
    await server.start()
    url = f"{scheme}://me%40x:p%40ss%3A%2Fword@127.0.0.1:{server.port}"
    sender = SmtpSender(url, "alerts@example.org", tls=good.client())
    await sender.send(MAIL.bytes_to, THREE)
    assert len(server.taken) == 1
    await sender.stop()
    wrong = SmtpSender(url.replace("word", "wort"), "alerts@example.org", tls=good.client())
    with pytest.raises(aiosmtplib.SMTPAuthenticationError):
        await wrong.send(MAIL.bytes_to, THREE)
    await wrong.stop()


@pytest.mark.parametrize("scheme", ["smtps", "smtp+starttls"])
async def test_an_expired_certificate(server: Server, certificates: Make, scheme: str) -> None:
    """No mail goes to a server whose certificate has expired; the reason is in the error."""
    await server.stop()
    expired = certificates(-1)
    server.tls, server.tls_at_once = expired.server(), scheme == "smtps"
    await server.start()
    sender = SmtpSender(f"{scheme}://127.0.0.1:{server.port}", "alerts@example.org", tls=expired.client())
    with pytest.raises((aiosmtplib.SMTPException, ssl.SSLError), match="expired"):
        await sender.send(MAIL.bytes_to, THREE)
    assert server.taken == []
    await sender.stop()


async def test_starttls_is_required_and_not_tried(server: Server) -> None:
    """A server that offers no STARTTLS gets no mail from who wants it."""
    sender = SmtpSender(f"smtp+starttls://127.0.0.1:{server.port}", "alerts@example.org")
    with pytest.raises(aiosmtplib.SMTPException, match="STARTTLS"):
        await sender.send(MAIL.bytes_to, THREE)
    await sender.stop()


async def test_international_addresses(server: Server, sender: SmtpSender) -> None:
    """A domain goes out in ASCII, a local part by SMTPUTF8; what is no address is refused and keeps no other."""
    outcomes = fates(
        await sender.send(MAIL.bytes_to, ["jürgen@bücher.example", "a@b\r\nRCPT TO:<x@y>", "ann@bücher.example"])
    )
    assert outcomes == {
        "jürgen@bücher.example": Fate.SENT,
        "a@b\r\nRCPT TO:<x@y>": Fate.REFUSED,
        "ann@bücher.example": Fate.SENT,
    }
    assert server.taken[0][0] == ["jürgen@xn--bcher-kva.example", "ann@xn--bcher-kva.example"]


async def test_other_programs_talk_to_the_test_server(server: Server) -> None:
    """The server is one: Python's own client sends through it."""

    def talk() -> None:
        with smtplib.SMTP("127.0.0.1", server.port) as client:
            client.sendmail("a@b", ["c@d"], MAIL.bytes_to(["c@d"]))

    await asyncio.to_thread(talk)
    assert server.taken[0][0] == ["c@d"]


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("smtp://host", ("smtp", "host", 25, None, None)),
        ("smtp+starttls://u:p@host", ("smtp+starttls", "host", 587, "u", "p")),
        ("smtps://u%40x:%3A@[::1]:1", ("smtps", "::1", 1, "u@x", ":")),
    ],
)
def test_addresses(url: str, wanted: Sequence[object]) -> None:
    """Scheme, host, port, user and password of a URL."""
    found = SmtpAddress.parse(url)
    assert (found.scheme, found.host, found.port, found.username, found.password) == wanted


@pytest.mark.parametrize("url", ["http://host", "smtp://", "host:25", "smtp://u:secret@"])
def test_addresses_that_are_none(url: str) -> None:
    """Anything else is refused, without its password in the message."""
    with pytest.raises(ValueError, match="SMTP_URL") as caught:
        SmtpAddress.parse(url)
    assert "secret" not in str(caught.value)
