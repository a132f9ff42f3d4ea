"""The states of alarms: one row per device, index, label and rule, on RocksDB, with a changelog."""

from __future__ import annotations

from typing import Any

from settings import Settings
from tables.rows import rocksdb_options


def declare(app: Any, settings: Settings) -> Any:
    """Return the table ``alarm_states`` of ``app``: key and value as bytes."""
    return app.Table(
        "alarm_states",
        key_type=bytes,
        value_type=bytes,
        options=rocksdb_options(settings),
        help="One state per device, index, label and rule.",
    )
