"""Light controller driver: a schedule message is one reading.

Index ``TASK_{id}`` where the message is about one task: label ``operation``, and the fields of the task where it
carries them. Index ``SCHEDULE`` where it is about all: ``operation``, and ``task_count`` where it tells it. The time
is the device's epoch (that of arrival where it is 0: a clock that was never set). ``metadata["schedule"]`` is what
:func:`devices.light_controller.schedule.merge` adds to the schedule of the device, which is read as ``SCHEDULE_STATE``.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, ClassVar, Final

import msgspec

from devices import brokered, jsontext
from devices.driver import CommandTraits, Downlink, Driver, Feedback, JsonSchema
from devices.light_controller import schedule
from devices.model import AnotherDevice, Reading, Uplink, Value
from devices.profiles import Profile

_TASK_LABELS: Final = ("operation", *schedule.TASK_FIELDS)
_TASK_UNITS: Final = ("", "min", "min", "", "", "", "")
_TASK_ID: Final[JsonSchema] = {"type": "integer", "minimum": 0, "maximum": 15}
_FLAG: Final[JsonSchema] = {"enum": [0, 1, True, False]}
_NOTHING: Final[JsonSchema] = {"type": "object", "additionalProperties": False, "properties": {}}
_ONE_TASK: Final[JsonSchema] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["task_id"],
    "properties": {"task_id": _TASK_ID},
}
_OPERATIONS: Final[Mapping[str, schedule.Operation]] = {
    "light_read_all": "read_all",
    "light_read_single": "read_task",
    "light_config_task": "create",
    "light_delete_task": "delete",
    "light_delete_all": "delete_all",
}


class LightControllerDriver(Driver):
    """Reads schedule messages and writes their commands."""

    name = "light_controller"
    text = True
    exclusive = True
    commands: ClassVar[Mapping[str, JsonSchema]] = {
        "light_read_all": _NOTHING,
        "light_read_single": _ONE_TASK,
        "light_config_task": {
            "type": "object",
            "additionalProperties": False,
            "required": ["task_id", "time_beg", "duration", "day", "channel"],
            "properties": {
                "task_id": _TASK_ID,
                "time_beg": {"type": "integer", "minimum": 0, "maximum": 1439},
                "duration": {"type": "integer", "minimum": 0, "maximum": 1440},
                "day": {"type": "integer", "minimum": 0, "maximum": 7},
                "channel": {"type": "integer", "minimum": 0, "maximum": 1},
                "active": _FLAG,
                "run_once": _FLAG,
            },
        },
        "light_delete_task": _ONE_TASK,
        "light_delete_all": _NOTHING,
    }
    # Each writes or reads an absolute state; none may overtake another, so none supersedes.
    traits: ClassVar[Mapping[str, CommandTraits]] = {name: CommandTraits(repeatable=True) for name in _OPERATIONS}

    def decode(self, uplink: Uplink, profile: Profile) -> list[Reading]:
        """Return the one reading of the message."""
        message = schedule.parse(uplink.data)
        if str(message.device_id) != uplink.device_id:
            raise AnotherDevice(f"the message is of device {message.device_id}, its topic says {uplink.device_id!r}")
        sampled_at = jsontext.from_epoch(message.epoch) if message.epoch else uplink.received_at
        index = "SCHEDULE" if message.header & schedule.ALL else f"TASK_{message.task_id}"
        labels: tuple[str, ...] = ("operation",)
        values: list[Value] = [message.operation]
        units: tuple[str, ...] = ("",)
        task = message.task
        if task is not None:
            labels, units = _TASK_LABELS, _TASK_UNITS
            values += [task.time_beg, task.duration, task.day, task.channel, task.active, task.run_once]
        elif message.task_count is not None:
            labels, units = ("operation", "task_count"), ("", "")
            values.append(message.task_count)
        shape = profile.shape(index, labels, units=units)
        return [
            Reading(
                request_id=uplink.request_id,
                timestamp=sampled_at,
                device_id=uplink.device_id,
                index=index,
                values=values,
                labels=shape.labels,
                display_names=shape.display_names,
                metadata={**shape.metadata, "schedule": schedule.describe(message)},
            )
        ]

    def device_id(self, uplink: Uplink) -> str | None:
        """Return the id in the message; None for a feedback."""
        return None if uplink.route.endswith("/feedback") else str(schedule.parse(uplink.data).device_id)

    def state_of(self, uplink: Uplink) -> dict[str, Any]:
        """Return the broker that commands go to; empty for a feedback."""
        return {} if uplink.route.endswith("/feedback") else brokered.state_of(uplink.route)

    def change_of(self, uplink: Uplink) -> dict[str, Any]:
        """Return what the message says of the schedule; empty for a feedback."""
        return {} if uplink.route.endswith("/feedback") else schedule.describe(schedule.parse(uplink.data))

    def merge(self, state: Mapping[str, Any] | None, change: Mapping[str, Any]) -> dict[str, Any]:
        """Return the schedule after a message."""
        return schedule.merge(state, change)

    def summary(self, state: Mapping[str, Any]) -> tuple[str, dict[str, Value]]:
        """Return ``SCHEDULE_STATE``: the tasks that are known as JSON, their number, the device's own count of its
        tasks (None: not known since the last change), and whether the two agree."""
        tasks = {key: state["tasks"][key] for key in sorted(state["tasks"], key=int)}
        count = state["task_count"]
        return "SCHEDULE_STATE", {
            "tasks": msgspec.json.encode(tasks).decode(),
            "known": len(tasks),
            "task_count": count,
            "complete": count == len(tasks),
        }

    def encode(
        self,
        command_type: str,
        payload: Mapping[str, Any],
        *,
        request_id: str,
        device_id: str,
        state: Mapping[str, Any],
        now: datetime,
    ) -> Downlink:
        """Build the JSON of a command: header and alarm word as numbers; raises CommandError."""
        self.check(command_type, payload)
        header = schedule.HEADERS[_OPERATIONS[command_type]] | payload.get("task_id", 0)
        alarm = 0
        if command_type == "light_config_task":
            task = schedule.Task(
                task_id=payload["task_id"],
                time_beg=payload["time_beg"],
                duration=payload["duration"],
                day=payload["day"],
                channel=payload["channel"],
                active=bool(payload.get("active", True)),
                run_once=bool(payload.get("run_once", False)),
            )
            alarm = schedule.pack_alarm(task)
        message = {
            **brokered.command(request_id, device_id, state),
            "epoch": int(now.timestamp()),
            "sync_header": header,
            "sync_alarm": alarm,
        }
        return Downlink(route=state["command_topic"], data=msgspec.json.encode(message))

    def feedback(self, uplink: Uplink) -> Feedback | None:
        """Return what the broker says of a command."""
        return brokered.feedback(uplink)
