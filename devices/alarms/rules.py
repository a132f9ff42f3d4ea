"""``config/alarms.yaml``: reading it, and finding what contradicts itself.

Guarantee: all that is wrong is reported at once, with file and line (:class:`~devices.configfile.ConfigErrors`); a
rule that passes can be compiled and evaluated. :func:`check_rule` and :func:`check_rules` look at rules that come by
the topic, too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec

from devices import configfile
from devices.alarms.alerts import PLACEHOLDERS, unknown_placeholders
from devices.alarms.model import DAYS, AlarmRule, Dependency, Schedule
from devices.alarms.prepare import Prepared, compares
from devices.alarms.schedule import minutes
from devices.configfile import ConfigError, ConfigErrors, Document

SCHEMA_PATH: Final = Path(__file__).resolve().parents[2] / "config" / "alarms.schema.json"

# RFC 5321, as far as mail addresses in use go; no comments, no quoted local part.
_MAILBOX: Final = re.compile(r"[^\s@<>,;:\"()\\\x00-\x1f\x7f]{1,64}@[^\s@<>,;:\"()\\\x00-\x1f\x7f]{1,189}")
_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,99}")
_ORDERING: Final = (">", ">=", "<", "<=")
_SETS: Final = ("in", "outside")

Known = Mapping[str, Collection[str] | None]


class Fault(NamedTuple):
    """What contradicts itself in a rule, and in which field (the path below the rule)."""

    where: tuple[str | int, ...]
    message: str
    found: Any = None
    allowed: str = ""


@lru_cache(maxsize=1)
def schema() -> dict[str, Any]:
    """Read the JSON schema of the file."""
    found: dict[str, Any] = json.loads(SCHEMA_PATH.read_text(encoding="utf-8"))
    return found


def load(path: Path, *, profiles: Known | None = None) -> list[AlarmRule]:
    """Read the rules of a file. Raises ConfigErrors with all that is wrong in it; see :func:`read`."""
    rules, errors = read(path, profiles=profiles)
    if errors:
        raise ConfigErrors(errors)
    return rules


def read(path: Path, *, profiles: Known | None = None) -> tuple[list[AlarmRule], list[ConfigError]]:
    """Read the rules of a file; returns those that are well and all errors.

    ``profiles``: the names that a rule may use, each with its indices, or None where any index is possible; None for
    the whole: not known, not checked.
    """
    errors: list[ConfigError] = []
    document = configfile.load(path, path.name, errors)
    if document is None or document.data is None:
        return [], errors
    errors += configfile.schema_errors(document, schema())
    entries = document.data.get("alarms") if isinstance(document.data, dict) else None
    if not isinstance(entries, list):
        return [], errors
    rules: list[tuple[int, AlarmRule]] = []
    for number, entry in enumerate(entries):
        if any(error.pointer.startswith(f"/alarms/{number}/") for error in errors):
            continue
        try:
            rule = msgspec.convert(entry, AlarmRule)
        except msgspec.ValidationError as exc:
            if not any(error.pointer == f"/alarms/{number}" for error in errors):
                errors.append(document.error(("alarms", number), str(exc)))
            continue
        faults = check_rule(rule, profiles)
        if not faults:
            rules.append((number, rule))
        errors += [_located(document, number, fault) for fault in faults]
    ids = [entry.get("id") if isinstance(entry, dict) else None for entry in entries]
    for number, fault in check_rules([rule for _, rule in rules], {name for name in ids if isinstance(name, str)}):
        errors.append(_located(document, rules[number][0], fault))
    for number, name in enumerate(ids):
        if name is not None and name in ids[:number]:
            first = document.line(("alarms", ids.index(name), "id"))
            errors.append(document.error(("alarms", number, "id"), f"the id is already on line {first}", found=name))
    return [rule for _, rule in rules], sorted(errors, key=lambda error: error.line)


def _located(document: Document, number: int, fault: Fault) -> ConfigError:
    where = ("alarms", number, *fault.where)
    return document.error(where, fault.message, found=fault.found, allowed=fault.allowed)


def check_rule(rule: AlarmRule, profiles: Known | None = None) -> list[Fault]:
    """Return what is contradictory in one rule. ``profiles`` as in :func:`read`."""
    faults = [*_named(rule, profiles), *_condition(rule), *_timing(rule), *_telling(rule)]
    if not faults:
        try:
            Prepared(rule)
        except (ValueError, TypeError, KeyError) as exc:
            faults.append(Fault((), f"the rule cannot be evaluated: {exc}"))
    return faults


def check_rules(rules: Sequence[AlarmRule], ids: Collection[str] | None = None) -> list[tuple[int, Fault]]:
    """Return what is contradictory between rules, each with the position of the rule. ``ids``: others that exist."""
    found: list[tuple[int, Fault]] = []
    by_id = {rule.id: rule for rule in rules}
    for number, rule in enumerate(rules):
        for place, dependency in enumerate(rule.depends_on):
            where = ("depends_on", place, "alarm")
            if dependency.alarm not in by_id and dependency.alarm not in (ids or ()):
                found.append((number, Fault(where, "no rule has this id", dependency.alarm, ", ".join(sorted(by_id)))))
            elif _leads_back(rule, dependency, by_id):
                found.append((number, Fault(where, "the rule depends on itself, and would mute itself for ever")))
    return found


def _leads_back(rule: AlarmRule, first: Dependency, by_id: Mapping[str, AlarmRule]) -> bool:
    # Through a device that is named, or through the gateway: a rule for a tag may well be one for both ends.
    seen: set[str] = set()
    waiting = [first]
    while waiting:
        dependency = waiting.pop()
        if dependency.alarm == rule.id and dependency.device_id in (None, rule.device_id):
            return True
        if dependency.alarm in seen or dependency.alarm not in by_id:
            continue
        seen.add(dependency.alarm)
        waiting += by_id[dependency.alarm].depends_on
    return False


def _named(rule: AlarmRule, profiles: Known | None) -> Iterable[Fault]:
    if not _ID.fullmatch(rule.id):
        yield Fault(("id",), "not an id", rule.id, "letters, digits and . _ : -, at most 100")
    named = [name for name in ("device_id", "profile", "tag") if getattr(rule, name)]
    if len(named) != 1:
        what = "no device" if not named else " and ".join(named)
        yield Fault((named[-1],) if named else (), f"the rule names {what}", allowed="one of device_id, profile, tag")
    if profiles is not None and rule.profile and rule.profile not in profiles:
        yield Fault(("profile",), "no such profile", rule.profile, ", ".join(sorted(profiles)))
    indices = (profiles or {}).get(rule.profile or "")
    if indices is not None and rule.index is not None and rule.index not in indices:
        yield Fault(("index",), f"the profile {rule.profile} has no such index", rule.index, ", ".join(sorted(indices)))


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "number" if value == value and abs(value) != float("inf") else "not finite"  # noqa: PLR0124
    return "text" if isinstance(value, str) else type(value).__name__


def _condition(rule: AlarmRule) -> Iterable[Fault]:
    op, threshold, clear = rule.math_operator, rule.threshold, rule.clear_threshold
    if not compares(rule):
        if clear is not None:
            yield Fault(("clear_threshold",), "there is no threshold to clear")
        if rule.duration_seconds or rule.repeat:
            field = "duration_seconds" if rule.duration_seconds else "repeat"
            yield Fault((field,), "there is no threshold that could be passed", allowed="no_data_seconds alone")
        return
    if op == "changed":
        if threshold is not None and (_kind(threshold) != "number" or threshold <= 0):
            yield Fault(("threshold",), "the smallest change must be a number above 0", threshold)
        if rule.duration_seconds:
            yield Fault(("duration_seconds",), "a change is one instant and cannot last", allowed="repeat")
        if clear is not None:
            yield Fault(("clear_threshold",), "a change has nothing to clear", clear)
        return
    if threshold is None:
        yield Fault(
            (), "the rule has nothing to compare with", allowed="threshold, no_data_seconds, or the operator changed"
        )
        return
    if rule.alarm_type == "Status" and op in _ORDERING:
        yield Fault(("math_operator",), "a status has no order", op, "==, !=, in, outside, changed")
    fault = _shape(op, threshold)
    if fault:
        yield Fault(("threshold",), fault, threshold)
        return
    if clear is not None:
        fault = _shape(op, clear) or _wrong_side(op, threshold, clear)
        if fault:
            yield Fault(("clear_threshold",), fault, clear)


def _shape(op: str, threshold: Any) -> str:
    """Return what is wrong with a threshold for this operator, empty for nothing."""
    if op in _SETS:
        if not isinstance(threshold, list | tuple) or not threshold:
            return f"{op} needs a list: two numbers for a range, texts for a set"
        kinds = {_kind(value) for value in threshold}
        if kinds == {"text"}:
            return ""
        if kinds != {"number"} or len(threshold) != 2:
            return f"{op} needs two numbers for a range, or texts for a set"
        return "" if threshold[0] <= threshold[1] else "the range begins above its end"
    kind = _kind(threshold)
    if op in _ORDERING and kind != "number":
        return f"{op} needs a number"
    return "" if kind in ("number", "text", "boolean") else f"{op} needs one number, text or boolean"


def _wrong_side(op: str, threshold: Any, clear: Any) -> str:
    if op in (">", ">="):
        return (
            "" if clear <= threshold else f"with {op} an alarm clears at or below its threshold {threshold}, not above"
        )
    if op in ("<", "<="):
        return (
            "" if clear >= threshold else f"with {op} an alarm clears at or above its threshold {threshold}, not below"
        )
    if op in ("==", "!="):
        return f"{op} has no side on which it could clear"
    if isinstance(threshold[0], str) or isinstance(clear[0], str):
        return "a set of texts has nothing between alarm and clear"
    within = threshold[0] <= clear[0] and clear[1] <= threshold[1]
    around = clear[0] <= threshold[0] and threshold[1] <= clear[1]
    if op == "outside":
        return "" if within else f"with outside an alarm clears inside its range {threshold}"
    return "" if around else f"with in an alarm clears outside its range {threshold}"


def _timing(rule: AlarmRule) -> Iterable[Fault]:
    for field in ("duration_seconds", "no_data_seconds", "renotify_seconds"):
        value = getattr(rule, field)
        if value is not None and not 0 < value <= 366 * 86400:
            yield Fault((field,), "out of range", value, "more than 0, at most a year, in seconds")
    if rule.repeat is not None:
        if rule.duration_seconds:
            yield Fault(("repeat",), "a rule has a duration or a repeat, not both", allowed="two rules")
        if not 2 <= rule.repeat.count <= 100:
            yield Fault(("repeat", "count"), "out of range", rule.repeat.count, "2 to 100")
        if not 0 < rule.repeat.within_seconds <= 366 * 86400:
            yield Fault(
                ("repeat", "within_seconds"), "out of range", rule.repeat.within_seconds, "more than 0, in seconds"
            )
    for field in ("schedule", "quiet_hours"):
        windows = getattr(rule, field)
        if windows is None:
            continue
        many = not isinstance(windows, Schedule)
        if many and not windows:
            yield Fault((field,), "empty: the rule would never be on" if field == "schedule" else "empty")
        for number, window in enumerate(windows if many else [windows]):
            for fault in _window(window):
                yield fault._replace(where=(field, *((number,) if many else ()), *fault.where))
            if field == "quiet_hours" and set(window.days) == set(DAYS) and _whole_day(window):
                yield Fault((field,), "quiet all week: nobody would ever be told", allowed="no recipients instead")


def _whole_day(window: Schedule) -> bool:
    return (window.start, window.end) == ("00:00", "24:00")


def _window(window: Schedule) -> Iterable[Fault]:
    if not window.days:
        yield Fault(("days",), "empty: no day", allowed=", ".join(DAYS))
    times = []
    for field in ("start", "end"):
        try:
            times.append(minutes(getattr(window, field)))
        except ValueError:
            yield Fault((field,), "not a time of day", getattr(window, field), 'HH:MM in quotes, like "08:00"')
    if len(times) == 2 and times[0] % 1440 == times[1] % 1440 and not _whole_day(window):
        yield Fault(("end",), "the window is empty: it ends when it starts", window.end)
    try:
        ZoneInfo(window.time_zone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        yield Fault(("time_zone",), "no such time zone", window.time_zone, "an IANA name like Europe/Paris")


def _telling(rule: AlarmRule) -> Iterable[Fault]:
    for number, recipient in enumerate(rule.recipients):
        fault = recipient_fault(recipient)
        if fault:
            yield Fault(("recipients", number), fault, recipient)
    unknown = unknown_placeholders(rule.message)
    if unknown:
        allowed = ", ".join(f"{{{name}}}" for name in sorted(PLACEHOLDERS))
        yield Fault(("message",), f"nothing fills in {', '.join(f'{{{name}}}' for name in unknown)}", allowed=allowed)


def recipient_fault(recipient: str) -> str:
    """Return what is wrong with a recipient, empty for a mail address or an http(s) URL."""
    if "://" not in recipient:
        return "" if _MAILBOX.fullmatch(recipient) else "not a mail address, and not a webhook (https:// or http://)"
    if "," in recipient or any(char.isspace() or not char.isprintable() for char in recipient):
        return "a webhook's URL has no comma and no space; write %2C and %20"
    try:
        url = urlsplit(recipient)
        _ = url.port
    except ValueError as exc:
        return f"not a URL: {exc}"
    if url.scheme not in ("http", "https"):
        return "a webhook is an https:// or http:// URL"
    return "" if url.hostname else "a webhook's URL needs a host"
