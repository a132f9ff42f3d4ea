"""Alarms are raised and resolved.

Consumes ``iot_validated_data`` (Reading), ``iot_alert_actions`` (AlertAction) and its own ticks; rules come from
``config/alarms.yaml`` and ``iot_alarms``, devices from ``config/devices.yaml`` and ``iot_devices``. Produces
``iot_alerts`` (Alert), key: device id, and ``{APP_ID}-alarms-open``, compacted: what is open, for rules that depend on
it in whatever partition. Table ``alarm_states``.
Guarantee: transitions of one alarm alternate; a state is stored only after the alert that it caused is in Kafka, and
the reading is committed after both, so a worker that is killed anywhere tells each transition at least once, with the
same id. Retried: Kafka. Dead-lettered: ``poison`` what is no Reading. Dropped: nothing; a reading that no rule names
counts as handled.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any, Final

from aiokafka.partitioner import DefaultPartitioner
from mode import Service

from agents.watch.knowledge import Knowledge
from agents.watch.partition import Partition
from devices.alarms.model import Alert
from devices.alarms.prepare import Limits
from streams import topics
from streams.feed import Feed, Feeds
from streams.messages import AlertAction, Reading, encode
from streams.resilience.bounds import within
from streams.resilience.chunks import Out
from streams.resilience.failures import Retryable
from streams.resilience.producer import Outgoing
from streams.stage import Stage
from streams.ticks import TICK_SECONDS, Tick, reach, write_ticks
from tables.alarms import declare
from tables.rows import LocalStates, publish, reached

alarms = Stage("alarms")
states = declare(alarms.app, alarms.settings)
ticks = topics.ticks("alarms", Tick, topics.validated_data)
open_alarms = topics.internal("alarms-open", Alert, "forever", compacted=True)

LIMITS: Final = Limits(max_age_seconds=alarms.settings.alarm_max_age_seconds)


class Alarms:
    """The partitions that this worker holds."""

    def __init__(self, knowledge: Knowledge) -> None:
        self.knowledge = knowledge
        self.partitions: dict[int, Partition] = {}
        self._locks: dict[int, asyncio.Lock] = {}
        knowledge.on_device = self.device_changed
        knowledge.on_alert = self.note

    @contextlib.asynccontextmanager
    async def turn(self, chunk: Any) -> AsyncIterator[Partition]:
        """Give the engine of a chunk's partition, to one body at a time; after a failure the next one begins anew."""
        number = chunk.records[0].partition
        async with self._locks.setdefault(number, asyncio.Lock()):
            partition = self.partitions.get(number)
            if partition is None:
                partition = self.partitions[number] = Partition(
                    number, self.knowledge, LocalStates(states, number), LIMITS, partition_of
                )
            try:
                yield partition
            except BaseException:
                self.forget(number)
                raise

    def forget(self, number: int) -> None:
        """Drop an engine whose states were not stored: the next event begins with those that were."""
        self.partitions.pop(number, None)

    def device_changed(self, device_id: str) -> None:
        """Have the partition of a device look at it."""
        partition = self.partitions.get(partition_of(device_id))
        if partition is not None:
            partition.changed.add(device_id)

    def note(self, alert: Alert) -> None:
        """Tell every engine of an alarm that is open, or over."""
        now = time.time()
        for partition in self.partitions.values():
            partition.engine.note(alert, now)

    async def settle(self, partition: Partition, chunk: Any, found: list[Alert]) -> None:
        """Send alerts, wait until Kafka has them, then store the states; nothing for a partition that is gone."""
        changes = partition.buffer.cut()
        if found and chunk.ours:
            await alarms.app.send_and_wait(outgoing(found))
        last = await publish(alarms.app, states, partition.number, changes) if chunk.ours else None
        if not chunk.ours:
            # Its next owner may have stored newer states already; the readings come again there.
            self.forget(partition.number)
            return
        partition.buffer.flush(changes)
        reached(states, partition.number, last)
        for alert in found:
            self.note(alert)


