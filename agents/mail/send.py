"""Mails to a server by SMTP, with an outcome for each recipient.

Guarantees: one recipient that the server refuses for good (5xx after RCPT) keeps no other from its mail; one that it
puts off (4xx) is told apart from one that has it. What concerns the server and not a recipient raises, and nothing is
lost: it is away, closes, greets or logs in with an error, does not take the sender (an administrator must act; the
mails are good). The only way to a second copy is a connection that ends between the end of DATA and its reply.

The connection is kept for the next mail and renewed when the server has closed it. One mail at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Self
from urllib.parse import unquote, urlsplit

import aiosmtplib
from aiosmtplib import SMTP

from agents.mail.render import wire_address

_PORTS: Final = {"smtp": 25, "smtp+starttls": 587, "smtps": 465}
# RFC 5321 lets a server close after five minutes of silence; well before, it is asked for less.
IDLE_SECONDS: Final = 60.0


class Fate(enum.Enum):
    """What became of a mail for one recipient."""

    SENT = "sent"
    REFUSED = "refused"
    LATER = "later"


class Outcome(NamedTuple):
    """``code`` and ``reply`` are the server's."""

    fate: Fate
    code: int = 0
    reply: str = ""


@dataclass(frozen=True)
class SmtpAddress:
    """Where and how: ``smtp`` plain, ``smtp+starttls`` (required, not tried), ``smtps``."""

    scheme: str
    host: str
    port: int
    username: str | None = None
    password: str | None = None

    @classmethod
    def parse(cls, url: str) -> Self:
        """Parse an SMTP_URL. Raises ``ValueError``, which does not hold the password."""
        parts = urlsplit(url)
        if parts.scheme not in _PORTS or not parts.hostname:
            raise ValueError(f"SMTP_URL is not smtp://, smtp+starttls:// or smtps:// with a host ({parts.hostname!r})")
        return cls(
            parts.scheme,
            parts.hostname,
            parts.port or _PORTS[parts.scheme],
            unquote(parts.username) if parts.username else None,
            unquote(parts.password) if parts.password else None,
        )


