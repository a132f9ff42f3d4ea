"""The commands of the devices of one partition: from what is said to what is stored and told.

Guarantee: the next state is stored, its changelog in Kafka, before it is told; what is to be told is stored with it and
struck off when Kafka has it. Whatever dies in between, the same is told again, with the same time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from devices.commands import machine
from devices.commands.formatting import NotYet, build, check
from devices.commands.model import Limits, OpenCommand, Step
from devices.driver import Downlink
from devices.model import CommandError
from devices.registry import Registry
from streams import topics
from streams.messages import Command, CommandReport, CommandStatus, DeviceState, DownlinkMessage, encode
from streams.resilience.failures import Poison
from streams.resilience.producer import Outgoing
from tables.commands import ROWS, STATES, CommandTables, Row, Told, encode_row
from tables.rows import LocalStates

log = logging.getLogger(__name__)

#: How long after a start time decides nothing yet: the backlog of every partition has begun to come by then.
LISTEN_SECONDS: Final = 5.0
#: Open commands of one device; more are refused.
MAX_OPEN: Final = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class House:
    """What all partitions share.

    ``send`` returns once Kafka has what it was given; ``caught_up`` tells whether all that was said of commands has
    been read; ``expiry_seconds`` is the life of a command that does not say when it expires; ``unknown`` says what
    becomes of commands for devices that nobody has configured (``accept``, ``reject``).
    """

    registry: Registry
    limits: Limits
    tables: CommandTables
    expiry_seconds: float
    send: Callable[[list[Outgoing]], Awaitable[None]]
    caught_up: Callable[[], bool]
    unknown: str = "accept"


def downlink_message(device_id: str, command: OpenCommand, attempt: int, downlink: Downlink) -> DownlinkMessage:
    """Return the record that tells a connector to send ``downlink``."""
    try:
        text, digits = downlink.data.decode(), None
    except UnicodeDecodeError:
        text, digits = None, downlink.data.hex()
    return DownlinkMessage(
        request_id=command.request_id,
        device_id=device_id,
        protocol=command.protocol,
        attempt=attempt,
        expires_at=command.expires_at,
        route=downlink.route,
        payload=text,
        payload_hex=digits,
        qos=downlink.qos,
        retain=downlink.retain,
        repeatable=command.repeatable,
    )


class Partition:
    """The commands of the devices of one partition; every change waits in ``touched`` until it is settled."""

    def __init__(self, number: int, house: House) -> None:
        self.house = house
        self.number = number
        self.registry = house.registry
        self.limits = house.limits
        self.lives = LocalStates(house.tables.lives, number)
        self.states = LocalStates(house.tables.states, number)
        self.lock = asyncio.Lock()
        self.touched: dict[str, Row] = {}
        self.heard: dict[str, bytes] = {}
        self.device_of: dict[str, str] = {}
        self.wake: dict[str, datetime] = {}
        self._open_ids: dict[str, list[str]] = {}
        self.loaded_at: datetime | None = None
        self._time_counts = False

    def load(self, now: datetime) -> None:
        """Take up what is open; what was not told for certain is told again."""
        if self.loaded_at is not None:
            return
        self.loaded_at = now
        for device_id, data in self.lives.items():
            row = ROWS.decode(data)
            self._note(device_id, row)
            if row.outbox:
                self.touched[device_id] = row

    def _note(self, device_id: str, row: Row) -> None:
        for request_id in self._open_ids.pop(device_id, ()):
            self.device_of.pop(request_id, None)
        ids = [command.request_id for command in row.life.open]
        if ids:
            self._open_ids[device_id] = ids
            self.device_of.update(dict.fromkeys(ids, device_id))
        at = machine.wake_at(row.life, self.limits)
        if at is None:
            self.wake.pop(device_id, None)
        else:
            self.wake[device_id] = at

    def row(self, device_id: str) -> Row:
        """Return a device's row, to be changed."""
        found = self.touched.get(device_id)
        if found is None:
            data = self.lives.get(device_id)
            found = self.touched[device_id] = ROWS.decode(data) if data is not None else Row()
        return found

    def states_of(self, device_id: str) -> dict[str, dict[str, Any]]:
        """Return what a device told, by profile."""
        data = self.heard.get(device_id) or self.states.get(device_id)
        return STATES.decode(data) if data is not None else {}

    def take(self, command: Command, now: datetime) -> None:
        """Take up a command; raises Poison for one without ids."""
        if not command.request_id or not command.device_id:
            raise Poison("a command needs request_id and device_id")
        row = self.row(command.device_id)
        try:
            if len(row.life.open) >= MAX_OPEN:
                raise CommandError(f"{MAX_OPEN} commands of this device are open already")
            states = self.states_of(command.device_id)
            target = check(
                self.registry,
                command.device_id,
                command.command_type,
                command.payload,
                protocol=command.protocol,
                states=states,
                unknown=self.house.unknown,
            )
        except CommandError as exc:
            where = f"{exc.pointer}: " if exc.pointer else ""
            steps = machine.refuse(row.life, command.request_id, f"{where}{exc}", now, self.limits)
        else:
            traits = target.traits(command.command_type)
            steps = machine.accept(
                row.life,
                OpenCommand(
                    request_id=command.request_id,
                    command_type=command.command_type,
                    payload=command.payload,
                    protocol=command.protocol,
                    order=0,
                    expires_at=self._expiry(command, now),
                    priority=command.priority or 0,
                    repeatable=traits.repeatable,
                    supersedes=traits.supersedes,
                    confirmed=traits.confirmed,
                    exclusive=target.driver.exclusive,
                ),
                now,
                self.limits,
            )
        self._tell(command.device_id, row, steps)
        self._dispatch(command.device_id, row, now)

    def _expiry(self, command: Command, now: datetime) -> datetime:
        at = command.expires_at
        if at is None:
            return now + timedelta(seconds=self.house.expiry_seconds)
        return at if at.tzinfo is not None else at.replace(tzinfo=UTC)

    def hear(self, told: DeviceState, now: datetime) -> None:
        """Keep what a device told of itself, take note of a command that shows in it, and send what has waited."""
        states = self.states_of(told.device_id)
        before = states.get(told.profile)
        if before != told.state:
            self.heard[told.device_id] = encode_row({**states, told.profile: told.state})
        if told.device_id in self.wake:
            row = self.row(told.device_id)
            if before:
                self._show(row, told, before, now)
            self._dispatch(told.device_id, row, now)

    def _show(self, row: Row, told: DeviceState, before: Mapping[str, Any], now: datetime) -> None:
        """Take a state that can only come of a command that was sent before it for the device's word on it."""
        profile = self.registry.profile(told.profile)
        if profile is None:
            return
        driver = self.registry.driver(profile)
        for command in list(row.life.open):
            # what was received before is the request in whose answer the command went out
            if command.sent_at is None or told.timestamp <= command.sent_at:
                continue
            detail = driver.applied(command.command_type, before, told.state)
            if detail:
                word = CommandReport(request_id=command.request_id, kind="DELIVERED", by_device=True, detail=detail)
                self._tell(told.device_id, row, machine.report(row.life, word, now, self.limits))

    def report(self, word: CommandReport, now: datetime) -> None:
        """Take the word of a connector or a device; one of a command that is not open here changes nothing."""
        device_id = self.device_of.get(word.request_id)
        if device_id is None:
            device_id = next((d for d, row in self.touched.items() if machine.find(row.life, word.request_id)), None)
        if device_id is None or (word.device_id is not None and word.device_id != device_id):
            return
        row = self.row(device_id)
        self._tell(device_id, row, machine.report(row.life, word, now, self.limits))
        self._dispatch(device_id, row, now)

    def pass_time(self, now: datetime) -> None:
        """Let time decide: what has expired, what has waited long enough, what is to be sent again.

        Not before what was said of commands while nobody listened has been read: an answer that is there must not
        become a time-out.
        """
        if not self._time_counts:
            since = self.loaded_at or now
            self._time_counts = now - since >= timedelta(seconds=LISTEN_SECONDS) and self.house.caught_up()
            if not self._time_counts:
                return
        for device_id in [device_id for device_id, at in self.wake.items() if at <= now]:
            row = self.row(device_id)
            steps, again = machine.pass_time(row.life, now, self.limits)
            self._tell(device_id, row, steps)
            for command in again:
                self._send(device_id, row, command, now)
            self._dispatch(device_id, row, now)

    def _dispatch(self, device_id: str, row: Row, now: datetime) -> None:
        for command in machine.candidates(row.life):
            if machine.may_go(row.life, command):
                self._send(device_id, row, command, now)

    def _send(self, device_id: str, row: Row, command: OpenCommand, now: datetime) -> None:
        try:
            states = self.states_of(device_id)
            downlink = build(self.registry, device_id, command, states, now, unknown=self.house.unknown)
        except NotYet:
            return
        except Exception as exc:
            if not isinstance(exc, CommandError):
                log.exception("%s for device %s cannot be written", command.command_type, device_id)
            self._tell(device_id, row, machine.fail(row.life, command, f"{exc}", now, self.limits))
            return
        attempt = machine.hand_over(command)
        message = encode(downlink_message(device_id, command, attempt, downlink))
        if command.protocol == "coap":
            row.outbox.append(Told(topics.coap_pending.name, command.request_id, message))
        else:
            row.outbox.append(Told(topics.downlinks.name, device_id, message))

    @staticmethod
    def _tell(device_id: str, row: Row, steps: Iterable[Step]) -> None:
        for step in steps:
            status = CommandStatus(
                request_id=step.request_id, device_id=device_id, state=step.state, detail=step.detail, timestamp=step.at
            )
            row.outbox.append(Told(topics.command_status.name, device_id, encode(status)))
            if step.withdraw:
                row.outbox.append(Told(topics.coap_pending.name, step.request_id, None))

    async def settle(self) -> None:
        """Store what has changed, tell it, and store that it was told."""
        changed, self.touched = self.touched, {}
        heard, self.heard = self.heard, {}
        if not changed and not heard:
            return
        tables = self.house.tables
        await tables.store(self.number, self._stored(changed), heard)
        outgoing: list[Outgoing] = [
            (told.topic, told.key.encode(), told.value, None) for row in changed.values() for told in row.outbox
        ]
        if outgoing:
            await self.house.send(outgoing)
            struck = {device_id: row for device_id, row in changed.items() if row.outbox}
            for row in struck.values():
                row.outbox = []
            await tables.store(self.number, self._stored(struck), {})

    def _stored(self, rows: Mapping[str, Row]) -> dict[str, bytes | None]:
        """Return what is to be written of ``rows``."""
        found: dict[str, bytes | None] = {}
        for device_id, row in rows.items():
            self._note(device_id, row)
            if not row.empty:
                found[device_id] = encode_row(row)
            elif device_id in self.lives:
                found[device_id] = None
        return found
