"""What alarms have to know: rules, devices, and what is open anywhere.

Guarantees: what comes by a topic replaces what the file of the same name says, and a tombstone gives the file's back; a
rule that contradicts itself is refused and the one before stays.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from devices.alarms import rules as alarm_rules
from devices.alarms.model import AlarmRule, Alert, DeviceInfo
from devices.registry import Registry
from streams.messages import Device

# Devices whose description is kept at hand.
MAX_REMEMBERED: Final = 65_536


def _ignore(_what: Any) -> None:
    """Do nothing yet."""


class Knowledge:
    """Rules, devices, and the alarms that are open anywhere: the files, and the topics over them."""

    def __init__(self, folder: Path) -> None:
        self.registry = Registry.load(folder)
        self.file_rules = {rule.id: rule for rule in alarm_rules.load(folder / "alarms.yaml")}
        self.topic_rules: dict[str, AlarmRule | None] = {}
        self.topic_devices: dict[str, Device] = {}
        #: by alert id, of all partitions and workers: what rules may depend on
        self.open: dict[str, Alert] = {}
        #: counts changes of rules, so that each partition notices when it is its turn
        self.version = 0
        #: called with the id of a device that was changed, and with each opening and closing of :attr:`open`
        self.on_device: Callable[[str], None] = _ignore
        self.on_alert: Callable[[Alert], None] = _ignore
        self._infos: dict[str, DeviceInfo | None] = {}

    def rules(self) -> list[AlarmRule]:
        """Return all rules; one from the topic replaces that of the file with the same id."""
        merged = dict(self.file_rules)
        merged.update({name: rule for name, rule in self.topic_rules.items() if rule is not None})
        return list(merged.values())

    def take_rule(self, key: str, rule: AlarmRule | None) -> None:
        """Take a rule from the topic; raises ValueError for one that contradicts itself or another's id."""
        if rule is not None:
            faults = [fault.message for fault in alarm_rules.check_rule(rule)]
            if rule.id != key:
                faults.append(f"its id {rule.id!r} is not the record's key")
            if faults:
                raise ValueError("; ".join(faults))
        self.topic_rules[key] = rule
        self.version += 1

    def take_device(self, key: str, device: Device | None) -> None:
        """Take a device from the topic."""
        if device is None:
            self.topic_devices.pop(key, None)
        else:
            self.topic_devices[key] = device
        self._infos.pop(key, None)
        self.on_device(key)

    def take_open(self, key: str, alert: Alert | None) -> None:
        """Take an alarm that was opened, None for one that is over, in whatever partition."""
        if alert is not None:
            self.open[key] = alert
        else:
            alert = self.open.pop(key, None)
            if alert is None:
                return
            alert = msgspec.structs.replace(alert, is_resolved=True)
        self.on_alert(alert)

    def devices(self) -> set[str]:
        """Return the ids of all registered devices."""
        return self.topic_devices.keys() | {entry.device_id for entry in self.registry.devices}

    def device(self, device_id: str) -> DeviceInfo | None:
        """Return what is known of a device, None where only its messages tell."""
        try:
            return self._infos[device_id]
        except KeyError:
            if len(self._infos) >= MAX_REMEMBERED:
                self._infos.clear()
            info = self._infos[device_id] = self._device(device_id)
            return info

    def _device(self, device_id: str) -> DeviceInfo | None:
        entry: Any = self.topic_devices.get(device_id) or self.registry.device(device_id)
        if entry is None:
            return None
        return DeviceInfo(
            device_id=device_id,
            name=entry.name,
            profile=entry.profile,
            tags=tuple(entry.tags),
            gateway=entry.config.get("gateway"),
            active=entry.active,
        )
