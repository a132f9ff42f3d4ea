"""The Things Stack: the documented uplink, payloads without a formatter, downlinks and what answers them."""

import copy
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from devices import testing
from devices.model import CommandError, DecodeError
from devices.pipeline import Refused
from devices.testing import readme_shows, table, uplink
from devices.tts.driver import TtsDriver

VECTOR = json.loads(Path(__file__).with_name("vectors.json").read_text())
TOPIC = "v3/app1@ttn/devices/dev1/up"
DRIVER = TtsDriver()


def message(**changes: Any) -> Any:
    found = copy.deepcopy(VECTOR["uplink"])
    found["uplink_message"].update(changes)
    return {**found, "uplink_message": {k: v for k, v in found["uplink_message"].items() if v is not None}}


def read(data: Any, topic: Any = TOPIC, device_id: Any = "dev1") -> Any:
    return testing.read(
        uplink(data if isinstance(data, (str, bytes)) else json.dumps(data), topic, device_id=device_id)
    )


def test_vector() -> None:
    """The documented uplink gives its decoded fields and the radio's state, at the network server's time."""
    readings = read(VECTOR["uplink"]).readings
    assert table(readings) == VECTOR["readings"]
    assert {r.timestamp.isoformat() for r in readings} == {VECTOR["time"]}
    lora = readings[-1]
    assert (lora.metadata["category"], set(lora.metadata["persist"])) == ("network", {False})
    assert (lora.metadata["dev_eui"], lora.metadata["simulated"]) == ("0004A30B001C0530", True)
    assert lora.metadata["units"][:2] == ["dBm", "dB"]


def test_without_a_formatter() -> None:
    """A payload that nothing decoded is kept as hexadecimal text."""
    found = table(read(message(decoded_payload=None)).readings)
    assert found["frm_payload"] == {"frm_payload": "8241de"}


def test_an_empty_frame() -> None:
    """A frame without payload, of which the stack leaves out what is 0, still tells its signal."""
    found = table(read(message(decoded_payload=None, frm_payload=None, f_cnt=None, f_port=None)).readings)
    assert set(found) == {"LORA"}
    assert (found["LORA"]["f_cnt"], found["LORA"]["f_port"]) == (0, 0)


@pytest.mark.parametrize(
    "data",
    [
        "",
        "[]",
        "{}",
        {**VECTOR["uplink"], "uplink_message": None},
        {**VECTOR["uplink"], "uplink_message": []},
        message(decoded_payload=[1]),
        message(decoded_payload=None, frm_payload="???"),
        message(decoded_payload=None, frm_payload=5),
        message(received_at="now"),
        message(settings=5),
        {"end_device_ids": {"device_id": "dev1"}, "join_accept": {}},
    ],
    ids=lambda d: str(d)[:20],
)
def test_what_is_no_uplink_is_poison(data: Any) -> None:
    """No uplink, no device, no base64, no time: DecodeError."""
    with pytest.raises(DecodeError):
        read(data)


def test_an_uplink_of_another_device_is_refused() -> None:
    """The payload must name the topic's device."""
    with pytest.raises(Refused) as caught:
        read({**VECTOR["uplink"], "end_device_ids": {"device_id": "other"}})
    assert caught.value.reason == "another_device"


def test_downlink() -> None:
    """A downlink goes to the device's queue, its payload as base64, the request id as a correlation id."""
    state = DRIVER.state_of(uplink(b"", TOPIC))
    payload = {"f_port": 5, "frm_payload": "0102ff", "priority": "HIGH"}
    sent = DRIVER.encode("downlink", payload, request_id="r-1", device_id="dev1", state=state, now=testing.NOW)
    assert (sent.route, sent.qos) == ("v3/app1@ttn/devices/dev1/down/push", 0)
    assert msgspec.json.decode(sent.data) == {
        "downlinks": [
            {
                "f_port": 5,
                "confirmed": True,
                "priority": "HIGH",
                "correlation_ids": ["headrace:r-1"],
                "frm_payload": "AQL/",
            }
        ]
    }


@pytest.mark.parametrize(
    ("payload", "state", "pointer"),
    [
        ({"f_port": 0, "frm_payload": ""}, {"command_topic": "x"}, "/payload/f_port"),
        ({"f_port": 1}, {"command_topic": "x"}, "/payload"),
        ({"f_port": 1, "frm_payload": "0"}, {"command_topic": "x"}, "/payload/frm_payload"),
        ({"f_port": 1, "frm_payload": "00"}, {}, ""),
    ],
)
def test_wrong_downlink_is_pointed_at(payload: Any, state: Any, pointer: Any) -> None:
    """What a downlink has wrong is named by a JSON pointer."""
    with pytest.raises(CommandError) as caught:
        DRIVER.encode("downlink", payload, request_id="r", device_id="dev1", state=state, now=testing.NOW)
    assert caught.value.pointer == pointer


@pytest.mark.parametrize(
    ("kind", "body", "success", "detail"),
    [
        ("ack", {"downlink_ack": {"f_port": 5, "correlation_ids": ["headrace:r-1"]}}, True, "downlink_ack"),
        ("nack", {"correlation_ids": ["as:x", "headrace:r-1"], "downlink_nack": {}}, False, "downlink_nack"),
        (
            "failed",
            {
                "downlink_failed": {
                    "downlink": {"correlation_ids": ["headrace:r-1"]},
                    "error": {"message_format": "too long"},
                }
            },
            False,
            "downlink_failed: too long",
        ),
    ],
)
def test_feedback(kind: Any, body: Any, success: Any, detail: Any) -> None:
    """Ack is success, nack and failed are not; the request is found by its correlation id."""
    body = {"end_device_ids": {"device_id": "dev1"}, **body}
    feedback = read(body, f"v3/app1@ttn/devices/dev1/down/{kind}").feedback
    assert feedback is not None
    assert (feedback.request_id, feedback.success, feedback.detail) == ("r-1", success, detail)


def test_feedback_of_somebody_elses_downlink() -> None:
    """A downlink that another program queued says nothing of our commands."""
    body = {"end_device_ids": {"device_id": "dev1"}, "downlink_ack": {"correlation_ids": ["as:x"]}}
    assert read(body, "v3/app1@ttn/devices/dev1/down/ack").feedback is None
    with pytest.raises(DecodeError):
        read({"end_device_ids": {"device_id": "dev1"}}, "v3/app1@ttn/devices/dev1/down/ack")


def test_readme_shows_the_profile() -> None:
    """The sample configuration in the README is the file."""
    assert readme_shows("tts", "tts")
