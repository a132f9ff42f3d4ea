"""What ``faust -A streams decode`` prints: the readings of one message, and what validation says of them.

Nothing is connected and nothing is sent. ``payload_of`` makes bytes of what was given (a file, hexadecimal digits, or
text); :func:`explain` is a pure function of these bytes, the registry and a time of arrival. Profiles that are not
active are tried too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from devices.driver import Driver
from devices.model import DecodeError, Reading, Uplink
from devices.pipeline import Outcome, Refused, read
from devices.profiles import Match, Profile
from devices.registry import Registry, driver_class
from devices.validation import Rejection

_HEX: Final = re.compile(r"(?:[0-9a-fA-F]{2}\s*)+")
_NAMED: Final = re.compile(r"\{(\w+)\}")
# What every reading has; the rest of its metadata is the driver's and worth printing.
_COMMON: Final = frozenset({"category", "units", "persist", "profile"})


class Explanation(NamedTuple):
    """What to print, and whether the message gave something."""

    text: str
    accepted: bool


def payload_of(argument: str, driver: str) -> bytes:
    """Return the message that ``argument`` is: the file's bytes, else digits as the driver takes them, else the text
    itself.

    Raises OSError for a file that is there and cannot be read, KeyError for a driver that is not registered.
    """
    path = Path(argument)
    try:
        is_file = path.is_file()
    except (OSError, ValueError):
        is_file = False
    data = path.read_bytes() if is_file else argument.encode("utf-8", "surrogateescape")
    text = data.strip()
    if driver_class(driver).text:
        return text
    digits = text.decode("ascii", "replace")
    return bytes.fromhex(digits) if _HEX.fullmatch(digits) else data


def explain(
    driver: str,
    data: bytes,
    registry: Registry,
    *,
    topic: str | None = None,
    device_id: str | None = None,
    received_at: datetime,
) -> Explanation:
    """Return what ``data`` is to ``driver``, as if it had arrived on ``topic`` (an MQTT topic or a CoAP path) at
    ``received_at``.

    Without a topic, one that the driver's first profile matches is made up; without a device id, the topic's or the
    payload's is taken. Raises KeyError for a driver that is not registered.
    """
    own = [profile for profile in registry.profiles if profile.driver == driver]
    if not own:
        own = [Profile(driver, driver, match=[Match(protocol="mqtt", route=f"{driver}/{{device_id}}")])]
    registry = Registry(own, registry.devices)
    instance = registry.driver(driver)
    protocol, route = _route(own, topic, instance, data, received_at)
    device_id = (
        device_id or registry.device_id(protocol, route, data) or _named(instance, protocol, route, data, received_at)
    )
    uplink = _uplink(protocol, route, data, device_id or "", received_at)
    found = registry.find(uplink)
    lines = [
        f"driver   {driver}",
        f"profile  {found[0].name if found else 'none'}",
        f"route    {protocol} {route}",
        f"device   {device_id or 'not known'}",
        f"payload  {len(data)} bytes",
        "",
    ]
    try:
        outcome = read(uplink, registry)
    except DecodeError as exc:
        return Explanation("\n".join([*lines, f"dead letter (poison): {exc}"]), accepted=False)
    except Refused as exc:
        refused = _rejections(exc.rejections)
        return Explanation(
            "\n".join([*lines, *refused, f"dead letter (rejected, {exc.reason}): {exc}"]), accepted=False
        )
    return Explanation("\n".join([*lines, *_outcome(outcome)]), accepted=True)


def _route(
    profiles: Iterable[Profile], topic: str | None, driver: Driver, data: bytes, received_at: datetime
) -> tuple[str, str]:
    """Return protocol and route: of the first match that fits ``topic``, or one made up for the first match of data."""
    matches = [match for profile in profiles for match in profile.match]
    if topic is not None:
        route = topic.removeprefix("/")
        fitting = [match for match in matches if match.params(route.split("/")) is not None]
        return (fitting or matches)[0].protocol, route
    first = next((match for match in matches if match.kind == "data"), matches[0])
    named = _named(driver, first.protocol, first.route, data, received_at) or "device"
    filled = _NAMED.sub(lambda part: named if part[1] == "device_id" else part[1], first.route)
    return first.protocol, filled.replace("#", "any").replace("+", "any")


def _named(driver: Driver, protocol: str, route: str, data: bytes, received_at: datetime) -> str | None:
    try:
        return driver.device_id(_uplink(protocol, route, data, "", received_at))
    except DecodeError:
        return None


def _uplink(protocol: str, route: str, data: bytes, device_id: str, received_at: datetime) -> Uplink:
    try:
        text: str | None = data.decode()
    except UnicodeDecodeError:
        text = None
    return Uplink(
        request_id="decode",
        received_at=received_at,
        device_id=device_id,
        protocol=protocol,
        route=route,
        text=text,
        data=data,
        metadata={},
    )


def _outcome(outcome: Outcome) -> list[str]:
    lines: list[str] = []
    if outcome.feedback is not None:
        said = "success" if outcome.feedback.success else "failure"
        lines.append(f"feedback  command {outcome.feedback.request_id}: {said} ({outcome.feedback.detail})")
    elif not outcome.readings:
        lines.append("no readings")
    for reading in outcome.readings:
        lines.extend(_reading(reading))
    lines.extend(_rejections(outcome.rejections))
    values = sum(len(reading.values) for reading in outcome.readings)
    lines.append(f"{len(outcome.readings)} readings, {values} values accepted, {len(outcome.rejections)} refused")
    return lines


def _reading(reading: Reading) -> list[str]:
    count = len(reading.values)
    units = reading.metadata.get("units") or [""] * count
    persist = reading.metadata.get("persist") or [True] * count
    lines = [f"{reading.index}  {reading.timestamp.isoformat()}  {reading.device_id}"]
    width = max(map(len, reading.labels), default=0)
    for label, value, unit, kept in zip(reading.labels, reading.values, units, persist, strict=True):
        shown = "missing" if value is None else msgspec.json.encode(value).decode()
        lines.append(f"  {label:<{width}}  {shown} {unit}".rstrip() + ("" if kept else "  (not persisted)"))
    extras = {key: value for key, value in reading.metadata.items() if key not in _COMMON}
    if reading.metadata.get("category") != "measurements":
        extras = {"category": reading.metadata.get("category"), **extras}
    if extras:
        lines.append("  " + msgspec.json.encode(extras).decode())
    return lines


def _rejections(rejections: Iterable[Rejection]) -> list[str]:
    return [f"refused  {r.index}/{r.label} = {r.value!r:.80}: {r.reason}" for r in rejections]
