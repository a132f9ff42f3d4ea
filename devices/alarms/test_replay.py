"""History against a rule."""

from __future__ import annotations

import pytest

from devices.alarms.model import AlarmRule, Dependency
from devices.alarms.replay import read_csv, replay, report

HISTORY = """device_id,index,label,time,value,value_text,unit
a,T,CH1,2025-06-15T15:00:00Z,85,,°C
a,T,CH1,2025-06-15T15:01:00Z,95,,°C
b,T,CH1,1749999660000,20,,°C
a,T,CH1,2025-06-15T17:02:00+02:00,96.5,,°C
a,T,CH1,2025-06-15T15:00:00Z,85,,°C
a,T,CH1,2025-06-15T15:10:00Z,80,,°C
"""


def test_report() -> None:
    """A line for each transition, timers included, in the order of time, and a sum."""
    rule = AlarmRule(
        id="hot", device_id="gone", threshold=90, duration_seconds=120, depends_on=[Dependency(alarm="elsewhere")]
    )
    assert list(report(rule, HISTORY.splitlines())) == [
        "2025-06-15T15:03:00Z  opened        a/T/CH1  96.5 °C  (> 90)",
        "2025-06-15T15:10:00Z  resolved      a/T/CH1  80 °C  (> 90)",
        "6 readings over 600 s: the rule hot opened 1 and resolved 1 alarms",
    ]


def test_silence_up_to_the_end() -> None:
    """A no-data rule fires in the gaps and, where an end is given, in the silence after the last row."""
    rule = AlarmRule(id="dead", tag="x", no_data_seconds=300)
    rows = list(read_csv(HISTORY.splitlines(), rule))
    last = max(row.time for row in rows)
    assert [(a.device_id, a.metadata["transition"]) for a in replay(rule, rows, last + 1000)] == [
        ("b", "opened"),
        ("a", "opened"),
        ("a", "resolved"),
        ("a", "opened"),
    ]


def test_columns_that_are_missing_are_what_the_rule_names() -> None:
    """Time and value suffice; texts and booleans are read as such."""
    rule = AlarmRule(
        id="x", device_id="d", index="S", label="L", alarm_type="Status", math_operator="==", threshold="ON"
    )
    rows = list(read_csv(["time,value", "1750000000,ON", "1750000001.5,true", "1750000002,", "1750000003,1e3"], rule))
    assert [(row.device_id, row.index, row.label, row.time, row.value) for row in rows] == [
        ("d", "S", "L", 1750000000.0, "ON"),
        ("d", "S", "L", 1750000001.5, True),
        ("d", "S", "L", 1750000002.0, None),
        ("d", "S", "L", 1750000003.0, 1000.0),
    ]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "has the columns none"),
        (["when,value"], "needs time and value"),
        (["time,value", "1,2", "soon,3"], "line 3: 'soon' is not a time"),
        (["time,value", "nan,3"], "line 2"),
    ],
)
def test_files_that_are_no_history(lines: list[str], message: str) -> None:
    """What cannot be read says why and where."""
    with pytest.raises(ValueError, match=message):
        list(read_csv(lines, AlarmRule(id="x", tag="t")))
