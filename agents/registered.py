"""Which devices somebody has registered: ``devices.yaml``, and the topic ``iot_devices`` over it.

Guarantees: what the topic says of a device replaces what the file says, a tombstone gives the file's word back; a
record that names no active profile, or overrides what no profile has, is refused and the one before stays. Nobody is
called unknown before the topic has been read to its end once.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

import msgspec
from jsonschema import Draft202012Validator
from mode import Service

from devices.registry import DeviceEntry, Registry, schema
from settings import Settings
from streams import topics
from streams.feed import Feed
from streams.messages import Device

_POLL_SECONDS: Final = 0.05


class Registered:
    """The devices of a registry, kept as the topic says."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self._from_file = {entry.device_id: entry for entry in registry.devices}
        self.feed: Feed | None = None

    def known(self, device_id: str) -> bool:
        """Tell whether somebody has configured a device, and as active."""
        entry = self.registry.device(device_id)
        return entry is not None and entry.active

    def take(self, device_id: str, device: Device | None) -> None:
        """Take a record of ``iot_devices``; raises ValueError for one that cannot be used."""
        if device is None:
            entry = self._from_file.get(device_id)
            if entry is None:
                self.registry.remove_device(device_id)
            else:
                self.registry.set_device(entry)
            return
        if device.profile is not None and self.registry.profile(device.profile) is None:
            raise ValueError(f"device {device_id!r:.80}: no active profile {device.profile!r:.80}")
        told = {name: value for name, value in msgspec.to_builtins(device).items() if value is not None}
        told.pop("name")
        for error in Draft202012Validator(schema("devices")).iter_errors({"devices": [told]}):
            where = "/".join(str(step) for step in list(error.absolute_path)[2:])
            raise ValueError(f"device {device_id!r:.80}: {where}: {error.message:.200}")
        fields: dict[str, Any] = {"profile": device.profile, "name": device.name, "active": device.active}
        entry = DeviceEntry(device_id=device_id, tags=tuple(device.tags), config=device.config, **fields)
        for profile in self.registry.profiles:
            if entry.config and entry.profile in (None, profile.name):
                profile.overridden(entry.config)
        self.registry.set_device(entry)

    async def follow(self, service: Service, settings: Settings) -> None:
        """Have ``service`` follow the topic for as long as it lives."""
        feed = Feed(settings, topics.devices, self.take, beacon=service.beacon)
        await service.add_runtime_dependency(feed)
        self.feed = feed

    @property
    def complete(self) -> bool:
        """Whether the topic has been read to its end once."""
        return self.feed is not None and self.feed.caught_up

    async def ready(self) -> None:
        """Wait until the topic has been read to its end once."""
        while self.feed is None:
            await asyncio.sleep(_POLL_SECONDS)
        await self.feed.ready()
