"""From a Reading to rows, as a pure function.

Numbers and booleans (0/1) go to ``value``, anything else to ``value_text``; None is no value and no row. What
``metadata["persist"]`` marks false is not kept. NaN, infinities and integers beyond a double are refused: SQL would
take some of them, and every average over them would be worthless.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from agents.stores.base import Row
from devices.model import Reading
from streams.resilience.failures import Rejected

__all__ = ["rows_of"]

Refuse = Callable[[str, Any, str], None]


def rows_of(reading: Reading, refuse: Refuse | None = None) -> list[Row]:
    """Return the rows of ``reading``, one for each value that is kept.

    ``refuse(label, value, reason)`` is called for each value that no store may hold, and the others go on; without it
    the first such value raises :class:`~streams.resilience.failures.Rejected`, as do ``values`` and ``labels`` of
    different length.
    """
    labels = reading.labels
    values = reading.values
    metadata = reading.metadata
    device_id, index, time, request_id = reading.device_id, reading.index, reading.timestamp, reading.request_id
    if len(values) != len(labels):
        raise Rejected(
            f"reading of device {device_id!r}, index {index!r} has {len(values)} values and {len(labels)} labels; "
            "a driver must give each value its label"
        )
    persist = _aligned(metadata.get("persist"), len(values))
    units = _aligned(metadata.get("units"), len(values))
    rows: list[Row] = []
    for position, value in enumerate(values):
        if value is None or (persist is not None and persist[position] is False):
            continue
        label = labels[position]
        number: float | None = None
        text: str | None = None
        if isinstance(value, bool | int | float):
            try:
                number = float(value)
            except OverflowError:
                number = math.inf
            if not math.isfinite(number):
                reason = "is not a finite double"
                if refuse is None:
                    raise Rejected(f"value of device {device_id!r}, index {index!r}, label {label!r} {reason}")
                refuse(label, value, reason)
                continue
        elif isinstance(value, str):
            text = value
        else:
            text = msgspec.json.encode(value).decode()
        unit = units[position] if units is not None else None
        if unit is not None and not isinstance(unit, str):
            unit = str(unit)
        rows.append((device_id, index, label, time, number, text, unit, request_id))
    return rows


def _aligned(listed: Any, length: int) -> Sequence[Any] | None:
    """Return ``listed`` when it says something for each of ``length`` values; a shorter list leaves the rest unsaid."""
    if not isinstance(listed, list | tuple):
        return None
    return listed if len(listed) >= length else [*listed, *([None] * (length - len(listed)))]
