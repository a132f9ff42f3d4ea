"""What a device driver is: a plain class, bytes (or JSON) in, readings out, commands to bytes.

Guarantee asked of every driver: ``decode`` returns or raises :class:`~devices.model.DecodeError`, whatever the bytes;
it never blocks, reads no clock and keeps no state of its own (a family that needs some, like Sparkplug's aliases,
keeps it bounded and rebuilds it from what the device says). What the rest of the house needs to know about a family's
commands (schemas, what is safe to repeat, what supersedes what) is declared here as data, so that no stage knows a
family's name.
"""
# ruff: noqa: ARG002 - a driver overrides what it has; the defaults need none of their arguments

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, ClassVar, Final

import msgspec
from jsonschema import Draft202012Validator

from devices.model import CommandError, Reading, Uplink, Value

if TYPE_CHECKING:
    from devices.profiles import Profile

JsonSchema = dict[str, Any]

# No device samples so much between two messages; a message that pretends to must not fill the memory.
MAX_READINGS: Final = 20_000


class Downlink(msgspec.Struct, frozen=True, kw_only=True):
    """What goes out to a device: ``route`` is the MQTT topic (empty over CoAP: it goes into the answer to the next
    request)."""

    route: str
    data: bytes
    qos: int = 1
    retain: bool = False


class Feedback(msgspec.Struct, frozen=True, kw_only=True):
    """What a device says about a command that it was sent."""

    request_id: str
    success: bool
    detail: str = ""


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a CoAP request: ``code`` is dotted (``2.01``), ``data`` the payload.

    ``content_format`` is the CoAP number, None without payload; ``carries`` is the pending downlink that went into
    it, so that the stage knows what the device's acknowledgement of this answer delivers.
    """

    code: str
    data: bytes = b""
    content_format: int | None = None
    carries: bytes | None = None


class CommandTraits(msgspec.Struct, frozen=True, kw_only=True):
    """How the command stage may treat a command type.

    ``repeatable``: sent twice it does what it does sent once. ``supersedes``: a newer one of the same device makes an
    older one that is still queued pointless. ``confirmed``: the device answers with feedback; without it,
    delivery is the last that will be heard of the command.
    """

    repeatable: bool = False
    supersedes: bool = False
    confirmed: bool = True


class Driver:
    """Base of the drivers; a family overrides what it has.

    ``exclusive``: a device takes one open command at a time. ``text``: messages are text (JSON, or hexadecimal digits
    that the device itself writes), so that digits given by hand are the message and not its bytes. ``options``: JSON
    schema of what a profile may set for it.
    """

    name: ClassVar[str] = ""
    commands: ClassVar[Mapping[str, JsonSchema]] = {}
    traits: ClassVar[Mapping[str, CommandTraits]] = {}
    exclusive: ClassVar[bool] = False
    text: ClassVar[bool] = False
    options: ClassVar[JsonSchema] = {"type": "object", "additionalProperties": False, "properties": {}}

    def decode(self, uplink: Uplink, profile: Profile) -> list[Reading]:
        """Return the readings of one message; raises DecodeError for what is not one of this family."""
        raise NotImplementedError

    def device_id(self, uplink: Uplink) -> str | None:
        """Return the device that the payload itself names, None where it names none."""
        return None

    def encode(
        self,
        command_type: str,
        payload: Mapping[str, Any],
        *,
        request_id: str,
        device_id: str,
        state: Mapping[str, Any],
        now: datetime,
    ) -> Downlink:
        """Build what goes to the device; raises CommandError.

        ``state`` is what ``state_of`` said of the device's last uplink (empty: not heard of yet), ``now`` the time of
        sending.
        """
        raise CommandError(f"devices of family {self.name} take no commands, so not {command_type!r} either")

    def feedback(self, uplink: Uplink) -> Feedback | None:
        """Return what this message says about a command, None where it says nothing; raises DecodeError."""
        return None

    def state_of(self, uplink: Uplink) -> dict[str, Any]:
        """Return what later commands need to know of this uplink (JSON), empty where nothing."""
        return {}

    def applied(self, command_type: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
        """Tell by what ``state_of`` said before a command was sent, and of an uplink after it, that the device has it.

        Returns how that is known, empty where nothing can be told.
        """
        return ""

    def change_of(self, uplink: Uplink) -> dict[str, Any]:
        """Return what this uplink changes of a state that messages add up to (JSON), empty where nothing."""
        return {}

    def merge(self, state: Mapping[str, Any] | None, change: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state after ``change`` as :meth:`change_of` tells it (None: before the first); pure.

        A stretch of changes merged again, in order, must end in the same state: it may be delivered again.
        """
        raise NotImplementedError

    def summary(self, state: Mapping[str, Any]) -> tuple[str, dict[str, Value]]:
        """Return index and values, by label, of the reading that shows a state of :meth:`merge`."""
        raise NotImplementedError

    def reply(self, uplink: Uplink, now: datetime, pending: bytes | None = None) -> Reply | None:
        """Return the answer that a device expects in the response to ``uplink``; None: an empty 2.04."""
        return None

    def check(self, command_type: str, payload: Any) -> None:
        """Raise CommandError, with a JSON pointer to what is wrong, unless ``payload`` fits the command type's
        schema."""
        schema = self.commands.get(command_type)
        if schema is None:
            known = ", ".join(sorted(self.commands)) or "none"
            raise CommandError(f"{self.name} knows no command {command_type!r}; it knows: {known}", "/command_type")
        for error in _validator(type(self), command_type).iter_errors(payload):
            pointer = "".join(f"/{str(step).replace('~', '~0').replace('/', '~1')}" for step in error.absolute_path)
            raise CommandError(f"{command_type}: {error.message}", "/payload" + pointer)


_VALIDATORS: dict[tuple[str, str, str], Draft202012Validator] = {}


def _validator(driver: type[Driver], command_type: str) -> Draft202012Validator:
    key = (driver.__module__, driver.__qualname__, command_type)
    found = _VALIDATORS.get(key)
    if found is None:
        found = _VALIDATORS[key] = Draft202012Validator(driver.commands[command_type])
    return found