def outgoing(found: list[Alert]) -> list[Outgoing]:
    """Return the records that tell of ``found``: each alert, and what is open for those who depend on it."""
    records: list[Outgoing] = []
    for alert in found:
        records.append((topics.alerts.name, alert.device_id.encode(), encode(alert), None))
        if alert.metadata.get("transition") in ("opened", "resolved"):
            value = None if alert.is_resolved else encode(alert)
            records.append((open_alarms.name, alert.id.encode(), value, None))
    return records


_partitioner = DefaultPartitioner()


def partition_of(device_id: str) -> int:
    """Return the partition in which the readings of a device are."""
    numbers = range(alarms.app.conf.topic_partitions)
    return int(_partitioner(device_id.encode(), numbers, numbers))


_alarms: Alarms | None = None


@alarms.prepare
def current() -> Alarms:
    """Return the alarms over the configured rules, loaded when they are first needed."""
    global _alarms
    if _alarms is None:
        _alarms = Alarms(Knowledge(alarms.settings.config_path))
    return _alarms


@alarms.app.on_partitions_revoked.connect  # type: ignore[arg-type]
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
        async with watch.turn(chunk) as partition:
            found = await partition.prepare(time.time())
            now = time.time()
            await chunk.each(partial(_count, partition, found, now))
            await watch.settle(partition, chunk, found)


def _count(partition: Partition, found: list[Alert], now: float, reading: Reading, _out: Out) -> None:
    """Let a reading count."""
    found.extend(partition.count(reading, now))


@alarms.agent(ticks, chunks=True, name="alarms-ticks")
async def pass_time(stream: Any) -> None:
    """Let time count: durations, silences, reminders."""
    watch = current()
    await FEEDS.ready()
    async for chunk in stream:
        async with watch.turn(chunk) as partition:
            found = await partition.prepare(time.time())
            now = time.time()
            found += partition.tick(now, reach(alarms.app, topics.validated_data, partition.number))
            await chunk.each(_nothing)
            await watch.settle(partition, chunk, found)


def _nothing(_tick: Tick, _out: Out) -> None:
    """Count a tick as handled."""


@alarms.agent(topics.alert_actions, chunks=True, name="alarms-actions")
async def take_actions(stream: Any) -> None:
    """Take acknowledgements."""
    watch = current()
    await FEEDS.ready()
    async for chunk in stream:
        async with watch.turn(chunk) as partition:
            found = await partition.prepare(time.time())
            now = time.time()
            await chunk.each(partial(_act, partition, found, now))
            await watch.settle(partition, chunk, found)


def _act(partition: Partition, found: list[Alert], now: float, action: AlertAction, _out: Out) -> None:
    """Take an acknowledgement."""
    found.extend(partition.engine.acknowledge(action.alert_id, now, action.user, action.comment))


#: rules, devices and open alarms
FEEDS = Feeds(alarms.app)


class Clock(Service):
    """Follows rules and devices, and writes a tick to each partition that this worker holds."""

    async def on_start(self) -> None:
        """Follow the topics."""
        knowledge = current().knowledge
        feeds = [
            Feed(alarms.settings, declaration, take, beacon=self.beacon)
            for declaration, take in (
                (topics.alarm_rules, knowledge.take_rule),
                (topics.devices, knowledge.take_device),
                (open_alarms, knowledge.take_open),
            )
        ]
        for feed in feeds:
            await self.add_runtime_dependency(feed)
        FEEDS.all = feeds

    @Service.task
    async def _tick(self) -> None:
        while not self.should_stop:
            await self.sleep(TICK_SECONDS)
            try:
                await write_ticks(alarms.app, ticks)
            except Exception as exc:
                self.log.info("No tick: %r; time counts from the next one", exc)


alarms.service(Clock)


@alarms.check("rules")
async def rules_known() -> None:
    """Raise while the rules of the topic are not complete."""
    try:
        await within(FEEDS.ready(), 1.0)
    except TimeoutError:
        raise Retryable("the topics of rules, devices and open alarms have not been read to their end yet") from None
