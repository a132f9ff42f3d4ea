"""Workers and servers are killed under load: what was acknowledged is stored, a dead letter, or a drop that was meant."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.oracle import Oracle
from tests.faults.worker import Realm, realm
from tools.simulator import Fleet, Plan
from tools.stack import Stack

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

STAGES = "mqtt,normalizer,ingestor,caching"
LIVENESS_SECONDS = 120.0


def wait_for(what: str, condition: Callable[[], Any], seconds: float = LIVENESS_SECONDS) -> Any:
    """Return the first true answer of ``condition``; fails, saying ``what``, after a generous bound."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found = condition()
        if found:
            return found
        time.sleep(0.2)
    pytest.fail(f"{what}: not within {seconds:.0f} s")


def groups(own: Realm) -> list[str]:
    """Return the consumer groups of a realm."""
    return [f"{own.name}-{stage}" for stage in ("normalizer", "ingestor", "caching")]


def settled(own: Realm, fleet: Fleet) -> None:
    """Wait for the end of the fleet and check its ledger: nothing lost, no row twice."""
    assert fleet.join(LIVENESS_SECONDS), "the fleet did not get its last acknowledgements"
    report = own.settle(fleet)
    assert report.ok, f"{report.text()}\n{own.logs()}"


def test_a_worker_killed_again_and_again(breakable: Stack, tmp_path: Path, short: bool, seed: int) -> None:
    """20,000 messages at QoS 1 while the worker is killed five times at random moments: nothing is lost."""
    rng = random.Random(seed)
    messages, kills = 20_000, 5 if short else 12
    with (
        realm(breakable, tmp_path, STAGES=STAGES) as own,
        Oracle(breakable.env["KAFKA_BOOTSTRAP_SERVERS"], groups(own)) as oracle,
    ):
        worker = own.worker().start()
        fleet = own.fleet(Plan(messages=messages, rate=800, poison=0.01, duplicates=0.02))
        fleet.start()
        for _ in range(kills):
            time.sleep(rng.uniform(0.5, 3.0))
            worker.kill()
            worker.start()
        settled(own, fleet)
        assert worker.starts == kills + 1
        assert oracle.samples
        assert oracle.violations == []
        for group in groups(own):
            assert any(name == group for name, _ in oracle.last), f"{group} never committed"


def test_the_broker_killed_and_started_again(breakable: Stack, tmp_path: Path, short: bool, seed: int) -> None:
    """Kafka is killed and comes back, twice: the same worker goes on by itself and nothing is lost."""
    rng = random.Random(seed)
    with realm(breakable, tmp_path, STAGES=STAGES) as own:
        worker = own.worker().start()
        pid = worker.pid
        fleet = own.fleet(Plan(seconds=15 if short else 40, rate=300))
        fleet.start()
        for _ in range(2):
            time.sleep(rng.uniform(1.0, 4.0))
            breakable.part("kafka").kill()
            time.sleep(rng.uniform(1.0, 3.0))
            breakable.part("kafka").start()
        settled(own, fleet)
        assert worker.pid == pid, "the worker must live through it"
        worker.wait_ready(LIVENESS_SECONDS)


def test_the_broker_stopped_for_longer_than_a_session(breakable: Stack, tmp_path: Path, short: bool) -> None:
    """Kafka is frozen for longer than a session: the worker resumes and nothing is lost."""
    with realm(breakable, tmp_path, STAGES=STAGES) as own:
        worker = own.worker().start()
        fleet = own.fleet(Plan(seconds=15 if short else 40, rate=200))
        fleet.start()
        time.sleep(3)
        breakable.part("kafka").pause()
        time.sleep(10)
        breakable.part("kafka").resume()
        settled(own, fleet)
        assert worker.alive


def test_the_worker_stopped_for_longer_than_a_session(breakable: Stack, tmp_path: Path) -> None:
    """A worker is frozen until the group has given it up: it finds back and nothing is lost."""
    with realm(breakable, tmp_path, STAGES=STAGES) as own:
        worker = own.worker().start()
        fleet = own.fleet(Plan(seconds=20, rate=200))
        fleet.start()
        time.sleep(3)
        worker.pause()
        time.sleep(9)
        worker.resume()
        settled(own, fleet)
        assert worker.alive


