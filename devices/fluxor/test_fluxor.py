"""The Fluxor driver against captured frames, and its commands against what a controller's broker expects."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from devices import testing
from devices.fluxor import frame
from devices.fluxor.driver import FluxorDriver
from devices.model import CommandError, DecodeError
from devices.testing import readme_shows, shipped_profile, table, uplink

VECTORS = json.loads(Path(__file__).with_name("vectors.json").read_text())
DRIVER = FluxorDriver()
STATE = {
    "broker_id": "7",
    "command_topic": "broker_data/7/command",
    "hw_type": 0,
    "reg_typ": 0x4444,
    "sen_typ": 0x8343,
    "U_consigne": 5000,
    "U_hysteresys": 126,
    "T_consigne": 2000,
    "T_hysteresys": 126,
}


def data_of(device_id: Any, payload: Any, broker: Any = "7") -> Any:
    return uplink(payload, f"broker_data/{broker}/{device_id}/data", device_id=str(device_id))


def decode(payload: Any, device_id: Any) -> Any:
    return DRIVER.decode(data_of(device_id, payload), shipped_profile("fluxor"))


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: v["device_id"])
def test_vector(vector: Any) -> None:
    """Every captured frame gives its seven readings, with the captured values, labels and names."""
    outcome = testing.read(data_of(vector["device_id"], vector["mqtt_payload_ascii_hex"]))
    assert not outcome.rejections
    found = table(outcome.readings)
    assert set(found) == set(vector["indexes"])
    for index in ("T", "U"):
        reading = next(r for r in outcome.readings if r.index == index)
        triples = zip(reading.labels, reading.display_names, reading.values, strict=True)
        assert [list(triple) for triple in triples] == vector["channels"][index]
        assert reading.metadata["persist"] == [True] * len(reading.values)
    parameters = found["P"]
    assert parameters["U_consigne"] == vector["U_consigne"]
    assert parameters["U_hysteresys"] == vector["U_hysteresys"]
    assert parameters["reg_type_state"] is bool(vector["reg_typ"] >> 14 & 1)
    assert ("T_consigne" in parameters) is bool(vector["reg_typ"] & 4)
    assert list(found["CTRL"].values()) == [bool(bit) for bit in vector["control"]]
    assert list(found["S"].values()) == [bool(vector["status"] >> bit & 1) for bit in range(32)]
    assert found["ST"] == {"IS_TEC": bool(vector["reg_typ"] & 4), "IS_LIGHT": bool(vector["reg_typ"] & 8)}
    assert {r.timestamp for r in outcome.readings} == {testing.NOW}
    assert {r.device_id for r in outcome.readings} == {vector["device_id"]}


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: v["device_id"])
def test_build_frame_reproduces_captured_frame(vector: Any) -> None:
    """A frame built from what a captured frame says is that frame, byte for byte."""
    sen_typ = vector["sen_typ"].to_bytes(4, "little")
    pairs = zip(vector["channels"]["T"], vector["channels"]["U"], strict=True)
    built = frame.build_frame(
        vector["id"],
        [(t[2], u[2]) for t, u in pairs],
        sen_typ=sen_typ,
        reg_typ=vector["reg_typ"],
        humidity_set_point=vector["U_consigne"],
        humidity_hysteresis=vector["U_hysteresys"],
        temperature_set_point=vector["T_consigne"],
        temperature_hysteresis=vector["T_hysteresys"],
        control=int(vector["mqtt_payload_ascii_hex"][74:76], 16)
        | int(vector["mqtt_payload_ascii_hex"][76:78], 16) << 8,
        status=vector["status"],
    ).decode()
    # Where no temperature is regulated, controllers leave the temperature hysteresis at 0 and not at 127.
    sent = vector["mqtt_payload_ascii_hex"]
    assert built[:32] == sent[:32]
    assert built[34:] == sent[34:]


def test_temperature_parameters_come_with_reg_typ_bit_2() -> None:
    """T set point and hysteresis are read where the controller regulates temperature, and come first."""
    payload = frame.build_frame(
        9, [(20.0, 50.0)], reg_typ=0x4444, temperature_set_point=21.5, temperature_hysteresis=-0.3
    )
    reading = next(r for r in decode(payload, 9) if r.index == "P")
    assert reading.labels == ["T_consigne", "T_hysteresys", "U_consigne", "U_hysteresys", "reg_type_state"]
    assert reading.values == [21.5, -0.3, 50.0, -0.1, True]
    assert reading.metadata["units"] == ["°C", "°C", "%", "%", ""]


def test_channel_word_zero_is_a_fault() -> None:
    """A channel that measures nothing has no value and says so; its neighbour is read."""
    found = {r.index: r for r in decode(frame.build_frame(9, [None, (19.5, 60.0)]), 9)}
    assert found["T"].values == [None, 19.5]
    assert found["U"].values == [None, 60.0]
    assert found["T"].metadata["faults"] == {"T_int": "no measurement"}


def test_minus_100_degrees_with_humidity_is_a_value() -> None:
    """Only a word of 0 is a fault; a low half of 0 with humidity above it is -100 °C and left to validation."""
    readings = decode(frame.build_frame(9, [(-100.0, 50.0)]), 9)
    assert table(readings)["T"] == {"T_int": -100.0, "T_ext": None}


def test_labels_are_unique_within_an_index() -> None:
    """A second external sensor is T_ext_2; external wins over regulating."""
    payload = frame.build_frame(9, [(1, 1), (2, 2), (3, 3), (4, 4)], sen_typ=(0x83, 0xE3, 0x23, 0x22))
    found = table(decode(payload, 9))
    assert found["T"] == {"T_ext": 1.0, "T_ext_2": 2.0, "T_reg": 3.0, "T_reg_2": 4.0}
    assert found["U"] == {"U_ext": 1.0, "U_ext_2": 2.0, "U_int": 3.0, "U_int_2": 4.0}


def test_no_sensor_no_climate() -> None:
    """A controller without a sensor gives no T and no U; a sensor type nobody knows is named, not guessed."""
    readings = decode(frame.build_frame(9, [], sen_typ=(0, 0, 0, 5)), 9)
    assert {r.index for r in readings} == {"P", "CTRL", "S", "E", "ST"}
    assert next(r for r in readings if r.index == "ST").metadata["unknown_sensors"] == {"CH4": 5}


@pytest.mark.parametrize(
    ("control", "state"), [(0b0011_0000, "ON"), (0, "OFF"), (0b0010_0000, "FORCED"), (0b0001_0000, "ERR")]
)
def test_lights(control: Any, state: Any) -> None:
    """Of (ctrl, pres): 1 1 on, 0 0 off, 0 1 forced, 1 0 an error, for each light by itself."""
    found = table(decode(frame.build_frame(9, [], control=control), 9))["E"]
    assert [name for name, value in found.items() if value and name.endswith("CH1")] == [f"LIGHT_{state}_CH1"]
    assert [name for name, value in found.items() if value and name.endswith("CH2")] == ["LIGHT_OFF_CH2"]


def test_memory_variant() -> None:
    """With hw_type bit 0 a memory address comes before the control bits, and status is one byte."""
    payload = frame.build_frame(9, [(20.0, 50.0)], control=1, status=2, memory_address=b"\1\2\3\4\5\6\7\x08")
    found = {r.index: r for r in decode(payload, 9)}
    assert found["CTRL"].values == [True, *[False] * 7]
    assert found["S"].values == [False, True, *[False] * 6]
    assert found["S"].metadata["memory_address"] == "0102030405060708"


@pytest.mark.parametrize(
    "payload", ["", "00", "zz" * 43, "00" * 42, "00" * 44, "0" * 85, b"\xff" * 86, "00" * 4 + "01" + "00" * 38]
)
def test_what_is_no_frame_is_poison(payload: Any) -> None:
    """Wrong length, odd digits, no digits, a length that hw_type contradicts: DecodeError."""
    with pytest.raises(DecodeError):
        decode(payload, 0)


def test_frame_of_another_device_is_poison() -> None:
    """A frame whose id is not its topic's device is refused."""
    with pytest.raises(DecodeError, match="of device 9"):
        decode(frame.build_frame(9, []), 10)


