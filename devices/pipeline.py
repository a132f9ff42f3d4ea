"""From an uplink to what is worth keeping of it: match, decode, validate. Pure over a registry; no clock, no I/O.

Three ways out, and no fourth: an :class:`Outcome`; :class:`~devices.model.DecodeError` (the bytes can never be read:
poison); :class:`Refused` (understood and refused: a dead letter of class ``rejected``). Whatever else a driver raises
is turned into DecodeError here, with the driver's name, so that one careless driver is one dead letter.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import msgspec

from devices.driver import Feedback
from devices.model import AnotherDevice, DecodeError, DriverOutOfMemory, Reading, Uplink
from devices.profiles import Profile
from devices.registry import Registry
from devices.timing import DriverAside
from devices.validation import MAX_AHEAD, Rejection, validate

T = TypeVar("T")


class Refused(ValueError):
    """Nothing of the message is taken.

    ``reason``: ``no_profile``; ``device_not_allowed`` (profiles match, and allow other devices only);
    ``another_device`` (the payload names another than the route); ``unknown_device``; ``device_inactive``;
    ``driver_aside``; ``rejected_value``.
    """

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


def _call(_driver: str, function: Callable[..., T], *args: Any) -> T:
    return function(*args)


def read(
    uplink: Uplink,
    registry: Registry,
    *,
    known: Callable[[str], bool] | None = None,
    max_ahead: timedelta = MAX_AHEAD,
    call: Callable[..., Any] = _call,
) -> Outcome:
    """Return what ``uplink`` gives; raises DecodeError or Refused.

    ``known`` is None where devices that nobody configured are welcome; ``call(driver, function, *args)`` calls a
    driver, and may refuse to (:class:`~devices.timing.DriverAside`).
    """
    found = registry.find(uplink)
    if found is None:
        excluded = registry.excluded(uplink)
        if excluded is not None:
            raise Refused(
                "device_not_allowed",
                f"{uplink.protocol} {uplink.route!r} is profile {excluded.name}'s, which does not allow device "
                f"{uplink.device_id!r} (match.devices)",
            )
        raise Refused(
            "no_profile", f"no profile matches {uplink.protocol} {uplink.route!r} of device {uplink.device_id!r}"
        )
    entry = registry.device(uplink.device_id)
    if entry is not None and not entry.active:
        raise Refused("device_inactive", f"device {uplink.device_id!r} is configured as not active")
    profile, match = found
    if known is not None and match.kind == "data" and not known(uplink.device_id):
        raise Refused("unknown_device", f"device {uplink.device_id!r} is not known here (UNKNOWN_DEVICES=reject)")
    driver = registry.driver(profile)
    if match.kind == "request":
        return Outcome(readings=[], rejections=[], profile=profile)
    try:
        if match.kind == "feedback":
            feedback = call(driver.name, driver.feedback, uplink)
            return Outcome(readings=[], rejections=[], profile=profile, feedback=feedback)
        readings = call(driver.name, driver.decode, uplink, profile)
    except AnotherDevice as exc:
        raise Refused("another_device", str(exc)) from exc
    except DriverAside as exc:
        raise Refused("driver_aside", str(exc)) from exc
    except DecodeError:
        raise
    except MemoryError:
        # Without its cause: a lack of memory in general is waited out, whereas this is given up after some attempts.
        raise DriverOutOfMemory(f"driver {driver.name} found no memory for this message") from None
    except Exception as exc:
        raise DecodeError(f"driver {driver.name} failed on this message: {type(exc).__name__}: {exc}") from exc
    checked = validate(readings, profile, uplink.received_at, max_ahead)
    if checked.rejections and not checked.readings:
        first = checked.rejections[0]
        raise Refused(
            "rejected_value",
            f"nothing valid is left of the message: {len(checked.rejections)} values refused, the first"
            f" {first.index}/{first.label} = {first.value!r:.80}: {first.reason}",
            checked.rejections,
        )
    return Outcome(readings=checked.readings, rejections=checked.rejections, profile=profile)
