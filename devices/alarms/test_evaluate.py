"""The state machine, against properties and against a plain reference that shares no code with it."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.alarms.evaluate import Events, acknowledge, close, due, evaluate, rule_changed, tick
from devices.alarms.model import AlarmRule, AlarmState, Kind, Life, Reason, Repeat, Schedule, pack, unpack
from devices.alarms.prepare import Limits, Prepared, brief, compile_test

BASE = 1_750_000_000.0
WIDE = Limits(max_age_seconds=1e9, max_ahead_seconds=1e9)
Sample = tuple[float, Any]

values = st.one_of(st.integers(0, 10), st.sampled_from([None, math.nan, "text", "x", True, 7.5]))


@st.composite
def rules(draw: st.DrawFn) -> AlarmRule:
    op: Any = draw(st.sampled_from([">", ">=", "<", "<=", "==", "!=", "in", "outside", "changed"]))
    threshold: Any = draw(st.integers(3, 7))
    clear = None
    if op in ("==", "!=") and draw(st.booleans()):
        threshold = "text"
    elif op in ("in", "outside") and draw(st.booleans()):
        threshold = ["text", "other"]
    elif op in ("in", "outside"):
        threshold = [threshold - 2, threshold + 1]
    elif op == "changed":
        threshold = draw(st.sampled_from([None, 2]))
    elif op in (">", ">=") and draw(st.booleans()):
        clear = threshold - 2
    elif op in ("<", "<=") and draw(st.booleans()):
        clear = threshold + 2
    how = draw(st.sampled_from(["plain", "duration", "repeat"]))
    return AlarmRule(
        id="r",
        tag="t",
        math_operator=op,
        threshold=threshold,
        clear_threshold=clear,
        duration_seconds=draw(st.integers(1, 40)) if how == "duration" and op != "changed" else None,
        repeat=Repeat(count=draw(st.integers(2, 4)), within_seconds=draw(st.integers(5, 60)))
        if how == "repeat"
        else None,
        no_data_seconds=draw(st.one_of(st.none(), st.integers(5, 50))),
    )


samples = st.lists(st.tuples(st.integers(0, 200), values), max_size=30, unique_by=lambda s: s[0]).map(
    lambda found: [(BASE + t, v) for t, v in found]
)


def feed(rule: Prepared, readings: list[Sample], now: float = BASE + 300) -> tuple[AlarmState, list[Any]]:
    events: list[Any] = []
    state = AlarmState()
    for time, value in readings:
        state, new = evaluate(rule, state, value, time, now)
        events += new
    return state, events


@given(rules(), samples, st.data())
def test_duplicates(rule: AlarmRule, readings: list[Sample], data: st.DataObject) -> None:
    """With any redelivery in any place, state and transitions are those of the readings once each."""
    prepared = Prepared(rule, WIDE)
    twice = list(readings)
    for reading in data.draw(st.lists(st.sampled_from(readings), max_size=20)) if readings else []:
        first = next(i for i, one in enumerate(twice) if one is reading)
        twice.insert(data.draw(st.integers(first + 1, len(twice))), reading)
    assert feed(prepared, twice) == feed(prepared, readings)


@given(rules(), samples, st.randoms(use_true_random=False))
def test_any_order(rule: AlarmRule, readings: list[Sample], rng: Any) -> None:
    """In any order openings and closings alternate, and a late reading makes no transition and moves no decision."""
    prepared = Prepared(rule, WIDE)
    shuffled = list(readings)
    rng.shuffle(shuffled)
    state, newest, opened = AlarmState(), 0.0, False
    for time, value in shuffled:
        before = state
        state, events = evaluate(prepared, state, value, time, BASE + 300)
        if time <= newest:
            assert not events
            assert (state.life, state.since, state.time, state.start) == (
                before.life,
                before.since,
                before.time,
                before.start,
            )
        newest = max(newest, time)
        for event in events:
            assert (event.kind is Kind.OPENED) is not opened
            opened = event.kind is Kind.OPENED
            assert event.resolved is not opened
        assert (state.life is Life.OPEN) is opened
        assert len(state.hits) <= prepared.count


@given(rules(), samples)
def test_late_hits_count_as_if_in_order(rule: AlarmRule, readings: list[Sample]) -> None:
    """A late hit inside the window counts: the same hits are known whatever the order they came in."""
    prepared = Prepared(rule, WIDE)
    if not prepared.count or prepared.on_change or not readings:
        return
    prepared.count = 100
    ordered = sorted(readings)
    newest_first = [ordered[-1], *ordered[:-1]]
    assert feed(prepared, newest_first)[0].hits == feed(prepared, ordered)[0].hits


def reference(rule: AlarmRule, readings: list[Sample], end: float) -> list[tuple[str, float, float]]:
    """Second by second, from the rule's text: (kind, start of the alarm, when)."""
    number = {"<": -1, "<=": -1}.get(rule.math_operator, 1)

    texts = isinstance(rule.threshold, str) or (isinstance(rule.threshold, list) and isinstance(rule.threshold[0], str))

    def comparable(value: Any) -> bool:
        if rule.math_operator == "changed":
            return value is not None and value == value  # noqa: PLR0124
        if texts:
            return isinstance(value, str)
        return isinstance(value, int | float) and not math.isnan(value)

    def met(value: Any, threshold: Any) -> bool:
        match rule.math_operator:
            case ">" | "<":
                return bool(number * value > number * threshold)
            case ">=" | "<=":
                return bool(number * value >= number * threshold)
            case "==" | "!=":
                return bool(value == threshold) is (rule.math_operator == "==")
            case _:
                within = value in threshold if texts else threshold[0] <= value <= threshold[1]
                return bool(within) is (rule.math_operator == "in")

    def hit(at: int) -> bool | None:
        value = readings[at][1]
        if not comparable(value):
            return None
        if rule.math_operator != "changed":
            return met(value, rule.threshold)
        past = [v for _, v in readings[:at] if comparable(v)]
        if not past:
            return None
        if rule.threshold and isinstance(value, int | float) and isinstance(past[-1], int | float):
            return bool(abs(value - past[-1]) >= rule.threshold)
        return bool(value != past[-1])

    found: list[tuple[str, float, float]] = []
    opened: tuple[float, str] | None = None
    floor = 0.0  # an alarm that ended, silence included, ends what was pending
    for second in range(int(BASE), int(end) + 1):
        so_far = [i for i, (time, _) in enumerate(readings) if time <= second]
        if not so_far:
            continue
        last = so_far[-1]
        time, value = readings[last]
        if time == second:
            if opened and opened[1] == "silence":
                found.append(("resolved", opened[0], time))
                opened, floor = None, time
            many = [
                i
                for i in so_far
                if hit(i) and readings[i][0] >= time - (rule.repeat.within_seconds if rule.repeat else 0)
            ]
            enough = rule.repeat is not None and len(many) >= rule.repeat.count
            if opened and hit(last) is not None:
                stays = hit(last) if rule.clear_threshold is None else met(value, rule.clear_threshold)
                if not stays and not enough:
                    found.append(("resolved", opened[0], time))
                    opened, floor = None, time
            elif not opened and hit(last) and not rule.duration_seconds and (enough or not rule.repeat):
                opened = (time, "condition")
                found.append(("opened", time, time))
        if not opened and rule.duration_seconds:
            run: list[float] = []
            for i in reversed(so_far):
                if hit(i) is False or readings[i][0] < floor:
                    break
                if hit(i):
                    run.append(readings[i][0])
            if run and second - run[-1] >= rule.duration_seconds:
                opened = (run[-1], "condition")
                # a sample that shows it says when; silence says it on time
                found.append(("opened", run[-1], float(second)))
        if not opened and rule.no_data_seconds and second - time >= rule.no_data_seconds:
            opened = (time, "silence")
            found.append(("opened", time, float(second)))
    return found


