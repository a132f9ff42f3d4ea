"""An SMTP server that delivers nothing, and a page that shows what it got.

Guarantee: a mail is on disk (fsync, one rename) before its sender reads 250; all of them are there after a restart.

    GET    /                      the list, newest first
    GET    /messages.json         the list for programs, oldest first
    DELETE /messages.json         forget all mails
    GET    /messages/{id}         one mail: its headers, its HTML as it is in a sandboxed frame, its text
    GET    /messages/{id}/html    the HTML part as it is; scripts do not run
    GET    /messages/{id}/raw     the bytes as they came
"""

import argparse
import asyncio
import email
import email.policy
import html
import json
import os
import signal
from datetime import UTC, datetime
from email.message import EmailMessage
from pathlib import Path
from typing import Any

from aiohttp import web
from aiosmtpd.smtp import SMTP, Envelope, Session

_LARGEST_MAIL_BYTES = 32 * 1024 * 1024
_SANDBOX = {"Content-Security-Policy": "sandbox; default-src 'none'; img-src data: https:; style-src 'unsafe-inline'"}
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0 1rem;color:#1b1f24}"
    "table{border-collapse:collapse;width:100%}"
    "td,th{text-align:left;padding:.4rem .6rem;border-bottom:1px solid #d8dee4}"
    "iframe{width:100%;height:32rem;border:1px solid #d8dee4}pre{white-space:pre-wrap;background:#f6f8fa;padding:1rem}"
)


