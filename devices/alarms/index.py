"""Which rules a reading meets: found by device, profile, tag and index, and remembered.

Guarantee: a rule costs nothing for devices that it does not name. What is remembered is shared by all devices of the
same profile and tags; only devices that a rule names have an entry of their own. Not safe to share between threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from devices.alarms.model import AlarmRule, DeviceInfo
from devices.alarms.prepare import DEFAULT_LIMITS, Limits, Prepared

# Indices and tags can be made up by devices: what is remembered is bounded.
MAX_REMEMBERED: Final = 65_536


class RuleIndex:
    """The active rules, compiled. Raises ``ValueError`` for a rule that cannot be
    (:func:`~devices.alarms.rules.check_rule` finds it first) and for one id twice."""

    def __init__(self, rules: Iterable[AlarmRule] = (), limits: Limits = DEFAULT_LIMITS) -> None:
        self.rules: dict[str, AlarmRule] = {}
        self._prepared: dict[str, Prepared] = {}
        self._by_device: dict[str, list[Prepared]] = {}
        self._by_profile: dict[str, list[Prepared]] = {}
        self._by_tag: dict[str, list[Prepared]] = {}
        self._remembered: dict[tuple[str | None, str | None, tuple[str, ...], str | None], tuple[Prepared, ...]] = {}
        for rule in sorted(rules, key=lambda rule: rule.id):
            if rule.id in self.rules:
                raise ValueError(f"two alarm rules have the id {rule.id!r}")
            self.rules[rule.id] = rule
            if not rule.active:
                continue
            try:
                prepared = Prepared(rule, limits)
            except (TypeError, KeyError, LookupError) as exc:
                raise ValueError(f"the alarm rule {rule.id!r} cannot be used: {exc!r}") from exc
            self._prepared[rule.id] = prepared
            if rule.device_id is not None:
                self._by_device.setdefault(rule.device_id, []).append(prepared)
            if rule.profile is not None:
                self._by_profile.setdefault(rule.profile, []).append(prepared)
            if rule.tag is not None:
                self._by_tag.setdefault(rule.tag, []).append(prepared)

    def __len__(self) -> int:
        return len(self._prepared)

    def __iter__(self) -> Iterator[Prepared]:
        return iter(self._prepared.values())

    def get(self, rule_id: str) -> Prepared | None:
        """Return an active rule, None for one that is switched off or unknown."""
        return self._prepared.get(rule_id)

    def rules_for(
        self, device_id: str, profile: str | None, tags: tuple[str, ...], index: str | None
    ) -> tuple[Prepared, ...]:
        """Return the rules that a reading of this device under ``index`` meets, by id; None: under any index."""
        key = (device_id if device_id in self._by_device else None, profile, tags, index)
        found = self._remembered.get(key)
        if found is None:
            if len(self._remembered) >= MAX_REMEMBERED:
                self._remembered.clear()
            found = self._remembered[key] = tuple(self._find(device_id, profile, tags, index))
        return found

    def applies(self, rule: Prepared, info: DeviceInfo) -> bool:
        """Tell whether ``rule`` names the device; it may where the device's profile is only known by its messages."""
        mine = rule.rule
        return info.active and (
            (mine.device_id is not None and mine.device_id == info.device_id)
            or (mine.profile is not None and info.profile in (mine.profile, None))
            or (mine.tag is not None and mine.tag in info.tags)
        )

    def _find(
        self, device_id: str, profile: str | None, tags: tuple[str, ...], index: str | None
    ) -> Iterator[Prepared]:
        named = [*self._by_device.get(device_id, ()), *self._by_profile.get(profile or "", ())]
        for tag in tags:
            named += self._by_tag.get(tag, ())
        for rule in sorted(set(named), key=lambda rule: rule.id):
            if index is None or rule.index is None or rule.index == index:
                yield rule
