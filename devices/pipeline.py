"""From an uplink to what is worth keeping of it: match, decode, validate. Pure over a registry; no clock, no I/O.

Three ways out, and no fourth: an :class:`Outcome`; :class:`~devices.model.DecodeError` (the bytes can never be read:
poison); :class:`Refused` (understood and refused: a dead letter of class ``rejected``). Whatever else a driver raises
is turned into DecodeError here, with the driver's name, so that one careless driver is one dead letter.
"""

from __future__ import annotations

import msgspec

from devices.driver import Feedback
from devices.model import DecodeError, Reading, Uplink
from devices.profiles import Profile
from devices.registry import Registry
from devices.validation import Rejection, validate


class Refused(ValueError):
    """Nothing of the message is taken. ``reason``: ``no_profile``, ``device_inactive`` or ``rejected_value``."""

    def __init__(self, reason: str, message: str, rejections: list[Rejection] | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.rejections = rejections or []


class Outcome(msgspec.Struct, kw_only=True):
    """What one message gave. ``feedback``: what it says of a command; a request that is only answered gives nothing."""

    readings: list[Reading]
    rejections: list[Rejection]
    profile: Profile
    feedback: Feedback | None = None


def read(uplink: Uplink, registry: Registry) -> Outcome:
    """Return what ``uplink`` gives; raises DecodeError or Refused."""
    found = registry.find(uplink)
    if found is None:
        raise Refused(
            "no_profile", f"no profile matches {uplink.protocol} {uplink.route!r} of device {uplink.device_id!r}"
        )
    entry = registry.device(uplink.device_id)
    if entry is not None and not entry.active:
        raise Refused("device_inactive", f"device {uplink.device_id!r} is configured as not active")
    profile, match = found
    driver = registry.driver(profile)
    if match.kind == "request":
        return Outcome(readings=[], rejections=[], profile=profile)
    try:
        if match.kind == "feedback":
            feedback = driver.feedback(uplink)
            return Outcome(readings=[], rejections=[], profile=profile, feedback=feedback)
        readings = driver.decode(uplink, profile)
    except (DecodeError, MemoryError):
        raise
    except Exception as exc:
        raise DecodeError(f"driver {driver.name} failed on this message: {type(exc).__name__}: {exc}") from exc
    checked = validate(readings, profile, uplink.received_at)
    if checked.rejections and not checked.readings:
        first = checked.rejections[0]
        raise Refused(
            "rejected_value",
            f"nothing valid is left of the message: {len(checked.rejections)} values refused, the first"
            f" {first.index}/{first.label} = {first.value!r:.80}: {first.reason}",
            checked.rejections,
        )
    return Outcome(readings=checked.readings, rejections=checked.rejections, profile=profile)