class Inbox:
    """The mails of one folder: `000001.eml` has the bytes, `000001.json` the envelope. Also aiosmtpd's handler."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._messages: dict[int, dict[str, Any]] = {}
        for envelope_file in sorted(folder.glob("*.json")):
            number = int(envelope_file.stem)
            self._messages[number] = self._describe(number, json.loads(envelope_file.read_text()), self.raw(number))
        self._last = max(self._messages, default=0)

    async def handle_DATA(self, _server: SMTP, _session: Session, envelope: Envelope) -> str:  # noqa: N802 - aiosmtpd's name
        """Keep one mail, then accept it."""
        raw = envelope.original_content or b""
        self._last += 1
        number = self._last
        about = {"received": datetime.now(UTC).isoformat(), "from": envelope.mail_from, "to": list(envelope.rcpt_tos)}
        # The envelope comes last: a mail without one was never accepted.
        _put(self.folder / f"{number:06}.eml", raw)
        _put(self.folder / f"{number:06}.json", json.dumps(about).encode())
        self._messages[number] = self._describe(number, about, raw)
        return f"250 OK, kept as message {number}"

    def messages(self) -> list[dict[str, Any]]:
        """Return all mails, oldest first."""
        return [self._messages[number] for number in sorted(self._messages)]

    def message(self, number: int) -> dict[str, Any] | None:
        """Return one mail."""
        return self._messages.get(number)

    def raw(self, number: int) -> bytes:
        """Return the bytes of one mail as they came."""
        return (self.folder / f"{number:06}.eml").read_bytes()

    def clear(self) -> None:
        """Forget all mails; numbers go on."""
        for number in list(self._messages):
            (self.folder / f"{number:06}.json").unlink(missing_ok=True)
            (self.folder / f"{number:06}.eml").unlink(missing_ok=True)
            del self._messages[number]

    @staticmethod
    def _describe(number: int, about: dict[str, Any], raw: bytes) -> dict[str, Any]:
        mail = email.message_from_bytes(raw, policy=email.policy.default)
        assert isinstance(mail, EmailMessage)
        return {
            "id": number,
            "received": about["received"],
            "from": about["from"],
            "to": about["to"],
            "subject": str(mail.get("Subject", "")),
            "headers": [[name, str(value)] for name, value in mail.items()],
            "text": _part(mail, "plain"),
            "html": _part(mail, "html"),
            "size_bytes": len(raw),
        }


def _part(mail: EmailMessage, kind: str) -> str | None:
    part = mail.get_body(preferencelist=(kind,))
    if part is None:
        return None
    try:
        return str(part.get_content())
    except (LookupError, ValueError):  # a charset that Python does not know
        payload = part.get_payload(decode=True)
        return payload.decode(errors="replace") if isinstance(payload, bytes) else None


def _put(path: Path, content: bytes) -> None:
    draft = path.with_suffix(".draft")
    with draft.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def application(inbox: Inbox) -> web.Application:
    """Return the page over an inbox."""

    def find(request: web.Request) -> dict[str, Any]:
        found = inbox.message(int(request.match_info["id"]))
        if found is None:
            raise web.HTTPNotFound(text=f"there is no message {request.match_info['id']} in this inbox")
        return found

    async def index(_request: web.Request) -> web.Response:
        return _page(_index(inbox.messages()), "Inbox", refresh=True)

    async def listing(_request: web.Request) -> web.Response:
        return web.json_response(inbox.messages(), dumps=lambda value: json.dumps(value, ensure_ascii=False))

    async def forget(_request: web.Request) -> web.Response:
        inbox.clear()
        return web.Response(status=204)

    async def one(request: web.Request) -> web.Response:
        mail = find(request)
        return _page(_message(mail), mail["subject"])

    async def as_html(request: web.Request) -> web.Response:
        content = find(request)["html"]
        if content is None:
            raise web.HTTPNotFound(text="this message has no HTML part")
        return web.Response(text=content, content_type="text/html", headers=_SANDBOX)

    async def raw(request: web.Request) -> web.Response:
        return web.Response(body=inbox.raw(find(request)["id"]), content_type="text/plain", headers=_SANDBOX)

    app = web.Application()
    app.router.add_get("/", index)
    app.router.add_get("/messages.json", listing)
    app.router.add_delete("/messages.json", forget)
    app.router.add_get(r"/messages/{id:\d+}", one)
    app.router.add_get(r"/messages/{id:\d+}/html", as_html)
    app.router.add_get(r"/messages/{id:\d+}/raw", raw)
    return app


def _index(messages: list[dict[str, Any]]) -> str:
    rows = "".join(
        f"<tr><td>{m['received'][:19].replace('T', ' ')}</td><td>{html.escape(', '.join(m['to']))}</td>"
        f'<td><a href="/messages/{m["id"]}">{html.escape(m["subject"] or "(no subject)")}</a></td></tr>'
        for m in reversed(messages)
    )
    count = len(messages)
    return (
        f"<h1>Inbox</h1><p>{count} message{'' if count == 1 else 's'}. Nothing that arrives here is delivered.</p>"
        f"<table><tr><th>Received (UTC)</th><th>To</th><th>Subject</th></tr>{rows}</table>"
    )


def _message(mail: dict[str, Any]) -> str:
    headers = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in mail["headers"])
    frame = f'<iframe sandbox title="HTML part" src="/messages/{mail["id"]}/html"></iframe>' if mail["html"] else ""
    text = f"<h2>Text</h2><pre>{html.escape(mail['text'])}</pre>" if mail["text"] else ""
    return (
        f'<p><a href="/">Inbox</a> · <a href="/messages/{mail["id"]}/raw">raw</a></p>'
        f"<h1>{html.escape(mail['subject'] or '(no subject)')}</h1>{frame}{text}"
        f"<h2>Headers</h2><table>{headers}</table>"
    )


def _page(body: str, title: str, *, refresh: bool = False) -> web.Response:
    again = '<meta http-equiv="refresh" content="5">' if refresh else ""
    head = f'<meta charset="utf-8">{again}<title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return web.Response(
        text=f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>', content_type="text/html"
    )


async def serve(inbox: Inbox, smtp_port: int, page_port: int) -> None:
    """Serve SMTP and the page on loopback until SIGTERM or SIGINT."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    runner = web.AppRunner(application(inbox), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", page_port).start()
    server = await loop.create_server(
        lambda: SMTP(inbox, enable_SMTPUTF8=True, data_size_limit=_LARGEST_MAIL_BYTES, hostname="localhost", loop=loop),
        "127.0.0.1",
        smtp_port,
    )
    await ended.wait()
    server.close()
    await runner.cleanup()


def main() -> None:
    """Run the inbox; see `--help`."""
    parser = argparse.ArgumentParser(prog="python -m tools.inbox", description=__doc__.splitlines()[0])
    parser.add_argument("--smtp-port", type=int, required=True)
    parser.add_argument("--page-port", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="where the mails are kept")
    options = parser.parse_args()
    asyncio.run(serve(Inbox(options.folder), options.smtp_port, options.page_port))


if __name__ == "__main__":
    main()
