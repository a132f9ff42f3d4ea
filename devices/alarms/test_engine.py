"""The engine: keys, ids, timers, starts over, rules that change, dependencies."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from devices.alarms.alerts import Series, fill_in, split_key, state_key, text_of
from devices.alarms.engine import GRACE_SECONDS, AlarmEngine
from devices.alarms.model import AlarmRule, Alert, Dependency, DeviceInfo, Schedule, unpack
from devices.model import Reading, Value

BASE = 1_750_000_000.0
OVEN = DeviceInfo(device_id="oven-1", name="Oven 1", profile="p", tags=("oven",), gateway="gw")


def reading(offset: float, *values: Value, device: str = "oven-1", index: str = "T", **metadata: Any) -> Reading:
    labels = [f"CH{n + 1}" for n in range(len(values))]
    return Reading(
        request_id=f"req-{offset:g}",
        timestamp=datetime.fromtimestamp(BASE + offset, UTC),
        device_id=device,
        index=index,
        values=list(values),
        labels=labels,
        display_names=[f"Channel {n + 1}" for n in range(len(values))],
        metadata={"units": ["°C"] * len(values), **metadata},
    )


def rule(**fields: Any) -> AlarmRule:
    return AlarmRule(
        **{
            "id": "hot",
            "name": "Hot",
            "tag": "oven",
            "index": "T",
            "threshold": 90,
            "recipients": ["a@b", "c@d"],
            **fields,
        }
    )


def engine(
    *rules: AlarmRule, states: dict[str, bytes] | None = None, fleet: Iterable[DeviceInfo] = (OVEN,)
) -> AlarmEngine:
    known = {info.device_id: info for info in fleet}
    return AlarmEngine({} if states is None else states, rules, devices=known.get)


def said(alerts: Iterable[Alert]) -> list[tuple[str, str, bool]]:
    return [(a.metadata["transition"], a.field_name, a.metadata["notify"]) for a in alerts]


def at(offset: float, *values: Value, on: AlarmEngine, **more: Any) -> list[tuple[str, str, bool]]:
    return said(on.process(reading(offset, *values, **more), OVEN, BASE + offset))


def test_an_alert_says_everything() -> None:
    """Opening and closing share an id, say value, unit, threshold and recipients, and have their own transition."""
    one = engine(rule(message="{device} {label} is {value} {unit} > {threshold}"))
    (opened,) = one.process(reading(0, 20.0, 95.25), OVEN, BASE)
    assert opened.message == "Oven 1 CH2 is 95.25 °C > 90"
    assert (opened.alarm_id, opened.name, opened.sensor_name, opened.field_name) == ("hot", "Hot", "Oven 1", "CH2")
    assert (opened.error_value, opened.threshold, opened.math_operator) == (95.25, 90, ">")
    assert (opened.recipients, opened.request_id, opened.is_resolved) == ("a@b,c@d", "req-0", False)
    assert opened.start_date == opened.timestamp == datetime.fromtimestamp(BASE, UTC)
    assert opened.metadata == {
        "transition": "opened",
        "transition_id": f"{opened.id}-opened",
        "notify": True,
        "index": "T",
        "unit": "°C",
        "display_name": "Channel 2",
    }
    (closed,) = one.process(reading(60, 20.0, 80), OVEN, BASE + 60)
    assert (closed.id, closed.is_resolved, closed.error_value, closed.request_id) == (opened.id, True, 80, "req-60")
    assert closed.end_date == datetime.fromtimestamp(BASE + 60, UTC)
    assert closed.metadata["transition_id"] == f"{opened.id}-resolved"
    assert one.open_alarms == 0


def test_a_redelivery_after_a_crash_makes_the_same_alert() -> None:
    """With the state from before and the same reading comes the same alert, its ids and all."""
    states: dict[str, bytes] = {}
    one = engine(rule(duration_seconds=10), states=states)
    at(0, 95, on=one)
    before = dict(states)
    first = one.process(reading(10, 96), OVEN, BASE + 10)
    again = engine(rule(duration_seconds=10), states=before)
    assert again.rebuild(BASE + 400) == []
    assert again.process(reading(10, 96), OVEN, BASE + 400) == first != []


def test_whole_devices_and_counts() -> None:
    """A rule of silence alone has one state a device, whatever it sends; counts say what became of readings."""
    one = engine(AlarmRule(id="dead", tag="oven", no_data_seconds=60))
    at(0, 1, 2, on=one)
    at(5, 1, index="U", on=one)
    at(5, 1, index="U", on=one)
    assert one.process(reading(-90_000, 1), OVEN, BASE) == one.process(reading(1000, 1), OVEN, BASE) == ()
    assert list(one.states) == ["oven-1|||dead"]
    assert one.counts == {"evaluated": 3, "late": 1, "old": 1, "future": 1}
    assert one.tick(BASE + 64) == []
    (alert,) = one.tick(BASE + 65)
    assert (alert.math_operator, alert.threshold, alert.error_value) == ("no_data", 60, None)
    assert alert.message == "dead: Oven 1 is silent"
    assert at(70, 1, on=one) == [("resolved", "", True)]


def test_timers_survive_a_start_over() -> None:
    """A new engine over the same states fires what the old one was waiting for, and knows its open alarms."""
    states: dict[str, bytes] = {}
    one = engine(rule(duration_seconds=60, renotify_seconds=600), states=states)
    at(0, 95, on=one)
    two = engine(rule(duration_seconds=60, renotify_seconds=600), states=states)
    assert two.next_due() is None
    assert two.rebuild(BASE + 30) == []
    assert two.next_due() == BASE + 60
    (alert,) = two.tick(BASE + 60)
    assert alert.start_date == datetime.fromtimestamp(BASE, UTC)
    three = engine(rule(duration_seconds=60, renotify_seconds=600), states=states)
    three.rebuild(BASE + 100)
    assert three.open_alarms == 1
    assert said(three.tick(BASE + 700)) == [("reminded", "CH1", True)]
    (ack,) = three.acknowledge(alert.id, BASE + 800, "ann", "on my way")
    assert (ack.metadata["user"], ack.metadata["comment"], ack.metadata["transition"]) == (
        "ann",
        "on my way",
        "acknowledged",
    )
    assert three.acknowledge(alert.id, BASE + 801) == [] == three.acknowledge("unknown", BASE)
    assert three.tick(BASE + 9000) == []


def test_a_busy_series_has_one_timer() -> None:
    """However many readings come, a no-data rule keeps one timer a series."""
    one = engine(AlarmRule(id="dead", tag="oven", no_data_seconds=60))
    for second in range(100):
        at(second, 1, on=one)
        one.tick(BASE + second)
    assert len(one._timers) == 1
    assert said(one.tick(BASE + 159)) == [("opened", "", True)]


def test_a_rule_edited_while_its_alarm_is_open() -> None:
    """Only a changed condition closes; the reason is told, the new rule starts afresh, others are not looked at."""
    one = engine(rule(), rule(id="other", threshold=50))
    assert len(at(0, 95, on=one)) == 2
    assert one.set_rules([rule(recipients=["x@y"], level="CRITICAL"), rule(id="other", threshold=50)], BASE + 1) == []
    (closed,) = one.set_rules([rule(threshold=99, recipients=["x@y"]), rule(id="other", threshold=50)], BASE + 2)
    assert (closed.alarm_id, closed.metadata["reason"], closed.recipients) == ("hot", "rule_changed", "x@y")
    assert at(3, 95, on=one) == []
    assert at(4, 100, on=one) == [("opened", "CH1", True)]
    off = one.set_rules([rule(threshold=99, active=False)], BASE + 5)
    assert sorted((a.alarm_id, a.metadata["reason"]) for a in off) == [
        ("hot", "rule_switched_off"),
        ("other", "rule_removed"),
    ]
    assert list(one.states) == ["oven-1|T|CH1|hot"]
    assert at(6, 100, on=one) == []
    assert one.set_rules([rule(threshold=99)], BASE + 7) == []
    assert at(8, 100, on=one) == [("opened", "CH1", True)]


def test_a_rule_removed_while_nothing_ran() -> None:
    """At the start over the alarm of a rule that is gone is closed, as its opening told it, and its state is gone."""
    states: dict[str, bytes] = {}
    at(0, 95, on=engine(rule(), states=states))
    two = engine(rule(id="else"), states=states)
    (closed,) = two.rebuild(BASE + 100)
    assert (closed.alarm_id, closed.name, closed.recipients) == ("hot", "Hot", "a@b,c@d")
    assert (closed.metadata["reason"], closed.is_resolved) == ("rule_removed", True)
    assert states == {}
    assert two.rebuild(BASE + 101) == []


def test_a_silent_alarm_opened_again_by_another_rule_version_has_another_id() -> None:
    """Switching a no-data rule off and on over one silence makes a second alarm, not a repeat of the first."""
    dead = AlarmRule(id="dead", tag="oven", no_data_seconds=60)
    one = engine(dead)
    at(0, 1, on=one)
    (first,) = one.tick(BASE + 60)
    one.set_rules([msgspec.structs.replace(dead, active=False)], BASE + 70)
    one.set_rules([dead], BASE + 80)
    (second,) = one.tick(BASE + 90)
    assert second.start_date == first.start_date
    assert second.id != first.id


def test_a_device_that_loses_its_tag() -> None:
    """What no rule names any more is closed; a device that was never heard is silent from its registration on."""
    dead = AlarmRule(id="dead", tag="oven", no_data_seconds=60)
    one = engine(rule(), dead)
    assert one.expect(OVEN, BASE - 100) == []
    assert said(one.tick(BASE - 40)) == [("opened", "", True)]
    assert at(0, 95, on=one) == [("resolved", "", True), ("opened", "CH1", True)]
    (closed,) = one.expect(DeviceInfo(device_id="oven-1", tags=("other",)), BASE + 1)
    assert closed.metadata["reason"] == "not_applicable"
    assert one.process(reading(2, 99), DeviceInfo(device_id="oven-1", tags=("oven",), active=False), BASE + 2) == ()


def test_a_gateway_that_is_down_mutes_its_devices() -> None:
    """While it is down nobody is told of its devices; a moment after it is back, of what is open still."""
    gateway = DeviceInfo(device_id="gw", tags=("gateway",))
    one = engine(
        rule(depends_on=[Dependency(alarm="gw-down")]),
        AlarmRule(id="gw-down", tag="gateway", no_data_seconds=60),
        fleet=(OVEN, gateway),
    )
    one.process(reading(0, 1, device="gw"), gateway, BASE)
    assert said(one.tick(BASE + 60)) == [("opened", "", True)]
    assert at(61, 95, 95, on=one) == [("opened", "CH1", False), ("opened", "CH2", False)]
    assert one.tick(BASE + 100) == []
    one.process(reading(110, 1, device="gw"), gateway, BASE + 110)
    assert at(115, 20, 95, on=one) == [("resolved", "CH1", False)]
    one.process(reading(165, 1, device="gw"), gateway, BASE + 165)
    assert one.tick(BASE + 110 + GRACE_SECONDS - 1) == []
    assert said(one.tick(BASE + 110 + GRACE_SECONDS + 30)) == [("reminded", "CH2", True)]


def test_news_that_the_night_held_back() -> None:
    """The belated news of a closing says when it closed, and has a transition of its own."""
    one = engine(rule(quiet_hours=Schedule(start="22:00", end="06:00")))
    evening = datetime(2025, 6, 16, 21, 59, tzinfo=UTC).timestamp() - BASE
    (opened,) = one.process(reading(evening, 95), OVEN, BASE + evening)
    (closed,) = one.process(reading(evening + 120, 20), OVEN, BASE + evening + 120)
    assert not closed.metadata["notify"]
    (news,) = one.tick(BASE + evening + 8.1 * 3600)
    assert (news.id, news.is_resolved, news.end_date) == (opened.id, True, closed.end_date)
    assert news.metadata["transition_id"] == f"{opened.id}-reminded-1"
    assert news.metadata["notify"]
    assert unpack(one.states["oven-1|T|CH1|hot"]).alert is None


def test_a_clock_that_is_set_back() -> None:
    """When the host's clock goes back a day the timers are planned anew, and none waits for a day."""
    one = engine(AlarmRule(id="dead", tag="oven", no_data_seconds=60))
    at(86400, 1, on=one)
    one.tick(BASE + 86401)
    assert one.tick(BASE) == []
    assert one.next_due() == BASE + 60
    assert said(one.tick(BASE + 60)) == [("opened", "", True)]


parts = st.text(st.sampled_from("ab|%7C25Cé"), max_size=6)


@given(parts, parts, parts, parts)
def test_keys(device: str, index: str, label: str, rule_id: str) -> None:
    """A key gives back its parts, whatever characters a device puts into them."""
    assert split_key(state_key(device, index, label, rule_id)) == Series(device, index, label, rule_id)


def test_texts() -> None:
    """Values read as people write them, and a template fills in nothing but the names it knows."""
    assert [text_of(v) for v in (21.0, 21.50001, 1e-9, True, None, [2, 8.5], "ON", 1e300)] == [
        "21",
        "21.5",
        "1e-09",
        "true",
        "",
        "[2, 8.5]",
        "ON",
        "1e+300",
    ]
    assert fill_in("{value} {value.__class__} {0} {nope} {", {"value": "{unit}", "unit": "x"}) == (
        "{unit} {value.__class__} {0} {nope} {"
    )
