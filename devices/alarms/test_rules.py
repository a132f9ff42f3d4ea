"""The rules' file: what is right in it, what is wrong in it, and where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest

from devices.alarms import rules
from devices.alarms.model import AlarmRule, Dependency, Repeat, Schedule
from devices.configfile import ConfigErrors

CONFIG = Path(__file__).resolve().parents[2] / "config"


def test_the_shipped_rules() -> None:
    """The file that is shipped is read without a word, and every rule of it goes through the topic unchanged."""
    found = rules.load(CONFIG / "alarms.yaml", profiles={"fluxor": ("S", "T")})
    assert found
    for rule in found:
        assert msgspec.json.decode(msgspec.json.encode(rule), type=AlarmRule) == rule


def test_the_manual_shows_a_rule_that_is_shipped() -> None:
    """The sample in docs/alarms.md is the first rule of the file, to the letter."""
    manual = (CONFIG.parent / "docs" / "alarms.md").read_text(encoding="utf-8")
    sample = manual.partition("```yaml\nalarms:\n")[2].partition("```")[0]
    assert sample
    assert sample in (CONFIG / "alarms.yaml").read_text(encoding="utf-8")


def test_the_schema() -> None:
    """The schema is one, and knows exactly the fields of a rule."""
    jsonschema.Draft202012Validator.check_schema(rules.schema())
    assert set(rules.schema()["$defs"]["rule"]["properties"]) == set(AlarmRule.__struct_fields__)
    assert set(rules.schema()["$defs"]["window"]["properties"]) == set(Schedule.__struct_fields__)


def test_all_errors_at_once_each_with_its_line(tmp_path: Path) -> None:
    """Schema, contradictions, double ids and dependencies are found in one go, at the line of the field."""
    file = tmp_path / "alarms.yaml"
    file.write_text(
        """alarms:
  - id: one
    tag: a
    treshold: 5
  - id: two
    tag: a
    device_id: b
    threshold: 10
    clear_threshold: 11
    recipients: [ops@example.org, nobody]
  - id: two
    profile: fluxer
    threshold: 3
    depends_on: [{alarm: three}]
  - id: four
    tag: a
    threshold: 3
    schedule: {days: [], time_zone: Mars/Olympus}
  - id: five
    tag: a
    threshold: 3
    schedule: {start: "08:00", end: "08:00", time_zone: Mars/Olympus}
    depends_on: [{alarm: three}, {alarm: four}]
