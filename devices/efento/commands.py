"""Commands of Efento devices: each is a configuration message in the answer to the device's next message.

The message always carries ``current_time`` and asks for device information. proto3 does not send a zero: a field that
is set to 0, false or nothing would not reach the device, so such a command is refused, with a pointer to the field.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final

from devices import protobuf
from devices.driver import JsonSchema
from devices.efento import messages as m
from devices.model import CommandError

NO_ACK_INTERVAL: Final = 0xFFFFFFFF
MAX_BASE_SECONDS: Final = 65_535

_HIGH, _LOW, _DIFF, _CHANGE, _DISABLED = (
    "CONDITION_HIGH_THRESHOLD",
    "CONDITION_LOW_THRESHOLD",
    "CONDITION_DIFF_THRESHOLD",
    "CONDITION_BINARY_CHANGE_STATE",
    "CONDITION_DISABLED",
)
CONDITIONS: Final = {
    ">": _HIGH,
    ">=": _HIGH,
    "<": _LOW,
    "<=": _LOW,
    "diff": _DIFF,
    "==": _CHANGE,
    "!=": _CHANGE,
    "change": _CHANGE,
}
ACTIONS: Final = {
    "critical": "ACTION_TRIGGER_TRANSMISSION_WITH_ACK",
    "warning": "ACTION_TRIGGER_TRANSMISSION",
    "info": "ACTION_FAST_ADVERTISING_MODE",
}
#: Commands after which the device runs with another configuration.
CHANGING: Final = frozenset({"config", "alarm"})
# Defaults of the hysteresis, in the unit of the type; 5 % of the threshold for all others.
HYSTERESIS: Final = {"°C": 1.0, "hPa": 5.0, "% RH": 2.0}

_NOTHING: Final[JsonSchema] = {"type": "object", "additionalProperties": False, "properties": {}}
_config: Final[JsonSchema] = protobuf.schema(m.CONFIG.DESCRIPTOR, skip=frozenset({"current_time"}))
SCHEMAS: Final[Mapping[str, JsonSchema]] = {
    "config": {
        **_config,
        "minProperties": 1,
        "properties": {
            **_config["properties"],
            "measurement_period": {"type": "integer", "minimum": 1, "maximum": MAX_BASE_SECONDS * 100},
        },
    },
    "refresh_config": _NOTHING,
    "device_info_request": _NOTHING,
    "alarm": {
        "type": "object",
        "additionalProperties": False,
        "required": ["channel", "field_label", "math_operator", "level"],
        "properties": {
            "channel": {"type": "integer", "minimum": 1, "maximum": 32},
            "field_label": {"enum": sorted(m.BY_NAME)},
            "math_operator": {"enum": sorted(CONDITIONS)},
            "threshold": {"type": ["number", "boolean"]},
            "level": {"enum": [*ACTIONS, *(level.upper() for level in ACTIONS)]},
            "hysteresis": {"type": "number", "minimum": 0},
            "triggering_mode": {"type": "integer", "minimum": 0, "maximum": 65_535},
            "num_measurements": {"type": "integer", "minimum": 1, "maximum": 65_535},
            "active": {"type": "boolean"},
        },
    },
}


def split_period(seconds: int) -> tuple[int, int]:
    """Return (base, factor) whose product is ``seconds``: the base as it is, or its largest divisor that fits 16
    bits."""
    for factor in range(1, MAX_BASE_SECONDS):
        if seconds % factor == 0 and seconds // factor <= MAX_BASE_SECONDS:
            return seconds // factor, factor
        if seconds < factor:
            break
    raise CommandError(f"a measurement period of {seconds} s has no divisor that fits", "/payload/measurement_period")


def _steps(value: float, kind: m.MeasurementType, pointer: str) -> int:
    """Return ``value`` in steps of the type's resolution."""
    steps = round(value * kind.divisor)
    if not -(2**31) <= steps < 2**31:
        raise CommandError(f"{value} {kind.unit} is beyond what {kind.name} can say", pointer)
    return steps


def rule(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rule of an ``alarm`` command as fields of a Rule; raises CommandError."""
    kind = m.BY_NAME[payload["field_label"]]
    active = payload.get("active", True)
    condition = CONDITIONS[payload["math_operator"]] if active else _DISABLED
    found: dict[str, Any] = {
        "channel_mask": 1 << payload["channel"] - 1,
        "condition": condition,
        "action": ACTIONS[payload["level"].lower()],
    }
    if condition in (_CHANGE, _DISABLED):
        return found
    threshold = payload.get("threshold")
    if threshold is None or isinstance(threshold, bool):
        raise CommandError(f"{payload['math_operator']} needs a threshold that is a number", "/payload/threshold")
    if kind.kind == "binary":
        raise CommandError(f"{kind.name} is a state: only a change of it can be told", "/payload/math_operator")
    steps = _steps(threshold, kind, "/payload/threshold")
    parameters = [steps]
    if condition != _DIFF:
        hysteresis = payload.get("hysteresis", HYSTERESIS.get(kind.unit))
        if hysteresis is not None:
            parameters.append(_steps(hysteresis, kind, "/payload/hysteresis"))
        else:
            parameters.append(max(1, round(abs(steps) * 0.05)))
    parameters += [payload.get("triggering_mode", 1), payload.get("num_measurements", 1), kind.number]
    found["parameters"] = parameters
    return found


def _refuse_zeros(payload: Mapping[str, Any]) -> None:
    for name, value in payload.items():
        if not value:
            raise CommandError(
                f"{name} = {value!r} would not reach the device: proto3 sends no zero", f"/payload/{name}"
            )


def encode(command_type: str, payload: Mapping[str, Any], now: datetime) -> bytes:
    """Return the configuration message of a command that fits its schema; raises CommandError."""
    fields: dict[str, Any] = {"request_device_info": True, "current_time": int(now.timestamp())}
    if command_type == "config":
        own = dict(payload)
        if "measurement_period" in own:
            base, factor = split_period(own.pop("measurement_period"))
            own |= {"measurement_period_base": base, "measurement_period_factor": factor}
        _refuse_zeros(own)
        fields |= own
    elif command_type == "refresh_config":
        fields["request_configuration"] = True
    elif command_type == "alarm":
        fields |= {"ack_interval": NO_ACK_INTERVAL, "rules": [rule(payload)]}
    return _bytes(fields)


def greeting(now: datetime) -> bytes:
    """Return the answer to measurements when nothing is pending: the time, and a request for device information."""
    return _bytes({"request_device_info": True, "current_time": int(now.timestamp())})


def stamped(pending: bytes, now: datetime) -> bytes:
    """Return a configuration message that waited, with the time of now."""
    message: Any = m.CONFIG()
    message.ParseFromString(pending)
    message.current_time = int(now.timestamp())
    return bytes(message.SerializeToString())


def _bytes(fields: Mapping[str, Any]) -> bytes:
    message: Any = m.CONFIG()
    protobuf.fill(message, fields)
    return bytes(message.SerializeToString())
