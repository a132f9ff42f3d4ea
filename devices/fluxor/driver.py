"""Fluxor driver: one frame is up to seven readings at one arrival time; commands are JSON on the broker's command
topic.

A channel whose word is 0 is a sensor fault: its value is None (missing) and ``metadata["faults"]`` names the label. A
sensor type that nothing is known of gives no value; ``metadata["unknown_sensors"]`` of ``ST`` names the channel. A
frame whose id is not the device of its topic is a DecodeError. Everything constant (labels, names, units, bit lists)
is prepared once a profile and sensor set and shared by all readings; nobody may change it.
"""

from __future__ import annotations

import struct
from binascii import Error as HexError
from binascii import unhexlify
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, ClassVar, Final

import msgspec

from devices import brokered
from devices.driver import CommandTraits, Downlink, Driver, Feedback, JsonSchema
from devices.fluxor import frame
from devices.model import AnotherDevice, CommandError, DecodeError, Reading, Uplink
from devices.profiles import Profile, Shape

_CONTROL: Final[list[list[Any]]] = [frame.bits(value, 8) for value in range(256)]
_LIGHTS: Final[list[list[Any]]] = [frame.lights(value) for value in range(256)]
_STATES: Final[list[list[Any]]] = [frame.bits(value, 2) for value in range(4)]
_BYTE_BITS: Final[list[list[Any]]] = _CONTROL
_unpack = frame.FRAME.unpack
_unpack_memory = frame.MEMORY_FRAME.unpack


class _Plan(msgspec.Struct, frozen=True):
    """What is constant of the frames of one sensor set under one profile."""

    positions: tuple[int, ...]
    temperature: Shape | None
    humidity: Shape | None
    parameters: Shape
    control: Shape
    status: Shape
    lights: Shape
    state: Shape
    state_metadata: dict[str, Any]


def _plan(profile: Profile, sen_typ: tuple[int, ...], regulates_t: bool, memory: bool) -> _Plan:
    positions, t_labels, u_labels, t_names, u_names = frame.channel_labels(sen_typ)
    p_labels = ["U_consigne", "U_hysteresys", "reg_type_state"]
    p_units = ["%", "%", ""]
    if regulates_t:
        p_labels, p_units = ["T_consigne", "T_hysteresys", *p_labels], ["°C", "°C", *p_units]
    status_labels = frame.STATUS_LABELS[:8] if memory else frame.STATUS_LABELS
    state = profile.shape("ST", frame.STATE_LABELS, trusted=True)
    unknown = {
        f"CH{n + 1}": kind & frame.SENSOR_TYPE_MASK
        for n, kind in enumerate(sen_typ)
        if kind & frame.SENSOR_TYPE_MASK and n not in positions
    }

    def climate(index: str, labels: list[str], names: list[str], unit: str) -> Shape | None:
        if not labels:
            return None
        return profile.shape(index, labels, display_names=names, units=[unit] * len(labels), trusted=True)

    return _Plan(
        positions=tuple(positions),
        temperature=climate("T", t_labels, t_names, "°C"),
        humidity=climate("U", u_labels, u_names, "%"),
        parameters=profile.shape("P", p_labels, units=p_units, trusted=True),
        control=profile.shape("CTRL", frame.CONTROL_LABELS, trusted=True),
        status=profile.shape("S", status_labels, trusted=True),
        lights=profile.shape("E", frame.LIGHT_LABELS, trusted=True),
        state=state,
        state_metadata={**state.metadata, "unknown_sensors": unknown} if unknown else state.metadata,
    )


@lru_cache(maxsize=4096)
def _status_bits(status: int) -> list[Any]:
    return [bit for byte in status.to_bytes(4, "little") for bit in _BYTE_BITS[byte]]


