"""The checkers that every scenario ends with see what they are there to see."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.faults import rest, support
from tests.faults.oracle import Oracle
from tests.faults.rest import Bookkeeping, at_rest, restless, unbalanced, watched
from tests.faults.support import misowned, wait_for
from tests.faults.worker import Realm, Worker, WorkerError
from tools.simulator.evidence import Origin


def account(**counts: Any) -> dict[str, Any]:
    """Return the accounts of a stage that has done ten messages, but for ``counts``."""
    usual = {"stage": "s", "received": 10, "forwarded": 7, "dead_lettered": {"poison": 2}, "dropped": {"late": 1}}
    return {**usual, "returned": 0, "in_flight": 0, "balance": 0, **counts}


class FakeWorker:
    """A worker with accounts; its metrics are the same, but for ``metrics``."""

    name = "worker"
    alive = True

    def __init__(self, **counts: Any) -> None:
        self.account = account(**counts)
        self.metrics: dict[str, float] = {}

    def get(self, path: str) -> tuple[int, bytes]:
        """Return the accounts."""
        assert path == "/accounts"
        return 200, json.dumps([self.account]).encode()

    def metric(self, name: str, **_: str) -> float:
        """Return a metric."""
        told = {
            "headrace_received_total": self.account["received"],
            "headrace_forwarded_total": self.account["forwarded"],
            "headrace_returned_total": self.account["returned"],
            "headrace_dead_letters_total": sum(self.account["dead_lettered"].values()),
            "headrace_dropped_total": sum(self.account["dropped"].values()),
        }
        return float({**told, **self.metrics}.get(name, 0))


def test_accounts_are_counted_again() -> None:
    """Whatever the worker says of its balance: one message too many or too few anywhere is told."""
    assert unbalanced(account()) is None
    for wrong in (
        {"received": 11},
        {"forwarded": 8},
        {"dead_lettered": {"poison": 2, "rejected": 1}},
        {"dropped": {}},
        {"returned": 1},
        {"in_flight": 1},
        {"forwarded": 8, "in_flight": -1},
    ):
        assert unbalanced(account(**wrong)), wrong


def test_accounts_are_sampled_meanwhile() -> None:
    """A moment in which they do not balance is remembered, with worker and stage."""
    worker = FakeWorker()
    with Bookkeeping(SimpleNamespace(workers=[worker]), every_seconds=0.01) as book:  # type: ignore[arg-type]
        wait_for("samples", lambda: book.samples > 1)
        assert book.violations == []
        worker.account = account(received=11)
        wait_for("a violation", lambda: book.violations)
        worker.account = account()
    assert book.violations[0].startswith("worker, stage s: received 11, accounted for 10")


def test_what_is_not_at_rest_is_told() -> None:
    """Messages in flight, in a stage or a connector, and metrics that say something else than the accounts."""
    assert restless(FakeWorker()) == []  # type: ignore[arg-type]
    assert restless(FakeWorker(received=11, in_flight=1)) == ["worker, stage s: 1 in flight"]  # type: ignore[arg-type]
    told_otherwise, waiting = FakeWorker(), FakeWorker()
    told_otherwise.metrics["headrace_forwarded_total"] = 6
    waiting.metrics["headrace_connector_in_flight"] = 3
    assert restless(told_otherwise) == [  # type: ignore[arg-type]
        "worker, stage s: forwarded_total is 6 in /metrics and 7 in /accounts"
    ]
    assert restless(waiting) == ["worker: 3 device messages not acknowledged"]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("committed", "end", "problem"),
    [
        (10, 10, None),
        (9, 10, "committed and end differ"),
        (None, 10, "committed and end differ"),
        (11, 10, "the log ends at 10"),
    ],
)
def test_every_log_is_committed_to_its_end(
    monkeypatch: pytest.MonkeyPatch, committed: int | None, end: int, problem: str | None
) -> None:
    """Short of the end, never committed, and past the end are all told."""
    own: Any = SimpleNamespace(workers=[FakeWorker()])
    monkeypatch.setattr(rest, "standing", lambda _own: {("g", "t", 0): (committed, end)})
    if problem is None:
        at_rest(own, 0.3)
        return
    with pytest.raises(AssertionError, match=problem):
        at_rest(own, 0.3)


def test_a_log_that_goes_on_must_pass_where_it_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written for ever is never committed to its end; the end as it was first seen is enough."""
    own: Any = SimpleNamespace(workers=[FakeWorker()])
    moments = iter([(7, 10), (9, 12), (11, 14)])
    monkeypatch.setattr(rest, "standing", lambda _own: {("g", "ticks", 0): next(moments)})
    at_rest(own, 60)
    assert list(moments) == []


def test_an_offset_that_goes_back_is_told() -> None:
    """The oracle remembers the highest of each group and partition, until it is told to forget."""
    oracle = Oracle("nowhere:1", "g")
    for offset in (5, 7, 7):
        oracle._take(oracle.last, "g", {"t-0": SimpleNamespace(offset=offset)})
    assert oracle.violations == []
    oracle._take(oracle.last, "g", {"t-0": SimpleNamespace(offset=6)})
    assert oracle.violations == ["g t-0: committed offset went from 7 to 6"]
    oracle.forget()
    oracle._take(oracle.last, "g", {"t-0": SimpleNamespace(offset=0)})
    assert len(oracle.violations) == 1