@settings(max_examples=300)
@given(rules(), samples)
def test_in_order_equals_the_reference(rule: AlarmRule, readings: list[Sample]) -> None:
    """In order, with a timer that never oversleeps, the result is that of a plain reading of the rule."""
    readings = sorted(readings, key=lambda sample: sample[0])
    prepared = Prepared(rule, WIDE)
    end = BASE + 260
    events: list[Any] = []
    state = AlarmState()
    pending = list(readings)
    for second in range(int(BASE), int(end) + 1):
        now = float(second)
        if pending and pending[0][0] == now:
            time, value = pending.pop(0)
            state, new = evaluate(prepared, state, value, time, now)
            events += new
        when = due(prepared, state, now)
        if when is not None and when <= now:
            state, new = tick(prepared, state, now)
            assert new, "due, and nothing happened"
            events += new
        state = unpack(pack(state))
    assert [(str(e.kind), e.start, e.at) for e in events] == reference(rule, readings, end)


@given(
    rules(),
    samples,
    st.lists(st.tuples(st.sampled_from(["tick", "ack", "edit", "close"]), st.integers(0, 30)), max_size=30),
)
def test_alternation_whatever_happens(rule: AlarmRule, readings: list[Sample], steps: list[tuple[str, int]]) -> None:
    """Timers, acknowledgements, edited rules and closings between readings: openings and closings still alternate."""
    edited = deepcopy(rule)
    edited.no_data_seconds = 17
    forms = [Prepared(rule, WIDE), Prepared(edited, WIDE)]
    state, opened, now = AlarmState(), False, BASE
    seen: set[tuple[float, Reason, int, int]] = set()

    def check(events: Events) -> None:
        nonlocal opened
        for event in events:
            if event.kind in (Kind.OPENED, Kind.RESOLVED):
                assert (event.kind is Kind.OPENED) is not opened
                opened = event.kind is Kind.OPENED
                if opened:
                    mark = (event.start, event.cause, state.rule, state.closed)
                    assert mark not in seen
                    seen.add(mark)

    for position in range(max(len(readings), len(steps))):
        if position < len(readings):
            state, events = evaluate(forms[0], state, readings[position][1], readings[position][0], now)
            check(events)
        if position < len(steps):
            what, wait = steps[position]
            now += wait
            if what == "tick":
                state, events = tick(forms[0], state, now)
            elif what == "ack":
                state, events = acknowledge(state, now)
            elif what == "edit":
                forms.reverse()
                state, events = rule_changed(forms[1].rule, forms[0].rule, state, now)
            else:
                state, events = close(state, now, Reason.NOT_APPLICABLE)
            check(events)


