"""What the health monitor does about what it sees."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import pytest

from streams.resilience import health
from streams.resilience.health import HealthMonitor, Remedy, View
from streams.resilience.options import ResilienceOptions

BUDGET_SECONDS = 600.0


def seen(*, member: bool = True, reachable: bool = True, producer: bool = True) -> View:
    """Return a stage without partitions."""
    return View(
        started_age=1000.0,
        rebalancing_age=None,
        member=member,
        partitions=(),
        commit_age=0.0,
        fetch_age=0.0,
        fetch_failures=0,
        producer_usable=producer,
        broker_reachable=reachable,
    )


class Watched:
    """A monitor of one app, which sees what it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.view: View | None = None
        self.ends: list[BaseException] = []
        self.app: Any = SimpleNamespace(
            resilience=ResilienceOptions("stage", "iot_errors", recreate_budget_seconds=BUDGET_SECONDS),
            _producer=object(),
            producer=SimpleNamespace(usable=True, last_failure=None, recreate=AsyncMock()),
            consumer=SimpleNamespace(recreate=AsyncMock()),
            fatal=self.ends.append,
        )
        self.monitor = HealthMonitor(lambda: [self.app], interval_seconds=1, join_seconds=10, clock=lambda: self.now)
        monkeypatch.setattr(health, "look", lambda *_: self.view)

    def check(self, at: float, view: View | None) -> Remedy:
        """Look at ``view`` at a time."""
        self.now, self.view = at, view
        return self.monitor.check(self.app).remedy


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    """Return a monitor."""
    return Watched(monkeypatch)


async def test_an_outage_does_not_count_against_the_budget(watched: Watched) -> None:
    """A consumer that fails before and after a long outage is created anew; only failing with a broker ends it."""
    assert watched.check(0, seen(member=False)) is Remedy.RECREATE_CONSUMER
    for at in range(1, 2000, 100):
        assert watched.check(at, seen(reachable=False)) is Remedy.NONE
    assert watched.check(2000, seen(member=False)) is Remedy.RECREATE_CONSUMER
    assert watched.ends == []
    watched.check(2000 + BUDGET_SECONDS, seen(member=False))
    assert watched.ends == []
    watched.check(2001 + BUDGET_SECONDS, seen(member=False))
    assert "creating clients anew has not helped" in str(watched.ends[0])


@pytest.mark.parametrize("view", [None, seen(producer=False, reachable=False)], ids=["no consumer", "a consumer too"])
async def test_a_producer_that_waits_for_a_broker_does_not_count(watched: Watched, view: View | None) -> None:
    """While a producer is created anew and no broker answers, the worker lives on, however long that is."""
    watched.app.producer.usable = False
    watched.app.producer.last_failure = "KafkaConnectionError: nobody there"
    for at in range(0, 5000, 100):
        assert watched.check(at, view) is Remedy.RECREATE_PRODUCER
    assert watched.ends == []
