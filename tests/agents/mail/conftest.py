"""A real SMTP server whose answers a test chooses, and alerts to send to it."""

from __future__ import annotations

import asyncio
import email
import email.policy
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session

from devices.alarms.model import Alert

START = datetime(2026, 6, 16, 14, 5, 9, tzinfo=UTC)


def make_alert(number: int = 0, recipients: str = "ann@example.org", **fields: Any) -> Alert:
    """An alert as the engine makes it; another number is another alarm."""
    identity = f"{number:032x}"
    kind = fields.pop("transition", "opened")
    about = {
        "transition": kind,
        "transition_id": f"{identity}-{kind}",
        "notify": True,
        "index": "temperature",
        "unit": "°C",
        **fields.pop("metadata", {}),
    }
    known: dict[str, Any] = {
        "id": identity,
        "alarm_id": "machine-hot",
        "name": "Machine runs hot",
        "message": "Press 4 is at 95.25 °C",
        "level": "CRITICAL",
        "alarm_type": "Measure",
        "device_id": "press-4",
        "sensor_name": "Press 4",
        "field_name": "oil",
        "error_value": 95.25,
        "threshold": 90,
        "math_operator": ">",
        "start_date": START,
        "end_date": None,
        "is_resolved": False,
        "recipients": recipients,
        "request_id": "r-1",
        "timestamp": START,
        "metadata": about,
    }
    return Alert(**{**known, **fields})


@dataclass
class Server:
    """An SMTP server. The answers are functions or texts that a test sets; None accepts.

    ``drop_after_data``: so many times the mail is taken and the connection ends without a reply.
    """

    greeting: str | None = None
    mail: str | None = None
    rcpt: dict[str, str] = field(default_factory=dict)
    data: str | None = None
    drop_after_data: int = 0
    delay_seconds: float = 0
    users: dict[str, str] = field(default_factory=dict)
    tls: ssl.SSLContext | None = None
    tls_at_once: bool = False
    taken: list[tuple[list[str], EmailMessage]] = field(default_factory=list)
    sessions: int = 0
    senders: list[str] = field(default_factory=list)
    port: int = 0
    _server: asyncio.Server | None = None
    _transports: set[asyncio.BaseTransport] = field(default_factory=set)

    async def handle_MAIL(  # noqa: N802 - aiosmtpd's names, here and below
        self, _server: SMTP, _session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        if self.mail:
            return self.mail
        envelope.mail_from = address
        envelope.mail_options.extend(options)
        self.senders.append(address)
        return "250 OK"

    async def handle_RCPT(  # noqa: N802
        self, _server: SMTP, _session: Session, envelope: Envelope, address: str, _options: list[str]
    ) -> str:
        if address in self.rcpt:
            return self.rcpt[address]
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: SMTP, _session: Session, envelope: Envelope) -> str:  # noqa: N802
        await asyncio.sleep(self.delay_seconds)
        if self.data:
            return self.data
        message = email.message_from_bytes(envelope.original_content or b"", policy=email.policy.default)
        self.taken.append((list(envelope.rcpt_tos), message))
        if self.drop_after_data:
            self.drop_after_data -= 1
            assert server.transport is not None
            server.transport.abort()
        return "250 taken"

    def _authenticate(
        self, _server: SMTP, _session: Session, _envelope: Envelope, _mechanism: str, data: Any
    ) -> AuthResult:
        assert isinstance(data, LoginPassword)
        known = self.users.get(data.login.decode()) == data.password.decode()
        return AuthResult(success=known, handled=False)

    def _protocol(self) -> SMTP:
        self.sessions += 1
        made = SMTP(
            self,
            hostname="test",
            enable_SMTPUTF8=True,
            tls_context=None if self.tls_at_once else self.tls,
            authenticator=self._authenticate if self.users else None,
            auth_require_tls=False,
            auth_required=bool(self.users),
            ident="headrace-test",
            loop=asyncio.get_running_loop(),
        )
        made_connection = made.connection_made

        def connection_made(transport: asyncio.BaseTransport) -> None:
            self._transports.add(transport)
            if self.greeting:
                assert isinstance(transport, asyncio.Transport)
                transport.write(f"{self.greeting}\r\n".encode())
                transport.close()
                return
            made_connection(transport)

        made.connection_made = connection_made  # type: ignore[method-assign]
        return made

    async def start(self) -> None:
        """Listen, on the port of last time where there was one."""
        loop = asyncio.get_running_loop()
        tls = self.tls if self.tls_at_once else None
        self._server = await loop.create_server(self._protocol, "127.0.0.1", self.port, ssl=tls)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop listening and end every connection, as a crash does."""
        if self._server is not None:
            self._server.close()
            self.end_connections()
            await self._server.wait_closed()
            self._server = None

    def end_connections(self) -> None:
        """End every connection without a word."""
        for transport in self._transports:
            if isinstance(transport, asyncio.Transport):
                transport.abort()
        self._transports.clear()

    @property
    def url(self) -> str:
        return f"smtp://127.0.0.1:{self.port}"

    @property
    def subjects(self) -> list[str]:
        return [str(message["Subject"]) for _, message in self.taken]


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    """A server that accepts everything until a test says otherwise."""
    made = Server()
    await made.start()
    yield made
    await made.stop()


@dataclass(frozen=True)
class Certificate:
    """A server's certificate for 127.0.0.1 and localhost; its own authority."""

    cert: Path
    key: Path

    def server(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.cert, self.key)
        return context

    def client(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.cert))


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Certificate]:
    """Make a certificate that is good for so many days from now; a negative number: expired."""
    folder = tmp_path_factory.mktemp("certificates")

    def make(days: int) -> Certificate:
        made = Certificate(folder / f"{days}.pem", folder / f"{days}.key")
        if not made.cert.exists():
            _write_certificate(made, days)
        return made

    return make


def _write_certificate(made: Certificate, days: int) -> None:
    from datetime import timedelta
    from ipaddress import ip_address

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    today = datetime.now(UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(today - timedelta(days=30))
        .not_valid_after(today + timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    made.cert.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    made.key.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
