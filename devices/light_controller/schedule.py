"""Schedule messages of a light controller, and the schedule that they add up to.

A message is ``<IIBI``: id, epoch, header, alarm. Header: bits 0–3 task id, 5 all, 6 clear, 7 set. Alarm: bits 0–10
begin minute, 11–21 duration in minutes, 22–24 day, 25–28 task id, 29 channel, 30 active, 31 run once. :func:`merge`
is pure and keeps no order of its own: messages come in the order of the topic, and the same stretch merged again ends
in the same state.
"""

from __future__ import annotations

import struct
from binascii import Error as HexError
from binascii import unhexlify
from collections.abc import Mapping
from typing import Any, Final, Literal

import msgspec

from devices.model import DecodeError

FRAME: Final = struct.Struct("<IIBI")
FRAME_DIGITS: Final = FRAME.size * 2
SET: Final = 1 << 7
CLEAR: Final = 1 << 6
ALL: Final = 1 << 5
TASK_MASK: Final = 0x0F

Operation = Literal["read_task", "read_all", "create", "delete", "delete_all"]
# (set, all, clear); the three combinations that are not here mean nothing.
OPERATIONS: Final[Mapping[int, Operation]] = {
    0: "read_task",
    ALL: "read_all",
    SET: "create",
    SET | CLEAR: "delete",
    SET | ALL | CLEAR: "delete_all",
}
HEADERS: Final = {operation: header for header, operation in OPERATIONS.items()}
TASK_FIELDS: Final = ("time_beg", "duration", "day", "channel", "active", "run_once")


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of a schedule. ``time_beg`` is minutes after midnight, ``duration`` minutes, ``day`` and ``channel``
    as sent."""

    task_id: int
    time_beg: int
    duration: int
    day: int
    channel: int
    active: bool
    run_once: bool


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """One message. ``task``: what ``read_task`` and ``create`` carry; ``task_count``: what ``read_all`` answers."""

    device_id: int
    epoch: int
    header: int
    alarm: int
    operation: Operation
    task_id: int
    task: Task | None = None
    task_count: int | None = None


def pack_alarm(task: Task) -> int:
    """Return the alarm word of a task."""
    return (
        task.time_beg
        | task.duration << 11
        | task.day << 22
        | task.task_id << 25
        | task.channel << 29
        | int(task.active) << 30
        | int(task.run_once) << 31
    )


def unpack_alarm(word: int) -> Task:
    """Return the task of an alarm word."""
    return Task(
        task_id=word >> 25 & 0xF,
        time_beg=word & 0x7FF,
        duration=word >> 11 & 0x7FF,
        day=word >> 22 & 7,
        channel=word >> 29 & 1,
        active=bool(word >> 30 & 1),
        run_once=bool(word >> 31),
    )


def parse(data: bytes) -> Message:
    """Read a message: 26 hexadecimal digits, or the 52 that are the hexadecimal of these; raises DecodeError."""
    try:
        if len(data) == FRAME_DIGITS:
            raw = unhexlify(data)
        elif len(data) == 2 * FRAME_DIGITS:
            raw = unhexlify(unhexlify(data))
        else:
            raise DecodeError(
                f"a schedule message has {FRAME_DIGITS} hexadecimal digits (or twice as many), not {len(data)} bytes"
            )
    except HexError as exc:
        raise DecodeError(f"a schedule message is hexadecimal digits: {exc}") from None
    device_id, epoch, header, alarm = FRAME.unpack(raw)
    operation = OPERATIONS.get(header & (SET | ALL | CLEAR))
    if operation is None:
        raise DecodeError(
            f"header 0x{header:02x} is no operation: set {header >> 7}, all {header >> 5 & 1}, clear {header >> 6 & 1}"
        )
    return Message(
        device_id=device_id,
        epoch=epoch,
        header=header,
        alarm=alarm,
        operation=operation,
        task_id=header & TASK_MASK,
        task=unpack_alarm(alarm) if operation in ("read_task", "create") else None,
        task_count=alarm >> 25 & 0xF if operation == "read_all" else None,
    )


def build_frame(device_id: int, epoch: int, operation: Operation, *, task_id: int = 0, alarm: int = 0) -> bytes:
    """Build a message as a device sends it: 26 hexadecimal digits in ASCII."""
    return FRAME.pack(device_id, epoch, HEADERS[operation] | task_id, alarm).hex().encode()


def describe(message: Message) -> dict[str, Any]:
    """Return what :func:`merge` needs of a message, as JSON; it travels in ``metadata["schedule"]``."""
    found: dict[str, Any] = {"operation": message.operation, "task_id": message.task_id, "epoch": message.epoch}
    if message.task is not None:
        found["task"] = {name: getattr(message.task, name) for name in TASK_FIELDS}
    if message.task_count is not None:
        found["task_count"] = message.task_count
    return found


def merge(state: Mapping[str, Any] | None, message: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schedule of a device after a message as :func:`describe` tells it; neither argument is changed.

    State: ``{"tasks": {"3": {...}}, "task_count": n or None, "epoch": of the last message}``; ``task_count`` is the
    device's own count, None where it was not told since the last ``create`` or ``delete``.
    """
    tasks: dict[str, Any] = dict(state["tasks"]) if state else {}
    count = state["task_count"] if state else None
    operation, key = message["operation"], str(message["task_id"])
    if operation in ("read_task", "create"):
        if operation == "create":
            count = None
        tasks[key] = dict(message["task"])
    elif operation == "read_all":
        count = message["task_count"]
        if count == 0:
            tasks = {}
    elif operation == "delete":
        tasks.pop(key, None)
        count = None
    else:
        tasks, count = {}, 0
    return {"tasks": tasks, "task_count": count, "epoch": message["epoch"]}
