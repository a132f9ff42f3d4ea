"""Slow drivers are set aside, busy machines are not; clocks are turned by hand."""

from __future__ import annotations

from typing import Any

import pytest

from devices.timing import STRIKES, WINDOW_SECONDS, DriverAside, DriverTimes

LIMIT, ASIDE = 0.05, 60.0


class Machine:
    """Two clocks and what was told."""

    def __init__(self) -> None:
        self.now = self.used = 0.0
        self.told: list[tuple[str, float, bool]] = []
        self.times = DriverTimes(
            LIMIT,
            ASIDE,
            on_slow=lambda driver, seconds, aside: self.told.append((driver, round(seconds, 3), aside)),
            wall=lambda: self.now,
            cpu=lambda: self.used,
        )

    def work(self, seconds: float, cpu_seconds: float | None = None) -> str:
        """What a driver does: takes its time."""
        self.now += seconds
        self.used += seconds if cpu_seconds is None else cpu_seconds
        return "done"

    def call(self, driver: str, *how: Any) -> str:
        """Call it."""
        return self.times.call(driver, self.work, *how)


def test_one_that_is_always_slow_is_set_aside_and_comes_back() -> None:
    """After some slow calls in a row it is not called for a while; others are, all the time."""
    here = Machine()
    for _ in range(STRIKES):
        assert here.call("slow", 0.1, 0.0) == "done"
    with pytest.raises(DriverAside, match=r"driver slow .* 60 s more \(DRIVER_ASIDE_SECONDS\)"):
        here.call("slow", 0.001)
    assert here.call("other", 0.001) == "done"
    assert here.told == [("slow", 0.1, False)] * (STRIKES - 1) + [("slow", 0.1, True)]
    assert list(here.times.aside) == ["slow"]
    here.now += ASIDE
    assert here.call("slow", 0.001) == "done"
    assert here.times.aside == {}


def test_some_slow_messages_among_many_fast_ones_are_enough() -> None:
    """A device whose messages cost much is found among others that cost nothing."""
    here = Machine()
    with pytest.raises(DriverAside):
        for _ in range(STRIKES + 2):
            here.call("mixed", 0.2)
            for _ in range(50):
                here.call("mixed", 0.001)
    assert here.told[-1] == ("mixed", 0.2, True)


def test_a_busy_machine_sets_nobody_aside() -> None:
    """Calls that waited for a processor now and then are not the driver's doing."""
    here = Machine()
    for _ in range(100):
        here.call("fast", 0.3, 0.00002)
        here.call("fast", 0.0001)
    assert not any(aside for _, _, aside in here.told)


def test_slow_calls_far_apart_are_no_habit() -> None:
    """Strikes count within a window."""
    here = Machine()
    for _ in range(3 * STRIKES):
        here.call("rare", 0.2)
        here.call("rare", 0.001)
        here.now += WINDOW_SECONDS / (STRIKES - 2)
    assert not any(aside for _, _, aside in here.told)


def test_a_slow_failure_counts_as_well() -> None:
    """What a driver raises is raised, and its time taken."""
    here = Machine()

    def fail() -> None:
        here.work(1.0)
        raise ValueError("no")

    for _ in range(STRIKES):
        with pytest.raises(ValueError, match="no"):
            here.times.call("bad", fail)
    with pytest.raises(DriverAside):
        here.times.call("bad", fail)
