"""What the health pages say, and that the watchdog hears of the loop whatever a service does."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest
from mode import Service

from streams import metrics, web
from streams.core import SETTINGS, app
from streams.resilience.health import WELL, Verdict
from streams.resilience.judgement import Remedy

CHECK_SECONDS = 0.01


class Dog:
    """A watchdog that counts what it hears."""

    beats = 0

    def beat(self) -> None:
        """Count."""
        self.beats += 1


class Owner(Service):
    """A service that runs until it is told."""


class Hanging:
    """A stage's check of a service that never answers."""

    asked = 0

    async def __call__(self) -> None:
        self.asked += 1
        await asyncio.Event().wait()


def stage(name: str, *, reads_topics: bool = True, **checks: Any) -> Any:
    """Return as much of a stage as the checks look at."""
    guard = SimpleNamespace(tripped=None)
    stage_app = SimpleNamespace(reads_topics=reads_topics, started=True, typed_consumer=None, guard=guard)
    return SimpleNamespace(name=name, app=stage_app, checks=checks)


async def until(condition: Any, seconds: float = 10.0) -> None:
    """Wait for a condition."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(CHECK_SECONDS)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> web.Checks:
    """Checks that know nothing yet, of a worker without a verdict."""
    found = web.Checks()
    monkeypatch.setattr(web, "CHECKS", found)
    monkeypatch.setattr(app.pipeline.health, "verdicts", {})
    return found


async def test_the_watchdog_waits_for_no_service(checks: web.Checks, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sink that does not answer holds up its own check: the loop beats on, and is not asked again meanwhile."""
    dog, sink, owner = Dog(), Hanging(), Owner()
    monkeypatch.setattr(web, "CHECK_SECONDS", CHECK_SECONDS)
    monkeypatch.setattr(app, "stages", lambda: [stage("caching", redis=sink)])
    monkeypatch.setattr(app.pipeline, "watchdog", dog, raising=False)
    watching = asyncio.create_task(web.watch(owner))
    await until(lambda: sink.asked)
    before = dog.beats
    await until(lambda: dog.beats >= before + 10)
    assert (sink.asked, checks.results) == (1, {})
    await owner.stop()
    async with asyncio.timeout(10):
        await watching


async def test_progress_is_as_old_as_its_verdict(checks: web.Checks, monkeypatch: pytest.MonkeyPatch) -> None:
    """The age is that of the judgement, good or bad, not of the page's look at it."""
    now = time.monotonic()
    bad = Verdict(Remedy.RECREATE_CONSUMER, "nothing read for 130 s")
    monkeypatch.setattr(app, "stages", lambda: [stage("ingestor"), stage("caching")])
    app.pipeline.health.verdicts.update(ingestor=(WELL, now - 25.0), caching=(bad, now - 7.0))
    await checks.run()
    shown = web.shown(checks.results, now)
    assert shown["ingestor.progress"] == {"ok": True, "age_seconds": 25.0}
    assert shown["caching.progress"] == {"ok": False, "age_seconds": 7.0, "reason": "nothing read for 130 s"}
    assert abs(shown["ingestor.group"]["age_seconds"]) < 1.0


async def test_before_the_first_verdict_progress_says_so(checks: web.Checks, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that reads topics is not judged yet, which holds up no readiness; one that reads none has nothing to
    say."""
    monkeypatch.setattr(app, "stages", lambda: [stage("ingestor"), stage("mqtt", reads_topics=False)])
    await checks.run()
    ingestor, mqtt = (checks.results[f"{name}.progress"] for name in ("ingestor", "mqtt"))
    assert (ingestor["ok"], ingestor["reason"]) == (True, "not judged yet")
    assert mqtt["ok"]
    assert "reason" not in mqtt


def test_liveness_gives_its_checks_as_readiness_does(checks: web.Checks) -> None:
    """The loop's delay and the uptime, each with its age and what there is to say; no service is asked."""
    checks.turned(0.25)
    body = web.alive(checks.loop["at"] + 2.0)
    uptime = body["uptime_seconds"]
    assert body == {
        "status": "alive",
        "uptime_seconds": uptime,
        "checks": {
            "loop": {"ok": True, "age_seconds": 2.0, "reason": "0.250 s late"},
            "uptime": {"ok": True, "age_seconds": 0.0, "reason": f"{uptime} s"},
        },
    }
    assert metrics.REGISTRY.get_sample_value("headrace_loop_delay_seconds") == 0.25


def test_a_late_loop_is_alive_and_says_so(checks: web.Checks) -> None:
    """Later than a heartbeat may be: the check fails with the setting's name, the process stays alive."""
    checks.turned(SETTINGS.broker.heartbeat_interval_seconds + 1.0)
    body = web.alive(time.monotonic())
    assert body["status"] == "alive"
    assert not body["checks"]["loop"]["ok"]
    assert "KAFKA_HEARTBEAT_INTERVAL_SECONDS" in body["checks"]["loop"]["reason"]


def test_before_the_first_round_the_loop_says_so(checks: web.Checks) -> None:
    """No delay has been measured yet."""
    assert web.CHECKS is checks
    loop = web.alive(time.monotonic())["checks"]["loop"]
    assert (loop["ok"], loop["reason"]) == (True, "no round is over yet")
