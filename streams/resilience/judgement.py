"""Is a consumer well? A pure judgement over what can be seen of it: partitions, group, fetches, commits, broker.

*Stuck* means: there is something to read or to commit, and nothing has moved for a time. An idle topic, a partition
that is held for a dead sink, a partition without room and a slow handler that still advances are not stuck. Stages of
Faust (``health``) and the resilient consumers (``consumers``) are judged by this one function.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import Any

from streams.resilience.commits import PartitionLedger


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
#: So long after a broker was away, fetches that have failed in a row are from before.
RECONNECTED_SECONDS = 10.0


def judge(view: View, *, stuck_seconds: float, join_seconds: float, end_seconds: float = 600.0) -> Verdict:
    """Return what is wrong with a stage.

    ``join_seconds`` is how long a group may take to settle, ``end_seconds`` how long a handler may hang: a sink that
    does not answer is bounded by its own time-outs, well below it.
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
                f"{partition.name}: {partition.unread} record(s) to read and none read for "
                f"{partition.progress_age:.0f} s",
            )
    if any(partition.committable for partition in view.partitions) and (view.commit_age or 0.0) > stuck_seconds:
        return Verdict(Remedy.RECREATE_CONSUMER, f"no commit has succeeded for {view.commit_age:.0f} s")
    return WELL


def view_partition(
    name: str, ledger: PartitionLedger, end: int, *, held: bool, now: float, changed: dict[str, float]
) -> PartitionView:
    """Return one partition as seen now; ``end`` is the end of its log as far as known.

    ``changed`` keeps, between calls, since when something waits: what comes in after an idle hour has not been stuck
    for an hour.
    """
    oldest = ledger.oldest_in_flight()
    unread = max(0, end - (ledger.read_to or 0))
    if held:
        # Held for a sink that is away: what waits begins to count when it may go on.
        since = changed[f"waiting {name}"] = now
    elif oldest or unread:
        since = changed.setdefault(f"waiting {name}", now)
    else:
        changed.pop(f"waiting {name}", None)
        since = now
    return PartitionView(
        name,
        unread,
        held,
        ledger.in_flight,
        now - oldest.delivered_at if oldest else 0.0,
        now - max(ledger.last_progress, since),
        ledger.committable() is not None,
    )


def is_member(coordinator: Any, now: float, changed: dict[str, float]) -> bool:
    """Return whether the group counts us in; a moment without is normal (a coordinator moves, a session is renewed)."""
    task = getattr(coordinator, "_coordination_task", None)
    ended = task is not None and task.done()
    inside = coordinator is None or (getattr(coordinator, "generation", 0) >= 0 and not ended)
    if inside:
        changed.pop("outside", None)
        return True
    return now - changed.setdefault("outside", now) < 10.0


def position_of(fetcher: Any, tp: Any) -> int | None:
    """Return the offset that ``fetcher`` (aiokafka's) reads next, None while it does not know; waits for nothing."""
    subscription = fetcher._subscriptions.subscription
    if subscription is None or subscription.assignment is None:
        return None
    state = subscription.assignment.state_value(tp)
    position: int | None = None if state is None else state._position
    return position


def since_reachable(view: View, now: float, changed: dict[str, float]) -> View:
    """Return ``view`` with no age that goes back before the last look at which no broker could be reached.

    Nothing can move while the broker is away; a client that has just come back is not stuck, it has just begun.
    ``changed`` keeps that moment between calls.
    """
    if not view.broker_reachable:
        changed["away"] = now
        return view
    if "away" not in changed:
        return view
    most = now - changed["away"]
    return replace(
        view,
        rebalancing_age=None if view.rebalancing_age is None else min(view.rebalancing_age, most),
        partitions=tuple(replace(found, progress_age=min(found.progress_age, most)) for found in view.partitions),
        commit_age=None if view.commit_age is None else min(view.commit_age, most),
        fetch_age=min(view.fetch_age, most),
        fetch_failures=view.fetch_failures if most > RECONNECTED_SECONDS else 0,
    )


def is_reachable(client: Any) -> bool:
    """Return whether ``client`` (aiokafka's consumer) has a connection to any broker."""
    connections = getattr(client._client, "_conns", {})
    return any(connection.connected() for connection in connections.values())
