"""Zigbee2MQTT driver: the state of a device as readings, its availability as one.

Each number, boolean and text of the state is a reading as of plain JSON, with the units that Zigbee2MQTT gives its
well-known properties. ``last_seen`` (ISO 8601 or epoch ms), where Zigbee2MQTT is set up to send it, is the time.
``availability`` (JSON or plain text) is ``AVAILABILITY``/``online``. A device whose friendly name has slashes needs a
profile with a topic of as many segments.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, ClassVar, Final

import msgspec

from devices import fields, jsontext
from devices.driver import CommandTraits, Downlink, Driver, JsonSchema
from devices.model import CommandError, DecodeError, Reading, Uplink
from devices.profiles import Profile

# The units of Zigbee2MQTT's generic properties.
UNITS: Final[Mapping[str, str]] = {
    "temperature": "°C",
    "device_temperature": "°C",
    "local_temperature": "°C",
    "occupied_heating_setpoint": "°C",
    "current_heating_setpoint": "°C",
    "humidity": "%",
    "soil_moisture": "%",
    "battery": "%",
    "position": "%",
    "pressure": "hPa",
    "illuminance": "lx",
    "illuminance_lux": "lx",
    "voltage": "V",
    "current": "A",
    "power": "W",
    "energy": "kWh",
    "produced_energy": "kWh",
    "ac_frequency": "Hz",
    "co2": "ppm",
    "voc": "µg/m³",
    "pm10": "µg/m³",
    "pm25": "µg/m³",
    "formaldehyd": "mg/m³",
    "color_temp": "mired",
    "linkquality": "lqi",
}
# A device with a battery sends the battery's voltage, a plug that of the mains.
_BATTERY_UNITS: Final = {**UNITS, "voltage": "mV"}


class Zigbee2MqttDriver(Driver):
    """Reads Zigbee2MQTT's states and sends ``set`` and ``get``."""

    name = "zigbee2mqtt"
    text = True
    commands: ClassVar[Mapping[str, JsonSchema]] = {
        "set": {"type": "object", "minProperties": 1},
        "get": {"type": "object", "minProperties": 1, "additionalProperties": {"const": ""}},
    }
    traits: ClassVar[Mapping[str, CommandTraits]] = {
        # {"state": "TOGGLE"} twice is not what it is once.
        "set": CommandTraits(confirmed=False),
        "get": CommandTraits(repeatable=True, confirmed=False),
    }

    def decode(self, uplink: Uplink, profile: Profile) -> list[Reading]:
        """Return one reading a property, or the availability."""
        if uplink.route.endswith("/availability"):
            return [_availability(uplink, profile)]
        state = jsontext.parse(uplink)
        if not isinstance(state, dict):
            raise DecodeError("a state of Zigbee2MQTT is a JSON object")
        last_seen = state.pop("last_seen", None)
        sampled_at = uplink.received_at if last_seen is None else jsontext.parse_time(last_seen)
        readings: list[Reading] = []
        units = _BATTERY_UNITS if "battery" in state else UNITS
        fields.add(readings, fields.flatten(state), uplink, profile, sampled_at, units=units)
        if not readings:
            raise DecodeError("the state holds no number, boolean or text")
        return readings

    def state_of(self, uplink: Uplink) -> dict[str, Any]:
        """Return the topic of the device, which commands go below."""
        return {"topic": uplink.route.removesuffix("/availability")}

    def encode(
        self,
        command_type: str,
        payload: Mapping[str, Any],
        *,
        request_id: str,  # noqa: ARG002 - a device answers by its next state, not by an id
        device_id: str,
        state: Mapping[str, Any],
        now: datetime,  # noqa: ARG002
    ) -> Downlink:
        """Build ``set`` or ``get``; raises CommandError."""
        self.check(command_type, payload)
        if "topic" not in state:
            raise CommandError(f"device {device_id} has not been heard of yet; its topic comes from its last state")
        return Downlink(route=f"{state['topic']}/{command_type}", data=msgspec.json.encode(payload))


def _availability(uplink: Uplink, profile: Profile) -> Reading:
    word: Any = uplink.text
    if word not in ("online", "offline"):
        state = jsontext.parse(uplink)
        word = state.get("state") if isinstance(state, dict) else None
    if word not in ("online", "offline"):
        raise DecodeError("an availability is online or offline")
    shape = profile.shape("AVAILABILITY", ("online",), category="status", trusted=True)
    return Reading(
        request_id=uplink.request_id,
        timestamp=uplink.received_at,
        device_id=uplink.device_id,
        index="AVAILABILITY",
        values=[word == "online"],
        labels=shape.labels,
        display_names=shape.display_names,
        metadata=shape.metadata,
    )
