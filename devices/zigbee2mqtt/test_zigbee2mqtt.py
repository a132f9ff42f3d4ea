"""Zigbee2MQTT: the documented messages, availability in both forms, commands."""

import json
from pathlib import Path
from typing import Any

import pytest

from devices import testing
from devices.model import CommandError, DecodeError
from devices.pipeline import Refused
from devices.testing import readme_shows, uplink
from devices.zigbee2mqtt.driver import Zigbee2MqttDriver

VECTORS = json.loads(Path(__file__).with_name("vectors.json").read_text())
DRIVER = Zigbee2MqttDriver()


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: v["source"])
def test_vector(vector: Any) -> None:
    """Every documented message gives its properties with their units, at last_seen where it is sent."""
    device_id = vector["topic"].split("/")[1]
    assert testing.registry().device_id("mqtt", vector["topic"]) == device_id
    readings = testing.read(uplink(json.dumps(vector["payload"]), vector["topic"], device_id=device_id)).readings
    assert [[r.index, r.values[0], r.metadata["units"][0]] for r in readings] == vector["readings"]
    assert {r.timestamp.isoformat() for r in readings} == {vector.get("time", testing.NOW.isoformat())}


def test_mains_voltage_has_another_unit() -> None:
    """Without a battery, voltage is that of the mains."""
    (reading,) = testing.read(uplink('{"voltage": 231}', "zigbee2mqtt/plug")).readings
    assert reading.metadata["units"] == ["V"]


@pytest.mark.parametrize(("payload", "online"), [("online", True), ("offline", False), ('{"state": "offline"}', False)])
def test_availability(payload: Any, online: Any) -> None:
    """Availability comes as JSON or as plain text."""
    (reading,) = testing.read(uplink(payload, "zigbee2mqtt/lamp/availability")).readings
    assert (reading.index, reading.labels, reading.values) == ("AVAILABILITY", ["online"], [online])
    assert reading.metadata["category"] == "status"


@pytest.mark.parametrize(
    "topic", ["zigbee2mqtt/bridge/state", "zigbee2mqtt/lamp/set", "zigbee2mqtt/lamp/get", "other/lamp"]
)
def test_other_topics_are_not_ours(topic: Any) -> None:
    """The bridge's topics and our own commands match nothing."""
    with pytest.raises(Refused):
        testing.read(uplink('{"state": "online"}', topic))


@pytest.mark.parametrize(
    ("topic", "payload"),
    [
        ("zigbee2mqtt/lamp", ""),
        ("zigbee2mqtt/lamp", "[]"),
        ("zigbee2mqtt/lamp", "{}"),
        ("zigbee2mqtt/lamp", '{"last_seen": 1750000000123}'),
        ("zigbee2mqtt/lamp", '{"x": 1, "last_seen": "N/A"}'),
        ("zigbee2mqtt/lamp/availability", "asleep"),
        ("zigbee2mqtt/lamp/availability", '{"state": 1}'),
        ("zigbee2mqtt/lamp/availability", "[]"),
    ],
)
def test_what_is_no_state_is_poison(topic: Any, payload: Any) -> None:
    """No object, nothing in it, no time, no availability: DecodeError."""
    with pytest.raises(DecodeError):
        testing.read(uplink(payload, topic))


def test_commands() -> None:
    """Set and get go below the device's topic, as JSON."""
    for topic in ("zigbee2mqtt/lamp", "zigbee2mqtt/lamp/availability"):
        state = DRIVER.state_of(uplink(b"", topic))
        sent = DRIVER.encode("set", {"state": "ON"}, request_id="r", device_id="lamp", state=state, now=testing.NOW)
        assert (sent.route, sent.data, sent.retain) == ("zigbee2mqtt/lamp/set", b'{"state":"ON"}', False)
    sent = DRIVER.encode("get", {"state": ""}, request_id="r", device_id="lamp", state=state, now=testing.NOW)
    assert sent.route == "zigbee2mqtt/lamp/get"
    for kind, payload, now_state in (("set", {}, state), ("get", {"state": 1}, state), ("set", {"a": 1}, {})):
        with pytest.raises(CommandError):
            DRIVER.encode(kind, payload, request_id="r", device_id="lamp", state=now_state, now=testing.NOW)


def test_readme_shows_the_profile() -> None:
    """The sample configuration in the README is the file."""
    assert readme_shows("zigbee2mqtt", "zigbee2mqtt")
