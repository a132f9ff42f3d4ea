"""Commands find their end.

Consumes ``device_commands`` (Command), what devices told of themselves, what connectors and devices say of commands,
and its own ticks; produces ``iot_command_status`` (CommandStatus), the downlinks that connectors send, and, as readings
on ``iot_validated_data``, what messages add up to; key: device id. Tables ``open_commands``, ``device_states``,
``merged_states``. Guarantee: each request id starts one command, and each command ends in one terminal state. The next
state is stored in Kafka with all that is to be told of it, then told, then struck off: a worker that is killed anywhere
tells the same again, never something else. SUCCESSFUL is the device's word alone.
Retried: Kafka. Dead-lettered: ``poison`` what is no Command. Dropped: nothing; what no device can do ends as FAILED.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

from mode import Service

from agents.commanding.merging import Merging
from agents.commanding.partition import House, Partition
from agents.registered import Registered
from devices.commands.model import Limits
from devices.registry import Registry
from streams import topics
from streams.messages import CommandReport, encode
from streams.resilience.failures import Poison
from streams.stage import Stage
from streams.ticks import TICK_SECONDS, Tick, write_ticks
from tables.commands import declare
from tables.rows import LocalStates

commands = Stage("commands", chunks_in_flight=1)
tables = declare(commands.app, commands.settings)

ticks = topics.ticks("commands", Tick, topics.commands)


class Desk:
    """The partitions that this worker holds."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.registered = Registered(house.registry)
        self.partitions: dict[int, Partition] = {}

    def forget(self, number: int) -> None:
        """Drop what is in memory of a partition: the next event begins with what is stored."""
        self.partitions.pop(number, None)

    async def work(self, chunk: Any, act: Callable[[Partition, Any, datetime], None]) -> None:
        """Let ``act`` take every message of ``chunk``, then settle; a failure leaves what is stored."""
        if not commands.app.testing:
            await self.registered.ready()
        number = chunk.records[0].partition

        async def take(messages: list[Any]) -> list[tuple[int, BaseException]]:
            partition = self.partitions.get(number)
            if partition is None:
                partition = self.partitions[number] = Partition(number, self.house)
            async with partition.lock:
                bad: list[tuple[int, BaseException]] = []
                try:
                    now = datetime.now(UTC)
                    partition.load(now)
                    for position, message in enumerate(messages):
                        try:
                            act(partition, message, now)
                        except Poison as exc:
                            bad.append((position, exc))
                    if chunk.ours:
                        await partition.settle()
                    else:
                        # its next owner gets the same messages
                        self.forget(number)
                except BaseException:
                    self.forget(number)
                    raise
                return bad

        await chunk.all(take)

    async def merge(self, chunk: Any) -> None:
        """Add the messages of ``chunk`` to the states of their devices, and store these."""
        number = chunk.records[0].partition
        merging = Merging(self.house.registry, LocalStates(self.house.tables.merged, number))
        await chunk.each(merging.take)
        if merging.changes and chunk.ours:
            await self.house.send(merging.readings)
            await self.house.tables.store_merged(number, merging.changes)


_desk: Desk | None = None


@commands.prepare
def current() -> Desk:
    """Return the desk over the configured profiles, made when it is first needed."""
    global _desk
    if _desk is None:
        settings = commands.settings
        limits = Limits(timeout_seconds=settings.command_timeout_seconds, attempts=settings.command_attempts)
        house = House(
            registry=Registry.load(settings.config_path),
            limits=limits,
            tables=tables,
            expiry_seconds=settings.command_expiry_seconds,
            send=commands.app.send_and_wait,
            caught_up=caught_up,
            unknown=settings.unknown_devices,
        )
        _desk = Desk(house)
    return _desk


@commands.app.on_partitions_revoked.connect
async def forget_partitions(_app: Any, revoked: Any, *_: Any, **__: Any) -> None:
    """Drop what is in memory of partitions that are somebody else's now."""
    if _desk is not None:
        for tp in revoked:
            _desk.forget(tp.partition)


@commands.agent(topics.commands, chunks=True, name="commands")
async def take_commands(stream: Any) -> None:
    """Take up new commands."""
    async for chunk in stream:
        await current().work(chunk, Partition.take)


@commands.agent(topics.device_state, chunks=True, name="commands-device-state")
async def hear_devices(stream: Any) -> None:
    """Keep what devices told of themselves."""
    async for chunk in stream:
        await current().work(chunk, Partition.hear)


@commands.agent(topics.device_changes, chunks=True, name="commands-device-changes")
async def add_up(stream: Any) -> None:
    """Keep what the messages of devices add up to."""
    async for chunk in stream:
        await current().merge(chunk)


@commands.agent(topics.command_reports, chunks=True, name="commands-reports")
async def take_reports(stream: Any) -> None:
    """Take what connectors say of downlinks, and what devices answered."""
    async for chunk in stream:
        await current().work(chunk, Partition.report)


@commands.agent(topics.command_feedback, chunks=True, name="commands-feedback")
async def take_feedback(stream: Any) -> None:
    """Hand a device's word to every partition: it names the request, not the device, and one of them has it open."""
    async for chunk in stream:
        await chunk.all(to_all_partitions)


async def to_all_partitions(words: list[CommandReport]) -> None:
    """Send each word to each partition of the reports; returns once Kafka has them."""
    app = commands.app
    if app.testing:
        await app.capture([(topics.command_reports.name, None, encode(word), None) for word in words])
        return
    producer = await app.maybe_start_producer()
    sent: list[Awaitable[Any]] = [
        await producer.send(topics.command_reports.name, None, encode(word), number, None, None)
        for word in words
        for number in range(app.conf.topic_partitions)
    ]
    await asyncio.gather(*sent)


@commands.agent(ticks, chunks=True, name="commands-ticks")
async def let_time_pass(stream: Any) -> None:
    """Let time decide."""
    async for chunk in stream:
        await current().work(chunk, _pass_time)


def _pass_time(partition: Partition, _tick: Tick, now: datetime) -> None:
    partition.pass_time(now)


def caught_up() -> bool:
    """Tell whether everything that was said of commands has been read."""
    consumer = commands.app.typed_consumer
    if consumer is None:
        return True
    said = {topics.command_reports.name, topics.command_feedback.name}
    return not any(lag for tp, lag in consumer.lags().items() if tp.topic in said)


class Clock(Service):
    """Follows what is configured of devices, and writes a tick to each partition that this worker holds."""

    async def on_start(self) -> None:
        """Read the topic from its beginning."""
        await current().registered.follow(self, commands.settings)

    @Service.task
    async def _tick(self) -> None:
        while not self.should_stop:
            await self.sleep(TICK_SECONDS)
            try:
                await write_ticks(commands.app, ticks)
            except Exception as exc:
                self.log.info("No tick: %r; time counts from the next one", exc)


commands.service(Clock)
