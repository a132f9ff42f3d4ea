"""Is a stage well? A pure judgement over what can be seen of it, and the service that acts on it.

Every ``HEALTH_INTERVAL_SECONDS`` each stage is looked at. *Stuck* means: there is something to read or to commit, and
nothing has moved for ``STUCK_SECONDS``. An idle topic, a partition that is held for a dead sink, a partition without room
and a slow handler that still advances are not stuck. Service states of Faust are not asked: they stay ``running`` in
every hang that was seen.

What is done about it, in this order: the client is created anew; if that does not help for ``RECREATE_BUDGET_SECONDS``, the
worker ends, non-zero, for its supervisor. An absent broker or sink is waited for and never counts.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from mode import Service

from streams.resilience.backoff import Backoff
from streams.resilience.failures import Fatal


class Remedy(enum.Enum):
    """What helps."""

    NONE = "none"
    RECREATE_CONSUMER = "recreate the consumer"
    RECREATE_PRODUCER = "recreate the producer"
    END = "end the worker"


@dataclass(frozen=True, slots=True)
class PartitionView:
    """One partition as seen now; ages in seconds."""

    name: str
    unread: int
    held: bool
    in_flight: int
    oldest_age: float
    progress_age: float
    committable: bool


@dataclass(frozen=True, slots=True)
class View:
    """One stage as seen now; ages in seconds, None for what has not happened yet."""

    started_age: float
    rebalancing_age: float | None
    member: bool
    partitions: tuple[PartitionView, ...]
    commit_age: float | None
    fetch_age: float
    fetch_failures: int
    producer_usable: bool
    broker_reachable: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is wrong, in words, and what helps."""

    remedy: Remedy
    reason: str = ""

    @property
    def well(self) -> bool:
        """Tell whether nothing is wrong."""
        return not self.reason


WELL = Verdict(Remedy.NONE)
#: Fetches that may fail in a row before the consumer is created anew.
FETCH_FAILURES = 5


def judge(view: View, *, stuck_seconds: float, join_seconds: float, end_seconds: float = 600.0) -> Verdict:
    """Return what is wrong with a stage.

    ``join_seconds`` is how long a group may take to settle, ``end_seconds`` how long a handler may hang: a sink that does
    not answer is bounded by its own time-outs, well below it.
    """
    if not view.producer_usable:
        return Verdict(Remedy.RECREATE_PRODUCER, "the producer was fenced or has failed")
    if not view.broker_reachable:
        # Creating a client anew would only close one that reconnects by itself.
        return Verdict(Remedy.NONE, "no broker can be reached")
    if view.rebalancing_age is not None:
        if view.rebalancing_age > join_seconds:
            return Verdict(
                Remedy.RECREATE_CONSUMER,
                f"no assignment for {view.rebalancing_age:.0f} s: the join has failed silently",
            )
        return Verdict(Remedy.NONE, "the group is rebalancing")
    if not view.member:
        return Verdict(Remedy.RECREATE_CONSUMER, "the consumer has fallen out of its group")
    if view.fetch_failures >= FETCH_FAILURES:
        return Verdict(Remedy.RECREATE_CONSUMER, f"{view.fetch_failures} fetches have failed in a row")
    if view.fetch_age > stuck_seconds and any(p.unread and not p.held for p in view.partitions):
        return Verdict(Remedy.RECREATE_CONSUMER, f"no fetch has come back for {view.fetch_age:.0f} s")
    return _judge_partitions(view, stuck_seconds, end_seconds)


def _judge_partitions(view: View, stuck_seconds: float, end_seconds: float) -> Verdict:
    for partition in view.partitions:
        if partition.held or partition.progress_age <= stuck_seconds:
            continue
        if partition.in_flight:
            # Somebody else's progress does not help this one, but a new consumer would not either.
            return Verdict(
                Remedy.END if partition.progress_age > max(end_seconds, stuck_seconds) else Remedy.NONE,
                f"{partition.name}: {partition.in_flight} message(s) in flight, the oldest for "
                f"{partition.oldest_age:.0f} s, and none was completed for {partition.progress_age:.0f} s",
            )
        if partition.unread:
            return Verdict(
                Remedy.RECREATE_CONSUMER,
                f"{partition.name}: {partition.unread} record(s) to read and none read for {partition.progress_age:.0f} s",
            )
    if any(partition.committable for partition in view.partitions) and (view.commit_age or 0.0) > stuck_seconds:
        return Verdict(Remedy.RECREATE_CONSUMER, f"no commit has succeeded for {view.commit_age:.0f} s")
    return WELL


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
        try:
            end = consumer.highwater(tp) or 0
        except Exception:
            end = 0
        oldest = ledger.oldest_in_flight()
        partitions.append(
            PartitionView(
                f"{tp.topic}[{tp.partition}]",
                max(0, end - (ledger.read_to or 0)),
                tp in consumer.held,
                ledger.in_flight,
                now - oldest.delivered_at if oldest else 0.0,
                now - ledger.last_progress,
                ledger.committable() is not None,
            )
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
    return View(
        started_age=now - changed.setdefault("started", now),
        rebalancing_age=None if settled else now - changed["unsettled"],
        member=_member(coordinator, now, changed),
        partitions=tuple(partitions),
        commit_age=now - last_commit,
        fetch_age=now - consumer.last_fetch_at,
        fetch_failures=consumer.fetch_failures,
        producer_usable=app._producer is None or app.producer.usable,
        broker_reachable=client is None or _reachable(client),
    )


def _member(coordinator: Any, now: float, changed: dict[str, float]) -> bool:
    """Return whether the group counts us in; a moment without is normal (a coordinator moves, a session is renewed)."""
    inside = coordinator is None or getattr(coordinator, "generation", 0) >= 0
    if inside:
        changed.pop("outside", None)
        return True
    return now - changed.setdefault("outside", now) < 10.0


def _reachable(client: Any) -> bool:
    connections = getattr(client._client, "_conns", {})
    return any(connection.connected() for connection in connections.values())


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
        self._tasks: set[asyncio.Task[None]] = set()
        super().__init__(**kwargs)

    @Service.task
    async def _watch(self) -> None:
        while not self.should_stop:
            await self.sleep(self.interval_seconds)
            for app in self.apps():
                try:
                    self.check(app)
                except Exception as exc:
                    self.log.exception("The health check of stage %s failed: %r", app.resilience.stage, exc)

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
        if verdict.remedy is Remedy.NONE:
            if verdict.well:
                self._failing_since.pop(stage, None)
                if stage in self._backoffs:
                    self._backoffs[stage].healthy()
            return verdict
        since = self._failing_since.setdefault(stage, now)
        if verdict.remedy is Remedy.END or now - since > app.resilience.recreate_budget_seconds:
            app.fatal(
                Fatal(
                    f"stage {stage}: {verdict.reason}; "
                    f"{'no client can help that' if verdict.remedy is Remedy.END else 'creating clients anew has not helped'}"
                    " (STUCK_SECONDS, RECREATE_BUDGET_SECONDS)"
                )
            )
        elif stage not in self._working and now >= self._next_try.get(stage, 0.0):
            self._working.add(stage)
            task = asyncio.ensure_future(self._help(app, verdict))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
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
            self.log.exception("Stage %s: %s was not possible: %r", stage, verdict.remedy.value, exc)
        finally:
            self._next_try[stage] = self.clock() + backoff.next()
            self._working.discard(stage)
