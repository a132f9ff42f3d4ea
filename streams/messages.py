"""The messages on Headrace's topics, as JSON.

One Struct a topic, the field names of the contract. ``decode(type)`` and ``encode(value)`` are the only codecs:
they keep unknown fields out of the way, write times as RFC 3339 in UTC, and raise ``msgspec.ValidationError`` or
``msgspec.DecodeError`` (both poison) for bytes that are not such a message.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

import msgspec

from devices.model import Reading, Value

__all__ = [
    "Alert",
    "AlertAction",
    "AlarmRule",
    "Command",
    "CommandStatus",
    "Device",
    "RawMessage",
    "Reading",
    "Repeat",
    "Value",
    "decoder",
    "encode",
]

Level = Literal["CRITICAL", "WARNING", "INFO"]
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


class Repeat(msgspec.Struct, kw_only=True):
    """Fire only when the condition was met ``count`` times within ``within_seconds``."""

    count: int
    within_seconds: float


class AlarmRule(msgspec.Struct, kw_only=True):
    """One rule; what it names is one of ``device_id``, ``profile`` or ``tag``."""

    id: str
    name: str = ""
    active: bool = True
    device_id: str | None = None
    profile: str | None = None
    tag: str | None = None
    index: str | None = None
    label: str | None = None
    alarm_type: Literal["Measure", "Status"] = "Measure"
    math_operator: str = ">"
    threshold: Any = None
    clear_threshold: Any = None
    duration_seconds: float | None = None
    repeat: Repeat | None = None
    no_data_seconds: float | None = None
    level: Level = "WARNING"
    message: str = ""
    recipients: list[str] = msgspec.field(default_factory=list)
    options: dict[str, Any] = msgspec.field(default_factory=dict)


class Device(msgspec.Struct, kw_only=True):
    """A registered device; ``config`` overrides its profile."""

    device_id: str
    profile: str | None = None
    name: str = ""
    tags: list[str] = msgspec.field(default_factory=list)
    active: bool = True
    config: dict[str, Any] = msgspec.field(default_factory=dict)


class Alert(msgspec.Struct, kw_only=True):
    """One transition in the life of an alarm; ``recipients`` is a comma list."""

    id: str
    alarm_id: str
    name: str
    message: str
    level: Level
    alarm_type: Literal["Measure", "Status"]
    device_id: str
    sensor_name: str
    field_name: str
    error_value: Any
    threshold: Any
    math_operator: str
    start_date: datetime
    end_date: datetime | None
    is_resolved: bool
    recipients: str
    request_id: str
    timestamp: datetime
    metadata: dict[str, Any] = msgspec.field(default_factory=dict)


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


_encoder = msgspec.json.Encoder(decimal_format="number")
encode = _encoder.encode
decoder = msgspec.json.Decoder