@given(
    rules(),
    samples,
    st.lists(st.tuples(st.sampled_from(["tick", "ack", "edit", "close", "again"]), st.integers(0, 30)), max_size=40),
    st.data(),
)
def test_a_redelivery_changes_nothing_whenever_it_comes(
    rule: AlarmRule, readings: list[Sample], steps: list[tuple[str, int]], data: st.DataObject
) -> None:
    """Whatever timers, acknowledgements, edits and closings came in between, what has counted counts no more."""
    edited = deepcopy(rule)
    edited.no_data_seconds = 17
    forms = [Prepared(rule, WIDE), Prepared(edited, WIDE)]
    state, now = AlarmState(), BASE
    counted: list[Sample] = []
    for position in range(max(len(readings), len(steps))):
        if position < len(readings):
            time, value = readings[position]
            state, _ = evaluate(forms[0], state, value, time, now)
            counted.append(readings[position])
        if position < len(steps):
            what, wait = steps[position]
            now += wait
            if what == "tick":
                state, _ = tick(forms[0], state, now)
            elif what == "ack":
                state, _ = acknowledge(state, now)
            elif what == "edit":
                forms.reverse()
                state, _ = rule_changed(forms[1].rule, forms[0].rule, state, now)
            elif what == "close":
                state, _ = close(state, now, Reason.NOT_APPLICABLE)
            elif counted:
                time, value = data.draw(st.sampled_from(counted))
                assert evaluate(forms[0], state, value, time, now) == (state, ())


def rule(**fields: Any) -> AlarmRule:
    return AlarmRule(**{"id": "r", "tag": "t", "math_operator": ">", "threshold": 30, **fields})


def run(prepared: Prepared, *readings: Sample, state: AlarmState | None = None) -> tuple[AlarmState, list[str]]:
    state, said = state or AlarmState(), []
    for offset, value in readings:
        state, events = evaluate(prepared, state, value, BASE + offset, BASE + offset)
        said += [f"{event.kind}@{event.at - BASE:g}" for event in events]
    return state, said


