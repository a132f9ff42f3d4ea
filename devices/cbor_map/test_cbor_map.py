"""CBOR maps: the RFC's examples, times in their many forms, and what must be refused."""

import json
from pathlib import Path
from typing import Any

import cbor2
import pytest

from devices import testing
from devices.cbor_map.driver import CborMapDriver
from devices.model import DecodeError
from devices.pipeline import Refused
from devices.profiles import Profile
from devices.testing import readme_shows, uplink

VECTORS = json.loads(Path(__file__).with_name("vectors.json").read_text())


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: v["hex"][:16])
@pytest.mark.parametrize(("protocol", "route"), [("mqtt", "cbor/d1"), ("coap", "cbor/d1")])
def test_vector(vector: Any, protocol: Any, route: Any) -> None:
    """Every vector gives its readings, or is refused as it says."""
    message = uplink(bytes.fromhex(vector["hex"]), route, protocol=protocol)
    if vector.get("error"):
        with pytest.raises(DecodeError):
            testing.read(message)
        return
    readings = testing.read(message).readings
    assert [[r.timestamp.isoformat(), r.index, r.values[0]] for r in readings] == vector["readings"]


def test_integer_keys_have_names() -> None:
    """A profile names integer keys, inner ones too, and the field of the time."""
    profile = Profile("p", "cbor_map", options={"keys": {"1": "t", "-2": "when", "3": "air"}, "time_field": "when"})
    data = cbor2.dumps({1: 20, -2: 1_750_000_000, 3: {1: 7}})
    readings = CborMapDriver().decode(uplink(data, "x"), profile)
    assert [(r.index, r.values[0], r.timestamp.year) for r in readings] == [("t", 20, 2025), ("air.t", 7, 2025)]


def test_nan_is_refused_by_validation() -> None:
    """CBOR has NaN; it is a rejected value, its neighbour goes on."""
    outcome = testing.read(uplink(cbor2.dumps({"a": float("nan"), "b": 1}), "cbor/d1"))
    assert [r.index for r in outcome.readings] == ["b"]
    assert [r.reason for r in outcome.rejections] == ["not_finite"]
    with pytest.raises(Refused):
        testing.read(uplink(cbor2.dumps({"a": float("inf")}), "cbor/d1"))


@pytest.mark.parametrize(
    "hexdigits",
    [
        "",
        "01",
        "a0",
        "80",
        "8101",
        "a1616101ff",
        "a2616101616102",
        "a16161c5821a3b9aca0001",
        "a16161c4821a3b9aca0001f7",
        "d81c81d81d00",
        "a16161d823627828",
        "a1a1010203",
        "a1f401",
        "a1616161ff",
        "9bffffffffffffffff",
        "bb00000000ffffffff",
        "5b00000000ffffffff",
        "81" * 100_000 + "01",
        "a2013861613101",
        "a20101613102",
        "a16161c25a00000400" + "ff" * 1024,
    ],
    ids=lambda h: h[:20],
)
def test_what_is_no_such_cbor_is_poison(hexdigits: Any) -> None:
    """Truncated, trailing, nested without end, keys twice, tags for programs: DecodeError, at once."""
    with pytest.raises(DecodeError):
        testing.read(uplink(bytes.fromhex(hexdigits), "cbor/d1"))


def test_readme_shows_the_profile() -> None:
    """The sample configuration in the README is the file."""
    assert readme_shows("cbor_map", "cbor_map")
