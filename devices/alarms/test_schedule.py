"""Windows of the week, through both switches of the year."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.alarms.model import DAYS, Schedule
from devices.alarms.schedule import Calendar, minutes

YEAR = datetime(2025, 1, 1, tzinfo=UTC).timestamp()


def utc(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def clock(low: int, high: int) -> st.SearchStrategy[str]:
    return st.integers(low, high).map(lambda m: f"{m * 15 // 60:02}:{m * 15 % 60:02}")


windows = st.builds(
    Schedule,
    days=st.lists(st.sampled_from(DAYS), min_size=1, max_size=7, unique=True),
    start=clock(0, 95),
    end=clock(1, 96),
    time_zone=st.sampled_from(["Europe/Paris", "America/New_York", "Australia/Lord_Howe", "UTC", "Asia/Kathmandu"]),
).filter(lambda window: window.start != window.end)


@settings(max_examples=60)
@given(st.lists(windows, min_size=1, max_size=3), st.floats(0, 365 * 86400))
def test_a_change_is_where_the_answer_changes(schedules: list[Schedule], offset: float) -> None:
    """Between since and changes_at every minute has the same answer, and the seconds beyond both have the other."""
    time = YEAR + offset
    answer = Calendar(schedules).contains(time)
    since, until = Calendar(schedules).since(time), Calendar(schedules).changes_at(time)
    assert since <= time < until
    inside = Calendar(schedules)
    if since > float("-inf"):
        assert inside.contains(since) is answer
        assert Calendar(schedules).contains(since - 1) is not answer
    if until < float("inf"):
        assert Calendar(schedules).contains(until) is not answer
        assert Calendar(schedules).contains(until - 1) is answer
    for step in range(0, 7 * 1440, 97):
        moment = max(since, time - 3 * 86400) + step * 60
        if moment < until:
            assert Calendar(schedules).contains(moment) is answer


@settings(max_examples=60)
@given(st.lists(windows, min_size=1, max_size=2), st.lists(st.floats(0, 3e7), min_size=1, max_size=8))
def test_the_cache_answers_as_a_fresh_calendar(schedules: list[Schedule], offsets: list[float]) -> None:
    """In whatever order it is asked, a calendar says what one that remembers nothing says."""
    used = Calendar(schedules)
    for offset in offsets:
        assert used.contains(YEAR + offset) is Calendar(schedules).contains(YEAR + offset)


NIGHT = [Schedule(start="02:15", end="02:45", time_zone="Europe/Paris")]


def test_the_hour_that_is_skipped() -> None:
    """On 2025-03-30 Paris goes from 02:00 to 03:00: a window inside that hour does not occur."""
    calendar = Calendar(NIGHT)
    assert not any(calendar.contains(utc("2025-03-30T00:00:00Z") + minute * 60) for minute in range(240))
    assert calendar.changes_at(utc("2025-03-29T12:00:00Z")) == utc("2025-03-31T00:15:00Z")


def test_a_window_that_begins_in_the_skipped_hour() -> None:
    """A window from 02:30 on begins at 03:00 on that day, the first instant after 02:30 that exists."""
    calendar = Calendar([Schedule(start="02:30", end="04:00", time_zone="Europe/Paris")])
    assert calendar.changes_at(utc("2025-03-30T00:00:00Z")) == utc("2025-03-30T01:00:00Z")
    assert calendar.changes_at(utc("2025-03-30T01:10:00Z")) == utc("2025-03-30T02:00:00Z")


def test_the_hour_that_comes_twice() -> None:
    """On 2025-10-26 Paris has 02:00 to 03:00 twice: the window occurs in both."""
    calendar = Calendar(NIGHT)
    inside = [m for m in range(240) if calendar.contains(utc("2025-10-26T00:00:00Z") + m * 60)]
    assert inside == [*range(15, 45), *range(75, 105)]


def test_past_midnight_belongs_to_the_day_it_starts_on() -> None:
    """Friday 22:00 to 06:00 holds in the night to Saturday and not in the night to Friday."""
    calendar = Calendar([Schedule(days=["fri"], start="22:00", end="06:00", time_zone="UTC")])
    assert calendar.contains(utc("2025-06-21T05:59:00Z"))
    assert not calendar.contains(utc("2025-06-20T05:59:00Z"))
    assert not calendar.contains(utc("2025-06-21T22:30:00Z"))


def test_always() -> None:
    """A window that is all week never changes."""
    calendar = Calendar([Schedule()])
    assert calendar.contains(YEAR)
    assert calendar.changes_at(YEAR) == float("inf")


@pytest.mark.parametrize("text", ["8", "8:0", "24:01", "12:60", "-1:00", "", "a:bc", "¹2:00", "08:00:00"])
def test_times_that_are_none(text: str) -> None:
    """What is not HH:MM from 00:00 to 24:00 is refused."""
    with pytest.raises(ValueError):
        minutes(text)
