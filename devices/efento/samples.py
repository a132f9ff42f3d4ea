"""The arithmetic of Efento channels: from offsets to samples. Pure; times are epoch seconds as the device counts
them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from devices.efento import messages as m
from devices.model import Value

ERROR_CODES: Final = range(8_355_840, 8_388_608)
# A message with a binary channel and no factor was measured 14 times a base period.
BINARY_FACTOR: Final = 14
CALIBRATION: Final = ("required", "on-going", "done")

# (epoch seconds, value or None, what metadata says of this sample alone)
Sample = tuple[int, Value, dict[str, Any] | None]


def _error(code: int) -> tuple[None, dict[str, Any]]:
    return None, {"error_code": code, "error": f"the sensor reports error {code}"}


def binary(channel: Any) -> list[Sample]:
    """Return the changes of state: at ``timestamp + |offset| - 1``, the sign is the state."""
    found: list[Sample] = []
    for offset in channel.sample_offsets:
        if offset in ERROR_CODES:
            found.append((channel.timestamp, *_error(offset)))
        elif offset == 0:
            found.append((channel.timestamp, None, {"error": "a change of state without a sign"}))
        else:
            found.append((channel.timestamp + abs(offset) - 1, offset > 0, None))
    return found


def continuous(channel: Any, kind: m.MeasurementType | None, period: int) -> list[Sample]:
    """Return the samples, a period apart; of an accumulating type its own part of the counter, the rest as
    ``state``."""
    found: list[Sample] = []
    start, at = channel.start_point, channel.timestamp
    divisor = kind.divisor if kind is not None else 1
    plain = kind is None or (kind.kind == "continuous" and kind.divided_by == 1)
    for offset in channel.sample_offsets:
        if offset in ERROR_CODES:
            found.append((at, *_error(offset)))
        elif plain:
            raw = start + offset
            found.append((at, raw / divisor if divisor != 1 else raw, None))
        elif kind is not None and kind.kind == "calibrated":
            value, rest = divmod(start + offset, 3)
            found.append((at, value, {"calibration": CALIBRATION[rest]}))
        elif kind is not None:
            value, rest = divmod(start + offset, kind.divided_by)
            found.append((at, value, {"state": rest}))
        at += period
    return found


def counter(minor: list[Sample], major: list[Sample], weight: int) -> list[Sample]:
    """Return the samples of a counter: each of the minor with the major's of the same time, else its last before."""
    found: list[Sample] = []
    by_time = {at: (value, extra) for at, value, extra in major}
    times = sorted(by_time)
    for at, low, low_extra in minor:
        when = at if at in by_time else max((time for time in times if time < at), default=None)
        high, high_extra = by_time[when] if when is not None else (None, {"error": "the major channel has no sample"})
        if low is None:
            found.append((at, None, low_extra))
        elif high is None:
            found.append((at, None, high_extra))
        else:
            states = {"minor_state": (low_extra or {})["state"], "major_state": (high_extra or {})["state"]}
            found.append((at, int(high) * weight + int(low), states))
    return found


def period_seconds(message: Any, kinds: Sequence[m.MeasurementType | None]) -> int:
    """Return the seconds between samples: base × factor, a factor of 0 being 1, or 14 where a channel is binary."""
    has_binary = any(kind is not None and kind.kind == "binary" for kind in kinds)
    factor = message.measurement_period_factor or (BINARY_FACTOR if has_binary else 1)
    return int(message.measurement_period_base * factor)


def pairs(channels: Sequence[Any]) -> dict[int, int]:
    """Return {position of a minor channel: position of its major}: the first minor of a kind has its first major."""
    found: dict[int, int] = {}
    for minor, pair in m.PAIRS.items():
        minors = [n for n, channel in enumerate(channels) if channel.type == minor]
        majors = [n for n, channel in enumerate(channels) if channel.type == pair.major]
        found.update(zip(minors, majors, strict=False))
    return found
