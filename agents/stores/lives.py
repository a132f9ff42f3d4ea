"""The lives of alerts and commands, as rows that any order of arrival brings to the same end.

A transition is kept once, as an event of its own. The row with the present state moves only forward: for an alert
from open to resolved and, within one of them, to the later message; for a command along QUEUED → SENT → DELIVERED →
one of SUCCESSFUL, FAILED, EXPIRED, TIMEOUT, of which the first to be stored stays. The earliest acknowledgement of an
alert stays, and may be stored before the alert it belongs to.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import msgspec

from agents.stores.base import BadRow
from streams.messages import Alert, AlertAction, Command, CommandStatus, encode

__all__ = ["LifeWriter"]

_ALERT_COLUMNS = (
    "id, alarm_id, name, message, level, alarm_type, device_id, sensor_name, field_name, error_value, threshold, "
    "math_operator, start_date, end_date, is_resolved, recipients, request_id, metadata, updated_at"
)
_ALERT = f"""
INSERT INTO alerts AS old ({_ALERT_COLUMNS})
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19)
ON CONFLICT (id) DO UPDATE SET
    ({_ALERT_COLUMNS}) = ROW ({", ".join(f"EXCLUDED.{name.strip()}" for name in _ALERT_COLUMNS.split(","))})
WHERE (old.is_resolved, old.updated_at) < (EXCLUDED.is_resolved, EXCLUDED.updated_at)
"""  # noqa: S608  (constants only)
_ALERT_EVENT = """
INSERT INTO alert_events (alert_id, kind, time, device_id, actor, comment, body)
VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT DO NOTHING
"""
# Run after both, so that it does not matter which of the two came first.
_FOLD_ACKNOWLEDGEMENTS = """
UPDATE alerts SET acknowledged_at = ack.time, acknowledged_by = ack.actor, acknowledged_comment = ack.comment
FROM (
    SELECT DISTINCT ON (alert_id) alert_id, time, actor, comment FROM alert_events
    WHERE alert_id = ANY ($1::text[]) AND kind = 'ACKNOWLEDGED' ORDER BY alert_id, time
) AS ack
WHERE alerts.id = ack.alert_id AND (alerts.acknowledged_at IS NULL OR alerts.acknowledged_at > ack.time)
"""

_COMMAND = """
INSERT INTO commands AS old (request_id, device_id, command_type, payload, protocol, metadata, priority, expires_at,
state) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, 'QUEUED') ON CONFLICT (request_id) DO UPDATE SET
    command_type = EXCLUDED.command_type, payload = EXCLUDED.payload, protocol = EXCLUDED.protocol,
    metadata = EXCLUDED.metadata, priority = EXCLUDED.priority, expires_at = EXCLUDED.expires_at
WHERE old.command_type IS NULL
"""


def _rank(state: str) -> str:
    """Return the SQL that says how far in a command's life ``state`` is; 4 is its end."""
    return f"(CASE {state} WHEN 'QUEUED' THEN 1 WHEN 'SENT' THEN 2 WHEN 'DELIVERED' THEN 3 ELSE 4 END)"


_STATUS = f"""
INSERT INTO commands AS old (request_id, device_id, state, detail, created_at, updated_at)
VALUES ($1, $2, $3, $4, $5, $5)
ON CONFLICT (request_id) DO UPDATE SET
    state = EXCLUDED.state, detail = EXCLUDED.detail, updated_at = EXCLUDED.updated_at,
    created_at = least(old.created_at, EXCLUDED.created_at)
WHERE {_rank("old.state")} < {_rank("EXCLUDED.state")}
   OR (old.state = EXCLUDED.state AND {_rank("old.state")} < 4
       AND coalesce(old.updated_at, '-infinity') < EXCLUDED.updated_at)
"""  # noqa: S608  (constants only)
_STATUS_EVENT = """
INSERT INTO command_events (request_id, state, time, detail) VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING
"""


