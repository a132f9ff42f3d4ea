"""Protobuf messages from field tables: what a table says is what goes over the wire."""

from typing import Any

import pytest

from devices import protobuf
from devices.model import DecodeError

CLASSES = protobuf.build(
    "test.tables",
    {
        "Inner": "sint32 number = 1; bytes raw = 2",
        "Outer": "string name = 1; repeated Inner inner = 2; Colour colour = 3; repeated uint32 list = 4; double x = 5",
    },
    {"Colour": "NONE = 0; RED = 1"},
)


def test_fill_and_flatten() -> None:
    """JSON becomes a message, a message labels and values."""
    built = CLASSES["Outer"]()
    protobuf.fill(
        built, {"name": "a", "inner": [{"number": -1}, {"raw": "00ff"}], "colour": "RED", "list": [0, 7], "x": 1.5}
    )
    assert dict(protobuf.flatten(built)) == {
        "name": "a",
        "inner_1_number": -1,
        "inner_2_raw": "00ff",
        "colour": "RED",
        "list_1": 0,
        "list_2": 7,
        "x": 1.5,
    }
    assert built.SerializeToString().hex() == "0a0161120208011204120200ff18012202000729000000000000f83f"


def test_schema_says_what_fill_takes() -> None:
    """The schema knows ranges, enums, lists and inner messages."""
    properties = protobuf.schema(CLASSES["Outer"].DESCRIPTOR)["properties"]
    assert properties["colour"] == {"enum": ["NONE", "RED", 0, 1]}
    assert properties["list"]["items"] == {"type": "integer", "minimum": 0, "maximum": 2**32 - 1}
    assert properties["inner"]["items"]["properties"]["number"]["minimum"] == -(2**31)
    assert protobuf.schema(CLASSES["Outer"].DESCRIPTOR, skip=frozenset({"x"}))[
        "properties"
    ].keys() == properties.keys() - {"x"}


@pytest.mark.parametrize("data", [b"\xff", b"\x0a\x05ab", b"\x0a\x01\xff"])
def test_what_does_not_parse_is_poison(data: Any) -> None:
    """Broken wire format and text that is not UTF-8 are DecodeError that names what was expected."""
    with pytest.raises(DecodeError, match="no thing"):
        protobuf.parse(CLASSES["Outer"], data, "thing")


@pytest.mark.parametrize("table", ["uint32 x", "uint32 = 1", "x = 1; "])
def test_a_wrong_table_is_said(table: Any) -> None:
    """A table that is none is an error when it is built."""
    with pytest.raises(ValueError, match="is no field"):
        protobuf.build("test.wrong", {"M": table})
