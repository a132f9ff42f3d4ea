"""Sparkplug B: a session as another implementation encodes it, aliases, sequence gaps, births, deaths, stale wills."""

import json
from pathlib import Path
from typing import Any

import pytest

from devices import testing
from devices.model import CommandError, DecodeError
from devices.profiles import Profile
from devices.protobuf import fill
from devices.sparkplug import nodes
from devices.sparkplug import payload as p
from devices.sparkplug.driver import SparkplugDriver
from devices.testing import readme_shows, uplink

VECTORS = json.loads(Path(__file__).with_name("vectors.json").read_text())


def payload(**fields: Any) -> Any:
    built = p.PAYLOAD()
    fill(built, fields)
    return built.SerializeToString()


def session() -> Any:
    driver = SparkplugDriver()
    profile = Profile("sparkplug", "sparkplug")
    return lambda kind, data, device="": driver.decode(
        uplink(data, f"spBv1.0/G/{kind}/N" + (f"/{device}" if device else ""), device_id="G/N"), profile
    )


BIRTH = {
    "seq": 0,
    "metrics": [
        {"name": "bdSeq", "datatype": 4, "long_value": 1},
        {
            "name": "t",
            "alias": 1,
            "datatype": 9,
            "float_value": 1.5,
            "properties": {
                "keys": ["engUnit", "Quality"],
                "values": [{"type": 12, "string_value": "°C"}, {"type": 3, "int_value": 192}],
            },
        },
    ],
}


def test_session_of_vectors() -> None:
    """Birth, data by alias, a gap, deaths: each message gives what it says, node and device told apart."""
    registry = testing.fresh_registry()
    for vector in VECTORS["messages"]:
        message = uplink(bytes.fromhex(vector["hex"]), vector["topic"], device_id="G/N")
        assert registry.device_id("mqtt", vector["topic"]) == "G/N"
        readings = testing.read(message, registry).readings
        found = [
            [r.device_id, r.index, pytest.approx(r.values[0], rel=1e-6) if r.index == "Supply Voltage" else r.values[0]]
            for r in readings
        ]
        assert found == vector["readings"]
        for reading in readings:
            assert reading.metadata.get("seq_gap") == vector.get("seq_gap")
            assert reading.metadata.get("stale_death", False) is vector.get("stale", False)
            wanted = testing.NOW.isoformat() if "NDEATH" in vector["topic"] else VECTORS["time"]
            assert reading.timestamp.isoformat() == wanted


def test_subscriptions_leave_commands_out() -> None:
    """Our own node and device commands are not subscribed to."""
    filters = testing.registry().mqtt_filters()
    assert "spBv1.0/+/NDATA/+" in filters
    assert not any("CMD" in one or one == "spBv1.0/#" for one in filters)
    assert testing.registry().candidates("mqtt", "spBv1.0/G/NCMD/N") == ()


def test_units_and_quality_come_from_properties() -> None:
    """The birth's engineering unit holds for data by alias; quality is told where it is sent."""
    decode = session()
    (birth, status) = decode("NBIRTH", payload(**BIRTH))
    assert (birth.metadata["units"], birth.metadata["quality"]) == (["°C"], 192)
    assert (status.index, status.values, status.metadata["category"]) == ("STATUS", [True], "status")
    (data,) = decode("NDATA", payload(seq=1, metrics=[{"alias": 1, "float_value": 2.5, "is_historical": True}]))
    assert (data.index, data.values, data.metadata["units"]) == ("t", [2.5], ["°C"])
    assert data.metadata["historical"] is True
    assert "quality" not in data.metadata


def test_sequence_gaps() -> None:
    """Missing numbers are counted modulo 256; the same number again is a redelivery, not a gap; a birth starts anew."""
    decode = session()
    decode("NBIRTH", payload(**BIRTH))
    gaps = []
    for seq in (1, 2, 2, 5, 255, 0, 1, 1):
        (reading,) = decode("NDATA", payload(seq=seq, metrics=[{"alias": 1, "float_value": 1.0}]))
        gaps.append(reading.metadata.get("seq_gap", 0))
    assert gaps == [0, 0, 0, 2, 249, 0, 0, 0]
    decode("NBIRTH", payload(**BIRTH))
    assert "seq_gap" not in decode("NDATA", payload(seq=1, metrics=[{"alias": 1, "float_value": 1.0}]))[0].metadata


def test_alias_that_no_birth_named() -> None:
    """Before a birth an alias keeps its number and says so; nothing is lost and nothing is named wrongly."""
    decode = session()
    (reading,) = decode("NDATA", payload(seq=9, metrics=[{"alias": 4, "datatype": 3, "int_value": 7}]))
    assert (reading.index, reading.values) == ("alias_4", [7])
    assert reading.metadata["unresolved_alias"] == 4
    assert reading.metadata["birth_missing"] is True
    (named,) = decode("NDATA", payload(seq=10, metrics=[{"name": "x", "datatype": 3, "int_value": 2**32 - 1}]))
    assert (named.index, named.values) == ("x", [-1])
    assert "unresolved_alias" not in named.metadata


def test_a_birth_forgets_old_aliases() -> None:
    """After another birth an alias means what that birth says."""
    decode = session()
    decode("NBIRTH", payload(**BIRTH))
    decode("NBIRTH", payload(seq=0, metrics=[{"name": "other", "alias": 1, "datatype": 3, "int_value": 0}]))
    assert decode("NDATA", payload(seq=1, metrics=[{"alias": 1, "int_value": 5}]))[0].index == "other"


