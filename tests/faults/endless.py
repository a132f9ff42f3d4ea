"""Headrace with a driver that never returns from one kind of message: what `faust -A tests.faults.endless` loads."""

from __future__ import annotations

from devices.model import Reading, Uplink
from devices.plain_json.driver import PlainJsonDriver
from devices.profiles import Profile
from streams.core import app

__all__ = ["app"]

_decode = PlainJsonDriver.decode


def decode(self: PlainJsonDriver, uplink: Uplink, profile: Profile) -> list[Reading]:
    """Decode as ever, and turn for ever over a message that asks for it."""
    while b"endless" in uplink.data:
        pass
    return _decode(self, uplink, profile)


PlainJsonDriver.decode = decode  # type: ignore[method-assign]
