"""Plain JSON: each number, boolean or string of an object is a reading, its path the index and the label.

``timestamp``, else ``ts``, at the top of the object is the sample's time (RFC 3339, or epoch in s or ms), the arrival
time where neither is there. An array of objects is several samples. What is no such JSON is a DecodeError; see
:mod:`devices.fields`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final

from devices import fields, jsontext
from devices.driver import Driver
from devices.model import AnotherDevice, Reading, Uplink
from devices.profiles import Profile

TIME_FIELDS: Final = ("timestamp", "ts")


class PlainJsonDriver(Driver):
    """Reads JSON objects and arrays of them.

    Option ``time_field``: another name for the field of the sample's time. Option ``device_field``: the field in which
    the device names itself; it is no value, and where it names another device than topic or path the message is
    refused.
    """

    name = "plain_json"
    text = True
    options: ClassVar[dict[str, Any]] = {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "time_field": {"type": "string", "minLength": 1},
            "device_field": {"type": "string", "minLength": 1},
        },
    }

    def decode(self, uplink: Uplink, profile: Profile) -> list[Reading]:
        """Return one reading a field and sample."""
        named = profile.options.get("time_field")
        data = jsontext.parse(uplink)
        names_device = profile.options.get("device_field")
        if names_device is not None:
            for sample in data if isinstance(data, list) else [data]:
                _check_device(sample, names_device, uplink.device_id)
        return fields.samples(data, uplink, profile, (named, *TIME_FIELDS) if named else TIME_FIELDS)


def _check_device(sample: Any, field: str, device_id: str) -> None:
    """Take the field out of a sample; raises AnotherDevice where it names another one."""
    if isinstance(sample, dict):
        named = sample.pop(field, device_id)
        if str(named) != device_id:
            raise AnotherDevice(f"{field} is {named!r:.80}, the topic or path says {device_id!r:.80}")
