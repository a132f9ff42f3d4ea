"""Weekly windows in a time zone: is it now, when does that change.

Guarantees: a window is judged by the local clock on the wall. On the day that an hour is skipped a window inside that
hour does not occur; on the day that an hour comes twice it occurs in both. A window past midnight belongs to the day
that it starts on. Answers are cached for as long as they hold, so that asking costs nanoseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final
from zoneinfo import ZoneInfo

from devices.alarms.model import DAYS, Schedule

_DAY_MINUTES: Final = 24 * 60
# A weekly window changes at least once in eight days; the ninth is for the switch to summer time.
_HORIZON_DAYS: Final = 9


def minutes(text: str) -> int:
    """Return the minutes since midnight of ``HH:MM`` (``24:00`` included). Raises ``ValueError``."""
    hours, separator, rest = text.partition(":")
    if not (separator and hours.isascii() and rest.isascii() and hours.isdigit() and rest.isdigit() and len(rest) == 2):
        raise ValueError(f"{text!r} is not a time of day like 08:00")
    total = int(hours) * 60 + int(rest)
    if int(rest) > 59 or total > _DAY_MINUTES:
        raise ValueError(f"{text!r} is not a time of day from 00:00 to 24:00")
    return total


class _Window:
    """One :class:`Schedule`, compiled."""

    __slots__ = ("days", "end", "start", "zone")

    def __init__(self, schedule: Schedule) -> None:
        self.zone = ZoneInfo(schedule.time_zone)
        self.days = frozenset(DAYS.index(day) for day in schedule.days)
        self.start = minutes(schedule.start)
        self.end = minutes(schedule.end)

    def contains(self, time: float) -> bool:
        local = datetime.fromtimestamp(time, self.zone)
        minute = local.hour * 60 + local.minute
        day = local.weekday()
        if self.start < self.end:
            return day in self.days and self.start <= minute < self.end
        return (day in self.days and minute >= self.start) or ((day - 1) % 7 in self.days and minute < self.end)

    def edges(self, time: float) -> list[float]:
        """Return instants near which this window may begin or end, around ``time``."""
        midnight = datetime.fromtimestamp(time, self.zone).replace(
            hour=0, minute=0, second=0, microsecond=0, tzinfo=None
        )
        found = []
        for offset in range(-_HORIZON_DAYS, _HORIZON_DAYS + 1):
            for minute in (self.start, self.end):
                wall = midnight + timedelta(days=offset, minutes=minute)
                found += [wall.replace(tzinfo=self.zone, fold=fold).astimezone(UTC).timestamp() for fold in (0, 1)]
        return found


class Calendar:
    """The union of some windows. Not safe to share between threads: it remembers its last answer."""

    __slots__ = ("_answer", "_from", "_until", "_windows")

    def __init__(self, schedules: Iterable[Schedule]) -> None:
        self._windows = tuple(_Window(schedule) for schedule in schedules)
        self._from = self._until = 0.0
        self._answer = False

    def contains(self, time: float) -> bool:
        """Tell whether ``time`` (epoch seconds) lies in a window."""
        if not self._from <= time < self._until:
            self._look(time)
        return self._answer

    def changes_at(self, time: float) -> float:
        """Return when what :meth:`contains` says of ``time`` ends to be so; infinity where it never changes."""
        if not self._from <= time < self._until:
            self._look(time)
        return self._until

    def since(self, time: float) -> float:
        """Return since when what :meth:`contains` says of ``time`` has been so; minus infinity for ever."""
        if not self._from <= time < self._until:
            self._look(time)
        return self._from

    def _now(self, time: float) -> bool:
        return any(window.contains(time) for window in self._windows)

    def _look(self, time: float) -> None:
        answer = self._now(time)
        edges = sorted({edge for window in self._windows for edge in window.edges(time)})
        self._until = self._edge(time, [edge for edge in edges if edge > time], answer, float("inf"))
        self._from = self._edge(time, [edge for edge in reversed(edges) if edge <= time], answer, float("-inf"))
        self._answer = answer

    def _edge(self, time: float, candidates: Sequence[float], answer: bool, never: float) -> float:
        """Return the first instant of another answer in the order of ``candidates``, found to the second.

        The candidates are the walls' times; where the clock jumps over one of them the change is at the jump, which
        lies between two candidates, so the last step is a bisection. Backwards, that is the first instant of this
        answer.
        """
        backwards = never < 0
        same = time
        for candidate in candidates:
            # Just before an edge is what counts when looking back.
            probe = candidate - 1 if backwards else candidate
            if self._now(probe) == answer:
                same = probe
                continue
            other = probe
            while abs(other - same) > 1:
                middle = float(int((other + same) / 2))
                if middle in (other, same):
                    break
                if self._now(middle) == answer:
                    same = middle
                else:
                    other = middle
            return float(int(max(same, other))) if backwards else float(int(other))
        return never


def compile_calendar(schedules: Schedule | Sequence[Schedule] | None) -> Calendar | None:
    """Return the calendar of a rule's field, None for None. Raises ``ValueError`` for what :mod:`rules` refuses."""
    if schedules is None:
        return None
    return Calendar([schedules] if isinstance(schedules, Schedule) else schedules)
