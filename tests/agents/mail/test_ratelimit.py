"""Token buckets and what waits for a digest."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.mail.ratelimit import HeldBack, RateLimiter
from tests.agents.mail.conftest import make_alert

asked = st.lists(st.tuples(st.floats(0, 30), st.sampled_from(["a", "b", "c"])), max_size=150)


@settings(deadline=None)
@given(asked, st.integers(1, 20), st.integers(1, 20))
def test_no_minute_has_more_than_twice_the_rate(steps: list[tuple[float, str]], overall: int, each: int) -> None:
    """In any 60 s at most a full bucket and what came back meanwhile go out, for each recipient and in all."""
    limiter, now = RateLimiter(overall, each), 1000.0
    sent: list[tuple[float, str]] = []
    for wait, recipient in steps:
        now += wait / 10
        when = limiter.ready_at(recipient, now)
        assert limiter.admit(recipient, now) is (when <= now + 1e-6)
        if when <= now + 1e-6:
            sent.append((now, recipient))
    for start, _ in sent:
        window = [recipient for moment, recipient in sent if start <= moment <= start + 60]
        assert len(window) <= 2 * overall + 1
        assert all(window.count(recipient) <= 2 * each + 1 for recipient in "abc")


def test_refills_by_the_clock() -> None:
    """A bucket of six a minute gives six at once, then one each ten seconds; a clock that goes back gives none."""
    limiter = RateLimiter(100, 6)
    assert [limiter.admit("a", 0) for _ in range(7)] == [True] * 6 + [False]
    assert limiter.ready_at("a", 0) == pytest.approx(10)
    assert not limiter.admit("a", 9.9)
    assert not limiter.admit("a", -1000)
    assert limiter.admit("a", 10)
    assert limiter.admit("b", 10)
    assert [limiter.admit("a", 1000) for _ in range(7)] == [True] * 6 + [False]


def test_all_together() -> None:
    """What one recipient was refused by the overall rate costs it nothing of its own."""
    limiter = RateLimiter(2, 2)
    assert [limiter.admit(one, 0) for one in ("a", "b", "c")] == [True, True, False]
    assert [limiter.admit("c", 60) for _ in range(3)] == [True, True, False]


def test_memory_is_bounded() -> None:
    """Recipients that ask no more are forgotten."""
    limiter = RateLimiter(10_000_000, 10)
    for number in range(20_000):
        limiter.admit(f"r{number}", number * 60.0)
    assert len(limiter._each) <= 1_001


def test_a_rate_of_nothing() -> None:
    """A rate that would send nothing is refused."""
    with pytest.raises(ValueError, match="send nothing"):
        RateLimiter(0, 1)


def test_what_is_held_back_keeps_its_order_through_a_restart() -> None:
    """Everything waits in the order in which it came, once, and after a restart still does."""
    store: dict[str, bytes] = {}
    held = HeldBack(store, 300)
    for number in (3, 1, 2):
        held.add("a@x", f"t{number}", make_alert(number), 1000 + number)
    held.add("b@x", "t1", make_alert(1), 1100)
    held.add("a@x", "t1", make_alert(1), 1200)
    held = HeldBack(store, 300)
    assert [int(alert.id, 16) for alert in held.peek("a@x")] == [3, 1, 2]
    assert (len(held), held.waits("a@x"), held.waits("c@x"), held.due_at("a@x")) == (4, True, False, 1303)
    assert list(held.due(1302)) == []
    assert list(held.due(1303)) == ["a@x"]
    assert list(held.due(1500)) == ["a@x", "b@x"]
    assert list(held.due(5)) == ["a@x", "b@x"]
    held.clear("a@x", 2)
    assert [int(alert.id, 16) for alert in held.peek("a@x")] == [2]
    held.clear("a@x", 2)
    assert not held.waits("a@x")
    assert list(store) == ["b@x|t1"]
    held.add("b@x", "t9", make_alert(9), 1600)
    assert [int(alert.id, 16) for alert in HeldBack(store, 300).peek("b@x")] == [1, 9]
