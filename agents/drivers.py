"""Drivers under the settings' time limit: each stage that calls drivers takes their time, and tells of slow ones."""

from __future__ import annotations

from devices.timing import DriverTimes
from settings import Settings
from streams.events import EVENTS


def driver_times(settings: Settings) -> DriverTimes:
    """Return what calls drivers as ``DRIVER_LIMIT_SECONDS`` and ``DRIVER_ASIDE_SECONDS`` say."""
    aside_seconds = settings.driver_aside_seconds

    def slow(driver: str, seconds: float, aside: bool) -> None:
        EVENTS.slow_driver(driver, seconds, aside_seconds=aside_seconds if aside else None)

    return DriverTimes(settings.driver_limit_seconds, aside_seconds, on_slow=slow)
