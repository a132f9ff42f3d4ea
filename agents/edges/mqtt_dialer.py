"""How to reach the broker: address, TLS, and which version of MQTT it speaks.

Guarantee: MQTT 5 is tried first. A broker that says that it does not speak it is asked in 3.1.1 from then on, and so is
one that leaves a CONNECT of MQTT 5 unanswered (amqtt reads it as 3.1.1 and waits for more) and answers one of 3.1.1.
One that hangs up is asked in 3.1.1 once, and in 5 again the next time, because a broker that is just starting or
stopping hangs up too. A broker that has once spoken MQTT 5 is spoken to in it until it says otherwise.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import aiomqtt

from agents.edges.mqtt_connection import Connection
from agents.edges.mqtt_errors import Unanswered, UnsupportedProtocol
from agents.edges.mqtt_paho import Arrivals
from agents.edges.mqtt_wire import parse_url

log = logging.getLogger(__name__)

_FIRST_TRY_SECONDS: Final = 4.0


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files for ``mqtts://``: the authority to trust (default: the system's), our certificate and its key."""

    cafile: str | Path | None = None
    certfile: str | Path | None = None
    keyfile: str | Path | None = None

    def context(self) -> ssl.SSLContext:
        """Load the files. Raises ValueError that names the one that is wrong."""
        try:
            context = ssl.create_default_context(cafile=self.cafile or None)
        except (OSError, ssl.SSLError) as exc:
            raise ValueError(f"MQTT TLS: cannot read the CA file {str(self.cafile)!r}: {exc}") from None
        if self.keyfile and not self.certfile:
            raise ValueError(f"MQTT TLS: key file {str(self.keyfile)!r} without a certificate file")
        if self.certfile:
            try:
                context.load_cert_chain(self.certfile, self.keyfile or None)
            except (OSError, ssl.SSLError) as exc:
                raise ValueError(
                    f"MQTT TLS: cannot read certificate {str(self.certfile)!r} with key {str(self.keyfile)!r}: {exc}"
                ) from None
        return context


class Dialer:
    """Open connections to one broker. Raises ValueError at once for an address or files that cannot be right."""

    def __init__(
        self,
        url: str,
        *,
        tls: TlsFiles | None = None,
        keepalive_seconds: int = 30,
        timeout_seconds: float = 10.0,
        max_message_bytes: int = 1 << 20,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.url = parse_url(url)
        self.mqtt5 = True
        self._proven = False
        self._tls_context = (tls or TlsFiles()).context() if self.url.tls else None
        self._keepalive_seconds = keepalive_seconds
        self._timeout_seconds = timeout_seconds
        self._max_message_bytes = max_message_bytes
        self._clock = clock

    async def open(
        self,
        client_id: str,
        *,
        on_arrivals: Arrivals,
        persistent: bool,
        session_expiry_seconds: int = 0,
        receive_maximum: int = 65535,
        will: aiomqtt.Will | None = None,
    ) -> Connection:
        """Return an open connection. Raises what :meth:`Connection.open` raises."""

        async def attempt(*, mqtt5: bool, timeout_seconds: float) -> Connection:
            connection = Connection(
                self.url,
                client_id=client_id,
                mqtt5=mqtt5,
                on_arrivals=on_arrivals,
                max_message_bytes=self._max_message_bytes,
                persistent=persistent,
                session_expiry_seconds=session_expiry_seconds,
                receive_maximum=receive_maximum,
                keepalive_seconds=self._keepalive_seconds,
                timeout_seconds=timeout_seconds,
                will=will,
                tls_context=self._tls_context,
                clock=self._clock,
            )
            await connection.open()
            return connection

        patience = self._timeout_seconds
        if self.mqtt5:
            try:
                opened = await attempt(
                    mqtt5=True, timeout_seconds=patience if self._proven else min(patience, _FIRST_TRY_SECONDS)
                )
            except UnsupportedProtocol:
                log.info("MQTT: broker %s does not speak MQTT 5, going on with 3.1.1", self.url)
                self.mqtt5 = False
            except Unanswered as exc:
                if self._proven:
                    raise
                opened = await attempt(mqtt5=False, timeout_seconds=patience)
                if exc.silent:
                    log.info("MQTT: broker %s answers MQTT 3.1.1 only, going on with it", self.url)
                    self.mqtt5 = False
                return opened
            else:
                self._proven = True
                return opened
        return await attempt(mqtt5=False, timeout_seconds=patience)
