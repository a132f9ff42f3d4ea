"""Devices of the file and of the topic over it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agents.registered import Registered
from devices.registry import DeviceEntry, Registry
from streams.messages import Device

CONFIG = Path(__file__).parents[2] / "config"


def fleet() -> Registered:
    """The shipped profiles, and one device of the file."""
    registry = Registry.load(CONFIG)
    registry.set_device(DeviceEntry(device_id="filed", name="of the file", profile="plain_json"))
    return Registered(registry)


def test_the_topic_stands_over_the_file_until_its_tombstone() -> None:
    """A record replaces the file's word, a tombstone gives it back, or forgets who is in no file."""
    here = fleet()
    here.take("filed", Device(device_id="filed", active=False, tags=["x"]))
    here.take("new", Device(device_id="new", config={"gateway": "g", "values": {"t": {"max": 5}}}))
    assert (here.known("filed"), here.known("new"), here.known("nobody")) == (False, True, False)
    assert here.registry.device("filed").tags == ("x",)
    here.take("filed", None)
    here.take("new", None)
    assert (here.known("filed"), here.known("new")) == (True, False)
    assert here.registry.device("filed").name == "of the file"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"profile": "weather"}, "no active profile 'weather'"),
        ({"profile": "senml"}, "no active profile 'senml'"),
        ({"config": {"values": {"t": {"max": "hot"}}}}, "config/values/t/max"),
        ({"config": {"colour": "red"}}, "config"),
    ],
)
def test_a_record_that_cannot_be_used_is_refused(fields: dict[str, Any], expected: str) -> None:
    """It is said what is wrong, and what was known before stays."""
    here = fleet()
    with pytest.raises(ValueError, match=expected):
        here.take("filed", Device(device_id="filed", **fields))
    assert here.registry.device("filed").name == "of the file"
