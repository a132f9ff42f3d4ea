"""CBOR maps: what plain JSON is, in CBOR. Text and integer keys, nested maps, arrays of maps as several samples.

``timestamp`` or ``ts`` (RFC 3339 text, tag 0 or 1, or epoch in s or ms) is the sample's time. Byte strings are values
too, as hexadecimal text. What is no such CBOR is a DecodeError; see :mod:`devices.cbordata` and :mod:`devices.fields`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from devices import cbordata, fields
from devices.driver import Driver
from devices.model import Reading, Uplink
from devices.plain_json.driver import TIME_FIELDS
from devices.profiles import Profile


class CborMapDriver(Driver):
    """Reads CBOR maps. Options: ``keys`` gives integer keys their names, ``time_field`` as of plain JSON."""

    name = "cbor_map"
    options: ClassVar[dict[str, Any]] = {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "time_field": {"type": "string", "minLength": 1},
            "keys": {
                "type": "object",
                "propertyNames": {"pattern": "^-?[0-9]+$"},
                "additionalProperties": {"type": "string", "minLength": 1},
            },
        },
    }

    def decode(self, uplink: Uplink, profile: Profile) -> list[Reading]:
        """Return one reading a field and sample."""
        named = profile.options.get("time_field")
        data = cbordata.plain(cbordata.parse(uplink.data), profile.options.get("keys"))
        return fields.samples(data, uplink, profile, (named, *TIME_FIELDS) if named else TIME_FIELDS)