@pytest.mark.parametrize(
    ("op", "threshold", "yes", "no", "nothing"),
    [
        (">", 5, [5.1, 6, 10**400, math.inf], [5, 4, -(10**400)], ["6", None, math.nan]),
        ("<=", 5, [5, True, False], [6], ["a"]),
        ("==", "ON", ["ON"], ["OFF", ""], [1, None, True]),
        ("!=", "OK", ["ALARM"], ["OK"], [0]),
        ("==", True, [True, 1, 1.0], [False, 0], [2, "true", None]),
        ("in", [2, 4], [2, 3.5, 4], [1.9, 5], ["3", math.nan]),
        ("outside", [2, 4], [1.9, 5], [2, 4], [None]),
        ("in", ["A", "B"], ["A"], ["C"], [1]),
        ("outside", ["A", "B"], ["C"], ["B"], [1.0]),
    ],
)
def test_operators(op: str, threshold: Any, yes: list[Any], no: list[Any], nothing: list[Any]) -> None:
    """Every operator says yes, no, or nothing where the value cannot be compared."""
    test = compile_test(op, threshold)
    assert [test(value) for value in yes] == [True] * len(yes)
    assert [test(value) for value in no] == [False] * len(no)
    assert [test(value) for value in nothing] == [None] * len(nothing)


def test_hysteresis() -> None:
    """Between threshold and clear threshold an alarm stays as it is."""
    prepared = Prepared(rule(clear_threshold=28))
    assert run(prepared, (0, 29), (1, 31), (2, 29), (3, 28.5), (4, 28), (5, 29), (6, 31))[1] == [
        "opened@1",
        "resolved@4",
        "opened@6",
    ]


def test_a_restart_inside_a_duration_goes_on_counting() -> None:
    """A state that went through the table knows since when the condition has held."""
    prepared = Prepared(rule(duration_seconds=60))
    state, _ = run(prepared, (0, 31), (30, 32))
    state, said = run(prepared, (60, 33), state=unpack(pack(state)))
    assert said == ["opened@60"]
    assert state.start == BASE


def test_duration_by_silence() -> None:
    """In silence the duration ends by the host's clock, counted from when the last sample was processed."""
    prepared = Prepared(rule(duration_seconds=60))
    lag = 500
    state, _ = evaluate(prepared, AlarmState(), 31, BASE, BASE + lag)
    state, _ = evaluate(prepared, state, 31, BASE + 20, BASE + lag)
    assert due(prepared, state, BASE + lag) == BASE + lag + 40
    assert tick(prepared, state, BASE + lag + 39)[1] == ()
    state, events = tick(prepared, state, BASE + lag + 40)
    assert [(e.kind, e.start, e.at) for e in events] == [(Kind.OPENED, BASE, BASE + 60)]


def test_clear_and_trigger_in_the_same_millisecond() -> None:
    """Two values of one sample time are one sample: the first counts, whichever it was."""
    prepared = Prepared(rule())
    assert run(prepared, (0, 31), (0, 10))[1] == ["opened@0"]
    assert run(prepared, (0, 10), (0, 31))[1] == []


def test_flapping_is_counted_by_repeat() -> None:
    """Three hits within a minute open; the alarm closes on a good value once fewer than three are within a minute."""
    prepared = Prepared(rule(repeat=Repeat(count=3, within_seconds=60)))
    said = run(prepared, (0, 31), (10, 1), (20, 31), (30, 1), (40, 31), (50, 1), (61, 1), (70, 31), (200, 1))[1]
    assert said == ["opened@40", "resolved@61", "opened@70", "resolved@200"]


def test_too_old_and_from_the_future() -> None:
    """Beyond the limits a reading leaves the very same state; at the limits it counts."""
    prepared = Prepared(rule(), Limits(max_age_seconds=100, max_ahead_seconds=10))
    state = AlarmState()
    for offset, counts in ((-100.1, False), (10.1, False), (-100, True), (10, True)):
        new, events = evaluate(prepared, state, 31, BASE + offset, BASE)
        assert (new is state) is not counts
        assert bool(events) is counts


