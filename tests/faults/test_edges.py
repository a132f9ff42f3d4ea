"""Kafka and the connector's other side fail: nothing is acknowledged to the MQTT broker that Kafka does not have."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

import psutil
import pytest

from tests.faults.support import LIVENESS_SECONDS, STAGES, settled, wait_for
from tests.faults.worker import Worker, realm
from tools.simulator import Plan
from tools.stack import Stack

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

_WINDOW = 200


def acknowledged(worker: Worker) -> float:
    """Return how many messages the connector has acknowledged to the MQTT broker."""
    return worker.metric("headrace_connector_acks_total", connector="mqtt")


def test_the_connector_killed_between_receipt_and_acknowledgement(breakable: Stack, tmp_path: Path) -> None:
    """Kafka is frozen, so no PUBACK, at most a window in hand; killed then, the connector gets all of it again."""
    with realm(breakable, tmp_path, STAGES="normalizer,ingestor", MQTT_INFLIGHT=str(_WINDOW)) as own:
        connector = own.worker("connector", STAGES="mqtt").start()
        own.worker("rest").start()
        fleet = own.fleet(Plan(messages=2500, rate=400))
        fleet.start()
        wait_for("traffic", lambda: acknowledged(connector) > 200)
        breakable.part("kafka").pause()
        wait_for(
            "a full window", lambda: connector.metric("headrace_in_flight", stage="mqtt") >= _WINDOW, LIVENESS_SECONDS
        )
        stood_at = acknowledged(connector)
        assert fleet.join(LIVENESS_SECONDS), "the MQTT broker takes everything meanwhile"
        assert connector.metric("headrace_in_flight", stage="mqtt") <= _WINDOW
        assert acknowledged(connector) == stood_at
        connector.kill()
        breakable.part("kafka").resume()
        connector.start()
        settled(own, fleet)


def test_kafka_down_while_mqtt_is_up(breakable: Stack, tmp_path: Path, short: bool) -> None:
    """Kafka is away: a window of messages waits unacknowledged, memory is flat, the MQTT broker keeps the rest."""
    with realm(breakable, tmp_path, STAGES=STAGES, MQTT_INFLIGHT=str(_WINDOW)) as own:
        worker = own.worker().start()
        process = psutil.Process(worker.pid)
        fleet = own.fleet(Plan(seconds=12 if short else 120, rate=400))
        fleet.start()
        wait_for("traffic", lambda: acknowledged(worker) > 200)
        breakable.part("kafka").kill()
        wait_for("a full window", lambda: worker.metric("headrace_in_flight", stage="mqtt") >= _WINDOW)
        before = process.memory_info().rss
        stood_at = acknowledged(worker)
        assert fleet.join(300)
        # mosquitto was seen to send a tenth more than the receive maximum; reading stops with the read that brings it
        assert worker.metric("headrace_in_flight", stage="mqtt") <= 1.5 * _WINDOW
        assert acknowledged(worker) == stood_at
        assert process.memory_info().rss - before < 32 << 20
        assert worker.get("/health/live")[0] == 200
        breakable.part("kafka").start()
        settled(own, fleet)
        worker.wait_ready(LIVENESS_SECONDS)
        assert worker.starts == 1


def test_every_service_absent_at_the_start(breakable: Stack, tmp_path: Path, seed: int) -> None:
    """Nothing is there when the worker starts, and it comes in any order: the worker waits, and says so."""
    names = ["kafka", "postgresql", "valkey", "mqtt"]
    random.Random(seed).shuffle(names)
    with realm(breakable, tmp_path, STAGES=STAGES) as own:
        for name in names:
            breakable.part(name).stop()
        worker = own.worker().start(wait=False)
        wait_for("liveness without any service", lambda: worker.get("/health/live")[0] == 200)
        for name in names:
            time.sleep(1)
            assert worker.get("/health/ready")[0] == 503
            breakable.part(name).start()
        worker.wait_ready(LIVENESS_SECONDS)
        fleet = own.fleet(Plan(messages=500, rate=200))
        fleet.start()
        settled(own, fleet)
        assert worker.starts == 1


def test_a_broker_that_comes_back_empty(breakable: Stack, tmp_path: Path) -> None:
    """Kafka has lost all its data: topics are declared again, offsets begin anew, which is told of and counted, and the
    same worker goes on.
    """
    kafka = breakable.part("kafka")
    with realm(breakable, tmp_path, STAGES=STAGES) as own:
        worker = own.worker().start()
        before = own.fleet(Plan(messages=1500, rate=400))
        before.start()
        settled(own, before)
        worker.wait(lambda: worker.metric("headrace_in_flight") == 0, "idle")
        kafka.stop()
        shutil.rmtree(kafka.data)
        own.oracle.forget()
        kafka.start()
        after = own.fleet(Plan(messages=600, rate=200, seed=2))
        after.start()
        settled(own, after)
        assert worker.starts == 1
        worker.wait_ready(LIVENESS_SECONDS)
        assert worker.metric("headrace_offset_resets_total") > 0
        assert "the next to be read, is out of range" in worker.output()