def _fields(uplink: Uplink) -> tuple[Any, ...]:
    data = uplink.data
    try:
        raw = unhexlify(data)
    except HexError as exc:
        raise DecodeError(
            f"a Fluxor frame is 86 or 96 hexadecimal digits; these {len(data)} bytes are not: {exc}"
        ) from None
    if len(raw) == frame.FRAME_BYTES and not raw[4] & frame.HW_MEMORY:
        return _unpack(raw)
    if len(raw) == frame.MEMORY_FRAME_BYTES and raw[4] & frame.HW_MEMORY:
        return _unpack_memory(raw)
    raise DecodeError(
        f"a Fluxor frame has {frame.FRAME_BYTES} bytes, {frame.MEMORY_FRAME_BYTES} with hw_type bit 0;"
        f" this one has {len(raw)}" + (f" and hw_type {raw[4]}" if len(raw) > 4 else "")
    )


@lru_cache(maxsize=16_384)
def _state(route: str, digits: bytes) -> dict[str, Any]:
    """Return what commands need of a frame with these ``frame.STATE_DIGITS``; nobody may change it."""
    hw_type, reg_typ, sen_typ, u_set_point, u_hysteresis, t_set_point, t_hysteresis = frame.STATE.unpack(
        unhexlify(digits)
    )
    return {
        **brokered.state_of(route),
        "hw_type": hw_type,
        "reg_typ": reg_typ,
        "sen_typ": sen_typ,
        "U_consigne": u_set_point,
        "U_hysteresys": u_hysteresis,
        "T_consigne": t_set_point,
        "T_hysteresys": t_hysteresis,
    }


_PERCENT: Final[JsonSchema] = {"type": "number", "minimum": 0, "maximum": 100}
_HYSTERESIS: Final[JsonSchema] = {"type": "number", "minimum": -12.7, "maximum": 12.8}


_SET_POINTS: Final = ("U_consigne", "U_hysteresys", "T_consigne", "T_hysteresys")


def _raw(name: str, payload: Mapping[str, Any], state: Mapping[str, Any]) -> int:
    """Return the wire's number of a set point: what the command wants, else what the device's last uplink had."""
    if name not in payload:
        return int(state[name])
    return frame.hysteresis_byte(payload[name]) if name.endswith("hysteresys") else round(payload[name] * 100)


