"""Workers and servers are killed under load: what was acknowledged is stored, a dead letter, or a meant drop."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from tests.faults.rest import INPUTS
from tests.faults.support import LIVENESS_SECONDS, STAGES, members, misowned, settled, wait_for
from tests.faults.worker import realm
from tools.simulator import Plan
from tools.stack import Stack

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]


def test_a_worker_killed_again_and_again(breakable: Stack, tmp_path: Path, short: bool, seed: int) -> None:
    """20,000 messages at QoS 1 while the worker is killed five times at random moments: nothing is lost."""
    rng = random.Random(seed)
    messages, kills = 20_000, 5 if short else 12
    with realm(breakable, tmp_path, STAGES=STAGES) as own:
        worker = own.worker().start()
        fleet = own.fleet(Plan(messages=messages, rate=800, poison=0.01, duplicates=0.02))
        fleet.start()
        for _ in range(kills):
            time.sleep(rng.uniform(0.5, 3.0))
            worker.kill()
            worker.start()
        settled(own, fleet)
        assert worker.starts == kills + 1
        assert own.oracle.groups == {f"{own.name}-{stage}" for stage in ("normalizer", "ingestor", "caching")}


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
    """Kafka is frozen for two sessions: no acknowledgement meanwhile, then the worker resumes and nothing is lost."""
    with realm(breakable, tmp_path, STAGES=STAGES) as own:
        worker = own.worker().start()
        fleet = own.fleet(Plan(seconds=20 if short else 40, rate=200))
        fleet.start()

        def acknowledged() -> float:
            return worker.metric("headrace_connector_acks_total", connector="mqtt")

        wait_for("traffic", lambda: acknowledged() > 200)
        breakable.part("kafka").pause()
        time.sleep(4)
        stood_at, sent = acknowledged(), fleet.acknowledged
        time.sleep(8)
        assert acknowledged() == stood_at, "Kafka's being away was not felt"
        assert fleet.acknowledged > sent, "there must be something to acknowledge"
        breakable.part("kafka").resume()
        settled(own, fleet)
        assert worker.alive


def test_the_worker_stopped_for_longer_than_a_session(breakable: Stack, tmp_path: Path) -> None:
    """A worker is frozen until the group has given it up: it finds back and nothing is lost."""
    with realm(breakable, tmp_path, STAGES=STAGES) as own:
        worker = own.worker().start()
        fleet = own.fleet(Plan(seconds=20, rate=200))
        fleet.start()
        stages = ("normalizer", "ingestor", "caching")
        wait_for("membership", lambda: all(members(own, stage) for stage in stages))
        before = {stage: set(members(own, stage)) for stage in stages}
        worker.pause()
        time.sleep(9)
        wait_for("each group has given it up", lambda: not any(members(own, stage) for stage in stages))
        worker.resume()
        settled(own, fleet)
        assert worker.alive
        for stage in stages:
            after = set(members(own, stage))
            assert after and not after & before[stage], f"{stage}: the same member as before, {after}"


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
    """Three workers come and go, politely and not: the ledger is clean, each partition has one owner in the end."""
    rng = random.Random(seed)
    rounds = 4 if short else 30
    with realm(breakable, tmp_path, STAGES="normalizer,ingestor") as own:
        connector = own.worker("connector", STAGES="mqtt").start()
        workers = [own.worker(f"worker-{number}") for number in range(3)]
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
                # in order: what it has drained is committed; one that does not handle signals yet ends by this one
                young = not chosen.ready()
                chosen.signal(signal.SIGTERM)
                code = chosen.wait_exit(LIVENESS_SECONDS)
                assert code == 0 or (young and code == -signal.SIGTERM), chosen.tail()
        for worker in workers:
            worker.start()
        settled(own, fleet)
        assert connector.alive
        for stage in ("normalizer", "ingestor"):
            wait_for(
                f"one owner of each partition, {stage}", lambda stage=stage: not misowned(own, stage, INPUTS[stage])
            )
            assert len(members(own, stage)) == len(workers)
