"""Objects of named fields as readings: what plain JSON, CBOR maps and several JSON dialects have in common.

Each number, boolean or text is a reading whose index and only label are the field's path, objects joined with ``.``.
Nulls and arrays within an object are no values. Two fields with one path, nesting beyond ``MAX_DEPTH`` and numbers
beyond a double are a DecodeError; so is a message of more than ``MAX_READINGS`` values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final

from devices import jsontext
from devices.driver import MAX_READINGS
from devices.model import DecodeError, Reading, Uplink, Value
from devices.profiles import Profile

# Deeper than anything that a person would name by its path; a path of 200 characters is the end anyway.
MAX_DEPTH: Final = 32


def flatten(
    fields: Mapping[str, Any], prefix: str = "", out: dict[str, Value] | None = None, depth: int = 1
) -> dict[str, Value]:
    """Return {path: value} of an object."""
    if out is None:
        out = {}
    if depth > MAX_DEPTH:
        raise DecodeError(f"the objects are nested more than {MAX_DEPTH} deep")
    for name, value in fields.items():
        kind = type(value)
        if kind is dict:
            flatten(value, f"{prefix}{name}.", out, depth + 1)
            continue
        if kind is float or kind is bool or kind is str:
            pass
        elif kind is int:
            value = jsontext.number(value)  # noqa: PLW2901
        else:
            continue
        path = prefix + name
        if path in out:
            raise DecodeError(f"two fields give the path {path!r:.80}")
        out[path] = value
    return out


def add(
    out: list[Reading],
    values: Mapping[str, Value],
    uplink: Uplink,
    profile: Profile,
    sampled_at: datetime,
    *,
    units: Mapping[str, str] | None = None,
    category: str | None = None,
    persist: bool = True,
) -> None:
    """Append a reading for each of ``values``."""
    if len(out) + len(values) > MAX_READINGS:
        raise DecodeError(f"the message has more than {MAX_READINGS} values")
    request_id, device_id = uplink.request_id, uplink.device_id
    for path, value in values.items():
        unit = (units.get(path, ""),) if units is not None else None
        shape = profile.shape(path, (path,), units=unit, category=category, persist=persist)
        out.append(
            Reading(
                request_id=request_id,
                timestamp=sampled_at,
                device_id=device_id,
                index=path,
                values=[value],
                labels=shape.labels,
                display_names=shape.display_names,
                metadata=shape.metadata,
            )
        )


def samples(data: Any, uplink: Uplink, profile: Profile, time_fields: Sequence[str]) -> list[Reading]:
    """Return the readings of an object, or of an array of objects, each a sample.

    The first of ``time_fields`` that a sample has is its time; none of them is a value. A sample without has that of
    its arrival, those of an array a microsecond apart, so that none overwrites another.
    """
    readings: list[Reading] = []
    if type(data) is dict:
        _sample(data, uplink, profile, readings, time_fields=time_fields, arrival=uplink.received_at)
    elif type(data) is list:
        for number, sample in enumerate(data):
            if type(sample) is not dict:
                raise DecodeError(f"element {number} of the array is not an object")
            arrival = uplink.received_at + timedelta(microseconds=number)
            _sample(sample, uplink, profile, readings, time_fields=time_fields, arrival=arrival)
    else:
        raise DecodeError("the payload is neither an object nor an array of objects")
    if not readings:
        raise DecodeError("the payload holds no number, boolean or text")
    return readings


def _sample(
    data: dict[str, Any],
    uplink: Uplink,
    profile: Profile,
    out: list[Reading],
    *,
    time_fields: Sequence[str],
    arrival: datetime,
) -> None:
    sampled_at: datetime | None = None
    fields = data
    for name in time_fields:
        if name in data:
            if fields is data:
                fields = data.copy()
            raw = fields.pop(name)
            if sampled_at is None and raw is not None:
                sampled_at = jsontext.parse_time(raw)
    add(out, flatten(fields), uplink, profile, sampled_at or arrival)
