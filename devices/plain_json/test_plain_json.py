"""Plain JSON over both protocols: every field a reading, and what is no such JSON a dead letter, never a crash."""

import json
from pathlib import Path
from typing import Any

import pytest

from devices import testing
from devices.model import DecodeError
from devices.pipeline import Refused
from devices.profiles import compile_profile
from devices.registry import Registry
from devices.testing import readme_shows, uplink

VECTORS = json.loads(Path(__file__).with_name("vectors.json").read_text())
TOPIC = "devices/d1/telemetry"


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: v["payload"][:40])
@pytest.mark.parametrize(("protocol", "route"), [("mqtt", TOPIC), ("coap", "telemetry/d1")])
def test_vector(vector: Any, protocol: Any, route: Any) -> None:
    """Each number, boolean and string is a reading of one value whose index and label are its path."""
    readings = testing.read(uplink(vector["payload"], route, protocol=protocol)).readings
    assert [[r.timestamp.isoformat(), r.index, r.values[0]] for r in readings] == vector["readings"]
    for reading in readings:
        assert reading.labels == [reading.index]
        assert reading.display_names == [reading.index]
        assert reading.metadata == {
            "category": "measurements",
            "units": [""],
            "persist": [True],
            "profile": "plain_json",
        }
        assert (reading.device_id, reading.request_id) == ("d1", "r1")


@pytest.mark.parametrize(
    "payload",
    [
        "",
        "nonsense",
        "3",
        "null",
        "[]",
        "{}",
        '{"ts": 1}',
        '{"x": NaN}',
        '{"x": Infinity}',
        '{"x": 1e400}',
        '{"x": ' + "9" * 400 + "}",
        '{"x": ' + "9" * 5000 + "}",
        '{"x": null}',
        '{"x": 1, "timestamp": "yesterday"}',
        '{"x": 1, "ts": true}',
        '{"x": 1, "ts": 1e300}',
        '{"x": 1, "ts": "0001-01-01T00:00:00+10:00"}',
        '{"x": 1, "ts": {}}',
        '{"a.b": 1, "a": {"b": 2}}',
        '[{"x": 1}, 2]',
        '{"x": ' + "[" * 100_000,
        '{"x":' * 900 + "1" + "}" * 900,
        b'{"x": "\xff"}',
        b"\x00\x01\x02",
    ],
    ids=lambda p: repr(p[:24]),
)
def test_what_is_no_such_json_is_poison(payload: Any) -> None:
    """No JSON, no object, nothing in it, no time, no number a store can hold: DecodeError and nothing else."""
    with pytest.raises(DecodeError):
        testing.read(uplink(payload, TOPIC))


def test_a_name_that_no_store_can_hold_is_rejected() -> None:
    """A field name beyond 200 characters or with a NUL is refused; its neighbour goes on."""
    payload = json.dumps({"n" * 201: 1, "a\0b": 2, "good": 3})
    outcome = testing.read(uplink(payload, TOPIC))
    assert [r.index for r in outcome.readings] == ["good"]
    assert [r.reason for r in outcome.rejections] == ["name", "name"]


def test_large_integers_are_numbers() -> None:
    """An integer beyond 64 bits is a float that every store can hold."""
    readings = testing.read(uplink('{"x": 123456789012345678901234567890}', TOPIC)).readings
    assert readings[0].values == [1.2345678901234568e29]


def test_time_of_another_name() -> None:
    """A profile can name the field of the sample's time."""
    profile = compile_profile(
        {
            "profile": "mine",
            "driver": "plain_json",
            "match": {
                "protocol": "mqtt",
                "topic": "devices/{device_id}/telemetry",
                "payload": {"json_fields": ["when"]},
            },
            "options": {"time_field": "when"},
            "values": {"t": {"unit": "°C", "name": "Temperature", "max": 50}},
        }
    )
    registry = Registry([profile, testing.shipped_profile("plain_json")])
    (reading,) = testing.read(uplink('{"when": 1750000000, "t": 20}', TOPIC), registry).readings
    assert reading.timestamp.year == 2025
    assert reading.display_names == ["Temperature"]
    assert reading.metadata["units"] == ["°C"]
    assert reading.metadata["profile"] == "mine"
    with pytest.raises(Refused) as caught:
        testing.read(uplink('{"when": 1750000000, "t": 51}', TOPIC), registry)
    assert caught.value.reason == "rejected_value"
    other = testing.read(uplink('{"t": 51}', TOPIC), registry)
    assert other.profile.name == "plain_json"


def test_readme_shows_the_profile() -> None:
    """The sample configuration in the README is the file."""
    assert readme_shows("plain_json", "plain_json")