def test_host_clock_set_back() -> None:
    """Times remembered from a clock that ran a day ahead mute nobody once it is right again, and fire no timer."""
    prepared = Prepared(rule(duration_seconds=60, no_data_seconds=600))
    ahead = BASE + 86400
    state, _ = evaluate(prepared, AlarmState(), 31, ahead, ahead)
    back, events = tick(prepared, state, BASE)
    assert events == () and back.seen == BASE
    state, events = evaluate(prepared, state, 31, BASE + 1, BASE + 1)
    assert events == () and (state.time, state.since) == (BASE + 1, BASE + 1)
    assert run(prepared, (61, 31), state=state)[1] == ["opened@61"]


def test_no_data_and_back() -> None:
    """Silence opens at its due time; the first newer reading resolves, an older or redelivered one does not."""
    prepared = Prepared(AlarmRule(id="r", tag="t", no_data_seconds=60))
    state, _ = run(prepared, (0, 1))
    assert due(prepared, state, BASE) == BASE + 60
    state, events = tick(prepared, state, BASE + 75)
    assert [(e.kind, e.at, e.reason) for e in events] == [(Kind.OPENED, BASE + 60, Reason.NO_DATA)]
    assert run(prepared, (0, 1), (-5, 1), state=state)[1] == []
    assert run(prepared, (80, 1), state=state)[1] == ["resolved@80"]


def test_changed() -> None:
    """A change opens, the next sample without one resolves; a step below the threshold is none."""
    assert run(Prepared(rule(math_operator="changed", threshold=None)), (0, "a"), (1, "b"), (2, "b"))[1] == [
        "opened@1",
        "resolved@2",
    ]
    assert run(Prepared(rule(math_operator="changed", threshold=2)), (0, 1), (1, 2), (2, 4))[1] == ["opened@2"]


def test_long_texts_keep_states_small() -> None:
    """A text of a megabyte is remembered by its digest, and still differs from another one."""
    prepared = Prepared(rule(math_operator="changed", threshold=None))
    state, said = run(prepared, (0, "a" * 10**6), (1, "a" * 10**6), (2, "a" * 10**6 + "b"))
    assert said == ["opened@2"]
    assert len(pack(state)) < 300
    assert all(pack(AlarmState(value=brief(value))) for value in (10**400, 2**70, [1], {"a": 1}, -(2**63), math.inf))


def test_a_quiet_state_is_small() -> None:
    """What a table holds for a series where all is well takes some tens of bytes."""
    state, _ = run(Prepared(rule()), (0.123456, 1))
    assert len(pack(state)) <= 40


OFFICE = Schedule(days=["mon", "tue", "wed", "thu", "fri"], start="08:00", end="18:00", time_zone="Europe/Paris")
# Monday 2025-06-16, 00:00 in Paris
MONDAY = 1750024800.0


def at(hours: float) -> float:
    return MONDAY + hours * 3600


def test_schedule() -> None:
    """Outside its schedule a rule opens nothing, but closes; a run does not reach over the night."""
    prepared = Prepared(rule(schedule=OFFICE, duration_seconds=3600))
    state, said = AlarmState(), []
    for hours in (7, 7.9, 8.1, 9.2, 17.5, 19, 23, 24 + 8.2, 24 + 9.3):
        value = 1 if hours == 17.5 else 40
        state, events = evaluate(prepared, state, value, at(hours), at(hours))
        said += [(str(e.kind), round((e.at - MONDAY) / 3600, 1)) for e in events]
    assert said == [("opened", 9.2), ("resolved", 17.5), ("opened", 33.3)]


def test_silence_begins_with_the_schedule() -> None:
    """A machine that is off at night has its no-data time counted from the morning."""
    prepared = Prepared(AlarmRule(id="r", tag="t", no_data_seconds=1800, schedule=OFFICE))
    state, _ = evaluate(prepared, AlarmState(), 1, at(17.8), at(17.8))
    assert tick(prepared, state, at(18.5))[1] == ()
    assert due(prepared, state, at(18.5)) == at(32.5)
    assert [e.at for e in tick(prepared, state, at(32.6))[1]] == [at(32.5)]