class LifeWriter:
    """The writing side of alerts and commands; each call is one transaction, and safe to make again."""

    transaction: Callable[..., AbstractAsyncContextManager[Any]]
    write_separating: Callable[..., Awaitable[list[BadRow]]]

    async def write_alerts(self, alerts: Sequence[Alert]) -> list[BadRow]:
        """Store each transition, and bring each alert to its latest state. Returns the alerts that cannot be stored."""
        return await self.write_separating(alerts, self._write_alerts)

    async def write_alert_actions(self, actions: Sequence[AlertAction]) -> list[BadRow]:
        """Store acknowledgements, whether or not the alert is there yet. Returns the actions that cannot be stored."""
        return await self.write_separating(actions, self._write_alert_actions)

    async def write_commands(self, commands: Sequence[Command]) -> list[BadRow]:
        """Store what was asked of devices; the first command of a request id stays. Returns what cannot be stored."""
        return await self.write_separating(commands, self._write_commands)

    async def write_command_statuses(self, statuses: Sequence[CommandStatus]) -> list[BadRow]:
        """Store each step, and bring each command to its furthest state. Returns what cannot be stored."""
        return await self.write_separating(statuses, self._write_command_statuses)

    async def _write_alerts(self, alerts: Sequence[Alert]) -> None:
        # Sorted by key, here and below: two writers take their locks in the same order.
        alerts = sorted(alerts, key=lambda alert: (alert.id, alert.timestamp))
        events = [
            (a.id, "RESOLVED" if a.is_resolved else "OPEN", a.timestamp, a.device_id, None, None, encode(a).decode())
            for a in alerts
        ]
        async with self.transaction() as connection:
            await connection.executemany(_ALERT, [_alert_row(alert) for alert in alerts])
            await connection.executemany(_ALERT_EVENT, events)
            await connection.execute(_FOLD_ACKNOWLEDGEMENTS, [alert.id for alert in alerts])

    async def _write_alert_actions(self, actions: Sequence[AlertAction]) -> None:
        actions = sorted(actions, key=lambda action: (action.alert_id, action.timestamp))
        events = [
            (a.alert_id, "ACKNOWLEDGED", a.timestamp, a.device_id, a.user, a.comment, encode(a).decode())
            for a in actions
        ]
        async with self.transaction() as connection:
            await connection.executemany(_ALERT_EVENT, events)
            await connection.execute(_FOLD_ACKNOWLEDGEMENTS, [action.alert_id for action in actions])

    async def _write_commands(self, commands: Sequence[Command]) -> None:
        rows = [
            (
                c.request_id,
                c.device_id,
                c.command_type,
                encode(c.payload).decode(),
                c.protocol,
                encode(c.metadata).decode(),
                c.priority,
                c.expires_at,
            )
            for c in sorted(commands, key=lambda command: command.request_id)
        ]
        async with self.transaction() as connection:
            await connection.executemany(_COMMAND, rows)

    async def _write_command_statuses(self, statuses: Sequence[CommandStatus]) -> None:
        statuses = sorted(statuses, key=lambda status: status.request_id)
        async with self.transaction() as connection:
            await connection.executemany(
                _STATUS, [(s.request_id, s.device_id, s.state, s.detail, s.timestamp) for s in statuses]
            )
            await connection.executemany(
                _STATUS_EVENT, [(s.request_id, s.state, s.timestamp, s.detail) for s in statuses]
            )


def _alert_row(alert: Alert) -> tuple[Any, ...]:
    return (
        alert.id,
        alert.alarm_id,
        alert.name,
        alert.message,
        alert.level,
        alert.alarm_type,
        alert.device_id,
        alert.sensor_name,
        alert.field_name,
        _as_text(alert.error_value),
        _as_text(alert.threshold),
        alert.math_operator,
        alert.start_date,
        alert.end_date,
        alert.is_resolved,
        alert.recipients,
        alert.request_id,
        encode(alert.metadata).decode(),
        alert.timestamp,
    )


def _as_text(value: Any) -> str | None:
    """Return text as it is, None as nothing, everything else as JSON."""
    if value is None or isinstance(value, str):
        return value
    return msgspec.json.encode(value).decode()