@pytest.mark.parametrize(
    ("starts", "stopped", "seen"), [(1, False, True), (2, False, True), (1, True, False), (0, False, False)]
)
def test_a_scenario_without_a_worker_in_the_end_has_stopped_it(starts: int, stopped: bool, seen: bool) -> None:
    """A worker that has ended by itself is told where none is left; one that was stopped or never ran is not."""
    gone = SimpleNamespace(name="worker", alive=False, exit_code=1, starts=starts, stopped=stopped)
    own: Any = SimpleNamespace(workers=[gone])
    if not seen:
        at_rest(own, 0.3)
        return
    with pytest.raises(AssertionError, match="nobody stopped these"):
        at_rest(own, 0.3)


def test_who_has_seen_nothing_is_told() -> None:
    """No sample while a worker was there for long, an end by an exception, and what was seen, of either of the two."""

    def own(ready_ago: float | None, **fields: Any) -> Any:
        fine = {"samples": 9, "failure": None, "violations": []}
        ready_at = None if ready_ago is None else time.monotonic() - ready_ago
        watches = {name: SimpleNamespace(**fine) for name in ("oracle", "bookkeeping")}
        for name, value in fields.items():
            watch, _, field = name.partition("_")
            setattr(watches[watch], field, value)
        return SimpleNamespace(workers=[SimpleNamespace(ready_at=ready_at)], **watches)

    watched(own(60))
    for ready_ago in (None, 1):
        watched(own(ready_ago, oracle_samples=0, bookkeeping_samples=0))
    for watch in ("oracle", "bookkeeping"):
        with pytest.raises(AssertionError, match="sampled nothing"):
            watched(own(60, **{f"{watch}_samples": 0}))
        with pytest.raises(AssertionError, match="KeyError"):
            watched(own(60, **{f"{watch}_failure": KeyError("t")}))
        with pytest.raises(AssertionError, match="went back"):
            watched(own(60, **{f"{watch}_violations": ["it went back"]}))


def test_a_watch_keeps_what_ended_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception that nobody expected ends neither oracle nor bookkeeping in silence."""

    def broken(*_: object, **__: object) -> None:
        raise KeyError("unexpected")

    monkeypatch.setattr("tests.faults.oracle.AIOKafkaAdminClient", broken)
    monkeypatch.setattr(rest, "accounts", broken)
    own: Any = SimpleNamespace(workers=[FakeWorker()])
    with Oracle("nowhere:1", "g") as oracle, Bookkeeping(own, every_seconds=0.01) as book:
        wait_for("the end of both", lambda: oracle.failure and book.failure, 10)
    assert repr(oracle.failure) == repr(book.failure) == "KeyError('unexpected')"


def test_a_realm_at_rest_asks_for_each_devices_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message behind a younger one of its device on `iot_validated_data` is what a scenario fails with."""

    async def origins(_places: object, name: str, _since: object) -> list[Origin]:
        numbers = {"iot_raw_data": "1234", "iot_validated_data": "1324"}[name]
        return [Origin("dev", number, 0) for number in numbers]

    monkeypatch.setattr(rest, "origins", origins)
    fine = SimpleNamespace(samples=9, failure=None, violations=[])
    own: Any = SimpleNamespace(workers=[], places=None, oracle=fine, bookkeeping=fine)
    with pytest.raises(AssertionError, match=r"not in the order .*: 1 messages, .*request_id='2'"):
        Realm.rest(own)


@pytest.mark.parametrize(
    ("owned", "held", "wrong"),
    [
        ({"a": [0, 1], "b": [2]}, 3, []),
        ({"a": [0, 1]}, 2, ["p.t[2]: 0 owners"]),
        ({"a": [0, 1], "b": [1, 2]}, 4, ["p.t[1]: 2 owners"]),
        ({"a": [0, 1], "b": [2]}, 4, ["the workers hold 4 partitions, and the broker has given out 3"]),
    ],
)
def test_a_partition_with_no_owner_or_two_is_told(
    monkeypatch: pytest.MonkeyPatch, owned: dict[str, list[int]], held: int, wrong: list[str]
) -> None:
    """By what the broker has given to each member, and by what the workers say that they hold."""
    worker = FakeWorker()
    worker.metrics["headrace_assigned_partitions"] = held
    places = SimpleNamespace(topic=lambda name: f"p.{name}")
    own: Any = SimpleNamespace(workers=[worker], places=places)
    given = {member: [("p.t", number) for number in numbers] for member, numbers in owned.items()}
    monkeypatch.setattr(support, "members", lambda _own, _stage: given)
    monkeypatch.setattr(support, "partition_count", lambda _own, _topic: 3)
    assert misowned(own, "s", "t") == wrong


def test_a_worker_that_does_not_answer_has_no_metrics(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A metric is 0 where the worker has none of it, never because it does not run or does not answer."""
    monkeypatch.setattr("tools.worker._ANSWER_SECONDS", 0.2)
    worker = Worker({}, log=tmp_path / "log")
    with pytest.raises(WorkerError, match="does not run"):
        worker.metric("headrace_in_flight")
    monkeypatch.setattr(Worker, "alive", True)
    with pytest.raises(WorkerError, match="did not tell headrace_in_flight"):
        worker.metric("headrace_in_flight")
    answers = iter([(0, b""), (200, b'headrace_in_flight{stage="s"} 3.0')])
    monkeypatch.setattr(worker, "get", lambda _path: next(answers))
    assert worker.metric("headrace_in_flight", stage="s") == 3
