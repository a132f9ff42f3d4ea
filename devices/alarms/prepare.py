"""A rule compiled: its comparison as a closure, its calendars, its fingerprint.

What cannot be compared decides nothing: a missing value, NaN, text against a number, a number against text. Booleans
are 0 and 1 to a number, and are themselves to a boolean threshold.
"""

from __future__ import annotations

import hashlib
import math
import operator
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from devices.alarms.model import AlarmRule
from devices.alarms.schedule import Calendar, compile_calendar

# A test says yes, no, or None: this value decides nothing.
Test = Callable[[Any], bool | None]

# Longer texts are remembered by their digest: a state stays small whatever a device sends.
MAX_TEXT: Final = 64

_ORDER: Final[dict[str, Callable[[Any, Any], bool]]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
_EQUAL: Final[dict[str, Callable[[Any, Any], bool]]] = {"==": operator.eq, "!=": operator.ne}


class Limits(NamedTuple):
    """What a sample time may be, in seconds from now, to count for alarms; without it a reading is only stored.

    24 h back: devices that send a day's samples at once still alarm. Five minutes ahead: room for a clock that drifts,
    and as long as a wrong one can mute its own later readings.
    """

    max_age_seconds: float = 24 * 3600.0
    max_ahead_seconds: float = 300.0


DEFAULT_LIMITS: Final = Limits()


class Prepared:
    """One rule, ready to be evaluated. ``raises(value)`` opens, ``holds(value)`` keeps open; None for ``changed``.

    ``whole``: it watches a device or an index, not its labels. ``timed``: it may need a timer while nothing is owed.

    Raises ``ValueError``, ``TypeError`` or ``KeyError`` for a rule that :func:`devices.alarms.rules.check_rule`
    refuses.
    """

    __slots__ = (
        "changes_by",
        "count",
        "depends_on",
        "duration",
        "fingerprint",
        "holds",
        "id",
        "index",
        "label",
        "max_age",
        "max_ahead",
        "no_data",
        "on_change",
        "quiet",
        "raises",
        "renotify",
        "rule",
        "schedule",
        "timed",
        "whole",
        "within",
    )

    def __init__(self, rule: AlarmRule, limits: Limits = DEFAULT_LIMITS) -> None:
        self.rule = rule
        self.id = rule.id
        self.index = rule.index
        self.label = rule.label
        self.max_age, self.max_ahead = limits
        self.fingerprint = fingerprint(rule)
        self.on_change = rule.math_operator == "changed"
        self.changes_by: float = float(rule.threshold or 0) if self.on_change else 0.0
        self.duration = rule.duration_seconds or 0.0
        self.count = rule.repeat.count if rule.repeat else 0
        self.within = rule.repeat.within_seconds if rule.repeat else 0.0
        self.no_data = rule.no_data_seconds or 0.0
        self.renotify = rule.renotify_seconds or 0.0
        self.schedule: Calendar | None = compile_calendar(rule.schedule)
        self.quiet: Calendar | None = compile_calendar(rule.quiet_hours)
        self.depends_on = tuple(rule.depends_on)
        self.raises: Test | None = None
        self.holds: Test | None = None
        if compares(rule) and not self.on_change:
            self.raises = compile_test(rule.math_operator, rule.threshold)
            clear = rule.clear_threshold
            self.holds = self.raises if clear is None else compile_test(rule.math_operator, clear)
        # Silence is all the rule asks for and no label is named: one state for the device or the index.
        self.whole = self.raises is None and not self.on_change and self.label is None
        self.timed = bool(self.duration or self.no_data or self.renotify)


def compares(rule: AlarmRule) -> bool:
    """Tell whether the rule looks at values, and not at silence alone."""
    return rule.threshold is not None or rule.math_operator == "changed" or not rule.no_data_seconds


def compile_test(op: str, threshold: Any) -> Test:
    """Return the test of ``op`` (all but ``changed``) against ``threshold``.

    ``in`` and ``outside``: a list of two numbers is a range with its ends, a list of texts is a set.
    """
    if op in ("in", "outside"):
        inside = _range(threshold) if _is_range(threshold) else _member(threshold)
        return inside if op == "in" else _negated(inside)
    if isinstance(threshold, str):
        compare = _EQUAL[op]
        return lambda value: compare(value, threshold) if type(value) is str else None
    if isinstance(threshold, bool):
        compare = _EQUAL[op]
        return lambda value: (
            compare(bool(value), threshold)
            if type(value) is bool or (type(value) in (int, float) and value in (0, 1))
            else None
        )
    compare = _ORDER[op] if op in _ORDER else _EQUAL[op]
    number = float(threshold) if isinstance(threshold, float) else int(threshold)

    def test(value: Any) -> bool | None:
        kind = type(value)
        if kind is float:
            # NaN is the one float that differs from itself.
            return compare(value, number) if value == value else None  # noqa: PLR0124
        return compare(value, number) if kind is int or kind is bool else None

    return test


def _is_range(threshold: Any) -> bool:
    return len(threshold) == 2 and all(isinstance(end, int | float) for end in threshold)


def _range(threshold: Sequence[Any]) -> Test:
    low, high = threshold

    def inside(value: Any) -> bool | None:
        if type(value) not in (int, float, bool) or math.isnan(value):
            return None
        return bool(low <= value <= high)

    return inside


def _member(threshold: Sequence[Any]) -> Test:
    texts = frozenset(threshold)
    return lambda value: value in texts if type(value) is str else None


def _negated(test: Test) -> Test:
    def outside(value: Any) -> bool | None:
        answer = test(value)
        return None if answer is None else not answer

    return outside


def differs(value: Any, previous: Any, by: float) -> bool | None:
    """Tell whether ``value`` has changed; numbers count as changed when they differ by ``by`` or more (0: at all)."""
    if value is None or previous is None or value != value:  # noqa: PLR0124
        return None
    if by and isinstance(value, int | float) and isinstance(previous, int | float):
        return abs(value - previous) >= by
    return bool(value != previous)


def brief(value: Any) -> Any:
    """Return ``value`` as a state may keep it: equal values stay equal, long texts become a digest, odd types text."""
    if value is None or type(value) in (bool, float):
        return value
    if type(value) is int:
        # msgpack holds 64 bits.
        return value if -(2**63) <= value < 2**64 else float(value) if abs(value) < 10**300 else str(value)[:MAX_TEXT]
    text = value if type(value) is str else repr(value)
    if len(text) <= MAX_TEXT:
        return text
    return text[: MAX_TEXT - 24] + "… " + hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=10).hexdigest()


def fingerprint(rule: AlarmRule) -> int:
    """Return a number, never 0, that changes when what an open alarm of this rule means changes.

    Name, message, level, recipients, schedule, quiet hours, reminders and dependencies are not in it: with another of
    those an open alarm stays what it is.
    """
    parts = (
        rule.device_id,
        rule.profile,
        rule.tag,
        rule.index,
        rule.label,
        rule.alarm_type,
        rule.math_operator,
        rule.threshold,
        rule.clear_threshold,
        rule.duration_seconds and float(rule.duration_seconds),
        rule.repeat and (rule.repeat.count, float(rule.repeat.within_seconds)),
        rule.no_data_seconds and float(rule.no_data_seconds),
    )
    return zlib.crc32(msgspec.json.encode(parts)) or 1
