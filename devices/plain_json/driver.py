"""Plain JSON: each number, boolean or string of an object is a reading, its path the index and the label.

``timestamp``, else ``ts``, at the top of the object is the sample's time (RFC 3339, or epoch in s or ms), the arrival
time where neither is there. An array of objects is several samples. What is no such JSON is a DecodeError; see
:mod:`devices.fields`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final

from devices import fields, jsontext
from devices.driver import Driver
from devices.model import Reading, Uplink
from devices.profiles import Profile

TIME_FIELDS: Final = ("timestamp", "ts")


class PlainJsonDriver(Driver):
    """Reads JSON objects and arrays of them. Option ``time_field``: another name for the field of the sample's time."""

    name = "plain_json"
    text = True
    options: ClassVar[dict[str, Any]] = {
        "type": "object",
        "additionalProperties": False,
        "properties": {"time_field": {"type": "string", "minLength": 1}},
    }

    def decode(self, uplink: Uplink, profile: Profile) -> list[Reading]:
        """Return one reading a field and sample."""
        named = profile.options.get("time_field")
        return fields.samples(jsontext.parse(uplink), uplink, profile, (named, *TIME_FIELDS) if named else TIME_FIELDS)
