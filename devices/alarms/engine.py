"""The alarms of one partition: readings and time in, alerts out.

Guarantees: states live in the mapping that was passed in and nowhere else; in memory are only the timers and the open
alarms. Every change is written before the call returns, so whoever commits states and alerts together can be killed
at any moment. An engine that starts over (:meth:`AlarmEngine.rebuild`) takes up every timer where it was, and closes
what a rule that has been removed, or a device that lost its tag, left open.

Call :meth:`~AlarmEngine.tick` only once the partition has caught up: a silence is not one while readings are waiting.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from copy import copy
from typing import Any, Final, NamedTuple

from devices.alarms.alerts import following, opening, split_key, state_key
from devices.alarms.evaluate import Events, acknowledge, close, due, evaluate, rule_changed, tick
from devices.alarms.index import RuleIndex
from devices.alarms.model import AlarmRule, AlarmState, Alert, DeviceInfo, Kind, Reason, pack, unpack
from devices.alarms.prepare import DEFAULT_LIMITS, Limits, Prepared
from devices.model import Reading

_NONE: Final[tuple[Alert, ...]] = ()

# How long a dependency goes on muting after it came back: its devices need a moment to be heard again.
GRACE_SECONDS: Final = 60.0
# A clock that goes back by more than this was set, and timers are planned anew.
CLOCK_STEP_SECONDS: Final = 5.0
_NEVER: Final = float("inf")
# States that are looked at in one go: some 20 ms.
SLICE_STATES: Final = 4096


class _Visit(NamedTuple):
    """What the alerts of one call have in common."""

    info: DeviceInfo
    now: float
    request_id: str = ""
    display_name: str = ""
    said: Mapping[str, Any] | None = None


def _nothing_known(_device_id: str) -> DeviceInfo | None:
    return None


class AlarmEngine:
    """See the module's docstring. ``states`` maps :func:`~devices.alarms.alerts.state_key` to packed states.

    ``devices`` tells what is known of a device (for timers, which have no reading at hand). All times are epoch
    seconds. ``counts`` says what became of readings: ``evaluated`` (times rules), ``old``, ``future``, ``late`` (or
    redelivered).
    """

    def __init__(
        self,
        states: MutableMapping[str, bytes],
        rules: Iterable[AlarmRule] = (),
        *,
        devices: Callable[[str], DeviceInfo | None] = _nothing_known,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self.states = states
        self.index = RuleIndex(rules, limits)
        self.counts: Counter[str] = Counter()
        self._limits = limits
        self._devices = devices
        self._timers: list[tuple[float, str]] = []
        self._planned: dict[str, float] = {}
        self._open: dict[str, str] = {}
        self._keys: dict[str, str] = {}
        self._down: dict[tuple[str, str], set[str]] = {}
        self._grace: dict[tuple[str, str], float] = {}
        self._now = float("-inf")

    # Readings

    def process(self, reading: Reading, info: DeviceInfo | None, now: float) -> Sequence[Alert]:
        """Let one reading count under every rule that names it; returns the transitions, in order.

        ``info`` None: the device is known by its messages alone. A profile that it does not name is the one that the
        reading's metadata does.
        """
        device_id = reading.device_id
        metadata = reading.metadata
        if info is None:
            info = DeviceInfo(device_id=device_id)
        elif not info.active:
            return _NONE
        rules = self.index.rules_for(device_id, info.profile or metadata.get("profile"), info.tags, reading.index)
        if not rules:
            return _NONE
        time = reading.timestamp.timestamp()
        if not now - self._limits.max_age_seconds <= time <= now + self._limits.max_ahead_seconds:
            self.counts["future" if time > now else "old"] += 1
            return _NONE
        visit = _Visit(info, now, reading.request_id)
        alerts: list[Alert] = []
        labels, index = reading.labels, reading.index
        for rule in rules:
            if rule.whole:
                key = state_key(device_id, rule.index or "", "", rule.id)
                alerts += self._reading(rule, key, reading, -1, time, visit=visit)
                continue
            wanted = rule.label
            for position, label in enumerate(labels):
                if wanted is None or wanted == label:
                    key = state_key(device_id, index, label, rule.id)
                    alerts += self._reading(rule, key, reading, position, time, visit=visit)
        return alerts

    def _reading(
        self, rule: Prepared, key: str, reading: Reading, position: int, time: float, *, visit: _Visit
    ) -> Sequence[Alert]:
        packed = self.states.get(key)
        state = AlarmState() if packed is None else unpack(packed)
        units = reading.metadata.get("units")
        new, events = evaluate(
            rule,
            state,
            reading.values[position] if position >= 0 else None,
            time,
            visit.now,
            muted=bool(rule.depends_on) and self.is_muted(rule, visit.info, visit.now),
            request_id=visit.request_id,
            unit=units[position] if units and position >= 0 else "",
        )
        self.counts["evaluated"] += 1
        if new is state:
            self.counts["late"] += 1
            return _NONE
        alerts: Sequence[Alert] = _NONE
        if events:
            if position >= 0:
                visit = visit._replace(display_name=reading.display_names[position])
            alerts = self._tell(key, rule.rule, state, new, events, visit=visit)
        self.states[key] = pack(new)
        if rule.timed or new.owed or state.owed:
            self._plan(key, rule, new, visit)
        return alerts

    # Time

    def tick(self, now: float, limit: int = 10_000) -> list[Alert]:
        """Let time count for at most ``limit`` timers that are due; returns the transitions."""
        alerts: list[Alert] = []
        if now < self._now - CLOCK_STEP_SECONDS:
            self._replan(now)
        self._now = now
        for pair in [pair for pair, until in self._grace.items() if until <= now]:
            del self._grace[pair]
        while self._timers and self._timers[0][0] <= now and limit > 0:
            when, key = heapq.heappop(self._timers)
            if self._planned.get(key) != when:
                continue
            limit -= 1
            del self._planned[key]
            packed = self.states.get(key)
            series = split_key(key)
            rule = self.index.get(series.rule_id)
            if packed is None or rule is None:
                continue
            state = unpack(packed)
            visit = _Visit(self._info(series.device_id), now)
            new, events = tick(rule, state, now, muted=self.is_muted(rule, visit.info, now))
            alerts += self._tell(key, rule.rule, state, new, events, visit=visit)
            if new is not state:
                self.states[key] = pack(new)
            self._plan(key, rule, new, visit)
        return alerts

    def next_due(self) -> float | None:
        """Return when :meth:`tick` has something to do, None for never; it may turn out to have nothing."""
        return self._timers[0][0] if self._timers else None

    def _plan(self, key: str, rule: Prepared, state: AlarmState, visit: _Visit) -> None:
        now = visit.now
        when = due(rule, state, now, muted=bool(rule.depends_on) and self.is_muted(rule, visit.info, now))
        if when is None:
            return
        if when <= now:
            when = now + 1.0
        # A timer that rings too early finds out and plans itself anew; moving it with each reading would cost more.
        if when < self._planned.get(key, _NEVER):
            self._planned[key] = when
            heapq.heappush(self._timers, (when, key))

    def _replan(self, now: float) -> None:
        keys = list(self._planned)
        self._planned.clear()
        self._timers.clear()
        self._adopt_all(((key, packed) for key in keys if (packed := self.states.get(key)) is not None), now)

    # Acknowledgements

    def acknowledge(self, alert_id: str, now: float, user: str = "", comment: str = "") -> list[Alert]:
        """Acknowledge an open alarm; nothing for one that is unknown, acknowledged or over."""
        key = self._keys.get(alert_id)
        packed = None if key is None else self.states.get(key)
        if key is None or packed is None:
            return []
        state = unpack(packed)
        new, events = acknowledge(state, now)
        if not events:
            return []
        series = split_key(key)
        visit = _Visit(self._info(series.device_id), now, said={"user": user, "comment": comment})
        alerts = self._tell(key, self.index.rules.get(series.rule_id), state, new, events, visit=visit)
        self.states[key] = pack(new)
        return list(alerts)

    # Dependencies

    def is_muted(self, rule: Prepared, info: DeviceInfo, now: float) -> bool:
        """Tell whether something that the rule depends on is down, or has only just come back."""
        for dependency in rule.depends_on:
            device_id = dependency.device_id or info.gateway
            if device_id is None:
                continue
            pair = (dependency.alarm, device_id)
            if self._down.get(pair) or self._grace.get(pair, now) > now:
                return True
        return False

    def note(self, alert: Alert, now: float) -> None:
        """Take notice of an alert, this engine's or another's, that rules may depend on. Twice is once."""
        pair = (alert.alarm_id, alert.device_id)
        down = self._down.get(pair)
        if not alert.is_resolved:
            self._down.setdefault(pair, set()).add(alert.id)
        elif down is not None:
            down.discard(alert.id)
            if not down:
                del self._down[pair]
                self._grace[pair] = now + GRACE_SECONDS

    # Rules and devices

    def set_rules(self, rules: Iterable[AlarmRule], now: float) -> list[Alert]:
        """Take another set of rules; returns what that closes. Raises ``ValueError`` and changes nothing for bad ones.

        Looks at every state of each rule that was changed or removed, at none where nothing was.
        """
        return [alert for some in self.set_rules_in_slices(rules, now) for alert in some]

    def set_rules_in_slices(self, rules: Iterable[AlarmRule], now: float) -> Iterator[list[Alert]]:
        """Do what :meth:`set_rules` does a slice at a time; nothing else may be asked of the engine in between."""
        index = RuleIndex(rules, self._limits)
        old = self.index.rules
        touched = {
            rule_id for rule_id in old.keys() | index.rules.keys() if old.get(rule_id) != index.rules.get(rule_id)
        }
        self.index = index
        if touched:
            stored = ((key, packed) for key, packed in self.states.items() if split_key(key).rule_id in touched)
            yield from self._adopt_slices(stored, now, old)

    def rebuild(self, now: float) -> list[Alert]:
        """Read all states and take up their timers; call once after the states are there and the rules are complete."""
        return [alert for some in self.rebuild_in_slices(now) for alert in some]

    def rebuild_in_slices(self, now: float) -> Iterator[list[Alert]]:
        """Do what :meth:`rebuild` does a slice at a time; nothing else may be asked of the engine in between."""
        self._timers.clear()
        self._planned.clear()
        self._open.clear()
        self._keys.clear()
        self._now = now
        yield from self._adopt_slices(self.states.items(), now)

    def expect(self, info: DeviceInfo, now: float) -> list[Alert]:
        """Take notice of a registered device, or of a change to it.

        Its silence counts from now on where it was never heard, and what no rule names any more is closed.
        """
        mine = [key for key in self._open if split_key(key).device_id == info.device_id]
        stored = ((key, packed) for key in mine if (packed := self.states.get(key)) is not None)
        alerts = self._adopt_all(stored, now, info=info)
        if not info.active:
            return alerts
        for rule in self.index.rules_for(info.device_id, info.profile, info.tags, None):
            fixed = rule.whole or (rule.index is not None and rule.label is not None)
            if not rule.no_data or not fixed:
                continue
            key = state_key(info.device_id, rule.index or "", rule.label or "", rule.id)
            if key not in self.states:
                state = AlarmState(rule=rule.fingerprint, seen=now)
                self.states[key] = pack(state)
                self._plan(key, rule, state, _Visit(info, now))
        return alerts

    def _adopt_all(
        self, stored: Iterable[tuple[str, bytes]], now: float, info: DeviceInfo | None = None
    ) -> list[Alert]:
        return [alert for some in self._adopt_slices(stored, now, info=info) for alert in some]

    def _adopt_slices(
        self,
        stored: Iterable[tuple[str, bytes]],
        now: float,
        old: Mapping[str, AlarmRule] | None = None,
        info: DeviceInfo | None = None,
    ) -> Iterator[list[Alert]]:
        """Bring stored states under the present rules and plan their timers; write once all have been read."""
        alerts: list[Alert] = []
        changes: dict[str, AlarmState | None] = {}
        for number, (key, packed) in enumerate(stored, 1):
            state = unpack(packed)
            new = self._adopt(key, state, now, alerts, old=old, info=info)
            if new is not state:
                changes[key] = new
            if number % SLICE_STATES == 0:
                yield []
        for key, changed in changes.items():
            if changed is None:
                del self.states[key]
            else:
                self.states[key] = pack(changed)
        yield alerts

    def _adopt(
        self,
        key: str,
        state: AlarmState,
        now: float,
        alerts: list[Alert],
        *,
        old: Mapping[str, AlarmRule] | None,
        info: DeviceInfo | None,
    ) -> AlarmState | None:
        series = split_key(key)
        present = self.index.rules.get(series.rule_id)
        rule = self.index.get(series.rule_id)
        known = info or self._devices(series.device_id)
        visit = _Visit(known or DeviceInfo(device_id=series.device_id), now)
        silent = rule is not None and (
            self.is_muted(rule, visit.info, now) or (rule.quiet is not None and rule.quiet.contains(now))
        )
        if state.alert is not None and state.life and key not in self._open:
            self._remember(key, state.alert, now)
        events: Events = ()
        new = state
        if present is None or rule is None:
            if state.life or state.since is not None or state.hits:
                reason = Reason.RULE_REMOVED if present is None else Reason.RULE_SWITCHED_OFF
                new, events = close(state, now, reason, silent=silent)
        elif state.life and known is not None and not self.index.applies(rule, known):
            new, events = close(state, now, Reason.NOT_APPLICABLE, silent=silent)
        else:
            former = (old or {}).get(series.rule_id)
            if former is not None:
                new, events = rule_changed(former, present, state, now, silent=silent)
            if new.rule and new.rule != rule.fingerprint:
                new, events = tick(rule, new, now, muted=silent)
            if new.seen > now:
                new = copy(new)
                new.seen = now
        alerts += self._tell(key, present, state, new, events, visit=visit)
        self._planned.pop(key, None)
        if present is None:
            return None
        if rule is not None:
            self._plan(key, rule, new, visit)
        return new

    # Alerts

    def _info(self, device_id: str) -> DeviceInfo:
        return self._devices(device_id) or DeviceInfo(device_id=device_id)

    def _tell(
        self,
        key: str,
        rule: AlarmRule | None,
        before: AlarmState,
        after: AlarmState,
        events: Events,
        *,
        visit: _Visit,
    ) -> Sequence[Alert]:
        """Make the alerts of ``events`` and keep in ``after``, which nobody else has seen yet, what later ones need."""
        if not events:
            return _NONE
        alerts: list[Alert] = []
        series = split_key(key)
        known = before.alert
        for step in events:
            if step.kind is Kind.OPENED and rule is not None:
                known = after.alert = opening(rule, series, after, step, visit.info, display_name=visit.display_name)
                self._remember(key, known, visit.now)
                alerts.append(known)
            elif known is not None:
                alert = following(known, step, rule, visit.request_id, visit.said)
                alerts.append(alert)
                self.note(alert, visit.now)
                if step.kind is Kind.RESOLVED:
                    self._forget(key)
                    if after.owed and not after.life:
                        after.alert = alert
            self.counts[str(step.kind)] += 1
        return alerts

    def _remember(self, key: str, alert: Alert, now: float) -> None:
        self._open[key] = alert.id
        self._keys[alert.id] = key
        self.note(alert, now)

    def _forget(self, key: str) -> None:
        found = self._open.pop(key, None)
        if found is not None:
            self._keys.pop(found, None)

    @property
    def open_alarms(self) -> int:
        """How many alarms are open or acknowledged."""
        return len(self._open)
