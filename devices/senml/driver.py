"""SenML driver: each record is a reading under its resolved name, at its resolved time, in its unit.

JSON or CBOR, told apart by the first byte. The label of a value is the name again; a sum is a second value, ``sum``.
Data values stay base64url text in both formats. What is no SenML pack is a DecodeError, see :mod:`devices.senml.pack`.
"""

from __future__ import annotations

from base64 import urlsafe_b64encode
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, ClassVar, Final

from devices import cbordata, jsontext
from devices.driver import MAX_READINGS, Driver
from devices.model import DecodeError, Reading, Uplink, Value
from devices.profiles import Profile
from devices.senml import pack

POSITION_UNITS: Final = frozenset({"lat", "lon"})


def _cbor_scalar(value: Any) -> Any:
    if isinstance(value, bytes):
        return urlsafe_b64encode(value).rstrip(b"=").decode()
    return float(value) if isinstance(value, Decimal) else value


def _cbor_records(data: Any) -> Any:
    """Return a CBOR pack with the names that its integer labels stand for in JSON."""
    if not isinstance(data, list):
        raise DecodeError("a SenML pack is an array of records")
    records = []
    for record in data:
        if not isinstance(record, dict):
            raise DecodeError("a record of the pack is not a map")
        # Unknown integer labels are optional by their nature: there is no underscore to say otherwise.
        fields = [
            (pack.CBOR_LABELS.get(key) if type(key) is int else key, _cbor_scalar(value))
            for key, value in record.items()
        ]
        names = [name for name, _ in fields if isinstance(name, str)]
        if len(names) != len(set(names)):
            raise DecodeError("a record names a field twice, as text and as a label")
        records.append({name: value for name, value in fields if isinstance(name, str)})
    return records


def _time(record: pack.Record, received_at: datetime) -> datetime:
    if not record.relative:
        try:
            return jsontext.EPOCH + timedelta(seconds=record.time)
        except OverflowError:
            pass
    else:
        try:
            return (received_at + timedelta(seconds=record.time)).astimezone(UTC)
        except OverflowError:
            pass
    raise DecodeError(f"{record.name:.80} has the time {record.time!r:.40}, which no calendar holds")


def _label(index: str, record: pack.Record, seen: set[tuple[str, str, float]]) -> str:
    """Return the label of a value: the index; the unit of a position, which comes under the name of what is there;
    numbered where the pack says the same name twice for one time, so that none overwrites another."""
    label = first = record.unit if record.unit in POSITION_UNITS else index
    number = 1
    while (index, label, record.time) in seen:
        number += 1
        label = f"{first}_{number}"
    seen.add((index, label, record.time))
    return label


class SenmlDriver(Driver):
    """Reads SenML packs. Option ``strip_base_name``: a pack with one base name gives readings without it."""

    name = "senml"
    options: ClassVar[dict[str, Any]] = {
        "type": "object",
        "additionalProperties": False,
        "properties": {"strip_base_name": {"type": "boolean"}},
    }

    def decode(self, uplink: Uplink, profile: Profile) -> list[Reading]:
        """Return one reading a record."""
        # A JSON array begins with [ or white space; a CBOR array with 0x80 to 0x9f.
        if uplink.data[:1] and uplink.data[0] >= 0x80:
            records = pack.resolve(_cbor_records(cbordata.parse(uplink.data)))
        else:
            records = pack.resolve(jsontext.parse(uplink))
        if len(records) > MAX_READINGS:
            raise DecodeError(f"the pack has more than {MAX_READINGS} records")
        strip = bool(profile.options.get("strip_base_name")) and len({record.base_name for record in records}) == 1
        readings = []
        seen: set[tuple[str, str, float]] = set()
        for record in records:
            index = record.name[len(record.base_name) :] if strip else record.name
            index = index or record.name
            labels: list[str] = []
            values: list[Value] = []
            if record.has_value:
                labels.append(_label(index, record, seen))
                values.append(record.value)
            if record.total is not None:
                labels.append("sum")
                values.append(record.total)
            # The unit of a sum is that of the value and seconds together; SenML gives it no symbol.
            units = ["" if label == "sum" else record.unit for label in labels]
            shape = profile.shape(index, labels, units=units)
            metadata = shape.metadata
            if record.update_seconds is not None:
                metadata = {**metadata, "update_seconds": record.update_seconds}
            readings.append(
                Reading(
                    request_id=uplink.request_id,
                    timestamp=_time(record, uplink.received_at),
                    device_id=uplink.device_id,
                    index=index,
                    values=values,
                    labels=shape.labels,
                    display_names=shape.display_names,
                    metadata=metadata,
                )
            )
        return readings
