"""The embedded MQTT broker: mosquitto where there is one, else amqtt; and the SMTP server with its inbox page."""

import os
import smtplib
import socket
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from tools.stack import machine
from tools.stack.part import NotReadyError, Part

# max_queued_messages 0, max_inflight_messages 0: no limit. A connector that is away loses nothing of its session, and
# acknowledgements that wait for Kafka do not bound its rate (mosquitto's own 1000 and 20 would).
# max_packet_size: far above MAX_MESSAGE_BYTES, so that an oversized message reaches the connector, which reports it.
# autosave_interval: what a SIGKILL of the broker can lose, in seconds; an orderly end loses nothing.
_MOSQUITTO = """\
{user}listener {port} 127.0.0.1
allow_anonymous true
persistence true
persistence_location {data}/
autosave_interval 5
max_queued_messages 0
max_queued_bytes 0
max_inflight_messages 0
max_inflight_bytes 0
max_packet_size 67108864
set_tcp_nodelay true
log_dest stderr
log_timestamp_format %Y-%m-%dT%H:%M:%S
log_type error
log_type warning
log_type notice
connection_messages true
"""

_AMQTT = """\
listeners:
  default:
    type: tcp
    bind: 127.0.0.1:{port}
plugins:
  amqtt.plugins.authentication.AnonymousAuthPlugin:
    allow_anonymous: true
"""

# CONNECT of MQTT 3.1.1, clean session, keep-alive 60 s, an empty client id.
_CONNECT = b"\x10\x0c\x00\x04MQTT\x04\x02\x00\x3c\x00\x00"
_CONNACK_ACCEPTED = b"\x20\x02\x00\x00"
_DISCONNECT = b"\xe0\x00"


class Mqtt(Part):
    """An MQTT broker that keeps everything for an absent connector."""

    name: ClassVar[str] = "mqtt"
    title: ClassVar[str] = "MQTT broker"
    port_names: ClassVar[Sequence[str]] = ("port",)
    variable: ClassVar[str] = "MQTT_URL"

    @property
    def warning(self) -> str | None:
        """What a user must know of the broker that was found; None for mosquitto."""
        if machine.find_mosquitto():
            return None
        return (
            "mosquitto is not installed; amqtt stands in for it: MQTT 3.1.1 only, far slower, and it forgets "
            "sessions and queued messages when it ends. Install mosquitto (Debian: apt-get install mosquitto)."
        )

    def prepare(self) -> None:
        """Write the broker's configuration."""
        # As root mosquitto would become the user `mosquitto`, who may not be allowed into the data folder.
        user = "user root\n" if os.geteuid() == 0 else ""
        template = _MOSQUITTO if machine.find_mosquitto() else _AMQTT
        self._config.write_text(template.format(user=user, port=self.port(), data=self.data))

    def command(self) -> Sequence[str | Path]:
        """Return the broker's command."""
        if program := machine.find_mosquitto():
            return [program, "-c", self._config]
        return [sys.executable, "-m", "amqtt.scripts.broker_script", "-c", self._config]

    def probe(self) -> None:
        """CONNECT, and expect CONNACK with return code 0."""
        with socket.create_connection(("127.0.0.1", self.port()), timeout=5) as connection:
            connection.sendall(_CONNECT)
            answer = connection.recv(4)
            if answer != _CONNACK_ACCEPTED:
                raise NotReadyError(f"CONNECT was answered with {answer.hex() or 'nothing'}")
            connection.sendall(_DISCONNECT)

    def env(self) -> dict[str, str]:
        """MQTT_URL."""
        return {"MQTT_URL": f"mqtt://{self.address()}"}

    @property
    def _config(self) -> Path:
        return self.data / "broker.conf"


class Smtp(Part):
    """An SMTP server that delivers nothing: it keeps each mail on disk and shows it on a page."""

    name: ClassVar[str] = "smtp"
    title: ClassVar[str] = "SMTP inbox"
    port_names: ClassVar[Sequence[str]] = ("port", "page")
    variable: ClassVar[str] = "SMTP_URL"

    def prepare(self) -> None:
        """Nothing to lay out."""

    def command(self) -> Sequence[str | Path]:
        """Return the command of tools/inbox.py."""
        ports = ["--smtp-port", str(self.port()), "--page-port", str(self.port("page"))]
        return [sys.executable, "-m", "tools.inbox", *ports, "--folder", self.data]

    def probe(self) -> None:
        """EHLO, and the page's list of mails."""
        with smtplib.SMTP("127.0.0.1", self.port(), timeout=5) as client:
            code, said = client.ehlo()
        if code != 250:
            raise NotReadyError(f"EHLO was answered with {code} {said!r}")
        with urllib.request.urlopen(f"http://{self.address('page')}/messages.json", timeout=5) as answer:
            answer.read()

    def env(self) -> dict[str, str]:
        """SMTP_URL, and INBOX_URL of the page."""
        return {"SMTP_URL": f"smtp://{self.address()}", "INBOX_URL": f"http://{self.address('page')}"}
