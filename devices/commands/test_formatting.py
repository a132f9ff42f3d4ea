"""From a command to its device's bytes, with the shipped profiles."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from devices.commands.formatting import NotYet, build, check
from devices.commands.model import OpenCommand
from devices.model import CommandError
from devices.registry import Registry

NOW = datetime(2026, 1, 1, tzinfo=UTC)
FLUXOR = {
    "broker_id": "7",
    "command_topic": "broker_data/7/command",
    "hw_type": 0,
    "reg_typ": 4,
    "sen_typ": 2,
    "U_consigne": 5000,
    "U_hysteresys": 127,
    "T_consigne": 2000,
    "T_hysteresys": 127,
}


@pytest.fixture(scope="module")
def registry() -> Registry:
    """The shipped configuration."""
    return Registry.load(Path(__file__).parents[2] / "config")


def command(command_type: str, payload: dict[str, Any], protocol: str = "mqtt") -> OpenCommand:
    """Return an open command."""
    return OpenCommand(
        request_id="r-1", command_type=command_type, payload=payload, protocol=protocol, order=1, expires_at=NOW
    )


def test_a_fluxor_configuration(registry: Registry) -> None:
    """It goes to the broker that the device was heard through, at the profile's QoS, with the request's id."""
    downlink = build(registry, "2261001", command("config", {"T_consigne": 21.5}), {"fluxor": FLUXOR}, NOW)
    body = json.loads(downlink.data)
    assert (downlink.route, downlink.qos, downlink.retain) == ("broker_data/7/command", 1, False)
    assert (body["uid"], body["T_consigne"], body["U_consigne"]) == ("r-1-7", 2150, 5000)


def test_a_device_not_heard_of_has_to_wait(registry: Registry) -> None:
    """Without an uplink there is no broker to send to: not yet, which is no failure."""
    with pytest.raises(NotYet):
        build(registry, "2261001", command("config", {"T_consigne": 21.5}), {}, NOW)


def test_two_families_under_one_id(registry: Registry) -> None:
    """A light command takes the broker from a climate frame; a climate command waits for a frame of its own."""
    light = build(registry, "5", command("light_read_all", {}), {"fluxor": FLUXOR}, NOW)
    assert light.route == "broker_data/7/command"
    heard = {"light_controller": {"broker_id": "7", "command_topic": "broker_data/7/command"}}
    with pytest.raises(NotYet):
        build(registry, "5", command("config", {"T_consigne": 21.5}), heard, NOW)


def test_the_protocol_tells_families_apart(registry: Registry) -> None:
    """``config`` over CoAP is the sensor's, over MQTT the climate controller's."""
    target = check(registry, "x", "config", {"transfer_limit": 5}, protocol="coap", states={})
    assert target.driver.name == "efento"
    assert check(registry, "x", "config", {"T_consigne": 5}, protocol="mqtt", states={}).driver.name == "fluxor"
    assert build(registry, "x", command("config", {"transfer_limit": 5}, "coap"), {}, NOW).route == ""


@pytest.mark.parametrize(
    ("command_type", "payload", "pointer"),
    [
        ("config", {"T_consigne": "warm"}, "/payload/T_consigne"),
        ("config", {"nonsense": 1}, "/payload"),
        ("dance", {}, "/command_type"),
        ("light_read_single", {"task_id": 99}, "/payload/task_id"),
    ],
)
def test_what_is_wrong_is_pointed_at(
    registry: Registry, command_type: str, payload: dict[str, Any], pointer: str
) -> None:
    """A payload that does not fit is refused with a JSON pointer, before anything is queued."""
    with pytest.raises(CommandError) as raised:
        check(registry, "2261001", command_type, payload, protocol="mqtt", states={})
    assert raised.value.pointer == pointer
