"""Open commands and what devices have told, one row per device each, on RocksDB, with changelogs.

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
    """``lives``: the open and the remembered commands; ``states``: what each profile told of a device."""

    def __init__(self, app: Any, lives: Any, states: Any) -> None:
        self.app = app
        self.lives = lives
        self.states = states

    async def store(
        self, partition: int, lives: Mapping[str, bytes | None], states: Mapping[str, bytes | None]
    ) -> None:
        """Write what has changed in a partition, None for a row that goes; raises what Kafka says."""
        await store(self.app, self.lives, partition, lives)
        await store(self.app, self.states, partition, states)


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
    return CommandTables(app, lives, states)
