"""Alarms are raised and resolved.

Consumes ``iot_validated_data`` (Reading), ``iot_alert_actions`` (AlertAction) and its own ticks; rules come from
``config/alarms.yaml`` and ``iot_alarms``, devices from ``config/devices.yaml`` and ``iot_devices``. Produces ``iot_alerts``
(Alert), key: device id. Table ``alarm_states``.
Guarantee: transitions of one alarm alternate; a state is stored only after the alert that it caused is in Kafka, and the
reading is committed after both, so a worker that is killed anywhere tells each transition at least once, with the same id.
Retried: Kafka. Dead-lettered: ``poison`` what is no Reading. Dropped: nothing; a reading that no rule names counts as handled.
"""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from typing import Any

import msgspec
from mode import Service

from devices.alarms import rules as alarm_rules
from devices.alarms.buffer import StateBuffer
from devices.alarms.engine import AlarmEngine
from devices.alarms.model import AlarmRule, Alert, DeviceInfo
from devices.alarms.prepare import Limits
from devices.registry import Registry
from streams import topics
from streams.feed import Feed
from streams.messages import AlertAction, Device, Reading, encode
from streams.resilience.chunks import Out
from streams.resilience.failures import Poison, Retryable
from streams.stage import Stage
from tables.alarms import PartitionStates, declare

alarms = Stage("alarms")
states = declare(alarms.app, alarms.settings)

TICK_SECONDS = 1.0


class Tick(msgspec.Struct):
    """A moment, as a record of one partition: time passes where the states are."""

    at: datetime
    partition: int


ticks = topics.ticks("alarms", Tick, topics.validated_data)


class Knowledge:
    """Rules and devices: the files, and the topics over them."""

    def __init__(self) -> None:
        folder = alarms.settings.config_path
        self.registry = Registry.load(folder)
        self.file_rules = {rule.id: rule for rule in alarm_rules.load(folder / "alarms.yaml")}
        self.topic_rules: dict[str, AlarmRule | None] = {}
        self.topic_devices: dict[str, Device] = {}
        #: counts changes of rules, so that each partition notices when it is its turn
        self.version = 0

    def rules(self) -> list[AlarmRule]:
        """Return all rules; one from the topic replaces that of the file with the same id, a tombstone gives it back."""
        merged = dict(self.file_rules)
        merged.update({name: rule for name, rule in self.topic_rules.items() if rule is not None})
        return [rule for rule in merged.values() if rule.active]

    def take_rule(self, key: str, rule: AlarmRule | None) -> None:
        """Take a rule from the topic; raises ValueError for one that contradicts itself."""
        if rule is not None:
            faults = alarm_rules.check_rule(rule)
            if faults:
                raise ValueError("; ".join(fault.message for fault in faults))
        self.topic_rules[key] = rule
        self.version += 1

    def take_device(self, key: str, device: Device | None) -> None:
        """Take a device from the topic."""
        if device is None:
            self.topic_devices.pop(key, None)
        else:
            self.topic_devices[key] = device

    def device(self, device_id: str) -> DeviceInfo | None:
        """Return what is known of a device, None where only its messages tell."""
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


class Partition:
    """The engine of one partition, its states, and the order in which they are stored."""

    def __init__(self, number: int, knowledge: Knowledge) -> None:
        self.number = number
        self.knowledge = knowledge
        self.version = knowledge.version
        self.buffer = StateBuffer(PartitionStates(states, number))
        self.engine = AlarmEngine(
            self.buffer,
            knowledge.rules(),
            devices=knowledge.device,
            limits=Limits(max_age_seconds=alarms.settings.alarm_max_age_seconds),
        )
        self.lock = asyncio.Lock()
        self.rebuilt = False

    def prepare(self, now: float) -> list[Alert]:
        """Take up timers after a start, and rules that have changed; returns what that closes."""
        found: list[Alert] = []
        if not self.rebuilt:
            found += self.engine.rebuild(now)
            self.rebuilt = True
        if self.version != self.knowledge.version:
            self.version = self.knowledge.version
            found += self.engine.set_rules(self.knowledge.rules(), now)
        return found


class Alarms:
    """The partitions that this worker holds."""

    def __init__(self, knowledge: Knowledge) -> None:
        self.knowledge = knowledge
        self.partitions: dict[int, Partition] = {}

    def partition(self, number: int) -> Partition:
        """Return the engine of a partition, made when its first event comes."""
        found = self.partitions.get(number)
        if found is None:
            found = self.partitions[number] = Partition(number, self.knowledge)
        return found

    def forget(self, number: int) -> None:
        """Drop an engine whose states were not stored: the next event begins with those that were."""
        self.partitions.pop(number, None)

    async def settle(self, partition: Partition, found: list[Alert]) -> None:
        """Send alerts, wait until Kafka has them, then store the states."""
        changes = partition.buffer.cut()
        try:
            if found:
                await alarms.app.send_and_wait(
                    [(topics.alerts.name, alert.device_id.encode(), encode(alert), None) for alert in found]
                )
            partition.buffer.flush(changes)
        except BaseException:
            self.forget(partition.number)
            raise
        now = time.time()
        for alert in found:
            for other in self.partitions.values():
                other.engine.note(alert, now)