class SmtpSender:
    """See the module's docstring. ``sender`` is the envelope's; ``clock`` is monotonic, in seconds.

    ``tls`` None: the system's authorities, names checked.
    """

    def __init__(
        self,
        url: str,
        sender: str,
        *,
        timeout_seconds: float = 30.0,
        tls: ssl.SSLContext | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.address = SmtpAddress.parse(url)
        self.sender = wire_address(sender)
        self._timeout = timeout_seconds
        self._tls = tls
        self._clock = clock
        self._client: SMTP | None = None
        self._used = 0.0
        self._kept = False
        self._turn = asyncio.Lock()
        self.connections = 0

    async def stop(self) -> None:
        """Say goodbye, where there is somebody to say it to."""
        async with self._turn:
            await self._close()

    async def probe(self) -> None:
        """Connect, log in, ask for nothing. Raises what sending would."""
        async with self._turn:
            try:
                client = await self._ready()
                await client.noop(timeout=self._timeout)
            except BaseException:
                self._drop()
                raise
            self._used = self._clock()

    async def send(self, message: Callable[[Sequence[str]], bytes], recipients: Sequence[str]) -> dict[str, Outcome]:
        """Send one mail in one transaction; returns the outcome of each recipient.

        ``message`` makes the bytes, given those that the server has accepted. Raises ``aiosmtplib.SMTPException``,
        ``OSError`` (``ssl.SSLError`` included) or ``TimeoutError`` where the server as a whole cannot take it: try all
        again.
        """
        outcomes: dict[str, Outcome] = {}
        addresses: dict[str, str] = {}
        for recipient in dict.fromkeys(recipients):
            try:
                addresses[recipient] = wire_address(recipient)
            except ValueError as exc:
                outcomes[recipient] = Outcome(Fate.REFUSED, 553, str(exc))
        if not addresses:
            return outcomes
        async with self._turn:
            try:
                outcomes |= await self._transaction(message, addresses)
            except BaseException:
                # A cancelled or broken dialogue cannot be taken up again.
                self._drop()
                raise
            self._used = self._clock()
        return outcomes

    async def _transaction(
        self, message: Callable[[Sequence[str]], bytes], addresses: dict[str, str]
    ) -> dict[str, Outcome]:
        international = not all(address.isascii() for address in addresses.values())
        try:
            client, utf8 = await self._begin(international)
        except (aiosmtplib.SMTPException, ConnectionError) as exc:
            ended = isinstance(exc, aiosmtplib.SMTPServerDisconnected | ConnectionError)
            if not self._kept or not (ended or getattr(exc, "code", 0) == 421):
                raise
            # The kept connection had ended unnoticed; nothing was sent on it, so a new one may be tried at once.
            self._drop()
            client, utf8 = await self._begin(international)
        outcomes: dict[str, Outcome] = {}
        accepted: list[str] = []
        for recipient, address in addresses.items():
            if not address.isascii() and not utf8:
                outcomes[recipient] = Outcome(Fate.REFUSED, 553, "the server does not take international addresses")
                continue
            try:
                await client.rcpt(address, encoding="utf-8" if utf8 else "ascii", timeout=self._timeout)
                accepted.append(recipient)
            except aiosmtplib.SMTPResponseException as exc:
                if exc.code == 421:
                    raise
                outcomes[recipient] = _outcome(exc)
        if not accepted:
            await client.rset(timeout=self._timeout)
            return outcomes
        try:
            await client.data(message(accepted), timeout=self._timeout)
        except aiosmtplib.SMTPResponseException as exc:
            if exc.code == 421:
                raise
            return outcomes | dict.fromkeys(accepted, _outcome(exc))
        return outcomes | dict.fromkeys(accepted, Outcome(Fate.SENT, 250))

    async def _begin(self, international: bool) -> tuple[SMTP, bool]:
        client = await self._ready()
        if international:
            # What the server can do is known only once it was greeted.
            await client.ehlo(timeout=self._timeout)
        utf8 = international and client.supports_extension("smtputf8")
        options = ["SMTPUTF8", "BODY=8BITMIME"] if utf8 else []
        await client.mail(self.sender, options=options, encoding="utf-8" if utf8 else "ascii", timeout=self._timeout)
        return client, utf8

    async def _ready(self) -> SMTP:
        """Return a connection that has greeted and logged in, the kept one where it is fresh."""
        client = self._client
        if client is not None and client.is_connected and self._clock() - self._used < IDLE_SECONDS:
            self._kept = True
            return client
        await self._close()
        self._kept = False
        address = self.address
        client = SMTP(
            hostname=address.host,
            port=address.port,
            username=address.username,
            password=address.password,
            timeout=self._timeout,
            # Without a name aiosmtplib asks the resolver for ours, which can take its time-out.
            local_hostname=self.sender.rpartition("@")[2],
            use_tls=address.scheme == "smtps",
            # Never only if offered: who writes smtp:// means it, and who writes starttls wants no less.
            start_tls=address.scheme == "smtp+starttls",
            tls_context=self._tls if address.scheme != "smtp" else None,
        )
        try:
            await client.connect()
        except BaseException:
            client.close()
            raise
        self.connections += 1
        self._client = client
        self._used = self._clock()
        return client

    async def _close(self) -> None:
        client, self._client = self._client, None
        if client is None:
            return
        if client.is_connected:
            with contextlib.suppress(aiosmtplib.SMTPException, OSError, TimeoutError):
                await client.quit(timeout=min(self._timeout, 5.0))
        client.close()

    def _drop(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()


def _outcome(exc: aiosmtplib.SMTPResponseException) -> Outcome:
    fate = Fate.REFUSED if 500 <= exc.code < 600 else Fate.LATER
    return Outcome(fate, exc.code, exc.message)
