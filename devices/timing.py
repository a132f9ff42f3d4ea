"""How long drivers take, and which of them are set aside for a while because they keep taking too long.

Guarantee: a driver that is slow by its own doing is set aside after ``STRIKES`` slow calls; a machine that is busy with
something else sets none aside. Two rules tell them apart. ``STRIKES`` calls of a driver that are slow one after the
other, by the clock on the wall, whatever they wait for: no scheduler strikes the same few microseconds five times in a
row. And ``STRIKES`` calls within ``WINDOW_SECONDS`` that used more than the limit in processor time, whatever goes well
between them (one device's messages are slow, the others' are not); processor time is only looked at while a driver has
been slow lately, since asking for it can cost more than a fast driver's call.

Pure: clocks come in as arguments. The event loop does not turn during a call, so a call that never returns is not for
here: the worker ends and names the record (``streams/resilience/watchdog.py``).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final, TypeVar

STRIKES: Final = 5
WINDOW_SECONDS: Final = 60.0

T = TypeVar("T")


class DriverAside(Exception):
    """A driver is not called for a while; ``seconds`` until it is again."""

    def __init__(self, driver: str, seconds: float) -> None:
        super().__init__(
            f"driver {driver} keeps taking longer than DRIVER_LIMIT_SECONDS and is set aside for {seconds:.0f} s more "
            "(DRIVER_ASIDE_SECONDS)"
        )
        self.driver = driver
        self.seconds = seconds


class DriverTimes:
    """Calls drivers and takes their time. ``on_slow(driver, seconds, aside)`` is told of each slow call."""

    def __init__(
        self,
        limit_seconds: float,
        aside_seconds: float,
        *,
        on_slow: Callable[[str, float, bool], None] = lambda *_: None,
        wall: Callable[[], float] = time.perf_counter,
        cpu: Callable[[], float] = time.thread_time,
    ) -> None:
        self.limit_seconds = limit_seconds
        self.aside_seconds = aside_seconds
        self._on_slow = on_slow
        self._wall = wall
        self._cpu = cpu
        self._aside: dict[str, float] = {}
        self._streaks: dict[str, int] = {}
        self._watched: dict[str, float] = {}
        self._strikes: dict[str, deque[float]] = {}

    @property
    def aside(self) -> dict[str, float]:
        """The drivers that are set aside, with the seconds until they are called again."""
        now = self._wall()
        return {driver: until - now for driver, until in self._aside.items() if until > now}

    def call(self, driver: str, function: Callable[..., T], *args: Any) -> T:
        """Return ``function(*args)``, a call of that driver's; raises DriverAside without calling it."""
        if driver in self._aside:
            self._refuse(driver)
        cpu = self._cpu() if driver in self._watched else None
        begun = self._wall()
        try:
            return function(*args)
        finally:
            seconds = self._wall() - begun
            if seconds > self.limit_seconds:
                self._slow(driver, seconds, 0.0 if cpu is None else self._cpu() - cpu)
            elif self._streaks:
                self._streaks.pop(driver, None)

    def _refuse(self, driver: str) -> None:
        left = self._aside[driver] - self._wall()
        if left > 0:
            raise DriverAside(driver, left)
        del self._aside[driver]

    def _slow(self, driver: str, seconds: float, cpu_seconds: float) -> None:
        now = self._wall()
        self._watched[driver] = now
        streak = self._streaks[driver] = self._streaks.get(driver, 0) + 1
        strikes = self._strikes.setdefault(driver, deque(maxlen=STRIKES))
        if cpu_seconds > self.limit_seconds:
            strikes.append(now)
        within = len(strikes) == STRIKES and now - strikes[0] <= WINDOW_SECONDS
        aside = streak >= STRIKES or within
        if aside:
            self._aside[driver] = now + self.aside_seconds
            self._streaks.pop(driver)
            strikes.clear()
        self._on_slow(driver, seconds, aside)
