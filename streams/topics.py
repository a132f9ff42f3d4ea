"""Headrace's topics, declared once: name, message type, and how Kafka keeps them.

A declaration is what stages consume from and send to; ``name`` has the prefix of ``TOPIC_PREFIX`` already.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import settings as configuration
from streams import messages

Keeping = Literal["data", "events", "errors", "forever", "ticks"]


@dataclass(frozen=True, slots=True)
class Declaration:
    """One topic. ``type`` is the Struct of its values, None for bytes that are kept as they are."""

    base_name: str
    name: str
    type: type[Any] | None
    keeping: Keeping
    compacted: bool = False
    #: the topic (full name) whose number of partitions this one must have
    like: str | None = None

    @property
    def decode(self) -> Callable[[bytes], Any]:
        """Return the decoder of this topic's values."""
        if self.type is None:
            return bytes
        return messages.decoder(self.type).decode

    def retention_seconds(self, settings: configuration.Settings) -> float | None:
        """Return how long Kafka keeps a record, None for ever."""
        return {
            "data": settings.retention_data_seconds,
            "events": settings.retention_events_seconds,
            "errors": settings.retention_errors_seconds,
            "forever": None,
            "ticks": 3600.0,
        }[self.keeping]

    def config(self, settings: configuration.Settings) -> dict[str, str]:
        """Return the topic's configuration for Kafka."""
        config = {"max.message.bytes": str(settings.max_record_bytes)}
        if self.compacted:
            config["cleanup.policy"] = "compact"
        else:
            config["cleanup.policy"] = "delete"
            seconds = self.retention_seconds(settings)
            config["retention.ms"] = "-1" if seconds is None else str(int(seconds * 1000))
        return config


def _declare(name: str, type_: type[Any] | None, keeping: Keeping, *, compacted: bool = False) -> Declaration:
    return Declaration(name, configuration.load().topic(name), type_, keeping, compacted)


raw_data = _declare("iot_raw_data", messages.RawMessage, "data")
validated_data = _declare("iot_validated_data", messages.Reading, "data")
alarm_rules = _declare("iot_alarms", messages.AlarmRule, "forever", compacted=True)
devices = _declare("iot_devices", messages.Device, "forever", compacted=True)
alerts = _declare("iot_alerts", messages.Alert, "events")
commands = _declare("device_commands", messages.Command, "events")
command_status = _declare("iot_command_status", messages.CommandStatus, "events")
alert_actions = _declare("iot_alert_actions", messages.AlertAction, "events")
errors = _declare("iot_errors", None, "errors")

desk = Declaration(
    "dlq-desk", configuration.load().topic(f"{configuration.load().app_id}-dlq-desk"), None, "forever", compacted=True
)

ALL: list[Declaration] = [
    raw_data,
    validated_data,
    alarm_rules,
    devices,
    alerts,
    commands,
    command_status,
    alert_actions,
    errors,
    desk,
]


def internal(
    name: str, type_: type[Any] | None, keeping: Keeping, *, compacted: bool = False, like: Declaration | None = None
) -> Declaration:
    """Declare a topic that is nobody's business but Headrace's, ``{APP_ID}-{name}``; it is created with the others."""
    known = by_name(name)
    if known is not None:
        return known
    settings = configuration.load()
    full = settings.topic(f"{settings.app_id}-{name}")
    made = Declaration(name, full, type_, keeping, compacted, like.name if like else None)
    ALL.append(made)
    return made


def ticks(stage: str, type_: type[Any], like: Declaration) -> Declaration:
    """Declare the ticks of a stage: time as records of each partition, so that timers are under commit control too."""
    return internal(f"{stage}-ticks", type_, "ticks", like=like)


def by_name(name: str) -> Declaration | None:
    """Return the declaration of a topic, by its name with or without the prefix."""
    return next((topic for topic in ALL if name in (topic.name, topic.base_name)), None)


device_state = internal("device-state", messages.DeviceState, "forever", compacted=True, like=commands)
#: what single messages change of a state that they add up to, keyed by device
device_changes = internal("device-changes", messages.DeviceChange, "events", like=commands)
#: what goes out to devices at once, keyed by device
downlinks = internal("downlinks", messages.DownlinkMessage, "events", like=commands)
#: what waits for a device's next request, keyed by request id, a tombstone once it has waited enough
coap_pending = internal("coap-pending", messages.DownlinkMessage, "forever", compacted=True)
#: downlinks that must not go out twice, written before they do
downlinks_begun = internal("downlinks-begun", messages.DownlinkMessage, "events", like=commands)
#: what connectors say of downlinks, keyed by device
command_reports = internal("command-reports", messages.CommandReport, "events", like=commands)
#: what devices say of commands, keyed by request id: a feedback doesn't name its device
command_feedback = internal("command-feedback", messages.CommandReport, "events", like=commands)