def test_state_for_commands() -> None:
    """The last uplink tells the broker, the types and the set points."""
    vector = VECTORS[0]
    state = DRIVER.state_of(data_of(vector["device_id"], vector["mqtt_payload_ascii_hex"], broker="b-1"))
    assert state["broker_id"] == "b-1"
    assert state["command_topic"] == "broker_data/b-1/command"
    assert (state["hw_type"], state["reg_typ"], state["sen_typ"]) == (0, vector["reg_typ"], vector["sen_typ"])


def test_config_command() -> None:
    """A configuration carries scaled set points, the wanted state in bit 14 and bit 15; what it leaves out stays."""
    payload = {"U_consigne": 55.5, "U_hysteresys": -0.2, "reg_type_state": False}
    sent = DRIVER.encode("config", payload, request_id="a-b-c", device_id="2261001", state=STATE, now=testing.NOW)
    assert (sent.route, sent.qos, sent.retain) == ("broker_data/7/command", 1, False)
    message = msgspec.json.decode(sent.data)
    assert message["id_capteur"] == 2261001
    assert message["uid"] == "a-b-c-7"
    assert message["reg_type"] == 0x8444
    assert message["sen_type"] == 0x8343
    assert (message["U_consigne"], message["U_hysteresys"]) == (5550, 125)
    assert (message["T_consigne"], message["T_hysteresys"]) == (2000, 126)
    assert message["offsets"] == [127] * 4