def test_quiet_hours_hold_back_the_mail_and_not_the_state() -> None:
    """Opened at night: told in the morning if still open. Closed at night: told in the morning if the opening was."""
    prepared = Prepared(rule(quiet_hours=Schedule(start="22:00", end="06:00", time_zone="Europe/Paris")))
    night, morning = at(23), at(30)
    state, events = evaluate(prepared, AlarmState(), 31, night, night)
    assert [(e.kind, e.notify) for e in events] == [(Kind.OPENED, False)]
    assert due(prepared, state, night) == morning
    later, events = tick(prepared, state, morning)
    assert [(e.kind, e.reason, e.notify, e.resolved) for e in events] == [
        (Kind.REMINDED, Reason.QUIET_TIME_OVER, True, False)
    ]
    assert due(prepared, later, morning) is None
    state, events = evaluate(prepared, state, 1, night + 60, night + 60)
    assert [(e.kind, e.notify) for e in events] == [(Kind.RESOLVED, False)]
    assert due(prepared, state, night + 60) is None

    state, _ = evaluate(prepared, AlarmState(), 31, at(21), at(21))
    state, events = evaluate(prepared, state, 1, night, night)
    assert [(e.kind, e.notify) for e in events] == [(Kind.RESOLVED, False)]
    assert due(prepared, state, night) == morning
    state, events = tick(prepared, state, morning)
    assert [(e.kind, e.start, e.resolved, e.notify) for e in events] == [(Kind.REMINDED, at(21), True, True)]
    assert due(prepared, state, morning) is None


def test_reminders_until_acknowledged() -> None:
    """An open alarm is told again each interval until it is acknowledged; a second acknowledgement says nothing."""
    prepared = Prepared(rule(renotify_seconds=600))
    state, _ = run(prepared, (0, 31))
    numbers = []
    for minute in (10, 20, 30):
        assert due(prepared, state, BASE + minute * 60 - 1) == BASE + minute * 60
        state, events = tick(prepared, state, BASE + minute * 60)
        numbers += [event.number for event in events]
    assert numbers == [1, 2, 3]
    state, events = acknowledge(state, BASE + 1900)
    assert [e.kind for e in events] == [Kind.ACKNOWLEDGED]
    assert acknowledge(state, BASE + 1901) == (state, ())
    assert due(prepared, state, BASE + 1902) is None
    assert run(prepared, (2000, 1), state=state)[1] == ["resolved@2000"]


def test_a_dependency_that_is_down_mutes() -> None:
    """Muted, an alarm opens unheard; when the way is free again it is told, if it is still open."""
    prepared = Prepared(rule())
    state, events = evaluate(prepared, AlarmState(), 31, BASE, BASE, muted=True)
    assert [e.notify for e in events] == [False]
    assert due(prepared, state, BASE, muted=True) == BASE + 30
    assert tick(prepared, state, BASE + 30, muted=True)[1] == ()
    assert due(prepared, state, BASE + 31) == BASE + 31
    assert [(e.kind, e.notify) for e in tick(prepared, state, BASE + 31)[1]] == [(Kind.REMINDED, True)]


def test_rule_changes() -> None:
    """Another text keeps an open alarm; another threshold, switching off and removal resolve it and say why."""
    old = rule()
    state, _ = run(Prepared(old), (0, 31))
    assert rule_changed(old, rule(message="x", recipients=["a@b"], level="CRITICAL"), state, BASE + 5) == (state, ())
    for new, reason in (
        (rule(threshold=40), Reason.RULE_CHANGED),
        (rule(active=False), Reason.RULE_SWITCHED_OFF),
        (None, Reason.RULE_REMOVED),
    ):
        after, events = rule_changed(old, new, state, BASE + 5)
        assert [(e.kind, e.reason, e.start, e.at) for e in events] == [(Kind.RESOLVED, reason, BASE, BASE + 5)]
        assert after.life is Life.QUIET and after.time == BASE
    # edited while the worker was down: found out at the next reading, which then counts under the new rule
    assert run(Prepared(rule(threshold=40)), (9, 41), state=state)[1] == ["resolved@9", "opened@9"]