def test_the_database_away(breakable: Stack, tmp_path: Path, short: bool) -> None:
    """PostgreSQL is stopped: caching goes on meanwhile, and the ingestor resumes by itself with nothing lost."""
    away_seconds = 12 if short else 30
    database = breakable.part("postgresql")
    with realm(breakable, tmp_path, STAGES=STAGES) as own:
        worker = own.worker().start()
        fleet = own.fleet(Plan(seconds=away_seconds + 10, rate=200))
        fleet.start()
        wait_for("rows before the outage", lambda: worker.metric("headrace_forwarded_total", stage="ingestor"))
        database.kill()
        time.sleep(2)
        stored = worker.metric("headrace_forwarded_total", stage="ingestor")
        cached = worker.metric("headrace_forwarded_total", stage="caching") or 0
        time.sleep(away_seconds - 4)
        wait_for(
            "caching during the outage",
            lambda: (worker.metric("headrace_forwarded_total", stage="caching") or 0) > cached + 200,
        )
        assert worker.metric("headrace_forwarded_total", stage="ingestor") == stored
        assert worker.metric("headrace_assigned_partitions", stage="ingestor"), "the membership must live on"
        database.start()
        settled(own, fleet)
        assert worker.alive


def test_the_cache_away(breakable: Stack, tmp_path: Path) -> None:
    """Valkey is killed: rows go on being stored, and the cache is filled after its return."""
    with realm(breakable, tmp_path, STAGES=STAGES) as own:
        worker = own.worker().start()
        fleet = own.fleet(Plan(seconds=15, rate=200))
        fleet.start()
        wait_for("something cached", lambda: worker.metric("headrace_forwarded_total", stage="caching"))
        breakable.part("valkey").kill()
        time.sleep(1)
        stored = worker.metric("headrace_forwarded_total", stage="ingestor") or 0
        wait_for(
            "rows during the outage",
            lambda: (worker.metric("headrace_forwarded_total", stage="ingestor") or 0) > stored + 200,
        )
        breakable.part("valkey").start()
        settled(own, fleet)
        wait_for("the cache has caught up", lambda: not worker.metric("headrace_in_flight", stage="caching"))
        assert worker.alive


def test_the_mqtt_broker_killed(breakable: Stack, tmp_path: Path) -> None:
    """The MQTT broker is stopped and started: the connector finds back and what it acknowledged is stored."""
    with realm(breakable, tmp_path, STAGES=STAGES) as own:
        worker = own.worker().start()
        fleet = own.fleet(Plan(seconds=15, rate=200))
        fleet.start()
        time.sleep(4)
        # an orderly stop: mosquitto writes its sessions down at the end, and every few seconds before
        breakable.part("mqtt").stop()
        time.sleep(2)
        breakable.part("mqtt").start()
        settled(own, fleet)
        assert worker.alive


def test_two_workers_one_killed_or_started_every_two_seconds(
    breakable: Stack, tmp_path: Path, short: bool, seed: int
) -> None:
    """Workers come and go, politely and not: the ledger is clean and each device's order is kept."""
    rng = random.Random(seed)
    rounds = 6 if short else 30
    with realm(breakable, tmp_path, STAGES="normalizer,ingestor") as own:
        connector = own.worker("connector", STAGES="mqtt").start()
        workers = [own.worker(f"worker-{number}") for number in range(2)]
        workers[0].start()
        fleet = own.fleet(Plan(seconds=2.5 * rounds + 5, rate=150))
        fleet.start()
        for _ in range(rounds):
            time.sleep(2)
            chosen = rng.choice(workers)
            if not chosen.alive:
                chosen.spawn()
            elif rng.random() < 0.5:
                chosen.kill()
            else:
                chosen.terminate()
        for worker in workers:
            worker.stop() if worker.alive and not worker.wait_gone(20) else None
            worker.start()
        settled(own, fleet)
        assert connector.alive
