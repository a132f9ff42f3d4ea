"""Headrace with a driver that takes its time over one kind of message: what `faust -A tests.faults.slow` loads."""

from __future__ import annotations

import time

from devices.model import Reading, Uplink
from devices.plain_json.driver import PlainJsonDriver
from devices.profiles import Profile
from streams.core import app

__all__ = ["app"]

_decode = PlainJsonDriver.decode


def decode(self: PlainJsonDriver, uplink: Uplink, profile: Profile) -> list[Reading]:
    """Decode as ever, and take a fifth of a second over a message that asks for it."""
    if b"slow" in uplink.data:
        time.sleep(0.2)
    return _decode(self, uplink, profile)


PlainJsonDriver.decode = decode  # type: ignore[method-assign]
