"""The plain data of alarms: a rule, the state of one series under one rule, a transition, an alert.

Times inside states and transitions are seconds since the epoch, UTC, as float: exact to the microsecond, and a tenth of
the cost of datetimes. ``AlarmRule`` and ``Alert`` are the messages of the topics; they carry RFC 3339 times.
"""

from __future__ import annotations

import enum
from datetime import UTC, datetime
from typing import Any, Final, Literal

import msgspec

Level = Literal["CRITICAL", "WARNING", "INFO"]
AlarmType = Literal["Measure", "Status"]
Operator = Literal[">", ">=", "<", "<=", "==", "!=", "in", "outside", "changed"]
Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
DAYS: Final[tuple[Day, ...]] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")

# What an alert's ``math_operator`` says where silence, not a value, raised it; its ``threshold`` is then in seconds.
NO_DATA: Final = "no_data"


class Repeat(msgspec.Struct, kw_only=True):
    """Fire only when the condition was met ``count`` times within ``within_seconds``."""

    count: int
    within_seconds: float


class Schedule(msgspec.Struct, kw_only=True):
    """A weekly window in local time. ``end`` before ``start`` means past midnight; the day is the one it starts on.

    ``start`` and ``end`` are ``HH:MM``, ``24:00`` included as an end; ``time_zone`` is an IANA name.
    """

    days: list[Day] = msgspec.field(default_factory=lambda: list(DAYS))
    start: str = "00:00"
    end: str = "24:00"
    time_zone: str = "UTC"


class Dependency(msgspec.Struct, kw_only=True):
    """While alarm ``alarm`` of ``device_id`` is open, this rule is mute. None: of the device's own gateway."""

    alarm: str
    device_id: str | None = None


class AlarmRule(msgspec.Struct, kw_only=True):
    """One rule; what it names is one of ``device_id``, ``profile`` or ``tag``.

    ``index`` and ``label`` None: each of them on its own; a rule that has only ``no_data_seconds`` then watches the
    device (or the index) as a whole.
    """

    id: str
    name: str = ""
    active: bool = True
    device_id: str | None = None
    profile: str | None = None
    tag: str | None = None
    index: str | None = None
    label: str | None = None
    alarm_type: AlarmType = "Measure"
    math_operator: Operator = ">"
    threshold: Any = None
    clear_threshold: Any = None
    duration_seconds: float | None = None
    repeat: Repeat | None = None
    no_data_seconds: float | None = None
    level: Level = "WARNING"
    message: str = ""
    recipients: list[str] = msgspec.field(default_factory=list)
    renotify_seconds: float | None = None
    schedule: Schedule | list[Schedule] | None = None
    quiet_hours: Schedule | list[Schedule] | None = None
    depends_on: list[Dependency] = msgspec.field(default_factory=list)


class Alert(msgspec.Struct, kw_only=True):
    """One transition in the life of an alarm; ``recipients`` is a comma list.

    ``id`` is that of the alarm's opening and stays through its life. ``metadata`` has ``transition`` (a
    :class:`Kind`), ``transition_id`` (unique and the same for a redelivery), ``notify`` (bool: quiet hours and
    dependencies make it false), ``index``, ``unit``, ``display_name``, ``reason``; for an acknowledgement ``user``
    and ``comment``.
    """

    id: str
    alarm_id: str
    name: str
    message: str
    level: Level
    alarm_type: AlarmType
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


class Life(enum.IntEnum):
    """Where an alarm stands; what is resolved is quiet again."""

    QUIET = 0
    OPEN = 1
    ACKNOWLEDGED = 2


class Kind(enum.StrEnum):
    """What a transition is. OPENED and RESOLVED alternate; REMINDED changes nothing and only tells again."""

    OPENED = "opened"
    REMINDED = "reminded"
    ACKNOWLEDGED = "acknowledged"
    RESOLVED = "resolved"


class Reason(enum.StrEnum):
    """Why a transition happened, where it is not the plain condition."""

    CONDITION = ""
    NO_DATA = "no_data"
    DATA_IS_BACK = "data_is_back"
    STILL_OPEN = "still_open"
    QUIET_TIME_OVER = "quiet_time_over"
    RULE_CHANGED = "rule_changed"
    RULE_REMOVED = "rule_removed"
    RULE_SWITCHED_OFF = "rule_switched_off"
    NOT_APPLICABLE = "not_applicable"


class AlarmState(msgspec.Struct, kw_only=True, omit_defaults=True, gc=False):
    """What is remembered of one series under one rule. Never changed in place; 30 to 40 bytes while all is quiet.

    Fields are renamed to a letter on the wire; a new field needs a default.
    """

    rule: int = msgspec.field(default=0, name="r")  # fingerprint of the rule's condition; 0: none yet
    time: float = msgspec.field(default=0.0, name="t")  # newest sample time that counted
    seen: float = msgspec.field(default=0.0, name="s")  # when that sample was processed
    value: Any = msgspec.field(default=None, name="v")  # last value, where something will ask for it
    since: float | None = msgspec.field(default=None, name="p")  # first sample of a run that waits for its duration
    hits: tuple[float, ...] = msgspec.field(default=(), name="h")  # sample times, for ``repeat``; at most ``count``
    floor: float = msgspec.field(default=0.0, name="f")  # sample time up to which hits have counted, and are forgotten
    life: Life = msgspec.field(default=Life.QUIET, name="l")
    start: float = msgspec.field(default=0.0, name="b")  # of the open alarm
    cause: Reason = msgspec.field(default=Reason.CONDITION, name="c")
    told: float = msgspec.field(default=0.0, name="n")  # when somebody was last notified; 0: nobody was
    owed: bool = msgspec.field(default=False, name="o")  # a notification that a silence holds back
    reminders: int = msgspec.field(default=0, name="k")
    closed: int = msgspec.field(default=0, name="g")  # alarms ended from outside; keeps the next one's id apart
    request_id: str = msgspec.field(default="", name="q")  # of the reading that began what is pending or open
    unit: str = msgspec.field(default="", name="u")
    alert: Alert | None = msgspec.field(default=None, name="a")  # the opening, kept for its closing


class Transition(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One step: ``at`` is when it happened, ``start`` when the alarm that it belongs to began.

    ``resolved`` tells what is so after it. ``number`` counts reminders. Deterministic: the same readings and
    timers give the same transition, so that a redelivery can be recognized.
    """

    kind: Kind
    start: float
    at: float
    value: Any = None
    cause: Reason = Reason.CONDITION
    reason: Reason = Reason.CONDITION
    notify: bool = True
    resolved: bool = False
    number: int = 0


class DeviceInfo(msgspec.Struct, kw_only=True, frozen=True):
    """What rules and messages need to know of a device; ``gateway`` is the device that it depends on."""

    device_id: str
    name: str = ""
    profile: str | None = None
    tags: tuple[str, ...] = ()
    gateway: str | None = None
    active: bool = True


def to_datetime(seconds: float) -> datetime:
    """Return the aware UTC datetime of seconds since the epoch."""
    return datetime.fromtimestamp(seconds, UTC)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(AlarmState)


def pack(state: AlarmState) -> bytes:
    """Encode a state for a table."""
    return _encoder.encode(state)


def unpack(data: bytes) -> AlarmState:
    """Decode what :func:`pack` made. Raises ``msgspec.DecodeError``, ``msgspec.ValidationError``."""
    return _decoder.decode(data)
