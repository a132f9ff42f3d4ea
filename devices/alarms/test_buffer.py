"""The buffer of states, against a plain dict and through a crash."""

from __future__ import annotations

from copy import copy
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from devices.alarms.buffer import Changes, StateBuffer
from devices.alarms.engine import AlarmEngine
from devices.alarms.test_engine import BASE, OVEN, reading, rule

steps = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.sampled_from("abc"), st.binary(max_size=2)),
        st.tuples(st.just("del"), st.sampled_from("abc"), st.none()),
        st.tuples(st.sampled_from(["cut", "flush"]), st.none(), st.none()),
    ),
    max_size=40,
)


@given(steps)
def test_reads_like_a_dict_and_flushes_what_was_cut(given_steps: list[Any]) -> None:
    """Reads see every write at once; the store has exactly what the flushed batches had when they were cut."""
    store: dict[str, bytes] = {}
    buffer, model = StateBuffer(store), dict[str, bytes]()
    batches: list[tuple[Changes, dict[str, bytes]]] = []
    flushed: dict[str, bytes] = {}
    for what, key, value in given_steps:
        if what == "set":
            buffer[key] = model[key] = value
        elif what == "del" and key in model:
            del buffer[key], model[key]
        elif what == "cut":
            batches.append((buffer.cut(), copy(model)))
        elif what == "flush" and batches:
            changes, flushed = batches.pop(0)
            buffer.flush(changes)
        assert dict(buffer.items()) == model
        assert {k: buffer.get(k) for k in "abc"} == {k: model.get(k) for k in "abc"}
        assert [k in buffer for k in "abc"] == [k in model for k in "abc"]
        assert len(buffer) == len(model)
        assert store == flushed
    for changes, _ in [*batches, (buffer.cut(), None)]:
        buffer.flush(changes)
    assert store == model
    assert not buffer._ahead


def test_dying_before_the_flush_makes_the_alert_again() -> None:
    """Alert sent, state not stored: the reading that comes again makes the same alert; after the flush none."""
    store: dict[str, bytes] = {}

    def start() -> tuple[AlarmEngine, StateBuffer]:
        buffer = StateBuffer(store)
        engine = AlarmEngine(buffer, [rule()])
        engine.rebuild(BASE)
        return engine, buffer

    engine, buffer = start()
    first = engine.process(reading(0, 95), OVEN, BASE)
    assert store == {}
    engine, buffer = start()
    again = engine.process(reading(0, 95), OVEN, BASE)
    assert again == first != []
    buffer.flush(buffer.cut())
    engine, buffer = start()
    assert engine.process(reading(0, 95), OVEN, BASE) == []
    assert engine.open_alarms == 1


class Died(Exception):
    """The process ends here."""


crashes = st.lists(st.sampled_from(["", "", "sent", "half sent", "flushed"]), min_size=1, max_size=30)
values = st.lists(st.integers(80, 100), min_size=1, max_size=40)


@given(values, crashes, st.integers(1, 5), st.sampled_from([{}, {"duration_seconds": 3}, {"clear_threshold": 85}]))
def test_dying_anywhere_tells_everything_and_nothing_else(
    given_values: list[int], deaths: list[str], size: int, fields: dict[str, Any]
) -> None:
    """Killed after some alerts, all of them or the flush, and taken up at the last commit: the same transitions, in
    order, each at least once and at most once more for each death."""
    rules = [rule(no_data_seconds=2, **fields)]

    def run(plan: list[str]) -> list[str]:
        store: dict[str, bytes] = {}
        sent: list[str] = []
        committed = 0
        while committed < len(given_values):
            buffer = StateBuffer(store)
            engine = AlarmEngine(buffer, rules)
            engine.rebuild(BASE + 2 * committed)
            try:
                while committed < len(given_values):
                    death = plan.pop(0) if plan else ""
                    batch = range(committed, min(committed + size, len(given_values)))
                    alerts = [
                        alert.metadata["transition_id"]
                        for n in batch
                        for alert in engine.process(reading(2 * n, given_values[n]), OVEN, BASE + 2 * n)
                    ]
                    sent += alerts[: len(alerts) // 2] if death == "half sent" else alerts
                    if death in ("sent", "half sent"):
                        raise Died
                    buffer.flush(buffer.cut())
                    if death == "flushed":
                        raise Died
                    committed = batch.stop
            except Died:
                continue
        return sent

    undisturbed = run([])
    disturbed = run(list(deaths))
    assert list(dict.fromkeys(disturbed)) == undisturbed
    kills = len([death for death in deaths if death])
    assert all(disturbed.count(one) <= 1 + kills for one in undisturbed)
