"""Open commands and what devices have told, one row per device each, on RocksDB, with changelogs.

:meth:`CommandTables.stored` waits until Kafka has the changelog of all that was written: a command's next state is safe
before anybody hears of it.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from devices.commands.model import Life
from settings import Settings
from tables.alarms import rocksdb_options


class Told(msgspec.Struct):
    """A record that is still to be sent."""

    topic: str
    key: str
    value: bytes | None


class Row(msgspec.Struct, kw_only=True):
    """A device's commands, and what is to be sent because of them; it is sent again until it is known to be sent."""

    life: Life = msgspec.field(default_factory=Life)
    outbox: list[Told] = msgspec.field(default_factory=list)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to keep."""
        return not (self.life.open or self.life.ended or self.outbox)


ROWS = msgspec.msgpack.Decoder(Row)
STATES = msgspec.msgpack.Decoder(dict[str, dict[str, Any]])
encode_row = msgspec.msgpack.Encoder().encode


class CommandTables:
    """``lives``: the open and the remembered commands; ``states``: what each profile told of a device."""

    def __init__(self, lives: Any, states: Any) -> None:
        self.lives = lives
        self.states = states
        self.unacknowledged: list[Any] = []

    def watch(self, table: Any) -> None:
        """Keep the futures of what ``table`` writes to its changelog."""
        send = table.send_changelog

        def keep(*args: Any, **kwargs: Any) -> Any:
            future = send(*args, **kwargs)
            self.unacknowledged.append(future)
            return future

        table.send_changelog = keep

    def drop(self) -> None:
        """Wait for nothing any more; the events at hand do."""
        self.unacknowledged = [future for future in self.unacknowledged if not future.done()]

    async def stored(self) -> None:
        """Return once Kafka has acknowledged all that was written; raises what it said instead."""
        waiting, self.unacknowledged = self.unacknowledged, []
        if waiting:
            await asyncio.gather(*waiting)


def declare(app: Any, settings: Settings) -> CommandTables:
    """Return the tables ``open_commands`` and ``device_states`` of ``app``: keys and values as bytes."""
    options = rocksdb_options(settings)
    lives = app.Table(
        "open_commands",
        key_type=bytes,
        value_type=bytes,
        options=options,
        help="The commands of each device, and what of them is still to be told.",
    )
    states = app.Table(
        "device_states",
        key_type=bytes,
        value_type=bytes,
        options=options,
        help="What commands need to know of each device, by profile.",
    )
    tables = CommandTables(lives, states)
    tables.watch(lives)
    return tables
