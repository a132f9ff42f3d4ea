"""Is a stage well? A pure judgement over what can be seen of it, and the service that acts on it.

Every ``HEALTH_INTERVAL_SECONDS`` each stage is looked at. *Stuck* means: there is something to read or to commit, and
nothing has moved for ``STUCK_SECONDS``. An idle topic, a partition that is held for a dead sink, a partition without
room and a slow handler that still advances are not stuck. Service states of Faust are not asked: they stay ``running``
in every hang that was seen.

What is done about it, in this order: the client is created anew; if that does not help for ``RECREATE_BUDGET_SECONDS``,
the worker ends, non-zero, for its supervisor. An absent broker or sink is waited for and never counts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from mode import Service

from streams.resilience.backoff import Backoff
from streams.resilience.failures import Fatal
from streams.resilience.judgement import (
    WELL,
    PartitionView,
    Remedy,
    Verdict,
    View,
    is_member,
    is_reachable,
    judge,
    since_reachable,
    view_partition,
)

__all__ = ["WELL", "HealthMonitor", "PartitionView", "Remedy", "Verdict", "View", "judge", "look"]

#: How long a health check waits for the ends of the logs.
LOOK_UP_SECONDS = 5.0


def look(app: Any, now: float, changed: dict[str, float]) -> View | None:
    """Return what can be seen of ``app``, or None while it has not started.

    ``changed`` keeps, between calls, since when something has been as it is; pass the same dict each time.
    """
    consumer = app.typed_consumer
    if consumer is None or not app.started or app.producer_only:
        return None
    thread = consumer._thread
    client = thread._consumer
    partitions = []
    for tp, ledger in consumer.ledgers.items():
        end = consumer.end_of(tp) or 0
        held = tp in consumer.held
        partitions.append(
            view_partition(f"{tp.topic}[{tp.partition}]", ledger, end, held=held, now=now, changed=changed)
        )
    settled = app.assigned is not None and client is not None
    if settled:
        changed.pop("unsettled", None)
    else:
        changed.setdefault("unsettled", now)
    pending = any(partition.committable for partition in partitions)
    if pending:
        changed.setdefault("pending", now)
    else:
        changed.pop("pending", None)
    last_commit = max(consumer.last_commit_at or 0.0, changed.get("pending", now))
    coordinator = getattr(client, "_coordinator", None)
    view = View(
        started_age=now - changed.setdefault("started", now),
        rebalancing_age=None if settled else now - changed["unsettled"],
        member=is_member(coordinator, now, changed),
        partitions=tuple(partitions),
        commit_age=now - last_commit,
        fetch_age=now - consumer.last_fetch_at,
        fetch_failures=consumer.fetch_failures,
        producer_usable=app._producer is None or app.producer.usable,
        broker_reachable=client is None or is_reachable(client),
    )
    return since_reachable(view, now, changed)


def is_away(app: Any, view: View | None) -> bool:
    """Tell whether no broker can be reached, by the consumer or by a producer that is being created anew."""
    unreachable = view is not None and not view.broker_reachable
    return unreachable or (app._producer is not None and app.producer.last_failure is not None)


class HealthMonitor(Service):
    """Looks at the apps of a worker and does what helps."""

    def __init__(
        self,
        apps: Callable[[], list[Any]],
        *,
        interval_seconds: float,
        join_seconds: float,
        prepare: Callable[[], Awaitable[None]] | None = None,
        clock: Callable[[], float] = time.monotonic,
        **kwargs: Any,
    ) -> None:
        self.apps = apps
        self.interval_seconds = interval_seconds
        self.join_seconds = join_seconds
        self.prepare = prepare
        self.clock = clock
        #: the last verdict of each stage, with when it was made
        self.verdicts: dict[str, tuple[Verdict, float]] = {}
        self._changed: dict[str, dict[str, float]] = {}
        self._failing_since: dict[str, float] = {}
        self._working: set[str] = set()
        self._backoffs: dict[str, Backoff] = {}
        self._next_try: dict[str, float] = {}
        self._helpers: set[asyncio.Task[None]] = set()
        super().__init__(**kwargs)

    @Service.task
    async def _watch(self) -> None:
        while not self.should_stop:
            await self.sleep(self.interval_seconds)
            await asyncio.gather(*map(self._look_up_ends, self.apps()))
            for app in self.apps():
                try:
                    self.check(app)
                except Exception as exc:
                    self.log.exception(
                        "The health check of stage %s failed: %s", app.resilience.stage, type(exc).__name__
                    )

    async def _look_up_ends(self, app: Any) -> None:
        consumer = app.typed_consumer
        if consumer is None or not app.started or app.producer_only:
            return
        try:
            await consumer.look_up_ends(LOOK_UP_SECONDS)
        except Exception as exc:
            # A broker that is away; the judgement finds out by itself.
            self.log.debug("no ends of the logs of stage %s: %r", app.resilience.stage, exc)

    def check(self, app: Any) -> Verdict:
        """Look at one stage, remember the verdict, and begin what helps."""
        stage = app.resilience.stage
        now = self.clock()
        view = look(app, now, self._changed.setdefault(stage, {}))
        options = app.resilience
        verdict = WELL
        if view is None and app._producer is not None and not app.producer.usable:
            verdict = Verdict(Remedy.RECREATE_PRODUCER, "the producer was fenced or has failed")
        elif view is not None:
            verdict = judge(
                view,
                stuck_seconds=options.stuck_seconds,
                join_seconds=self.join_seconds,
                end_seconds=options.recreate_budget_seconds,
            )
        self.verdicts[stage] = (verdict, now)
        if verdict.well or is_away(app, view):
            self._failing_since.pop(stage, None)
        if verdict.remedy is Remedy.NONE:
            if verdict.well and stage in self._backoffs:
                self._backoffs[stage].healthy()
            return verdict
        since = self._failing_since.setdefault(stage, now)
        if verdict.remedy is Remedy.END or now - since > app.resilience.recreate_budget_seconds:
            app.fatal(
                Fatal(
                    f"stage {stage}: {verdict.reason}; "
                    f"{'no client helps' if verdict.remedy is Remedy.END else 'creating clients anew has not helped'}"
                    " (STUCK_SECONDS, RECREATE_BUDGET_SECONDS)"
                )
            )
        elif stage not in self._working and now >= self._next_try.get(stage, 0.0):
            self._working.add(stage)
            task = asyncio.ensure_future(self._help(app, verdict))
            self._helpers.add(task)
            task.add_done_callback(self._helpers.discard)
        return verdict

    async def _help(self, app: Any, verdict: Verdict) -> None:
        stage = app.resilience.stage
        backoff = self._backoffs.setdefault(stage, app.resilience.infrastructure_backoff())
        try:
            if self.prepare is not None:
                await self.prepare()
            if verdict.remedy is Remedy.RECREATE_PRODUCER:
                await app.producer.recreate(verdict.reason)
            else:
                await app.consumer.recreate(verdict.reason)
        except Exception as exc:
            self.log.exception("Stage %s: %s failed: %s", stage, verdict.remedy.value, type(exc).__name__)
        finally:
            self._next_try[stage] = self.clock() + backoff.next()
            self._working.discard(stage)
