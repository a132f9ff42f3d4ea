"""The Things Stack driver: what the payload formatter decoded is readings, the radio's state is one more.

Each number, boolean and text of ``uplink_message.decoded_payload`` is a reading as of plain JSON; without a formatter
the raw payload is one, ``frm_payload``, as hexadecimal text. ``LORA`` (category ``network``) has the best gateway's
signal and the frame's counters. The time is the network server's. A downlink carries the request id as a correlation
id; ``down/ack``, ``down/nack`` and ``down/failed`` answer it.
"""

from __future__ import annotations

import binascii
from base64 import b64decode, b64encode
from collections.abc import Mapping
from datetime import datetime
from typing import Any, ClassVar, Final

import msgspec

from devices import fields, jsontext
from devices.driver import CommandTraits, Downlink, Driver, Feedback, JsonSchema
from devices.model import AnotherDevice, CommandError, DecodeError, Reading, Uplink, Value
from devices.profiles import Profile

CORRELATION: Final = "headrace:"
_UNITS: Final = {"rssi": "dBm", "snr": "dB", "bandwidth": "Hz", "frequency": "Hz", "airtime": "s"}


def _object(parent: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = parent.get(name)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise DecodeError(f"{name} is not an object")
    return found


def _number(value: Any) -> float | int | None:
    """Return a number; the stack writes 64-bit numbers and durations (``1.056s``) as text."""
    if isinstance(value, str):
        try:
            value = float(value.removesuffix("s"))
        except ValueError:
            return None
        if value.is_integer():
            value = int(value)
    if type(value) is int or type(value) is float:
        return jsontext.number(value)
    return None


def _message(uplink: Uplink) -> dict[str, Any]:
    message = jsontext.parse(uplink)
    if not isinstance(message, dict):
        raise DecodeError("a message of The Things Stack is a JSON object")
    return message


def _device(message: Mapping[str, Any], uplink: Uplink) -> dict[str, Any]:
    ids = _object(message, "end_device_ids")
    named = ids.get("device_id")
    if not isinstance(named, str):
        raise DecodeError("the message has no end_device_ids.device_id")
    if named != uplink.device_id:
        raise AnotherDevice(f"the message is of device {named!r:.80}, its topic says {uplink.device_id!r:.80}")
    return ids


def _signal(up: Mapping[str, Any]) -> dict[str, Value]:
    gateways = [entry for entry in up.get("rx_metadata") or [] if isinstance(entry, dict)]
    heard = [entry for entry in gateways if _number(entry.get("rssi")) is not None]
    best = max(heard, key=lambda entry: _number(entry["rssi"]) or 0, default={})
    settings = _object(up, "settings")
    lora = _object(_object(settings, "data_rate"), "lora")
    # The stack leaves out what is 0: the first frame has no f_cnt.
    found = {
        "rssi": _number(best.get("rssi")),
        "snr": _number(best.get("snr")),
        "gateways": len(gateways),
        "spreading_factor": _number(lora.get("spreading_factor")),
        "bandwidth": _number(lora.get("bandwidth")),
        "frequency": _number(settings.get("frequency")),
        "f_cnt": _number(up.get("f_cnt", 0)),
        "f_port": _number(up.get("f_port", 0)),
        "airtime": _number(up.get("consumed_airtime")),
    }
    return {name: value for name, value in found.items() if value is not None}


class TtsDriver(Driver):
    """Reads uplinks of The Things Stack and queues downlinks."""

    name = "tts"
    text = True
    commands: ClassVar[Mapping[str, JsonSchema]] = {
        "downlink": {
            "type": "object",
            "additionalProperties": False,
            "required": ["f_port"],
            "oneOf": [{"required": ["frm_payload"]}, {"required": ["decoded_payload"]}],
            "properties": {
                "f_port": {"type": "integer", "minimum": 1, "maximum": 223},
                "frm_payload": {"type": "string", "pattern": "^([0-9a-fA-F]{2})*$", "maxLength": 484},
                "decoded_payload": {"type": "object"},
                "confirmed": {"type": "boolean"},
                "priority": {"enum": ["LOWEST", "LOW", "BELOW_NORMAL", "NORMAL", "ABOVE_NORMAL", "HIGH", "HIGHEST"]},
            },
        },
    }
    traits: ClassVar[Mapping[str, CommandTraits]] = {"downlink": CommandTraits()}

    def decode(self, uplink: Uplink, profile: Profile) -> list[Reading]:
        """Return the decoded fields (or the raw payload) and the state of the radio."""
        message = _message(uplink)
        ids = _device(message, uplink)
        if not isinstance(message.get("uplink_message"), dict):
            raise DecodeError("the message has no uplink_message")
        up = message["uplink_message"]
        times = (up.get("received_at"), message.get("received_at"))
        sampled_at = next((jsontext.parse_time(time) for time in times if time is not None), uplink.received_at)
        readings: list[Reading] = []
        decoded = _object(up, "decoded_payload")
        raw = up.get("frm_payload")
        if decoded:
            fields.add(readings, fields.flatten(decoded), uplink, profile, sampled_at)
        elif raw is not None:
            try:
                payload = b64decode(raw, validate=True)
            except (binascii.Error, TypeError, ValueError):
                raise DecodeError("frm_payload is not base64") from None
            fields.add(readings, {"frm_payload": payload.hex()}, uplink, profile, sampled_at)
        signal = _signal(up)
        shape = profile.shape(
            "LORA",
            tuple(signal),
            units=[_UNITS.get(name, "") for name in signal],
            category="network",
            persist=False,
        )
        about = {"dev_eui": ids["dev_eui"]} if isinstance(ids.get("dev_eui"), str) else {}
        if message.get("simulated") is True:
            about["simulated"] = True
        readings.append(
            Reading(
                request_id=uplink.request_id,
                timestamp=sampled_at,
                device_id=uplink.device_id,
                index="LORA",
                values=list(signal.values()),
                labels=shape.labels,
                display_names=shape.display_names,
                metadata={**shape.metadata, **about},
            )
        )
        return readings

    def device_id(self, uplink: Uplink) -> str | None:
        """Return the device that the message names."""
        found = _object(_message(uplink), "end_device_ids").get("device_id")
        return found if isinstance(found, str) else None

    def state_of(self, uplink: Uplink) -> dict[str, Any]:
        """Return the topic that downlinks of the device go to."""
        head, _, last = uplink.route.rpartition("/")
        return {"command_topic": f"{head}/down/push"} if last == "up" else {}

    def encode(
        self,
        command_type: str,
        payload: Mapping[str, Any],
        *,
        request_id: str,
        device_id: str,
        state: Mapping[str, Any],
        now: datetime,  # noqa: ARG002 - the stack has its own clock
    ) -> Downlink:
        """Build the request that queues a downlink; raises CommandError. The stack's broker takes QoS 0 only."""
        self.check(command_type, payload)
        if "command_topic" not in state:
            raise CommandError(f"device {device_id} has not been heard of yet; its topic comes from its last uplink")
        downlink: dict[str, Any] = {
            "f_port": payload["f_port"],
            "confirmed": payload.get("confirmed", True),
            "priority": payload.get("priority", "NORMAL"),
            "correlation_ids": [CORRELATION + request_id],
        }
        if "frm_payload" in payload:
            downlink["frm_payload"] = b64encode(bytes.fromhex(payload["frm_payload"])).decode()
        else:
            downlink["decoded_payload"] = payload["decoded_payload"]
        return Downlink(route=state["command_topic"], data=msgspec.json.encode({"downlinks": [downlink]}), qos=0)

    def feedback(self, uplink: Uplink) -> Feedback | None:
        """Return what ``down/ack``, ``down/nack`` or ``down/failed`` says; None for a downlink that is not ours."""
        message = _message(uplink)
        _device(message, uplink)
        for name, success in (("downlink_ack", True), ("downlink_nack", False), ("downlink_failed", False)):
            if name not in message:
                continue
            inner = _object(message, name)
            downlink = _object(inner, "downlink") or inner
            for one in (*(message.get("correlation_ids") or ()), *(downlink.get("correlation_ids") or ())):
                if isinstance(one, str) and one.startswith(CORRELATION):
                    error = _object(inner, "error").get("message_format")
                    detail = f"{name}: {error}" if error else name
                    return Feedback(request_id=one.removeprefix(CORRELATION), success=success, detail=detail[:500])
            return None
        raise DecodeError("the message is no downlink_ack, downlink_nack or downlink_failed")