_alarms: Alarms | None = None


@alarms.prepare
def current() -> Alarms:
    """Return the alarms over the configured rules, loaded when they are first needed."""
    global _alarms
    if _alarms is None:
        _alarms = Alarms(Knowledge())
    return _alarms


@alarms.app.on_partitions_revoked.connect
async def forget_engines(_app: Any, revoked: Any, **_: Any) -> None:
    """Drop the engines of partitions that are somebody else's now."""
    if _alarms is not None:
        for tp in revoked:
            _alarms.forget(tp.partition)


@alarms.agent(topics.validated_data, chunks=True, name="alarms")
async def evaluate(stream: Any) -> None:
    """Let every reading count under the rules that name it."""
    watch = current()
    await FEEDS.ready()
    async for chunk in stream:
        partition = watch.partition(chunk.records[0].partition)
        async with partition.lock:
            now = time.time()
            found = partition.prepare(now)
            device = watch.knowledge.device

            def count(
                reading: Reading,
                _out: Out,
                partition: Partition = partition,
                found: list[Alert] = found,
                now: float = now,
            ) -> None:
                found.extend(partition.engine.process(reading, device(reading.device_id), now))

            await chunk.each(count)
            await watch.settle(partition, found)


@alarms.agent(ticks, chunks=True, name="alarms-ticks")
async def pass_time(stream: Any) -> None:
    """Let time count: durations, silences, reminders."""
    watch = current()
    await FEEDS.ready()
    async for chunk in stream:
        partition = watch.partition(chunk.records[0].partition)
        async with partition.lock:
            now = time.time()
            found = partition.prepare(now)
            if caught_up(partition.number):
                found += partition.engine.tick(now)
            await chunk.each(_nothing)
            await watch.settle(partition, found)


def _nothing(_tick: Tick, _out: Out) -> None:
    """Count a tick as handled."""


def caught_up(number: int) -> bool:
    """Tell whether no reading of this partition waits: a silence is none while readings do."""
    consumer = alarms.app.typed_consumer
    if consumer is None:
        return True
    return not any(
        lag for tp, lag in consumer.lags().items() if tp.topic == topics.validated_data.name and tp.partition == number
    )


@alarms.agent(topics.alert_actions, chunks=True, name="alarms-actions")
async def take_actions(stream: Any) -> None:
    """Take acknowledgements."""
    watch = current()
    await FEEDS.ready()
    async for chunk in stream:
        partition = watch.partition(chunk.records[0].partition)
        async with partition.lock:
            now = time.time()
            found = partition.prepare(now)

            def act(
                action: AlertAction,
                _out: Out,
                partition: Partition = partition,
                found: list[Alert] = found,
                now: float = now,
            ) -> None:
                if action.action != "ack":
                    raise Poison(f"action {action.action!r} is not known")
                found.extend(partition.engine.acknowledge(action.alert_id, now, action.user, action.comment))

            await chunk.each(act)
            await watch.settle(partition, found)


class Feeds:
    """Waits for the topics of rules and devices; under ``test_context`` there are none."""

    rules: Feed | None = None
    devices: Feed | None = None

    async def ready(self) -> None:
        """Return once rules and devices are complete."""
        if alarms.app.testing:
            return
        while self.rules is None or self.devices is None:
            await asyncio.sleep(0.05)
        await self.rules.ready()
        await self.devices.ready()


FEEDS = Feeds()


class Clock(Service):
    """Follows rules and devices, and writes a tick to each partition that this worker holds."""

    async def on_start(self) -> None:
        """Follow the topics."""
        knowledge = current().knowledge
        settings = alarms.settings
        FEEDS.rules = Feed(settings, topics.alarm_rules, knowledge.take_rule, beacon=self.beacon)
        FEEDS.devices = Feed(settings, topics.devices, knowledge.take_device, beacon=self.beacon)
        await self.add_runtime_dependency(FEEDS.rules)
        await self.add_runtime_dependency(FEEDS.devices)

    @Service.task
    async def _tick(self) -> None:
        while not self.should_stop:
            await self.sleep(TICK_SECONDS)
            mine = [tp.partition for tp in alarms.app.assigned or () if tp.topic == ticks.name]
            now = datetime.now(UTC)
            try:
                producer = await alarms.app.maybe_start_producer()
                for number in mine:
                    await producer.send(ticks.name, None, encode(Tick(now, number)), number, None, None)
            except Exception as exc:
                self.log.info("No tick: %r; time counts from the next one", exc)


alarms.service(Clock)


@alarms.check("rules")
async def rules_known() -> None:
    """Raise while the rules of the topic are not complete."""
    try:
        await asyncio.wait_for(FEEDS.ready(), 1.0)
    except TimeoutError:
        raise Retryable("the topics of rules and devices have not been read to their end yet") from None
