"""What is kept of the commands of one device, and what comes of them. Plain data; times are aware UTC datetimes."""

from __future__ import annotations

from datetime import datetime
from typing import Final, Literal

import msgspec

State = Literal["QUEUED", "SENT", "DELIVERED", "SUCCESSFUL", "FAILED", "EXPIRED", "TIMEOUT"]
TERMINAL: Final[frozenset[str]] = frozenset({"SUCCESSFUL", "FAILED", "EXPIRED", "TIMEOUT"})
#: The states on the way, in order; a command passes them forward only.
ON_THE_WAY: Final[tuple[State, ...]] = ("QUEUED", "SENT", "DELIVERED")


class OpenCommand(msgspec.Struct, kw_only=True):
    """A command without a terminal state.

    ``attempts`` counts what was handed to the connector; ``on_way``: the connector has not said yet that the latest
    attempt was sent; ``waits_until``: how long an answer is waited for. ``repeatable`` … ``exclusive`` are what its
    driver says of the command type (:class:`devices.driver.CommandTraits`).
    """

    request_id: str
    command_type: str
    payload: dict[str, object]
    protocol: str
    order: int
    expires_at: datetime
    priority: int = 0
    state: State = "QUEUED"
    attempts: int = 0
    on_way: bool = False
    waits_until: datetime | None = None
    #: when it first left for the device, as the connector says
    sent_at: datetime | None = None
    #: the time of its latest step
    told_at: datetime | None = None
    repeatable: bool = False
    supersedes: bool = False
    confirmed: bool = True
    exclusive: bool = False


class Ended(msgspec.Struct):
    """A command that has its terminal state; kept for a while, so that its request id starts nothing again."""

    request_id: str
    state: State
    at: datetime


class Life(msgspec.Struct, kw_only=True):
    """All that is kept of one device's commands."""

    open: list[OpenCommand] = []
    ended: list[Ended] = []
    order: int = 0


class Step(msgspec.Struct, frozen=True):
    """One step in the life of a command, to be told.

    ``withdraw``: the connector may still hold it, and must not send it any more.
    """

    request_id: str
    state: State
    detail: str
    at: datetime
    withdraw: bool = False


class Report(msgspec.Struct, kw_only=True):
    """What a connector or a device says of a command.

    ``SENT``: attempt ``attempt`` has left for the device. ``DELIVERED``: the broker, or with ``by_device`` the device,
    has it. ``SUCCESSFUL``, ``FAILED``: the device's word (``by_device``), or a connector's that it can never be sent.
    ``EXPIRED``: the connector did not send it, because it was too late.
    """

    request_id: str
    kind: Literal["SENT", "DELIVERED", "SUCCESSFUL", "FAILED", "EXPIRED"]
    device_id: str | None = None
    attempt: int = 0
    by_device: bool = False
    detail: str = ""
    timestamp: datetime | None = None


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """``timeout_seconds``: how long a sent command waits for its answer; ``attempts``: how often what is safe to repeat
    is sent; an ended command's id is remembered for ``keep_seconds``, the latest ``keep_count`` of a device."""

    timeout_seconds: float = 60.0
    attempts: int = 3
    keep_seconds: float = 7 * 86_400.0
    keep_count: int = 1_000
