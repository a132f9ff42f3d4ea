"""Validation, value by value: what breaks a rule is taken out and said, what is left goes on.

Guarantees: what leaves here holds no NaN and no infinity, no text that a store cannot hold, no sample further ahead of
its arrival than ``max_ahead`` (24 h); a reading without a rejected value passes as the same object. A value None means
*missing* (the device says that it has none) and passes. Pure: no clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from math import isfinite
from typing import Any, Final

import msgspec

from devices.model import Reading, Value
from devices.profiles import MAX_NAME_CHARS, Profile, Shape, ValueRule

MAX_AHEAD: Final = timedelta(hours=24)
MAX_TEXT_CHARS: Final = 65_536

# What in a reading's metadata runs beside its values, and shrinks with them.
PARALLEL_METADATA: Final = ("units", "persist", "aliases")


class Rejection(msgspec.Struct, frozen=True, kw_only=True):
    """One value that was refused. ``reason`` is one of ``not_finite``, ``type``, ``below_min``, ``above_max``,
    ``not_whitelisted``, ``in_future``, ``too_old``, ``text``, ``name``."""

    device_id: str
    index: str
    label: str
    value: Value
    reason: str


class Validated(msgspec.Struct, kw_only=True):
    """What is left, and what was refused."""

    readings: list[Reading]
    rejections: list[Rejection]


def _plain_reason(value: Any) -> str | None:
    """Judge a value that no rule speaks of."""
    if value is None or value is True or value is False:
        return None
    if isinstance(value, (int, float)):
        try:
            return None if isfinite(value) else "not_finite"
        except OverflowError:
            return "not_finite"
    if isinstance(value, str):
        return "text" if "\x00" in value or len(value) > MAX_TEXT_CHARS else None
    return "type"


def _rule_reason(value: Any, rule: ValueRule) -> str | None:
    """Judge a value that is sound in itself against what the profile says of it."""
    if value is None:
        return None
    kind = type(value)
    wanted = rule.type
    if wanted is not None:
        if wanted == "number":
            fits = kind is float or kind is int
        elif wanted == "integer":
            fits = kind is int or (kind is float and value.is_integer())
        elif wanted == "boolean":
            fits = kind is bool
        else:
            fits = kind is str
        if not fits:
            return "type"
    if rule.whitelist is not None and not any(value == item and kind is type(item) for item in rule.whitelist):
        # 1 and 1.0 are the same number to a user; True and 1 are not the same to a whitelist of numbers.
        same = kind in (int, float) and any(value == item and not isinstance(item, bool) for item in rule.whitelist)
        if not same:
            return "not_whitelisted"
    if kind is float or kind is int:
        if rule.min is not None and value < rule.min:
            return "below_min"
        if rule.max is not None and value > rule.max:
            return "above_max"
    return None


def _bad_values(values: list[Value], shape: Shape) -> dict[int, str]:
    bad: dict[int, str] = dict.fromkeys(shape.bad_names, "name") if shape.bad_names else {}
    if not shape.trusted:
        try:
            # One C loop for the common case: a NaN or an infinity anywhere makes the sum one. Text makes it a
            # TypeError.
            sound = isfinite(sum(values))  # type: ignore[arg-type]
        except (TypeError, OverflowError):
            sound = False
        if not sound:
            for position, value in enumerate(values):
                reason = _plain_reason(value)
                if reason is not None:
                    bad[position] = reason
    for position, rule in shape.checks:
        if position not in bad:
            reason = _rule_reason(values[position], rule)
            if reason is not None:
                bad[position] = reason
    return bad


def _shrink(reading: Reading, bad: dict[int, str]) -> Reading:
    keep = [position for position in range(len(reading.values)) if position not in bad]
    metadata = dict(reading.metadata)
    for key in PARALLEL_METADATA:
        if isinstance(metadata.get(key), list):
            metadata[key] = [metadata[key][position] for position in keep]
    return msgspec.structs.replace(
        reading,
        values=[reading.values[position] for position in keep],
        labels=[reading.labels[position] for position in keep],
        display_names=[reading.display_names[position] for position in keep],
        metadata=metadata,
    )


def validate(
    readings: Sequence[Reading], profile: Profile, received_at: datetime, max_ahead: timedelta = MAX_AHEAD
) -> Validated:
    """Check every value of ``readings`` against ``profile`` and against what stores can hold."""
    kept: list[Reading] = []
    rejections: list[Rejection] = []
    latest = received_at + max_ahead
    checked_at: datetime | None = None
    ahead = False
    for reading in readings:
        shape = profile.shape_of(reading.index, reading.labels)
        # The readings of a message mostly share one time, the very object.
        if reading.timestamp is not checked_at:
            checked_at = reading.timestamp
            ahead = checked_at > latest
        if shape.free and not ahead:
            kept.append(reading)
            continue
        bad: dict[int, str]
        if ahead:
            bad = dict.fromkeys(range(len(reading.values)), "in_future")
        elif shape.max_age_seconds is not None and (
            (received_at - reading.timestamp).total_seconds() > shape.max_age_seconds
        ):
            bad = dict.fromkeys(range(len(reading.values)), "too_old")
        else:
            bad = _bad_values(reading.values, shape)
        if not bad:
            kept.append(reading)
            continue
        rejections.extend(
            Rejection(
                device_id=reading.device_id,
                index=reading.index[:MAX_NAME_CHARS],
                label=reading.labels[position][:MAX_NAME_CHARS],
                value=reading.values[position],
                reason=reason,
            )
            for position, reason in sorted(bad.items())
        )
        if len(bad) < len(reading.values):
            kept.append(_shrink(reading, bad))
    return Validated(readings=kept, rejections=rejections)