class FluxorDriver(Driver):
    """Reads Fluxor frames and writes their commands."""

    name = "fluxor"
    text = True
    exclusive = True
    commands: ClassVar[Mapping[str, JsonSchema]] = {
        "config": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "U_consigne": _PERCENT,
                "U_hysteresys": _HYSTERESIS,
                "T_consigne": {"type": "number", "minimum": 0, "maximum": 655.35},
                "T_hysteresys": _HYSTERESIS,
                "reg_type_state": {"type": "boolean"},
                "control": {"type": "integer", "minimum": 0, "maximum": 0xFFFF},
            },
        },
        "reboot": {"type": "object", "additionalProperties": False, "properties": {}},
        "synchronize": {"type": "object", "additionalProperties": False, "properties": {}},
    }
    traits: ClassVar[Mapping[str, CommandTraits]] = {
        "config": CommandTraits(repeatable=True, supersedes=True),
        "reboot": CommandTraits(),
        "synchronize": CommandTraits(repeatable=True),
    }

    def decode(self, uplink: Uplink, profile: Profile) -> list[Reading]:
        """Return T, U, P, CTRL, S, E, ST of one frame, at its arrival time."""
        fields = _fields(uplink)
        device_id = uplink.device_id
        if str(fields[0]) != device_id:
            raise AnotherDevice(f"the frame is of device {fields[0]}, its topic says {device_id!r}")
        reg_typ = fields[2]
        memory = fields[1] & frame.HW_MEMORY
        key = (fields[3:7], reg_typ & frame.REG_TEMPERATURE, memory)
        plan = profile._memory.get(key)
        if plan is None:
            plan = profile.remember(key, lambda: _plan(profile, fields[3:7], bool(key[1]), bool(memory)))
        if memory:
            control = fields[17] & 0xFF
            status = _BYTE_BITS[fields[18]]
        else:
            control = fields[16] & 0xFF
            status = _status_bits(fields[17])
        request_id, at = uplink.request_id, uplink.received_at

        def reading(shape: Shape, values: list[Any], metadata: dict[str, Any]) -> Reading:
            return Reading(
                request_id=request_id,
                timestamp=at,
                device_id=device_id,
                index=shape.index,
                values=values,
                labels=shape.labels,
                display_names=shape.display_names,
                metadata=metadata,
            )

        humidity = [fields[7] / 100, (fields[8] - 127) / 10, reg_typ & frame.REG_STATE != 0]
        if key[1]:
            humidity = [fields[9] / 100, (fields[10] - 127) / 10, *humidity]
        readings = [
            reading(plan.parameters, humidity, plan.parameters.metadata),
            reading(plan.control, _CONTROL[control], plan.control.metadata),
            reading(plan.status, status, plan.status.metadata),
            reading(plan.lights, _LIGHTS[control], plan.lights.metadata),
            reading(plan.state, _STATES[reg_typ >> 2 & 3], plan.state_metadata),
        ]
        if memory:
            readings[2].metadata = {**plan.status.metadata, "memory_address": fields[16].hex()}
        if plan.temperature is not None and plan.humidity is not None:
            words = [fields[12 + position] for position in plan.positions]
            for shape, values in (
                (plan.temperature, [((word & 0xFFFF) - 10_000) / 100 if word else None for word in words]),
                (plan.humidity, [(word >> 16) / 100 if word else None for word in words]),
            ):
                metadata = shape.metadata
                if 0 in words:
                    pairs = zip(shape.labels, words, strict=True)
                    metadata = {**metadata, "faults": {label: "no measurement" for label, word in pairs if not word}}
                readings.append(reading(shape, values, metadata))
        return readings

    def device_id(self, uplink: Uplink) -> str | None:
        """Return the id in the frame; None for a feedback."""
        return None if uplink.route.endswith("/feedback") else str(_fields(uplink)[0])

    def state_of(self, uplink: Uplink) -> dict[str, Any]:
        """Return the broker, types and set points that a command has to repeat; empty for a feedback."""
        if uplink.route.endswith("/feedback"):
            return {}
        try:
            return _state(uplink.route, uplink.data[frame.STATE_DIGITS])
        except (HexError, struct.error):
            _fields(uplink)
            raise

    def encode(
        self,
        command_type: str,
        payload: Mapping[str, Any],
        *,
        request_id: str,
        device_id: str,
        state: Mapping[str, Any],
        now: datetime,  # noqa: ARG002 - these frames carry no time
    ) -> Downlink:
        """Build the JSON of ``config``, ``reboot`` or ``synchronize``; raises CommandError.

        A set point that ``config`` does not name stays as the device's last uplink had it.
        """
        self.check(command_type, payload)
        message = brokered.command(request_id, device_id, state)
        if command_type == "config":
            if "reg_typ" not in state:
                raise CommandError(f"device {device_id} has sent no frame yet; its types come from its last one")
            reg_typ = state["reg_typ"] | frame.REG_COMMAND
            wanted = payload.get("reg_type_state")
            if wanted is not None:
                reg_typ = reg_typ | frame.REG_STATE if wanted else reg_typ & ~frame.REG_STATE
            message |= {
                "hw_type": state["hw_type"],
                "reg_type": reg_typ,
                "sen_type": state["sen_typ"],
                **{name: _raw(name, payload, state) for name in _SET_POINTS},
                "offsets": [127, 127, 127, 127],
                "control": payload.get("control", 0),
            }
        elif command_type == "reboot":
            message["control"] = frame.CONTROL_REBOOT
        return Downlink(route=state["command_topic"], data=msgspec.json.encode(message))

    def feedback(self, uplink: Uplink) -> Feedback | None:
        """Return what ``{"uid": "REQUEST-BROKER", "status": 1}`` says; the request id is all before the last ``-``."""
        return brokered.feedback(uplink)
