"""The reading side: what the HTTP API and the dashboard ask of PostgreSQL.

Every answer is a plain dictionary or a list of them, times are aware UTC datetimes, newest first. No query scans the
readings of other devices: devices and series are found by skipping along the primary key, and the latest of a series
by its end. A query with buckets reads what lies between ``since`` and ``until``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from typing import Any, Final

import msgspec

__all__ = ["AGGREGATES", "ReadSide"]

AGGREGATES: Final = ("avg", "min", "max", "sum", "count", "first", "last")

# The steps of the recursion jump from one device (or series) to the next through the primary key: as many index
# look-ups as there are devices, whatever the number of rows (PostgreSQL wiki, "Loose indexscan").
_DEVICES: Final = """
WITH RECURSIVE device(id) AS (
    (SELECT device_id FROM readings WHERE device_id > $1 ORDER BY device_id LIMIT 1)
    UNION ALL
    SELECT (SELECT device_id FROM readings WHERE device_id > device.id ORDER BY device_id LIMIT 1)
    FROM device WHERE device.id IS NOT NULL
)
SELECT id AS device_id FROM device WHERE id IS NOT NULL LIMIT $2
"""
# $1 is the device; what follows says what to take of each series, as r.
_EACH_SERIES: Final = """
WITH RECURSIVE series(index, label) AS (
    (SELECT index, label FROM readings WHERE device_id = $1 ORDER BY index, label LIMIT 1)
    UNION ALL
    SELECT following.index, following.label
    FROM series, LATERAL (
        SELECT n.index, n.label FROM readings n
        WHERE n.device_id = $1 AND (n.index, n.label) > (series.index, series.label)
        ORDER BY n.index, n.label LIMIT 1
    ) AS following
)
SELECT series.index, series.label, r.*
FROM series, LATERAL ({each}) AS r
{tail}
"""
_OF_SERIES: Final = "FROM readings WHERE device_id = $1 AND index = series.index AND label = series.label"
_LATEST: Final = _EACH_SERIES.format(
    each=f"SELECT time, value, value_text, unit, request_id {_OF_SERIES} ORDER BY time DESC LIMIT 1", tail=""
)
_FIRST_OR_LAST: Final = {"first": "ASC", "last": "DESC"}


class ReadSide:
    """Queries; each borrows one connection, and raises the library's exceptions when the server is away."""

    connection: Callable[[], AbstractAsyncContextManager[Any]]

    async def devices(self, after: str = "", limit: int = 1000) -> list[str]:
        """Return up to ``limit`` ids of devices that have readings, in order of their bytes, following ``after``."""
        async with self.connection() as connection:
            return [row["device_id"] for row in await connection.fetch(_DEVICES, after, limit)]

    async def device(self, device_id: str) -> dict[str, Any] | None:
        """Return ``{"device_id", "last_time", "series": [...]}`` with each series' latest value, or None if unknown."""
        async with self.connection() as connection:
            series = [dict(row) for row in await connection.fetch(_LATEST, device_id)]
        if not series:
            return None
        return {"device_id": device_id, "last_time": max(row["time"] for row in series), "series": series}

    async def readings(
        self,
        device_id: str,
        *,
        index: str | None = None,
        label: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        limit: int = 1000,
        bucket_seconds: float | None = None,
        aggregate: str = "avg",
    ) -> list[dict[str, Any]]:
        """Return up to ``limit`` readings with ``since <= time < until``, newest first.

        With ``bucket_seconds``, one row for each bucket of each numeric series instead: ``index``, ``label``,
        ``time`` (its start, aligned to the epoch), ``value`` (by ``aggregate``, one of :data:`AGGREGATES`),
        ``count``. Raises ``ValueError`` for an unknown aggregate or a bucket that is not positive.
        """
        if aggregate not in AGGREGATES:
            raise ValueError(f"aggregate {aggregate!r} is unknown; use one of {', '.join(AGGREGATES)}")
        if bucket_seconds is not None and not bucket_seconds > 0:
            raise ValueError(f"bucket_seconds is {bucket_seconds}; it must be more than 0")
        of_series, series = _Where(device_id), []
        of_series.add("time >= {}", since)
        of_series.add("time < {}", until)
        if index is not None:
            series.append(f"series.index = {of_series.argument(index)}")
        if label is not None:
            series.append(f"series.label = {of_series.argument(label)}")
        of_device = f"WHERE {' AND '.join(series)}" if series else ""
        most = of_series.argument(limit)
        if bucket_seconds is None:
            columns, group = "time, value, value_text, unit, request_id", ""
        else:
            width = f"{of_series.argument(float(bucket_seconds))}::float8"
            of_series.conditions.append("value IS NOT NULL")
            direction = _FIRST_OR_LAST.get(aggregate)
            value = f"(array_agg(value ORDER BY time {direction}))[1]" if direction else f"{aggregate}(value)::float8"
            start = f"to_timestamp(floor(extract(epoch FROM time)::float8 / {width}) * {width})"
            columns, group = f"{start} AS time, {value} AS value, count(*) AS count", "GROUP BY 1"
        more = "".join(f" AND {condition}" for condition in of_series.conditions)
        sql = _EACH_SERIES.format(
            # By position: the column that is called time and the bucket that is called time are not the same.
            each=f"SELECT {columns} {_OF_SERIES}{more} {group} ORDER BY 1 DESC LIMIT {most}",
            tail=f"{of_device} ORDER BY 3 DESC, 1, 2 LIMIT {most}",
        )
        async with self.connection() as connection:
            return [dict(row) for row in await connection.fetch(sql, *of_series.arguments)]

    async def alerts(
        self,
        *,
        device_id: str | None = None,
        alarm_id: str | None = None,
        level: str | None = None,
        is_resolved: bool | None = None,
        is_acknowledged: bool | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        limit: int = 100,
    ) -> list[dict[str, Any]]:
        """Return up to ``limit`` alerts that began in ``since <= start_date < until``, the latest first."""
        where = _Where()
        where.add("device_id = {}", device_id)
        where.add("alarm_id = {}", alarm_id)
        where.add("level = {}", level)
        # Written out, so that the planner can use the index over open alerts.
        if is_resolved is not None:
            where.conditions.append("is_resolved" if is_resolved else "NOT is_resolved")
        if is_acknowledged is not None:
            where.conditions.append(f"acknowledged_at IS {'NOT ' if is_acknowledged else ''}NULL")
        where.add("start_date >= {}", since)
        where.add("start_date < {}", until)
        return await self._fetch("SELECT * FROM alerts", where, "ORDER BY start_date DESC, id", limit)

    async def alert(self, alert_id: str) -> dict[str, Any] | None:
        """Return one alert with its ``transitions`` (``kind``, ``time``, ``actor``, ``comment``), oldest first."""
        events = "SELECT kind, time, actor, comment FROM alert_events WHERE alert_id = $1 ORDER BY time, kind"
        return await self._life("SELECT * FROM alerts WHERE id = $1", events, alert_id)

    async def command(self, request_id: str) -> dict[str, Any] | None:
        """Return one command with its ``transitions`` (``state``, ``time``, ``detail``), oldest first, or None."""
        events = "SELECT state, time, detail FROM command_events WHERE request_id = $1 ORDER BY time, state"
        return await self._life("SELECT * FROM commands WHERE request_id = $1", events, request_id)

    async def commands(
        self, *, device_id: str | None = None, state: str | None = None, limit: int = 100
    ) -> list[dict[str, Any]]:
        """Return up to ``limit`` commands, the latest first."""
        where = _Where()
        where.add("device_id = {}", device_id)
        where.add("state = {}", state)
        return await self._fetch("SELECT * FROM commands", where, "ORDER BY created_at DESC, request_id", limit)

    async def _fetch(self, select: str, where: _Where, tail: str, limit: int) -> list[dict[str, Any]]:
        sql = f"{select} {where.sql()} {tail} LIMIT {where.argument(limit)}"
        async with self.connection() as connection:
            return [_plain(row) for row in await connection.fetch(sql, *where.arguments)]

    async def _life(self, select: str, events: str, key: str) -> dict[str, Any] | None:
        async with self.connection() as connection:
            row = await connection.fetchrow(select, key)
            if row is None:
                return None
            transitions = await connection.fetch(events, key)
        return {**_plain(row), "transitions": [dict(event) for event in transitions]}


class _Where:
    """Conditions with their numbered arguments; a condition whose argument is None is left out."""

    def __init__(self, *arguments: Any) -> None:
        self.conditions: list[str] = []
        self.arguments: list[Any] = list(arguments)

    def argument(self, value: Any) -> str:
        self.arguments.append(value)
        return f"${len(self.arguments)}"

    def add(self, condition: str, value: Any) -> None:
        if value is not None:
            self.conditions.append(condition.format(self.argument(value)))

    def sql(self) -> str:
        return f"WHERE {' AND '.join(self.conditions)}" if self.conditions else ""


def _plain(row: Any) -> dict[str, Any]:
    """Return a record as a dictionary, with its JSON columns as objects."""
    plain = dict(row)
    for name in ("metadata", "payload"):
        if isinstance(plain.get(name), str):
            plain[name] = msgspec.json.decode(plain[name])
    return plain