@pytest.mark.parametrize(
    ("metric", "value"),
    [
        ({"datatype": 1, "int_value": 0x80}, -128),
        ({"datatype": 1, "int_value": 0xFFFFFF80}, -128),
        ({"datatype": 3, "int_value": 2**31}, -(2**31)),
        ({"datatype": 4, "long_value": 2**64 - 1}, -1),
        ({"datatype": 7, "int_value": 2**32 - 1}, 2**32 - 1),
        ({"datatype": 8, "long_value": 2**64 - 1}, float(2**64 - 1)),
        ({"datatype": 11, "boolean_value": True}, True),
        ({"datatype": 12, "string_value": "x"}, "x"),
        ({"datatype": 13, "long_value": 5}, 5),
        ({"datatype": 17, "bytes_value": "00ff"}, "00ff"),
        ({"datatype": 23, "bytes_value": "0100ffff"}, "[1,-1]"),
        ({"datatype": 32, "bytes_value": "0300000" + "0a0"}, "[true,false,true]"),
        ({"datatype": 33, "bytes_value": "61006200"}, '["a","b"]'),
        ({"datatype": 3, "is_null": True}, None),
        ({"datatype": 3}, None),
        (
            {
                "datatype": 16,
                "dataset_value": {
                    "columns": ["a", "b"],
                    "types": [1, 12],
                    "rows": [{"elements": [{"int_value": 255}, {"string_value": "x"}]}],
                },
            },
            '{"columns":["a","b"],"rows":[[-1,"x"]]}',
        ),
        (
            {
                "datatype": 19,
                "template_value": {"template_ref": "T", "metrics": [{"name": "m", "datatype": 3, "int_value": 5}]},
            },
            '{"template_ref":"T","metrics":{"m":5}}',
        ),
    ],
)
def test_values(metric: Any, value: Any) -> None:
    """Integers are two's complement of their width; arrays, data sets and templates become JSON text, bytes
    hexadecimal."""
    (reading,) = session()("NDATA", payload(metrics=[{"name": "x", **metric}]))
    assert reading.values == [value]
    assert type(reading.values[0]) is type(value)


def deep_template(depth: Any) -> Any:
    inner = {"name": "m", "datatype": 3, "int_value": 1}
    for _ in range(depth):
        inner = {"name": "m", "datatype": 19, "template_value": {"metrics": [inner]}}
    return inner


@pytest.mark.parametrize(
    ("route", "data"),
    [
        ("spBv1.0/G/NDATA/N", b"\xff"),
        ("spBv1.0/G/NDATA/N", payload(metrics=[{"datatype": 3, "int_value": 1}])),
        ("spBv1.0/G/NDATA/N", payload(timestamp=2**64 - 1, metrics=[{"name": "x", "int_value": 1}])),
        ("spBv1.0/G/NDATA/N", payload(metrics=[{"name": "x", "datatype": 23, "bytes_value": "01"}])),
        ("spBv1.0/G/NDATA/N", payload(metrics=[{"name": "x", "datatype": 32, "bytes_value": "ffffffff"}])),
        ("spBv1.0/G/NDATA/N", payload(metrics=[{"name": "x", "datatype": 33, "bytes_value": "ff00"}])),
        ("spBv1.0/G/NDATA/N", payload(metrics=[deep_template(20)])),
        ("spBv1.0/G/NCMD/N", payload()),
        ("spBv1.0/G/NDATA/N/D", payload()),
        ("spBv1.0/G/DDATA/N", payload()),
        ("spBv1.0//NDATA/N", payload()),
        ("spBv1.0/G/NDATA/" + "n" * 300, payload()),
        ("spBv1.0", payload()),
    ],
)
def test_what_is_no_message_is_poison(route: Any, data: Any) -> None:
    """No payload, no such topic, a metric without a name, a time without a calendar, arrays that lie: DecodeError."""
    with pytest.raises(DecodeError):
        SparkplugDriver().decode(uplink(data, route, device_id="G/N"), Profile("sparkplug", "sparkplug"))


def test_memory_is_bounded(monkeypatch: Any) -> None:
    """Nodes heard of longest ago are forgotten; a node cannot define metrics without end."""
    monkeypatch.setattr(nodes, "MAX_NODES", 3)
    monkeypatch.setattr(nodes, "MAX_METRICS", 2)
    memory = nodes.Nodes()
    for name in ("a", "b", "c", "a", "d"):
        memory.get(name).seq = 5
    assert len(memory) == 3
    assert memory.get("a").seq == 5
    assert memory.get("b").seq is None
    with pytest.raises(DecodeError, match="more than 2 metrics"):
        session()("NBIRTH", payload(metrics=[{"name": str(n), "datatype": 3, "int_value": 1} for n in range(3)]))


def test_rebirth_command() -> None:
    """A node is asked to be born again by the metric of the specification, on its command topic."""
    driver = SparkplugDriver()
    state = driver.state_of(uplink(b"", "spBv1.0/G/DDATA/N/D"))
    sent = driver.encode("rebirth", {}, request_id="r", device_id="G/N", state=state, now=testing.NOW)
    assert (sent.route, sent.retain) == ("spBv1.0/G/NCMD/N", False)
    message: Any = p.PAYLOAD.FromString(sent.data)
    (metric,) = message.metrics
    assert (metric.name, metric.datatype, metric.boolean_value) == ("Node Control/Rebirth", 11, True)
    assert message.timestamp == int(testing.NOW.timestamp() * 1000)
    with pytest.raises(CommandError, match="not been heard of"):
        driver.encode("rebirth", {}, request_id="r", device_id="G/N", state={}, now=testing.NOW)


def test_readme_shows_the_profile() -> None:
    """The sample configuration in the README is the file."""
    assert readme_shows("sparkplug", "sparkplug")
