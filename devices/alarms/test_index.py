"""Which rules a reading meets, against looking at every rule."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.alarms.index import RuleIndex
from devices.alarms.model import AlarmRule, DeviceInfo

names = st.sampled_from(["a", "b", "c"])
selections = st.one_of(
    st.fixed_dictionaries({"device_id": names}),
    st.fixed_dictionaries({"profile": names}),
    st.fixed_dictionaries({"tag": names}),
)
rules = st.lists(st.tuples(selections, st.one_of(st.none(), names), st.booleans()), max_size=12)
devices = st.lists(st.tuples(names, st.one_of(st.none(), names), st.lists(names, unique=True), names), max_size=10)


@given(rules, devices)
def test_finds_what_a_look_at_every_rule_finds(given_rules: list[Any], asked: list[Any]) -> None:
    """For any rules and devices, in any order of asking, each rule that names the reading is found once, by id."""
    made = [
        AlarmRule(id=f"r{n:02}", index=index, active=active, threshold=1, **named)
        for n, (named, index, active) in enumerate(given_rules)
    ]
    found = RuleIndex(made)
    for device, profile, tags, index in asked:
        info = DeviceInfo(device_id=device, profile=profile, tags=tuple(tags))
        wanted = [
            rule.id
            for rule in made
            if rule.active
            and (rule.device_id == device or (profile and rule.profile == profile) or rule.tag in tags)
            and rule.index in (None, index)
        ]
        assert [rule.id for rule in found.rules_for(device, profile, tuple(tags), index)] == wanted
        assert all(found.applies(rule, info) for rule in found.rules_for(device, profile, tuple(tags), index))


def test_a_device_that_no_rule_names_shares_what_is_remembered() -> None:
    """Ten thousand devices of one profile take one entry."""
    found = RuleIndex([AlarmRule(id="x", profile="p", threshold=1), AlarmRule(id="y", device_id="d1", threshold=1)])
    answers = {found.rules_for(f"d{n}", "p", (), "T") for n in range(10_000)}
    assert len(answers) == 2
    assert len(found._remembered) == 2


def test_refuses() -> None:
    """One id twice, or a rule that cannot be compiled, is a ValueError that names the rule."""
    with pytest.raises(ValueError, match="'x'"):
        RuleIndex([AlarmRule(id="x", tag="t", threshold=1), AlarmRule(id="x", tag="t", threshold=2)])
    with pytest.raises(ValueError, match="'y'"):
        RuleIndex([AlarmRule(id="y", tag="t")])
