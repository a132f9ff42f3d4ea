"""What is stuck and what is not, as both the stages and the consumers are judged."""

from __future__ import annotations

from dataclasses import replace

from streams.resilience.commits import PartitionLedger
from streams.resilience.judgement import Remedy, View, judge, since_reachable, view_partition


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Return the seconds."""
        return self.now


def judged(ledger: PartitionLedger, now: float, changed: dict[str, float], *, end: int = 0) -> Remedy:
    """Judge a consumer with the one partition, and nothing else wrong."""
    view = View(
        started_age=now,
        rebalancing_age=None,
        member=True,
        partitions=(view_partition("t[0]", ledger, end, held=False, now=now, changed=changed),),
        commit_age=0.0,
        fetch_age=0.0,
        fetch_failures=0,
        producer_usable=True,
        broker_reachable=True,
    )
    return judge(view, stuck_seconds=120, join_seconds=120).remedy


def test_a_record_after_an_idle_hour() -> None:
    """What comes in after an idle hour is not stuck for an hour; it is once nothing has moved for its own time."""
    clock, changed = Clock(), dict[str, float]()
    ledger = PartitionLedger(clock=clock)
    assert judged(ledger, 0.0, changed) is Remedy.NONE
    clock.now = 3600.0
    span = ledger.deliver(0, 0, 1)
    assert judged(ledger, clock.now, changed, end=1) is Remedy.NONE
    assert judged(ledger, 3600.0 + 601, changed, end=1) is Remedy.END
    assert span is not None
    clock.now = 4300.0
    ledger.complete(span)
    assert judged(ledger, 4300.0, changed, end=1) is Remedy.NONE
    assert judged(ledger, 9000.0, changed, end=2) is Remedy.NONE
    assert judged(ledger, 9000.0 + 121, changed, end=2) is Remedy.RECREATE_CONSUMER


def after_outage(now: float, changed: dict[str, float], *, reachable: bool, age: float) -> Remedy:
    """Judge a consumer in which nothing has moved for ``age``: a message in flight, fetches failed, no commit."""
    ledger = PartitionLedger(clock=lambda: now - age)
    ledger.deliver(0, 0, 1)
    ledger.last_progress = now - age
    view = View(
        started_age=now,
        rebalancing_age=None,
        member=True,
        partitions=(view_partition("t[0]", ledger, 5, held=False, now=now - age, changed=changed),),
        commit_age=age,
        fetch_age=age,
        fetch_failures=50,
        producer_usable=True,
        broker_reachable=reachable,
    )
    view = replace(view, partitions=(replace(view.partitions[0], progress_age=age, committable=True),))
    return judge(since_reachable(view, now, changed), stuck_seconds=120, join_seconds=120).remedy


def test_a_broker_that_comes_back_after_an_hour() -> None:
    """Nothing could move while it was away: nobody is created anew for that, and no worker ends; later it counts."""
    changed = dict[str, float]()
    assert after_outage(3600.0, changed, reachable=False, age=3600.0) is Remedy.NONE
    assert after_outage(3602.0, changed, reachable=True, age=3602.0) is Remedy.NONE
    assert after_outage(3600.0 + 130, changed, reachable=True, age=3730.0) is Remedy.RECREATE_CONSUMER
    assert after_outage(3600.0, dict[str, float](), reachable=True, age=3600.0) is Remedy.RECREATE_CONSUMER


def test_a_sink_that_comes_back_after_an_hour() -> None:
    """A partition that was held for it is not stuck when it is let go, nor does the worker end; later it counts."""
    clock, changed = Clock(), dict[str, float]()
    ledger = PartitionLedger(clock=clock)
    ledger.deliver(0, 0, 1)
    for now in (10.0, 1800.0, 3600.0):
        assert view_partition("t[0]", ledger, 5, held=True, now=now, changed=changed).progress_age == 0.0
    clock.now = 3602.0
    assert judged(ledger, clock.now, changed, end=5) is Remedy.NONE
    assert judged(ledger, 3600.0 + 601, changed, end=5) is Remedy.END
