"""From a transition to the Alert that tells it: ids, texts, and the keys of states.

Guarantee: ids depend on nothing but rule, series and the time the alarm began, so that a redelivery makes the same
alert with the same transition id.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from devices.alarms.model import (
    NO_DATA,
    AlarmRule,
    AlarmState,
    Alert,
    DeviceInfo,
    Kind,
    Reason,
    Transition,
    to_datetime,
)

PLACEHOLDERS: Final = frozenset(
    {"name", "device", "device_id", "index", "label", "value", "unit", "threshold", "operator", "level", "start"}
)
_PLACEHOLDER: Final = re.compile(r"\{([A-Za-z_]+)\}")


class Series(msgspec.Struct, frozen=True):
    """What a state belongs to; ``index`` and ``label`` are empty where a rule watches all of a device or index."""

    device_id: str
    index: str
    label: str
    rule_id: str


def _escaped(part: str) -> str:
    return part.replace("%", "%25").replace("|", "%7C")


def state_key(device_id: str, index: str, label: str, rule_id: str) -> str:
    """Return ``device|index|label|rule``; a ``|`` inside a part is written ``%7C``, a ``%`` ``%25``."""
    key = f"{device_id}|{index}|{label}|{rule_id}"
    if "%" not in key and key.count("|") == 3:
        return key
    return "|".join(map(_escaped, (device_id, index, label, rule_id)))


def split_key(key: str) -> Series:
    """Undo :func:`state_key`. Raises ``ValueError`` for text that is no such key."""
    parts = key.split("|")
    if len(parts) != 4:
        raise ValueError(f"{key!r} is not the key of an alarm state")
    return Series(*(part.replace("%7C", "|").replace("%25", "%") for part in parts))


def alert_id(series: Series, state: AlarmState, cause: Reason, start: float) -> str:
    """Return the id of the alarm that began at ``start``: 32 hexadecimal digits."""
    # Repeatable per part: no separator can be forged, because each part comes with its length.
    mark = repr((*msgspec.structs.astuple(series), str(cause), f"{start:.6f}", state.rule, state.closed))
    return hashlib.blake2b(mark.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def transition_id(alert: str, step: Transition) -> str:
    """Return the id of one transition: the alert's, what happened and, for reminders, which."""
    return f"{alert}-{step.kind}" + (f"-{step.number}" if step.kind is Kind.REMINDED else "")


def text_of(value: Any) -> str:
    """Return a value as a person reads it: at most four decimals, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and math.isfinite(value) and 1e-3 <= abs(value) < 1e15:
        return f"{value:.4f}".rstrip("0").rstrip(".")
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(text_of, value)) + "]"
    return str(value)


def unknown_placeholders(template: str) -> list[str]:
    """Return the names in braces that no message can fill in."""
    return sorted({name for name in _PLACEHOLDER.findall(template) if name not in PLACEHOLDERS})


def fill_in(template: str, values: Mapping[str, str]) -> str:
    """Replace ``{name}`` by its value; nothing else is special, an unknown name stays as it is."""
    return _PLACEHOLDER.sub(lambda found: values.get(found[1], found[0]), template)


def _message(rule: AlarmRule, series: Series, info: DeviceInfo, step: Transition, unit: str) -> str:
    silence = step.cause is Reason.NO_DATA
    values = {
        "name": rule.name or rule.id,
        "device": info.name or series.device_id,
        "device_id": series.device_id,
        "index": series.index,
        "label": series.label,
        "value": text_of(step.value),
        "unit": unit,
        "threshold": text_of(rule.no_data_seconds if silence else rule.threshold),
        "operator": NO_DATA if silence else rule.math_operator,
        "level": rule.level,
        "start": to_datetime(step.start).strftime("%Y-%m-%d %H:%M:%SZ"),
    }
    if rule.message:
        return fill_in(rule.message, values)
    if silence:
        what = " ".join(filter(None, (series.index, series.label)))
        return fill_in("{name}: {device} " + (f"({what}) " if what else "") + "is silent", values)
    if rule.math_operator == "changed":
        return fill_in("{name}: {device} {label} is now {value} {unit}", values).rstrip()
    return fill_in("{name}: {device} {label} = {value} {unit}", values).rstrip() + fill_in(
        " ({operator} {threshold})", values
    )


def opening(
    rule: AlarmRule, series: Series, state: AlarmState, step: Transition, info: DeviceInfo, *, display_name: str = ""
) -> Alert:
    """Return the alert of an OPENED transition; ``state`` is the one after it."""
    silence = step.cause is Reason.NO_DATA
    alert = alert_id(series, state, step.cause, step.start)
    unit = "" if silence else state.unit
    return Alert(
        id=alert,
        alarm_id=series.rule_id,
        name=rule.name or rule.id,
        message=_message(rule, series, info, step, unit),
        level=rule.level,
        alarm_type=rule.alarm_type,
        device_id=series.device_id,
        sensor_name=info.name or series.device_id,
        field_name=series.label,
        error_value=finite(step.value),
        threshold=rule.no_data_seconds if silence else rule.threshold,
        math_operator=NO_DATA if silence else rule.math_operator,
        start_date=to_datetime(step.start),
        end_date=None,
        is_resolved=False,
        recipients=",".join(rule.recipients),
        request_id=state.request_id,
        timestamp=to_datetime(step.at),
        metadata=_metadata(alert, step, series.index, unit, display_name),
    )


def following(
    opened: Alert,
    step: Transition,
    rule: AlarmRule | None,
    request_id: str = "",
    extra: Mapping[str, Any] | None = None,
) -> Alert:
    """Return the alert of any later transition of ``opened``; level and recipients are the rule's present ones.

    ``opened`` is the opening or, for news that a quiet time held back, the resolution.
    """
    about = opened.metadata
    metadata = _metadata(opened.id, step, about.get("index", ""), about.get("unit", ""), about.get("display_name", ""))
    metadata.update(extra or {})
    closed = step.kind is Kind.RESOLVED
    return msgspec.structs.replace(
        opened,
        name=(rule.name or rule.id) if rule else opened.name,
        level=rule.level if rule else opened.level,
        recipients=",".join(rule.recipients) if rule else opened.recipients,
        error_value=finite(step.value),
        end_date=opened.end_date or (to_datetime(step.at) if step.resolved else None),
        is_resolved=step.resolved,
        request_id=request_id if closed else opened.request_id,
        timestamp=to_datetime(step.at),
        metadata=metadata,
    )


def _metadata(alert: str, step: Transition, index: str, unit: str, display_name: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "transition": str(step.kind),
        "transition_id": transition_id(alert, step),
        "notify": step.notify,
        "index": index,
        "unit": unit,
    }
    if display_name:
        found["display_name"] = display_name
    if step.reason:
        found["reason"] = str(step.reason)
    return found


def finite(value: Any) -> Any:
    """Return ``value`` as JSON can hold it: an infinite or huge number as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value) if type(value) is int and not -(2**63) <= value < 2**64 else value
