"""The messages on Headrace's topics, as JSON.

One Struct a topic, the field names of the contract. ``decode(type)`` and ``encode(value)`` are the only codecs:
they keep unknown fields out of the way, write times as RFC 3339 in UTC, and raise ``msgspec.ValidationError`` or
``msgspec.DecodeError`` (both poison) for bytes that are not such a message.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

import msgspec

from devices.alarms.model import AlarmRule, Alert, Level, Repeat
from devices.commands.model import Report as CommandReport
from devices.model import DecodeError, Reading, Uplink, Value
from streams.resilience.encoding import encode

__all__ = [
    "AlarmRule",
    "Alert",
    "AlertAction",
    "Command",
    "CommandReport",
    "CommandStatus",
    "Device",
    "DeviceChange",
    "DeviceState",
    "DownlinkMessage",
    "Level",
    "RawMessage",
    "Reading",
    "Repeat",
    "Value",
    "decoder",
    "encode",
    "uplink_of",
]

CommandState = Literal["QUEUED", "SENT", "DELIVERED", "SUCCESSFUL", "FAILED", "EXPIRED", "TIMEOUT"]
TERMINAL_STATES = frozenset({"SUCCESSFUL", "FAILED", "EXPIRED", "TIMEOUT"})


class RawMessage(msgspec.Struct, kw_only=True, gc=False):
    """A device's message as it arrived: ``payload`` holds valid UTF-8 as it came, ``payload_hex`` all else."""

    request_id: str
    timestamp: datetime
    device_id: str
    protocol: str
    payload: str | None = None
    payload_hex: str | None = None
    device_type: str | None = None
    action: str | None = None
    metadata: dict[str, Any] = msgspec.field(default_factory=dict)


class Device(msgspec.Struct, kw_only=True):
    """A registered device; ``config`` overrides its profile."""

    device_id: str
    profile: str | None = None
    name: str = ""
    tags: list[str] = msgspec.field(default_factory=list)
    active: bool = True
    config: dict[str, Any] = msgspec.field(default_factory=dict)


class AlertAction(msgspec.Struct, kw_only=True):
    """An operator's word on an alert: who acknowledged it, when and why."""

    alert_id: str
    device_id: str
    action: Literal["ack"]
    user: str
    comment: str = ""
    timestamp: datetime


class Command(msgspec.Struct, kw_only=True):
    """What an operator wants of a device."""

    request_id: str
    device_id: str
    command_type: str
    payload: dict[str, Any] = msgspec.field(default_factory=dict)
    protocol: str = "mqtt"
    metadata: dict[str, Any] = msgspec.field(default_factory=dict)
    priority: int | None = None
    expires_at: datetime | None = None


class CommandStatus(msgspec.Struct, kw_only=True):
    """One step in the life of a command."""

    request_id: str
    device_id: str
    state: CommandState
    detail: str = ""
    timestamp: datetime


class DeviceState(msgspec.Struct, kw_only=True):
    """What a device's last message told that its commands need; read by ``profile``."""

    device_id: str
    profile: str
    state: dict[str, Any]
    timestamp: datetime


class DeviceChange(msgspec.Struct, kw_only=True):
    """What one message of a device, read by ``profile``, changes of a state that its messages add up to."""

    request_id: str
    device_id: str
    profile: str
    change: dict[str, Any]
    timestamp: datetime


class DownlinkMessage(msgspec.Struct, kw_only=True):
    """What a connector is to hand to a device: attempt ``attempt`` at the command ``request_id``.

    ``route`` is the MQTT topic, empty over CoAP. Nothing is sent after ``expires_at``; what is not ``repeatable`` is
    sent at most once.
    """

    request_id: str
    device_id: str
    protocol: str
    attempt: int
    expires_at: datetime
    route: str = ""
    payload: str | None = None
    payload_hex: str | None = None
    qos: int = 1
    retain: bool = False
    repeatable: bool = False

    @property
    def data(self) -> bytes:
        """The bytes that go out."""
        return self.payload.encode() if self.payload is not None else bytes.fromhex(self.payload_hex or "")


decoder = msgspec.json.Decoder


def uplink_of(message: RawMessage) -> Uplink:
    """Return what a driver sees of ``message``; raises DecodeError where it holds no payload."""
    text = message.payload
    if text is not None:
        data = text.encode()
    elif message.payload_hex is not None:
        try:
            data = bytes.fromhex(message.payload_hex)
        except ValueError as exc:
            raise DecodeError(f"payload_hex is not hexadecimal: {exc}") from exc
    else:
        raise DecodeError("neither payload nor payload_hex is set")
    metadata = message.metadata
    return Uplink(
        request_id=message.request_id,
        received_at=message.timestamp,
        device_id=message.device_id,
        protocol=message.protocol,
        route=metadata.get("mqtt_topic") or metadata.get("uri_path") or "",
        text=text,
        data=data,
        metadata=metadata,
    )
