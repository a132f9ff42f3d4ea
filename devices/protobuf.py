"""Protobuf messages from field tables: descriptors are built when a driver is imported, no ``protoc`` anywhere.

A table maps a message's name to its fields, ``"uint32 id = 1; repeated sint32 samples = 5; Other inner = 6"``, an
enum's name to its values, ``"NONE = 0; SOME = 1"``. The wire is that of proto3; ``optional`` gives a scalar presence,
which is how proto2 is read. Beside the builder: JSON schema of a message, filling a message from such JSON, and the
flat view of a message that becomes labels and values.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError as ProtobufError
from google.protobuf.message import Message

from devices.model import DecodeError

_FIELD: Final = re.compile(r"(?:(?P<label>repeated|optional)\s+)?(?P<type>\w+)\s+(?P<name>\w+)\s*=\s*(?P<number>\d+)")
_ENTRY: Final = re.compile(r"(?P<name>\w+)\s*=\s*(?P<number>-?\d+)")
_Proto: Final = descriptor_pb2.FieldDescriptorProto
_SCALARS: Final = {
    name: getattr(_Proto, f"TYPE_{name.upper()}")
    for name in (
        *("double", "float", "int32", "int64", "uint32", "uint64", "sint32", "sint64"),
        *("fixed32", "fixed64", "sfixed32", "sfixed64", "bool", "string", "bytes"),
    )
}
_RANGES: Final[Mapping[int, tuple[int, int]]] = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}


def build(
    package: str, messages: Mapping[str, str], enums: Mapping[str, str] | None = None
) -> dict[str, type[Message]]:
    """Return the class of each message; raises ValueError for a table that is none."""
    enums = enums or {}
    file = descriptor_pb2.FileDescriptorProto(name=f"{package}.proto", package=package, syntax="proto3")
    for name, text in enums.items():
        enum = file.enum_type.add(name=name)
        for entry in filter(None, (part.strip() for part in text.split(";"))):
            found = _ENTRY.fullmatch(entry)
            if found is None:
                raise ValueError(f"{name}: {entry!r} is no enum value")
            enum.value.add(name=found["name"], number=int(found["number"]))
    for name, text in messages.items():
        message = file.message_type.add(name=name)
        for entry in filter(None, (part.strip() for part in text.split(";"))):
            found = _FIELD.fullmatch(entry)
            if found is None:
                raise ValueError(f"{name}: {entry!r} is no field")
            label = _Proto.LABEL_REPEATED if found["label"] == "repeated" else _Proto.LABEL_OPTIONAL
            field = message.field.add(name=found["name"], number=int(found["number"]), label=label)
            if found["label"] == "optional":
                # Presence in proto3 is a oneof of its own (descriptor.proto); proto2 would let text through that is
                # not UTF-8.
                field.proto3_optional = True
                field.oneof_index = len(message.oneof_decl)
                message.oneof_decl.add(name=f"_{found['name']}")
            kind = found["type"]
            if kind in _SCALARS:
                field.type = _SCALARS[kind]
            else:
                field.type = _Proto.TYPE_ENUM if kind in enums else _Proto.TYPE_MESSAGE
                field.type_name = f".{package}.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{name}")) for name in messages}


def parse(kind: type[Message], data: bytes, what: str) -> Any:
    """Return the message in ``data``; raises DecodeError, which says ``what`` was expected."""
    message = kind()
    try:
        message.ParseFromString(data)
    except ProtobufError as exc:
        raise DecodeError(f"the payload is no {what}: {exc}") from None
    return message


def repeated(field: FieldDescriptor) -> bool:
    """Tell whether a field is a list."""
    return bool(field.is_repeated)


def schema(descriptor: Any, *, skip: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Return the JSON schema of a message: fields by name, bytes as hexadecimal text, enums by name or number."""
    properties: dict[str, Any] = {}
    for field in descriptor.fields:
        if field.name in skip:
            continue
        one = _field_schema(field)
        properties[field.name] = {"type": "array", "items": one} if repeated(field) else one
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _field_schema(field: FieldDescriptor) -> dict[str, Any]:
    if field.message_type is not None:
        return schema(field.message_type)
    if field.enum_type is not None:
        return {
            "enum": [*(value.name for value in field.enum_type.values), *(v.number for v in field.enum_type.values)]
        }
    if field.cpp_type in _RANGES:
        low, high = _RANGES[field.cpp_type]
        return {"type": "integer", "minimum": low, "maximum": high}
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return {"type": "boolean"}
    if field.type == FieldDescriptor.TYPE_BYTES:
        return {"type": "string", "pattern": "^([0-9a-fA-F]{2})*$"}
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return {"type": "string"}
    return {"type": "number"}


def fill(message: Any, fields: Mapping[str, Any]) -> None:
    """Set the fields of ``message`` from JSON that fits its schema."""
    by_name = message.DESCRIPTOR.fields_by_name
    for name, value in fields.items():
        field = by_name[name]
        if field.message_type is not None:
            if repeated(field):
                for item in value:
                    fill(getattr(message, name).add(), item)
            else:
                getattr(message, name).SetInParent()
                fill(getattr(message, name), value)
        elif repeated(field):
            getattr(message, name).extend(_scalar(field, item) for item in value)
        else:
            setattr(message, name, _scalar(field, value))


def _scalar(field: FieldDescriptor, value: Any) -> Any:
    if field.enum_type is not None and isinstance(value, str):
        return field.enum_type.values_by_name[value].number
    if field.type == FieldDescriptor.TYPE_BYTES:
        return bytes.fromhex(value)
    return value


def flatten(message: Any, prefix: str = "", *, skip: frozenset[str] = frozenset()) -> Iterator[tuple[str, Any]]:
    """Yield (name, value) of all set fields: inner messages joined by ``_``, lists numbered from 1, enums by name,
    bytes as hex."""
    for field, value in message.ListFields():
        if field.name in skip:
            continue
        items = (
            [(f"{prefix}{field.name}_{n}", item) for n, item in enumerate(value, 1)]
            if repeated(field)
            else [(prefix + field.name, value)]
        )
        for name, item in items:
            if field.message_type is not None:
                yield from flatten(item, f"{name}_", skip=skip)
            elif field.enum_type is not None:
                known = field.enum_type.values_by_number.get(item)
                yield name, known.name if known is not None else item
            elif isinstance(item, bytes):
                yield name, item.hex()
            else:
                yield name, item
