"""Validation value by value: what breaks a rule goes, with its reason; what is left goes on."""

from datetime import timedelta
from typing import Any

import pytest

from devices.model import Reading
from devices.profiles import compile_profile
from devices.testing import NOW
from devices.validation import validate


def profile_with(**rule: Any) -> Any:
    return compile_profile(
        {"profile": "p", "driver": "plain_json", "match": [], "values": {"i": {"labels": {"a": rule}}}}
    )


def reading(values: Any, at: Any = NOW, index: Any = "i") -> Any:
    names = ["a", "b", "c"][: len(values)]
    return Reading(
        request_id="r",
        timestamp=at,
        device_id="d",
        index=index,
        values=list(values),
        labels=names,
        display_names=[name.upper() for name in names],
        metadata={"units": ["u"] * len(names), "persist": [True] * len(names), "other": 1},
    )


@pytest.mark.parametrize(
    ("rule", "value", "reason"),
    [
        ({}, 1, None),
        ({}, None, None),
        ({}, "text", None),
        ({}, float("nan"), "not_finite"),
        ({}, float("inf"), "not_finite"),
        ({}, -float("inf"), "not_finite"),
        ({}, 10**400, "not_finite"),
        ({}, "a\0b", "text"),
        ({}, "x" * 70_000, "text"),
        ({}, [1], "type"),
        ({"min": 0}, -0.1, "below_min"),
        ({"min": 0}, 0, None),
        ({"min": 0}, "text", None),
        ({"min": 0}, None, None),
        ({"max": 10}, 10.1, "above_max"),
        ({"max": 0}, True, None),
        ({"min": 0}, float("nan"), "not_finite"),
        ({"type": "number"}, True, "type"),
        ({"type": "number"}, 1.5, None),
        ({"type": "integer"}, 1.5, "type"),
        ({"type": "integer"}, 2.0, None),
        ({"type": "boolean"}, 1, "type"),
        ({"type": "boolean"}, False, None),
        ({"type": "string"}, 1, "type"),
        ({"type": "string"}, None, None),
        ({"whitelist": [1, 2]}, 1.0, None),
        ({"whitelist": [1, 2]}, True, "not_whitelisted"),
        ({"whitelist": ["on", "off"]}, "off", None),
        ({"whitelist": ["on", "off"]}, "of", "not_whitelisted"),
        ({"whitelist": [True]}, 1, "not_whitelisted"),
        ({"whitelist": [0, True]}, True, None),
    ],
)
def test_reason(rule: Any, value: Any, reason: Any) -> None:
    """Each rule refuses what it says and nothing else; a missing value breaks none."""
    checked = validate([reading([value])], profile_with(**rule), NOW)
    assert [r.reason for r in checked.rejections] == ([] if reason is None else [reason])
    assert len(checked.readings) == (reason is None)


def test_what_is_left_goes_on() -> None:
    """The lists shrink together, metadata with them, and the original is not touched."""
    before = reading([99, 2, float("nan")])
    checked = validate([before], profile_with(max=10), NOW)
    (left,) = checked.readings
    assert (left.values, left.labels, left.display_names) == ([2], ["b"], ["B"])
    assert left.metadata == {"units": ["u"], "persist": [True], "other": 1}
    assert [(r.label, r.reason) for r in checked.rejections] == [("a", "above_max"), ("c", "not_finite")]
    assert len(before.values) == len(before.metadata["units"]) == 3


def test_sound_readings_pass_as_they_are() -> None:
    """A reading without a rejected value is the same object."""
    before = reading([1, True, "x"])
    assert validate([before], profile_with(max=10), NOW).readings[0] is before


@pytest.mark.parametrize(
    ("ahead", "kept"),
    [(timedelta(hours=24), True), (timedelta(hours=24, seconds=1), False), (-timedelta(days=4000), True)],
)
def test_samples_of_tomorrow_are_refused(ahead: Any, kept: Any) -> None:
    """A sample more than 24 h ahead of its arrival is refused whole; an old one is not."""
    checked = validate([reading([1, 2], NOW + ahead)], profile_with(), NOW)
    assert bool(checked.readings) is kept
    assert [r.reason for r in checked.rejections] == ([] if kept else ["in_future"] * 2)


def test_max_age() -> None:
    """A profile can refuse samples that are too old on arrival."""
    profile = profile_with(max_age_seconds=60)
    assert validate([reading([1], NOW - timedelta(seconds=60))], profile, NOW).readings
    assert [r.reason for r in validate([reading([1], NOW - timedelta(seconds=61))], profile, NOW).rejections] == [
        "too_old"
    ]


def test_index_without_a_rule_is_checked_too() -> None:
    """NaN is refused under an index that no profile mentions."""
    checked = validate([reading([float("nan"), 1], index="other")], profile_with(), NOW)
    assert checked.readings[0].labels == ["b"]
