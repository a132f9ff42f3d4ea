"""Open commands, what devices have told, and what their messages add up to: one row per device each, on RocksDB, with
changelogs.

:meth:`CommandTables.store` returns once Kafka has the changelog of all that was written: a command's next state is safe
before anybody hears of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from devices.commands.model import Life
from settings import Settings
from tables.rows import rocksdb_options, store


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
    """``lives``: the open and the remembered commands; ``states``: what each profile told of a device; ``merged``: what
    the messages of each profile add up to."""

    def __init__(self, app: Any, lives: Any, states: Any, merged: Any) -> None:
        self.app = app
        self.lives = lives
        self.states = states
        self.merged = merged

    async def store(
        self, partition: int, lives: Mapping[str, bytes | None], states: Mapping[str, bytes | None]
    ) -> None:
        """Write what has changed in a partition, None for a row that goes; raises what Kafka says."""
        await store(self.app, self.lives, partition, lives)
        await store(self.app, self.states, partition, states)

    async def store_merged(self, partition: int, changes: Mapping[str, bytes | None]) -> None:
        """Write the states of a partition that messages have changed; raises what Kafka says."""
        await store(self.app, self.merged, partition, changes)


def declare(app: Any, settings: Settings) -> CommandTables:
    """Return the tables ``open_commands``, ``device_states`` and ``merged_states`` of ``app``: all as bytes."""
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
    merged = app.Table(
        "merged_states",
        key_type=bytes,
        value_type=bytes,
        options=options,
        help="What the messages of each device add up to (a controller's schedule), by profile.",
    )
    return CommandTables(app, lives, states, merged)
