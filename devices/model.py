"""What goes into a driver and what comes out of it.

Everything here is plain data: a driver is handed an :class:`Uplink`, returns :class:`Reading` objects, and raises
:class:`DecodeError` for bytes that cannot be a message of its family. Times are aware UTC datetimes.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec

Value = float | int | bool | str | None


class DecodeError(ValueError):
    """The bytes are not a message of this family, or break its rules. Trying again cannot help."""


class DriverOutOfMemory(Exception):
    """A driver has found no memory for a message: the next attempt may, or it is the message that wants too much."""


class AnotherDevice(DecodeError):
    """The message claims another device than its topic or path: it is refused, and read as neither's."""


class CommandError(ValueError):
    """A command cannot be encoded for this device; ``pointer`` is the JSON pointer to what is wrong."""

    def __init__(self, message: str, pointer: str = "") -> None:
        super().__init__(message)
        self.pointer = pointer


class Reading(msgspec.Struct, kw_only=True, gc=False):
    """Values of one device under one index, sampled at one time.

    ``values``, ``labels`` and ``display_names`` have the same length; ``metadata["units"]`` and
    ``metadata["persist"]``, where present, have it too. ``timestamp`` is the time of the sample, not of arrival.
    """

    request_id: str
    timestamp: datetime
    device_id: str
    index: str
    values: list[Value]
    labels: list[str]
    display_names: list[str]
    metadata: dict[str, Any]


class Uplink(msgspec.Struct, kw_only=True, gc=False):
    """One message of a device as a driver sees it.

    ``text`` is the payload where it is valid UTF-8, else None; ``data`` holds the bytes in any case.
    ``route`` is the MQTT topic or the CoAP path (no leading slash). ``received_at`` is the arrival time.
    """

    request_id: str
    received_at: datetime
    device_id: str
    protocol: str
    route: str
    text: str | None
    data: bytes
    metadata: dict[str, Any]