"""
    )
    with pytest.raises(ConfigErrors) as caught:
        rules.load(file, profiles={"fluxor": None})
    lines = [(error.line, error.message) for error in caught.value.errors]
    assert lines == [
        (4, "unknown key; do you mean threshold?"),
        (6, "the rule names device_id and tag"),
        (9, "with > an alarm clears at or below its threshold 10, not above"),
        (10, "not a mail address, and not a webhook (https:// or http://)"),
        (11, "the id is already on line 5"),
        (12, "no such profile"),
        (18, lines[6][1]),
        (22, "the window is empty: it ends when it starts"),
        (22, "no such time zone"),
    ]
    assert "alarms.yaml:6: " in str(caught.value)


def faults(**fields: Any) -> list[tuple[str, str]]:
    found = rules.check_rule(AlarmRule(**{"id": "r", "tag": "t", "threshold": 5, **fields}))
    return [(".".join(map(str, fault.where)), fault.message) for fault in found]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"math_operator": ">", "clear_threshold": 5},
        {"math_operator": "<", "clear_threshold": 6},
        {"math_operator": "outside", "threshold": [2, 8], "clear_threshold": [3, 7]},
        {"math_operator": "in", "threshold": [2, 8], "clear_threshold": [1, 9]},
        {"math_operator": "in", "threshold": ["A", "B"], "alarm_type": "Status"},
        {"math_operator": "==", "threshold": "ON", "alarm_type": "Status"},
        {"math_operator": "changed", "threshold": None},
        {"math_operator": "changed", "threshold": 0.5, "repeat": Repeat(count=2, within_seconds=9)},
        {"threshold": None, "no_data_seconds": 60},
        {"threshold": 5, "no_data_seconds": 60},
        {"schedule": [Schedule(start="22:00", end="06:00"), Schedule(days=["sun"])]},
        {"recipients": ["a@localhost", "a+b@x.org", "é@exämple.fr", "http://[::1]:8080/x?y=1", "https://h/"]},
        {"message": "{device} {value}{unit} {"},
    ],
)
def test_well(fields: dict[str, Any]) -> None:
    """These rules are sound."""
    assert faults(**fields) == []


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"id": "a|b"}, "id"),
        ({"tag": None}, ""),
        ({"threshold": None}, ""),
        ({"threshold": "5"}, "threshold"),
        ({"threshold": float("nan")}, "threshold"),
        ({"threshold": [1, 2]}, "threshold"),
        ({"threshold": {"a": 1}, "math_operator": "=="}, "threshold"),
        ({"math_operator": "in", "threshold": 5}, "threshold"),
        ({"math_operator": "in", "threshold": [8, 2]}, "threshold"),
        ({"math_operator": "in", "threshold": [1, "a"]}, "threshold"),
        ({"math_operator": "in", "threshold": [1, 2, 3]}, "threshold"),
        ({"math_operator": "changed", "threshold": 0}, "threshold"),
        ({"math_operator": "changed", "threshold": None, "duration_seconds": 5}, "duration_seconds"),
        ({"alarm_type": "Status"}, "math_operator"),
        ({"clear_threshold": "4"}, "clear_threshold"),
        ({"math_operator": "<=", "clear_threshold": 4}, "clear_threshold"),
        ({"math_operator": "==", "clear_threshold": 4}, "clear_threshold"),
        ({"math_operator": "outside", "threshold": [2, 8], "clear_threshold": [1, 7]}, "clear_threshold"),
        ({"math_operator": "in", "threshold": [2, 8], "clear_threshold": [3, 9]}, "clear_threshold"),
        ({"threshold": None, "no_data_seconds": 5, "clear_threshold": 1}, "clear_threshold"),
        ({"threshold": None, "no_data_seconds": 5, "duration_seconds": 1}, "duration_seconds"),
        ({"duration_seconds": -1}, "duration_seconds"),
        ({"duration_seconds": 5, "repeat": Repeat(count=2, within_seconds=5)}, "repeat"),
        ({"repeat": Repeat(count=1, within_seconds=5)}, "repeat.count"),
        ({"repeat": Repeat(count=2, within_seconds=0)}, "repeat.within_seconds"),
        ({"schedule": []}, "schedule"),
        ({"schedule": Schedule(days=[])}, "schedule.days"),
        ({"schedule": [Schedule(start="8")]}, "schedule.0.start"),
        ({"schedule": Schedule(time_zone="../x")}, "schedule.time_zone"),
        ({"quiet_hours": Schedule()}, "quiet_hours"),
        ({"recipients": ["a@b\r\nBcc: c@d"]}, "recipients.0"),
        ({"recipients": ["ok@x", "a@b,c@d"]}, "recipients.1"),
        ({"recipients": ["ftp://x/y"]}, "recipients.0"),
        ({"recipients": ["https://x/a,b"]}, "recipients.0"),
        ({"recipients": ["https:///a"]}, "recipients.0"),
        ({"recipients": ["http://x:99999/a"]}, "recipients.0"),
        ({"message": "{valeu}"}, "message"),
    ],
)
def test_contradictions(fields: dict[str, Any], where: str) -> None:
    """Each of these has exactly one fault, in this field."""
    assert [place for place, _ in faults(**fields)] == [where]


def test_an_index_that_the_profile_has_not() -> None:
    """Where the indices of a profile are known, another one is a fault."""
    rule = AlarmRule(id="r", profile="fluxor", index="X", threshold=1)
    assert [fault.where for fault in rules.check_rule(rule, {"fluxor": ("T", "U")})] == [("index",)]
    assert rules.check_rule(rule, {"fluxor": None}) == []


def test_dependencies_that_go_in_a_circle() -> None:
    """A rule that would mute itself is a fault, and one that depends on a rule that is not there."""
    given = [
        AlarmRule(id="a", tag="t", threshold=1, depends_on=[Dependency(alarm="b")]),
        AlarmRule(id="b", tag="t", threshold=1, depends_on=[Dependency(alarm="a")]),
        AlarmRule(id="c", tag="t", threshold=1, depends_on=[Dependency(alarm="nope")]),
        AlarmRule(id="d", tag="t", threshold=1, depends_on=[Dependency(alarm="a", device_id="x")]),
    ]
    assert [(number, fault.where) for number, fault in rules.check_rules(given)] == [
        (0, ("depends_on", 0, "alarm")),
        (1, ("depends_on", 0, "alarm")),
        (2, ("depends_on", 0, "alarm")),
    ]


@pytest.mark.parametrize("text", ["", "alarms: []", "# nothing\n"])
def test_no_rules(tmp_path: Path, text: str) -> None:
    """An empty file, and an empty list, are no rules and no errors."""
    file = tmp_path / "alarms.yaml"
    file.write_text(text)
    assert rules.load(file) == []


@pytest.mark.parametrize("text", ["alarms: {a: 1}", "[]", "alarms: [1]", "alarms:\n  - id: [x", "alarms: [{id: 5}]"])
def test_files_that_are_something_else(tmp_path: Path, text: str) -> None:
    """What has another shape is an error with a line, never a traceback."""
    file = tmp_path / "alarms.yaml"
    file.write_text(text)
    with pytest.raises(ConfigErrors) as caught:
        rules.load(file)
    assert all(error.file == "alarms.yaml" and error.line for error in caught.value.errors)


def test_words_that_older_yaml_reads_as_something_else(tmp_path: Path) -> None:
    """ON, off and 18:00 are texts."""
    file = tmp_path / "alarms.yaml"
    file.write_text(
        "alarms: [{id: x, tag: t, alarm_type: Status, math_operator: ==, threshold: ON,"
        " schedule: {start: 08:00, end: 18:00}}]"
    )
    (rule,) = rules.load(file)
    assert rule.threshold == "ON"
    assert rule.schedule == Schedule(start="08:00", end="18:00")
