"""SenML packs resolved: from records that lean on base fields to records that stand alone (RFC 8428, section 4.6).

Base fields hold from the record that sets them to the end of the pack. Names and times are sums of base and own; a
time below 2**28 is relative to arrival. A pack of a version above 10, with a field that must be understood and is
not, or with a record that has no value, is a DecodeError.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from devices import jsontext
from devices.model import DecodeError, Value

VERSION: Final = 10
# Section 4.5.3: what is smaller counts seconds from now, what is not counts them from 1970.
ABSOLUTE_FROM: Final = 2**28
# Section 4.5.1.
NAME: Final = re.compile(r"[A-Za-z0-9][-A-Za-z0-9:./_]*")
# Section 6, table 4.
CBOR_LABELS: Final[Mapping[int, str]] = {
    -1: "bver",
    -2: "bn",
    -3: "bt",
    -4: "bu",
    -5: "bv",
    -6: "bs",
    0: "n",
    1: "u",
    2: "v",
    3: "vs",
    4: "vb",
    5: "s",
    6: "t",
    7: "ut",
    8: "vd",
}
_BASE: Final = frozenset({"bver", "bn", "bt", "bu", "bv", "bs"})


class Record(NamedTuple):
    """One resolved record. ``time``: seconds, from arrival where ``relative``; ``value`` and ``total`` (the sum):
    None where not there."""

    base_name: str
    name: str
    unit: str
    value: Value
    has_value: bool
    total: float | None
    time: float
    relative: bool
    update_seconds: float | None


def _number(record: Mapping[str, Any], key: str, *, finite: bool = False) -> float | None:
    value = record.get(key)
    if value is None:
        return None
    if type(value) is not int and type(value) is not float:
        raise DecodeError(f"{key} is not a number")
    value = jsontext.number(value)
    if finite and not math.isfinite(value):
        raise DecodeError(f"{key} is not finite")
    return value


def _text(record: Mapping[str, Any], key: str) -> str | None:
    value = record.get(key)
    if value is not None and not isinstance(value, str):
        raise DecodeError(f"{key} is not text")
    return value


def _value(record: Mapping[str, Any], base: float | None) -> tuple[Value, bool]:
    given = [key for key in ("v", "vs", "vb", "vd") if record.get(key) is not None]
    if len(given) > 1:
        raise DecodeError(f"a record has several values: {', '.join(given)}")
    if not given or given == ["v"]:
        own = _number(record, "v")
        if own is None and base is None:
            return None, False
        return (own or 0) + (base or 0), True
    key = given[0]
    if key == "vb":
        if type(record[key]) is not bool:
            raise DecodeError("vb is not a boolean")
        return record[key], True
    return _text(record, key), True


def resolve(records: Any) -> list[Record]:
    """Return the resolved records of a pack; raises DecodeError."""
    if not isinstance(records, list) or not records:
        raise DecodeError("a SenML pack is an array of records")
    base: dict[str, Any] = {}
    found: list[Record] = []
    for position, record in enumerate(records):
        if not isinstance(record, dict):
            raise DecodeError(f"record {position} is not an object")
        unknown = next((key for key in record if isinstance(key, str) and key.endswith("_")), None)
        if unknown is not None:
            raise DecodeError(f"record {position} has the field {unknown!r:.40}, which must be understood and is not")
        version = record.get("bver")
        if version is not None and (type(version) is not int or not 0 < version <= VERSION):
            raise DecodeError(f"the pack is of version {version!r:.20}, known are those up to {VERSION}")
        base.update((key, record[key]) for key in _BASE if record.get(key) is not None)
        if record.keys() <= _BASE:
            continue
        found.append(_record(position, record, base))
    if not found:
        raise DecodeError("the pack has no record with a value")
    return found


def _record(position: int, record: Mapping[str, Any], base: Mapping[str, Any]) -> Record:
    base_name = _text(base, "bn") or ""
    name = _text(record, "n") or ""
    if not NAME.fullmatch(base_name + name):
        raise DecodeError(f"record {position} has no name that SenML allows: {base_name + name!r:.80}")
    value, has_value = _value(record, _number(base, "bv"))
    own_sum, base_sum = _number(record, "s"), _number(base, "bs")
    total = None if own_sum is None and base_sum is None else (own_sum or 0) + (base_sum or 0)
    if not has_value and total is None:
        raise DecodeError(f"record {position} ({base_name + name:.80}) has no value")
    time = (_number(base, "bt", finite=True) or 0) + (_number(record, "t", finite=True) or 0)
    return Record(
        base_name=base_name,
        name=base_name + name,
        unit=_text(record, "u") or _text(base, "bu") or "",
        value=value,
        has_value=has_value,
        total=total,
        time=time,
        relative=time < ABSOLUTE_FROM,
        update_seconds=_number(record, "ut", finite=True),
    )
