"""SenML: the RFC's examples in JSON and CBOR, resolution of base fields, and packs that must be refused."""

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import cbor2
import pytest

from devices import testing
from devices.model import DecodeError
from devices.profiles import Profile
from devices.senml.driver import SenmlDriver
from devices.testing import readme_shows, uplink

VECTORS = json.loads(Path(__file__).with_name("vectors.json").read_text())


def read(records: Any, **options: Any) -> Any:
    message = uplink(json.dumps(records), "senml/d1")
    return SenmlDriver().decode(message, Profile("senml", "senml", options=options))


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: v["source"])
def test_vector(vector: Any) -> None:
    """Every example resolves to the names, times, units and values that the RFC says."""
    data = bytes.fromhex(vector["hex"]) if "hex" in vector else json.dumps(vector["json"])
    readings = testing.read(uplink(data, "senml/d1")).readings
    found = [[r.timestamp.isoformat(), r.index, r.values[0], r.metadata["units"][0]] for r in readings]
    assert found == vector["readings"]
    assert [r.labels[0] for r in readings] == [unit if unit in ("lat", "lon") else name for _, name, _, unit in found]


@pytest.mark.parametrize("vector", [v for v in VECTORS if "json" in v], ids=lambda v: v["source"])
def test_cbor_says_the_same(vector: Any) -> None:
    """A JSON example written in CBOR, with integer labels, reads the same."""
    from devices.senml.pack import CBOR_LABELS

    labels = {name: label for label, name in CBOR_LABELS.items()}
    records = [{labels[key]: value for key, value in record.items()} for record in vector["json"]]
    readings = testing.read(uplink(cbor2.dumps(records), "senml/d1")).readings
    assert [[r.timestamp.isoformat(), r.index, r.values[0], r.metadata["units"][0]] for r in readings] == vector[
        "readings"
    ]


def test_times_below_2_to_28_are_relative() -> None:
    """A small time counts from arrival, a large one from 1970."""
    readings = read([{"n": "a", "v": 1, "t": -5}, {"n": "a", "v": 1}, {"n": "a", "v": 1, "t": 2**28}])
    assert [r.timestamp - testing.NOW for r in readings[:2]] == [timedelta(seconds=-5), timedelta(0)]
    assert readings[2].timestamp.year == 1978


def test_base_value_and_sum() -> None:
    """Base value and base sum are added; a missing one counts as 0; a sum is a value of its own."""
    readings = read([{"bn": "x:", "bv": 10, "bs": 100, "n": "a", "v": 1, "s": 5}, {"n": "b"}, {"n": "c", "vs": "t"}])
    assert [r.values for r in readings] == [[11, 105], [10, 100], ["t", 100]]
    assert readings[0].labels == ["x:a", "sum"]
    assert readings[0].metadata["units"] == ["", ""]
    (only,) = read([{"n": "a", "s": 3, "u": "J"}])
    assert (only.labels, only.values) == (["sum"], [3])


def test_stripped_base_name() -> None:
    """With the option, a pack of one base name gives short names; one of several keeps the full ones."""
    readings = read([{"bn": "urn:x:", "n": "a", "v": 1}, {"n": "b", "v": 2}], strip_base_name=True)
    assert [r.index for r in readings] == ["a", "b"]
    readings = read([{"bn": "urn:x:", "n": "a", "v": 1}, {"bn": "urn:y:", "n": "a", "v": 2}], strip_base_name=True)
    assert [r.index for r in readings] == ["urn:x:a", "urn:y:a"]
    assert [r.index for r in read([{"bn": "urn:x", "v": 1}], strip_base_name=True)] == ["urn:x"]


def test_the_same_name_twice() -> None:
    """Values of one name and time are told apart, so that none overwrites another."""
    readings = read([{"n": "a", "v": 1}, {"n": "a", "v": 2}, {"n": "a", "v": 3, "t": 1}])
    assert [r.labels for r in readings] == [["a"], ["a_2"], ["a"]]


def test_update_time_and_data() -> None:
    """Update time is metadata; CBOR's bytes are JSON's base64url."""
    assert read([{"n": "a", "v": 1, "ut": 60}])[0].metadata["update_seconds"] == 60
    (reading,) = testing.read(uplink(cbor2.dumps([{0: "a", 8: b"hi \n"}]), "senml/d1")).readings
    assert reading.values == ["aGkgCg"]


@pytest.mark.parametrize(
    "records",
    [
        [],
        {},
        [1],
        [{}],
        [{"bn": "a"}],
        [{"n": "a"}],
        [{"v": 1}],
        [{"n": "-a", "v": 1}],
        [{"n": "a b", "v": 1}],
        [{"n": "a", "v": "1"}],
        [{"n": "a", "v": True}],
        [{"n": "a", "vb": 1}],
        [{"n": "a", "vs": 1}],
        [{"n": 1, "v": 1}],
        [{"n": "a", "v": 1, "vs": "x"}],
        [{"n": "a", "v": 1, "must_": 1}],
        [{"bver": 11, "n": "a", "v": 1}],
        [{"bver": "5", "n": "a", "v": 1}],
        [{"n": "a", "v": 1, "t": "now"}],
        [{"n": "a", "v": 1, "t": 1e300}],
        [{"n": "a", "v": 1, "t": -1e15}],
        [{"n": "a", "v": 1}, {"n": "b"}],
    ],
    ids=str,
)
def test_what_is_no_pack_is_poison(records: Any) -> None:
    """No array, no name, no value, two values, a version or field that is not known, no time: DecodeError, in both
    formats."""
    with pytest.raises(DecodeError):
        read(records)
    with pytest.raises(DecodeError):
        testing.read(uplink(cbor2.dumps(records), "senml/d1"))


def test_cbor_time_that_is_no_number_is_poison() -> None:
    """CBOR has NaN for a time, JSON does not."""
    with pytest.raises(DecodeError):
        testing.read(uplink(cbor2.dumps([{0: "a", 2: 1, 6: float("nan")}]), "senml/d1"))


def test_readme_shows_the_profile() -> None:
    """The sample configuration in the README is the file."""
    assert readme_shows("senml", "senml")
