"""The inbox page: a mail is shown as it came, and cannot harm who looks at it."""

from email.message import EmailMessage
from pathlib import Path

import pytest
from aiohttp.test_utils import TestClient, TestServer
from aiosmtpd.smtp import SMTP, Envelope, Session

from tools.inbox import Inbox, application

HTML = "<p>Température <b>31 °C</b></p><script>document.title='run'</script>"


async def deliver(inbox: Inbox, subject: str = "Alerte <1>", *, html: str | None = HTML) -> str:
    """Hand a mail to the inbox as the SMTP server does, and return its answer."""
    mail = EmailMessage()
    mail["Subject"] = subject
    mail["From"] = "alerts@localhost"
    mail["To"] = "operator@localhost"
    mail.set_content("Température 31 °C\n")
    if html is not None:
        mail.add_alternative(html, subtype="html")
    envelope = Envelope()
    envelope.mail_from = "alerts@localhost"
    envelope.rcpt_tos = ["operator@localhost", "second@localhost"]
    envelope.original_content = mail.as_bytes()
    return await inbox.handle_DATA(SMTP(inbox), Session(None), envelope)


@pytest.fixture
def inbox(tmp_path: Path) -> Inbox:
    """An empty inbox."""
    return Inbox(tmp_path / "mails")


async def test_list_for_programs_has_envelope_and_parts(inbox: Inbox) -> None:
    """`/messages.json` has the envelope's recipients, the decoded subject, text and HTML of each mail, oldest first."""
    assert await deliver(inbox) == "250 OK, kept as message 1"
    await deliver(inbox, "zweite", html=None)
    async with TestClient(TestServer(application(inbox))) as client:
        first, second = await (await client.get("/messages.json")).json()
    assert (first["subject"], first["to"]) == ("Alerte <1>", ["operator@localhost", "second@localhost"])
    assert (first["text"], first["html"].strip()) == ("Température 31 °C\n", HTML)
    assert (second["id"], second["html"]) == (2, None)


async def test_html_is_shown_as_it_is_but_runs_nothing(inbox: Inbox) -> None:
    """The HTML part is served unchanged under a policy that forbids scripts."""
    await deliver(inbox)
    async with TestClient(TestServer(application(inbox))) as client:
        answer = await client.get("/messages/1/html")
        assert (await answer.text()).strip() == HTML
        assert answer.headers["Content-Security-Policy"].startswith("sandbox; default-src 'none'")


async def test_pages_escape_what_a_sender_wrote(inbox: Inbox) -> None:
    """A subject with markup is text on the list and on the mail's page."""
    await deliver(inbox)
    async with TestClient(TestServer(application(inbox))) as client:
        for path in ("/", "/messages/1"):
            page = await (await client.get(path)).text()
            assert "Alerte &lt;1&gt;" in page
            assert "<script>" not in page


async def test_raw_is_byte_for_byte(inbox: Inbox) -> None:
    """`/raw` has the bytes as they came, and so has the folder."""
    await deliver(inbox)
    async with TestClient(TestServer(application(inbox))) as client:
        assert await (await client.get("/messages/1/raw")).read() == inbox.raw(1)
    assert inbox.raw(1).startswith(b"Subject: Alerte <1>\n")


async def test_what_is_not_there_is_404(inbox: Inbox) -> None:
    """An unknown mail, and the HTML of a mail without any, are not found."""
    await deliver(inbox, html=None)
    async with TestClient(TestServer(application(inbox))) as client:
        assert [(await client.get(path)).status for path in ("/messages/7", "/messages/1/html")] == [404, 404]


async def test_a_new_inbox_on_the_folder_has_the_mails(inbox: Inbox) -> None:
    """Mails and their numbers survive a restart; a draft of a mail that was never accepted is not one."""
    await deliver(inbox)
    (inbox.folder / "000002.eml").write_bytes(b"Subject: cut off\r\n\r\n")
    again = Inbox(inbox.folder)
    assert again.messages() == inbox.messages()
    assert await deliver(again) == "250 OK, kept as message 2"


async def test_forgetting_empties_list_and_folder(inbox: Inbox) -> None:
    """DELETE forgets all mails; later ones get new numbers."""
    await deliver(inbox)
    async with TestClient(TestServer(application(inbox))) as client:
        assert (await client.delete("/messages.json")).status == 204
        assert await (await client.get("/messages.json")).json() == []
    assert list(inbox.folder.iterdir()) == []
    assert await deliver(inbox) == "250 OK, kept as message 2"


async def test_a_mail_without_sense_is_kept(inbox: Inbox) -> None:
    """Bytes that are no mail, in a charset that nobody knows, are kept and shown."""
    envelope = Envelope()
    envelope.mail_from, envelope.rcpt_tos = "a@localhost", ["b@localhost"]
    envelope.original_content = b"Content-Type: text/plain; charset=unheard-of\r\n\r\n\xff\xfe"
    await inbox.handle_DATA(SMTP(inbox), Session(None), envelope)
    async with TestClient(TestServer(application(inbox))) as client:
        assert (await client.get("/messages/1")).status == 200
        assert (await client.get("/")).status == 200
