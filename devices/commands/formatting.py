"""From a command to what its device understands: which family, whether it fits, and the bytes. Pure over a registry."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, NamedTuple

from devices.commands.model import OpenCommand
from devices.driver import CommandTraits, Downlink, Driver
from devices.model import CommandError
from devices.profiles import Profile
from devices.registry import Registry

#: What the device's uplinks have told, by the name of the profile that read them.
States = Mapping[str, Mapping[str, Any]]


class Target(NamedTuple):
    """The profile that a command is written under, and its driver."""

    profile: Profile
    driver: Driver

    def traits(self, command_type: str) -> CommandTraits:
        """Return what may be done with a command type."""
        return self.driver.traits.get(command_type, CommandTraits())


class NotYet(Exception):
    """The device has not been heard of under the profile that the command needs: it waits for its next message."""


def targets(registry: Registry, command_type: str, protocol: str, heard: tuple[str, ...]) -> list[Target]:
    """Return the profiles of ``protocol`` that know ``command_type``, those under which the device is known first."""
    own = [profile for name in heard if (profile := registry.profile(name)) is not None]
    found = []
    for profile in dict.fromkeys((*own, *registry.profiles)):
        if any(match.protocol == protocol for match in profile.match):
            driver = registry.driver(profile)
            if command_type in driver.commands:
                found.append(Target(profile, driver))
    return found


def heard_as(registry: Registry, device_id: str, states: States) -> tuple[str, ...]:
    """Return the profiles that a device is known by: the configured one, then those that read its messages."""
    entry = registry.device(device_id)
    configured = (entry.profile,) if entry is not None and entry.profile else ()
    return (*configured, *states)


def check(
    registry: Registry,
    device_id: str,
    command_type: str,
    payload: Mapping[str, Any],
    *,
    protocol: str,
    states: States,
    unknown: str = "accept",
) -> Target:
    """Return what a command is for; raises CommandError, with a JSON pointer, where no family takes it.

    A device that has not been heard of may be of any family: the first that takes the payload. With ``unknown``
    ``reject`` it has to be configured.
    """
    entry = registry.device(device_id)
    if entry is None and unknown == "reject":
        raise CommandError(f"device {device_id:.80} is not known here (UNKNOWN_DEVICES=reject)", "/device_id")
    if entry is not None and not entry.active:
        raise CommandError(f"device {device_id:.80} is configured as not active", "/device_id")
    known = heard_as(registry, device_id, states)
    found = targets(registry, command_type, protocol, known)
    if not found:
        names = sorted(
            {name for p in registry.profiles for name in registry.driver(p).commands if _speaks(p, protocol)}
        )
        raise CommandError(
            f"no active profile over {protocol} knows command {command_type!r}; known: {', '.join(names) or 'none'}",
            "/command_type",
        )
    first: CommandError | None = None
    for target in [target for target in found if target.profile.name in known] or found:
        try:
            target.driver.check(command_type, payload)
        except CommandError as exc:
            first = first or exc
        else:
            return target
    raise first or CommandError("no family takes this command", "/payload")


def _speaks(profile: Profile, protocol: str) -> bool:
    return any(match.protocol == protocol for match in profile.match)


def build(
    registry: Registry,
    device_id: str,
    command: OpenCommand,
    states: States,
    now: datetime,
    *,
    unknown: str = "accept",
) -> Downlink:
    """Return what goes out; raises NotYet, or CommandError where it never will."""
    target = check(
        registry,
        device_id,
        command.command_type,
        command.payload,
        protocol=command.protocol,
        states=states,
        unknown=unknown,
    )
    own = states.get(target.profile.name)
    # a controller can speak two families under one id: the broker is the same
    state = own if own is not None else {name: value for other in states.values() for name, value in other.items()}
    try:
        downlink = target.driver.encode(
            command.command_type,
            command.payload,
            request_id=command.request_id,
            device_id=device_id,
            state=state,
            now=now,
        )
    except CommandError as exc:
        if own is None:
            raise NotYet(str(exc)) from exc
        raise
    qos = registry.profile_for(device_id, target.profile).qos
    if command.protocol == "mqtt" and not downlink.route:
        raise CommandError(f"{target.driver.name} names no topic for {command.command_type!r}")
    return (
        downlink
        if downlink.qos == qos
        else Downlink(route=downlink.route, data=downlink.data, qos=qos, retain=downlink.retain)
    )
