"""What the API makes of a request for a command: ids, protocol, refusals with pointers, the rate."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import streams.core  # noqa: F401  (the pages hang on the host app)
from agents.registered import Registered
from devices.registry import DeviceEntry, Registry
from streams import api_commands
from streams.api import Refusal
from streams.api_commands import CommandRequest, Rate, command_of
from streams.messages import Device

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def fleet() -> Registry:
    """The shipped profiles, and a sensor."""
    registry = Registry.load(Path(__file__).parents[2] / "config")
    registry.set_device(DeviceEntry(device_id="282c02", profile="efento"))
    return registry


def asked(**fields: Any) -> CommandRequest:
    """Return a request for a climate configuration."""
    return CommandRequest(
        **{"device_id": "2261001", "command_type": "config", "payload": {"T_consigne": 21.5}, **fields}
    )


def test_what_is_left_out_is_filled_in(fleet: Registry) -> None:
    """An id is made, the protocol is that of the device's profile, or of the first that knows the command."""
    made = command_of(asked(), "", fleet, NOW)
    assert (made.protocol, len(made.request_id)) == ("mqtt", 32)
    sensor = asked(device_id="282c02", payload={"transfer_limit": 5}, request_id="mine")
    assert command_of(sensor, "", fleet, NOW).protocol == "coap"
    assert command_of(sensor, "", fleet, NOW).request_id == "mine"


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"device_id": ""}, "/device_id"),
        ({"request_id": "a\nb"}, "/request_id"),
        ({"protocol": "smoke"}, "/protocol"),
        ({"expires_at": NOW - timedelta(seconds=1)}, "/expires_at"),
        ({"expires_at": datetime(2027, 1, 1)}, "/expires_at"),  # noqa: DTZ001 - that is what is wrong
        ({"command_type": "dance"}, "/command_type"),
        ({"payload": {"T_consigne": 900}}, "/payload/T_consigne"),
        ({"device_id": "282c02"}, "/payload"),
    ],
)
def test_what_is_wrong_is_pointed_at(fleet: Registry, fields: dict[str, Any], pointer: str) -> None:
    """Each refusal has a pointer to what is wrong, below the command's place in a batch."""
    with pytest.raises(Refusal) as raised:
        command_of(asked(**fields), "/commands/3", fleet, NOW)
    assert (raised.value.status, raised.value.pointer) == (400, f"/commands/3{pointer}")


def test_what_iot_devices_says_counts(fleet: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """A profile that only the topic names gives the protocol; no command for who is not active, or not known."""
    take = Registered(fleet).take
    take("77", Device(device_id="77", profile="efento"))
    wanted = asked(device_id="77", payload={"transfer_limit": 5})
    assert command_of(wanted, "", fleet, NOW).protocol == "coap"
    monkeypatch.setattr(api_commands, "SETTINGS", dataclasses.replace(api_commands.SETTINGS, unknown_devices="reject"))
    assert command_of(wanted, "", fleet, NOW).device_id == "77"
    with pytest.raises(Refusal, match="UNKNOWN_DEVICES=reject") as raised:
        command_of(asked(), "", fleet, NOW)
    assert raised.value.pointer == "/device_id"
    take("77", Device(device_id="77", profile="efento", active=False))
    with pytest.raises(Refusal, match="not active") as raised:
        command_of(wanted, "/commands/0", fleet, NOW)
    assert (raised.value.status, raised.value.pointer) == (400, "/commands/0/device_id")


def test_the_rate_is_per_key() -> None:
    """A minute's worth at once, then as fast as it fills; one key's does not slow another's."""
    rate = Rate(60)
    assert rate.take("a", 60, 0.0) == 0
    assert rate.take("a", 2, 1.0) == pytest.approx(1.0)
    assert rate.take("b", 1, 1.0) == 0
    assert rate.take("a", 2, 2.0) == 0
