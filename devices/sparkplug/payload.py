"""The Sparkplug B payload (specification 3.0, section 6.4) as field tables, and its metrics as values.

Integers travel unsigned: Int8 to Int32 in ``int_value``, Int64 in ``long_value``, as two's complement. DateTime is
milliseconds in ``long_value``. Data sets, templates and arrays become JSON text, bytes and files hexadecimal text.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from devices import jsontext, protobuf
from devices.model import DecodeError, Value

_VALUE: Final = """
    optional uint32 int_value = {0}; optional uint64 long_value = {1}; optional float float_value = {2};
    optional double double_value = {3}; optional bool boolean_value = {4}; optional string string_value = {5}"""
_MESSAGES: Final = {
    "Payload": """
        optional uint64 timestamp = 1; repeated Metric metrics = 2; optional uint64 seq = 3; optional string uuid = 4;
        optional bytes body = 5""",
    "Metric": """
        optional string name = 1; optional uint64 alias = 2; optional uint64 timestamp = 3; optional uint32 datatype =
        4; optional bool is_historical = 5; optional bool is_transient = 6; optional bool is_null = 7;
        optional MetaData metadata = 8; optional PropertySet properties = 9;"""
    + _VALUE.format(10, 11, 12, 13, 14, 15)
    + "; optional bytes bytes_value = 16; optional DataSet dataset_value = 17; optional Template template_value = 18",
    "MetaData": """
        optional bool is_multi_part = 1; optional string content_type = 2; optional uint64 size = 3; optional uint64
        seq = 4; optional string file_name = 5; optional string file_type = 6; optional string md5 = 7;
        optional string description = 8""",
    "PropertySet": "repeated string keys = 1; repeated PropertyValue values = 2",
    "PropertySetList": "repeated PropertySet propertyset = 1",
    "PropertyValue": "optional uint32 type = 1; optional bool is_null = 2;"
    + _VALUE.format(3, 4, 5, 6, 7, 8)
    + "; optional PropertySet propertyset_value = 9; optional PropertySetList propertysets_value = 10",
    "DataSet": """
        optional uint64 num_of_columns = 1; repeated string columns = 2; repeated uint32 types = 3; repeated Row rows
        = 4""",
    "Row": "repeated DataSetValue elements = 1",
    "DataSetValue": _VALUE.format(1, 2, 3, 4, 5, 6),
    "Template": """
        optional string version = 1; repeated Metric metrics = 2; repeated Parameter parameters = 3;
        optional string template_ref = 4; optional bool is_definition = 5""",
    "Parameter": "optional string name = 1; optional uint32 type = 2;" + _VALUE.format(3, 4, 5, 6, 7, 8),
}
_classes = protobuf.build("headrace.sparkplug", _MESSAGES)
PAYLOAD: Final = _classes["Payload"]

INT8, INT16, INT32, INT64, UINT8, UINT16, UINT32, UINT64 = range(1, 9)
FLOAT, DOUBLE, BOOLEAN, STRING, DATETIME, TEXT, UUID, DATASET, BYTES, FILE, TEMPLATE = range(9, 20)
INT8_ARRAY, BOOLEAN_ARRAY, STRING_ARRAY, DATETIME_ARRAY = 22, 32, 33, 34
_SIGNED_BITS: Final = {INT8: 8, INT16: 16, INT32: 32, INT64: 64}
# Section 6.4.16: arrays are little-endian bytes of their elements.
_ARRAYS: Final[Mapping[int, str]] = {
    22: "b",
    23: "h",
    24: "i",
    25: "q",
    26: "B",
    27: "H",
    28: "I",
    29: "Q",
    30: "f",
    31: "d",
    34: "Q",
}
_SIMPLE: Final = ("int_value", "long_value", "float_value", "double_value", "boolean_value", "string_value")
MAX_TEMPLATE_DEPTH: Final = 8


def simple(holder: Any, datatype: int) -> Value:
    """Return the scalar that a metric, property or data set element holds; None where it holds none."""
    field = next((name for name in _SIMPLE if holder.HasField(name)), None)
    if field is None:
        return None
    value: Value = getattr(holder, field)
    bits = _SIGNED_BITS.get(datatype)
    if bits is not None and isinstance(value, int) and not isinstance(value, bool):
        value &= (1 << bits) - 1
        if value >> bits - 1:
            value -= 1 << bits
    if datatype == BOOLEAN and type(value) is int:
        return bool(value)
    return jsontext.number(value) if type(value) is int else value


def _text(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _array(raw: bytes, datatype: int) -> Value:
    code = _ARRAYS.get(datatype)
    if code is not None:
        size = struct.calcsize(f"<{code}")
        if len(raw) % size:
            raise DecodeError(f"an array of type {datatype} has {len(raw)} bytes, no multiple of {size}")
        return _text(list(struct.unpack(f"<{len(raw) // size}{code}", raw)))
    if datatype == BOOLEAN_ARRAY:
        count = int.from_bytes(raw[:4], "little")
        if len(raw) < 4 or (count + 7) // 8 != len(raw) - 4:
            raise DecodeError(f"a boolean array says {count} elements in {len(raw)} bytes")
        return _text([bool(raw[4 + n // 8] >> 7 - n % 8 & 1) for n in range(count)])
    if datatype == STRING_ARRAY:
        try:
            return _text(raw.decode().split("\x00")[:-1])
        except UnicodeDecodeError:
            raise DecodeError("a string array is not UTF-8") from None
    return raw.hex()


def _dataset(table: Any) -> str:
    types = list(table.types)
    rows = []
    for row in table.rows:
        kinds = types + [0] * (len(row.elements) - len(types))
        rows.append([simple(element, kind) for element, kind in zip(row.elements, kinds, strict=False)])
    return _text({"columns": list(table.columns), "rows": rows})


def value_of(metric: Any, datatype: int, depth: int = 0) -> Value:
    """Return the value of a metric of that type; None for a null; raises DecodeError for one that cannot be."""
    if metric.is_null:
        return None
    if metric.HasField("bytes_value"):
        return _array(metric.bytes_value, datatype)
    if metric.HasField("dataset_value"):
        return _dataset(metric.dataset_value)
    if metric.HasField("template_value"):
        if depth >= MAX_TEMPLATE_DEPTH:
            raise DecodeError(f"templates are nested more than {MAX_TEMPLATE_DEPTH} deep")
        members = {m.name: value_of(m, m.datatype, depth + 1) for m in metric.template_value.metrics}
        return _text({"template_ref": metric.template_value.template_ref, "metrics": members})
    return simple(metric, datatype)


def properties(metric: Any) -> dict[str, Value]:
    """Return the scalar properties of a metric: ``engUnit``, ``Quality`` and what else there is."""
    if not metric.HasField("properties"):
        return {}
    pairs = zip(metric.properties.keys, metric.properties.values, strict=False)
    return {key: simple(value, value.type) for key, value in pairs if not value.is_null}
