"""The checkers that every scenario ends with see what they are there to see."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from tests.faults import rest
from tests.faults.oracle import Oracle
from tests.faults.rest import Bookkeeping, at_rest, restless, unbalanced
from tests.faults.support import wait_for


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
