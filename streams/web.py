"""``/health/live``, ``/health/ready`` and ``/metrics`` of a worker.

Live says that the process runs and its event loop turns; no sink and no broker can take that away. Ready says that
every stage holds its place in its group and that what it writes to answers. Both give each check with its age and the
reason of its failure, or what else there is to know of it.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from aiohttp import web
from mode import Service

from streams import metrics
from streams.core import SETTINGS, app
from streams.resilience.bounds import end, within
from streams.resilience.deadletter import describe
from streams.resilience.health import Verdict

STARTED = time.monotonic()
CHECK_SECONDS = 1.0
NOT_JUDGED = "not judged yet"


class Checks:
    """The state of every stage and of what it needs, as last looked at."""

    def __init__(self) -> None:
        self.results: dict[str, dict[str, Any]] = {}
        self.loop = result(None, "no round is over yet")

    def turned(self, delay_seconds: float) -> None:
        """Take note that the event loop has run a round, and how late; a heartbeat of the group would be as late."""
        bound = SETTINGS.broker.heartbeat_interval_seconds
        said = f"{delay_seconds:.3f} s late"
        late = f"{said}, more than KAFKA_HEARTBEAT_INTERVAL_SECONDS={bound:g}" if delay_seconds > bound else None
        self.loop = result(late, said)
        metrics.LOOP_DELAY.set(delay_seconds)

    async def run(self) -> None:
        """Look at every stage; each outside service has a bounded time to answer."""
        found = {"pipeline": result(app.pipeline.problem)}
        pending = []
        for stage in app.stages():
            found[f"{stage.name}.group"] = result(group_problem(stage.app))
            found[f"{stage.name}.progress"] = progress(stage.app, app.pipeline.health.verdicts.get(stage.name))
            if stage.app.guard.tripped is not None:
                found[f"{stage.name}.guard"] = result(stage.app.guard.tripped)
            pending += [(f"{stage.name}.{name}", check) for name, check in stage.checks.items()]
        found |= dict(
            zip([name for name, _ in pending], await asyncio.gather(*(ask(c) for _, c in pending)), strict=True)
        )
        self.results = found


def result(problem: str | None, said: str | None = None, at: float | None = None) -> dict[str, Any]:
    """Return one check's result: ``problem`` is None where all is well, ``said`` is what there is to say then.

    ``at`` (monotonic) is when it was found; None: now.
    """
    why = problem or said
    return {"ok": problem is None, "at": time.monotonic() if at is None else at, **({"reason": why} if why else {})}


def progress(stage_app: Any, judged: tuple[Verdict, float] | None) -> dict[str, Any]:
    """Return the last verdict on a stage, as old as it is; until the first one nothing is held against the stage."""
    if judged is None:
        return result(None, NOT_JUDGED if stage_app.reads_topics else None)
    verdict, at = judged
    return result(None if verdict.well else verdict.reason, at=at)


def group_problem(stage_app: Any) -> str | None:
    """Return why a stage has no place in its group, or None."""
    if not stage_app.reads_topics:
        return None if stage_app.started else "not started yet"
    consumer = stage_app.typed_consumer
    if consumer is None or not stage_app.started:
        return "not started yet"
    if stage_app.assigned is None:
        return "no assignment yet: the group is rebalancing"
    if consumer.fetch_failures:
        return f"{consumer.fetch_failures} fetches failed in a row; the last: {consumer.last_failure}"
    if stage_app.tables and not stage_app.tables.recovery.completed.is_set():
        return "tables are being restored"
    return None


async def ask(check: Any) -> dict[str, Any]:
    """Run one check of a stage within its bound."""
    try:
        await within(check(), SETTINGS.connect_timeout_seconds)
    except Exception as exc:
        return result(f"{type(exc).__name__}: {describe(exc)}")
    return result(None)


CHECKS = Checks()


async def watch(owner: Service) -> None:
    """Look every few seconds until ``owner`` stops, so that asking costs nothing and what hangs holds up nobody.

    The watchdog hears that the loop turns, however long a service takes to answer.
    """
    looking: asyncio.Task[None] | None = None
    while not owner.should_stop:
        before = time.monotonic()
        await owner.sleep(CHECK_SECONDS)
        app.pipeline.watchdog.beat()
        CHECKS.turned(max(0.0, time.monotonic() - before - CHECK_SECONDS))
        if looking is None or looking.done():
            looking = asyncio.create_task(_look(owner))
    if looking is not None:
        await end(looking)


async def _look(owner: Service) -> None:
    try:
        await CHECKS.run()
    except Exception:
        owner.log.exception("A health check failed")


@app.page("/health/live")
async def live(view: Any, _request: Any) -> Any:
    """Answer that the process is alive, with how its event loop does."""
    return view.json(alive(time.monotonic()))


def alive(now: float) -> dict[str, Any]:
    """Return what ``/health/live`` answers at ``now`` (monotonic), whatever its checks say.

    A loop that is late gets no better by a restart, and one that is blocked answers nothing and has the watchdog.
    """
    uptime = round(now - STARTED, 1)
    checks = {"loop": CHECKS.loop, "uptime": result(None, f"{uptime} s", at=now)}
    return {"status": "alive", "uptime_seconds": uptime, "checks": shown(checks, now)}


@app.page("/health/ready")
async def ready(_view: Any, _request: Any) -> Any:
    """Answer whether every stage can work, each check with its age and its reason."""
    checks = shown(CHECKS.results, time.monotonic())
    good = bool(checks) and all(found["ok"] for found in checks.values())
    body = {"status": "ready" if good else "not ready", "stages": [s.name for s in app.stages()], "checks": checks}
    return web.json_response(body, status=200 if good else 503)


def shown(results: dict[str, dict[str, Any]], now: float) -> dict[str, dict[str, Any]]:
    """Return checks as JSON has them: with their age at ``now`` (monotonic), and the reason where there is one."""
    return {
        name: {"ok": found["ok"], "age_seconds": round(now - found["at"], 1), **reason(found)}
        for name, found in results.items()
    }


def reason(found: dict[str, Any]) -> dict[str, str]:
    """Return the reason of a check, where there is one."""
    return {"reason": found["reason"]} if "reason" in found else {}


@app.page("/metrics")
async def exposition(_view: Any, _request: Any) -> Any:
    """Answer all metrics in the Prometheus text format."""
    return web.Response(body=metrics.exposition(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})


@app.page("/accounts")
async def accounts(_view: Any, _request: Any) -> Any:
    """Answer the accounting identity of every stage of this worker."""
    return web.json_response([one.accounts.as_dict() for one in app.apps()])