def test_reboot_and_synchronize() -> None:
    """A reboot sets control bit 13; both name the device and the request."""
    reboot = msgspec.json.decode(
        DRIVER.encode("reboot", {}, request_id="r", device_id="9", state=STATE, now=testing.NOW).data
    )
    assert reboot == {"id_capteur": 9, "uid": "r-7", "control": 8192}
    sync = msgspec.json.decode(
        DRIVER.encode("synchronize", {}, request_id="r", device_id="9", state=STATE, now=testing.NOW).data
    )
    assert sync == {"id_capteur": 9, "uid": "r-7"}


@pytest.mark.parametrize(
    ("kind", "payload", "pointer"),
    [
        ("config", {"U_consigne": 101}, "/payload/U_consigne"),
        ("config", {"U_hysteresys": "x"}, "/payload/U_hysteresys"),
        ("config", {"colour": 1}, "/payload"),
        ("reboot", [], "/payload"),
        ("explode", {}, "/command_type"),
    ],
)
def test_wrong_command_is_pointed_at(kind: Any, payload: Any, pointer: Any) -> None:
    """What a command has wrong is named by a JSON pointer, before anything is sent."""
    with pytest.raises(CommandError) as caught:
        DRIVER.encode(kind, payload, request_id="r", device_id="9", state=STATE, now=testing.NOW)
    assert caught.value.pointer == pointer


def test_command_needs_an_uplink_first() -> None:
    """Nothing can be sent to a device that has not been heard of."""
    with pytest.raises(CommandError, match="not been heard of"):
        DRIVER.encode("reboot", {}, request_id="r", device_id="9", state={}, now=testing.NOW)


@pytest.mark.parametrize(
    ("status", "success"), [(1, True), (0, False), (2, False), ("1", False), (True, False), (None, False)]
)
def test_feedback(status: Any, success: Any) -> None:
    """Status 1 is success, anything else failure; the request id is all before the last dash."""
    message = uplink(json.dumps({"uid": "6f1c-22-aa-7", "status": status}), "broker_data/7/feedback", device_id="7")
    feedback = testing.read(message).feedback
    assert feedback is not None
    assert (feedback.request_id, feedback.success) == ("6f1c-22-aa", success)


@pytest.mark.parametrize(
    "payload", ["", "[]", "{}", '{"uid": "x"}', '{"uid": 3, "status": 1}', '{"uid": "nodash", "status": 1}']
)
def test_feedback_that_is_none_is_poison(payload: Any) -> None:
    """A feedback without an id or a status is DecodeError."""
    with pytest.raises(DecodeError):
        testing.read(uplink(payload, "broker_data/7/feedback", device_id="7"))


def test_uplink_after_a_command_round_trip() -> None:
    """A frame built with the commanded set points reads back as them."""
    state = {**STATE, "sen_typ": 0x43}
    sent = msgspec.json.decode(
        DRIVER.encode(
            "config",
            {"U_consigne": 61.25, "U_hysteresys": 1.5},
            request_id="r",
            device_id="9",
            state=state,
            now=testing.NOW,
        ).data
    )
    payload = frame.build_frame(
        9, [], humidity_set_point=sent["U_consigne"] / 100, humidity_hysteresis=(sent["U_hysteresys"] - 127) / 10
    )
    assert table(decode(payload, 9))["P"] | {"reg_type_state": True} == {
        "U_consigne": 61.25,
        "U_hysteresys": 1.5,
        "reg_type_state": True,
    }


def test_readme_shows_the_profile() -> None:
    """The sample configuration in the README is the file."""
    assert readme_shows("fluxor", "fluxor")
