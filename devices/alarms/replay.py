"""History against a rule: when would it have fired.

The rule is taken to name every device of the file; readings are taken in the order of their sample times, as if each
had arrived at that time, and timers ring in between as they would have. Nothing is sent anywhere.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from devices.alarms.alerts import text_of
from devices.alarms.engine import AlarmEngine
from devices.alarms.model import AlarmRule, Alert, DeviceInfo
from devices.alarms.prepare import Limits
from devices.model import Reading

_EVERYTHING: Final = "replayed"
_NO_LIMITS: Final = Limits(max_age_seconds=float("inf"), max_ahead_seconds=float("inf"))
# Beyond this a bare number can only be milliseconds (the year 5138 in seconds).
_MILLISECONDS_FROM: Final = 1e11


class Row(msgspec.Struct, frozen=True):
    """One value of history; ``time`` is epoch seconds."""

    time: float
    device_id: str
    index: str
    label: str
    value: Any
    unit: str = ""


def read_csv(lines: Iterable[str], rule: AlarmRule) -> Iterator[Row]:
    """Read history: columns ``time`` and ``value``, and where they are ``device_id``, ``index``, ``label``,
    ``value_text``, ``unit``, as the table ``readings`` has them; what is missing is what the rule names.

    Raises ``ValueError`` that names the line.
    """
    reader = csv.DictReader(lines)
    columns = set(reader.fieldnames or ())
    if "time" not in columns or not columns & {"value", "value_text"}:
        raise ValueError(f"the CSV has the columns {', '.join(sorted(columns)) or 'none'}; it needs time and value")
    for record in reader:
        try:
            time = _time(record["time"])
        except (ValueError, TypeError, OverflowError) as exc:
            raise ValueError(f"line {reader.line_num}: {record['time']!r} is not a time: RFC 3339 or epoch") from exc
        yield Row(
            time,
            record.get("device_id") or rule.device_id or "device",
            record.get("index") or rule.index or "index",
            record.get("label") or rule.label or "label",
            _value(record.get("value"), record.get("value_text")),
            record.get("unit") or "",
        )


def _time(text: str) -> float:
    text = text.strip()
    try:
        number = float(text)
    except ValueError:
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    number = number / 1000 if abs(number) >= _MILLISECONDS_FROM else number
    return datetime.fromtimestamp(number, UTC).timestamp()


def _value(number: str | None, text: str | None) -> Any:
    if not number:
        return text or None
    if number.lower() in ("true", "false"):
        return number.lower() == "true"
    try:
        return float(number) if any(char in number for char in ".eEnN") else int(number)
    except ValueError:
        return number


def replay(rule: AlarmRule, rows: Iterable[Row], until: float | None = None) -> Iterator[Alert]:
    """Yield the transitions that ``rows`` would have brought, in order; timers go on until the last row or ``until``.

    Raises ``ValueError`` for a rule that cannot be evaluated.
    """
    everywhere = msgspec.structs.replace(
        rule, active=True, device_id=None, profile=None, tag=_EVERYTHING, depends_on=[]
    )

    def known(device_id: str) -> DeviceInfo:
        return DeviceInfo(device_id=device_id, tags=(_EVERYTHING,))

    engine = AlarmEngine({}, [everywhere], devices=known, limits=_NO_LIMITS)
    end = until or 0.0
    for row in sorted(rows, key=lambda row: row.time):
        yield from _timers(engine, row.time)
        reading = Reading(
            request_id="",
            timestamp=datetime.fromtimestamp(row.time, UTC),
            device_id=row.device_id,
            index=row.index,
            values=[row.value],
            labels=[row.label],
            display_names=[row.label],
            metadata={"units": [row.unit]},
        )
        yield from engine.process(reading, known(row.device_id), row.time)
        end = max(end, row.time)
    yield from _timers(engine, end)


def _timers(engine: AlarmEngine, until: float) -> Iterator[Alert]:
    while (due := engine.next_due()) is not None and due <= until:
        yield from engine.tick(due)


def describe(alert: Alert) -> str:
    """Return one line for a terminal: when, what, which series, value against threshold."""
    about: Mapping[str, Any] = alert.metadata
    what = str(about["transition"])
    series = "/".join(filter(None, (alert.device_id, about.get("index"), alert.field_name)))
    value = f"{text_of(alert.error_value)} {about.get('unit', '')}".strip()
    against = f"{alert.math_operator} {text_of(alert.threshold)}".strip()
    notes = [str(about["reason"])] if about.get("reason") else []
    if not about.get("notify", True):
        notes.append("nobody told")
    return f"{alert.timestamp:%Y-%m-%dT%H:%M:%SZ}  {what:<12}  {series}  {value or '-'}  ({against})" + (
        f"  [{', '.join(notes)}]" if notes else ""
    )


def report(rule: AlarmRule, lines: Iterable[str], until: float | None = None) -> Iterator[str]:
    """Yield the report of ``alarms test``: a line for each transition, and a sum. Raises ``ValueError`` for bad CSV."""
    rows = list(read_csv(lines, rule))
    opened = resolved = 0
    for alert in replay(rule, rows, until):
        opened += alert.metadata["transition"] == "opened"
        resolved += alert.metadata["transition"] == "resolved"
        yield describe(alert)
    span = f"{max(r.time for r in rows) - min(r.time for r in rows):.0f} s" if rows else "nothing"
    yield f"{len(rows)} readings over {span}: the rule {rule.id} opened {opened} and resolved {resolved} alarms"
