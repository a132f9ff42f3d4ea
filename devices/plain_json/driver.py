"""Plain JSON: each number, boolean or string of an object is a reading, its path the index and the label.

``timestamp``, else ``ts``, at the top of the object is the sample's time (RFC 3339, or epoch in s or ms), the arrival
time where neither is there. An array of objects is several samples; those of them without a time are set a
microsecond apart, so that none overwrites another. Nulls and arrays within an object are no values. A path that two
fields give, an object that holds no value, and whatever is not such JSON is a DecodeError.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any, ClassVar, Final

from devices import jsontext
from devices.driver import MAX_READINGS, Driver
from devices.model import DecodeError, Reading, Uplink, Value
from devices.profiles import Profile

TIME_FIELDS: Final = ("timestamp", "ts")
# Deeper than anything that a person would name by its path; a path of 200 characters is the end anyway.
MAX_DEPTH: Final = 32


def _flatten(fields: dict[str, Any], prefix: str, out: dict[str, Value], depth: int = 1) -> None:
    if depth > MAX_DEPTH:
        raise DecodeError(f"the objects are nested more than {MAX_DEPTH} deep")
    for name, value in fields.items():
        kind = type(value)
        if kind is dict:
            _flatten(value, f"{prefix}{name}.", out, depth + 1)
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


class PlainJsonDriver(Driver):
    """Reads JSON objects and arrays of them. Option ``time_field``: another name for the field of the sample's time."""

    name = "plain_json"
    options: ClassVar[dict[str, Any]] = {
        "type": "object",
        "additionalProperties": False,
        "properties": {"time_field": {"type": "string", "minLength": 1}},
    }

    def decode(self, uplink: Uplink, profile: Profile) -> list[Reading]:
        """Return one reading a field and sample."""
        data = jsontext.parse(uplink)
        if type(data) is dict:
            readings: list[Reading] = []
            self._sample(data, uplink, profile, uplink.received_at, readings)
        elif type(data) is list:
            readings = []
            for number, sample in enumerate(data):
                if type(sample) is not dict:
                    raise DecodeError(f"element {number} of the array is not an object")
                arrival = uplink.received_at + timedelta(microseconds=number)
                self._sample(sample, uplink, profile, arrival, readings)
        else:
            raise DecodeError("the payload is neither a JSON object nor an array of objects")
        if not readings:
            raise DecodeError("the payload holds no number, boolean or string")
        return readings

    def _sample(
        self, data: dict[str, Any], uplink: Uplink, profile: Profile, arrival: datetime, out: list[Reading]
    ) -> None:
        sampled_at = arrival
        named = profile.options.get("time_field")
        fields = data
        for name in (named,) if named else TIME_FIELDS:
            if data.get(name) is not None:
                sampled_at = jsontext.parse_time(data[name])
                break
        if any(name in data for name in TIME_FIELDS) or named in data:
            fields = {name: value for name, value in data.items() if name not in TIME_FIELDS and name != named}
        values: dict[str, Value] = {}
        _flatten(fields, "", values)
        for path, value in values.items():
            shape = profile.shape(path, (path,))
            if len(out) >= MAX_READINGS:
                raise DecodeError(f"the payload has more than {MAX_READINGS} values")
            out.append(
                Reading(
                    request_id=uplink.request_id,
                    timestamp=sampled_at,
                    device_id=uplink.device_id,
                    index=path,
                    values=[value],
                    labels=shape.labels,
                    display_names=shape.display_names,
                    metadata=shape.metadata,
                )
            )
