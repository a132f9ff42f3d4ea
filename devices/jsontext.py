"""JSON as devices send it: one place where text becomes Python data, and times of many forms become UTC datetimes.

What cannot be a device's JSON is :class:`~devices.model.DecodeError`, whatever way it is wrong: no JSON, NaN and
Infinity, numbers beyond a double, nesting that exhausts the stack, invalid UTF-8.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, Final

import msgspec

from devices.model import DecodeError, Uplink

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
# 1e11 s is the year 5138 and 1e11 ms is 1973: what is larger counts milliseconds.
_MILLISECONDS_FROM: Final = 1e11
_INT64: Final = 2**63

_decode = msgspec.json.Decoder().decode


def parse(uplink: Uplink) -> Any:
    """Return the payload's JSON; raises DecodeError."""
    try:
        return _decode(uplink.data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        raise DecodeError(f"the payload is not JSON: {exc}") from exc
    except RecursionError:
        raise DecodeError("the payload's JSON is nested too deeply") from None


def number(value: float) -> int | float:
    """Return ``value`` as every store can hold it: integers beyond 64 bits as floats; raises DecodeError beyond a
    double."""
    if type(value) is int and not -_INT64 <= value < _INT64:
        try:
            return float(value)
        except OverflowError:
            raise DecodeError("an integer is larger than a double can hold") from None
    return value


def from_epoch(value: float) -> datetime:
    """Return the time of an epoch in seconds or, beyond 1e11, milliseconds; raises DecodeError for a time no calendar
    holds."""
    try:
        if abs(value) >= _MILLISECONDS_FROM:
            return EPOCH + (timedelta(milliseconds=value))
        return EPOCH + timedelta(seconds=value)
    except (OverflowError, ValueError):
        raise DecodeError(f"{value!r:.40} is not a time in epoch seconds or milliseconds") from None


def from_milliseconds(value: int) -> datetime:
    """Return the time of an epoch in milliseconds; raises DecodeError for a time no calendar holds."""
    try:
        return EPOCH + timedelta(milliseconds=value)
    except (OverflowError, ValueError):
        raise DecodeError(f"{value!r:.40} is not a time in epoch milliseconds") from None


def parse_time(value: Any) -> datetime:
    """Return the UTC time of RFC 3339 text (without an offset: UTC) or of an epoch in s or ms; raises DecodeError."""
    if type(value) is int or type(value) is float:
        return from_epoch(value)
    if isinstance(value, str):
        try:
            found = msgspec.convert(value, datetime)
            return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
        except (msgspec.ValidationError, OverflowError, ValueError):
            pass
    raise DecodeError(f"{value!r:.80} is not a time: RFC 3339, or epoch seconds or milliseconds")
