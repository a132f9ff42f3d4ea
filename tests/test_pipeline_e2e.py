"""The whole way, for real: devices over MQTT, the worker's stages, Kafka, and the rows in PostgreSQL."""

from pathlib import Path

import pytest

from tests.faults.worker import realm
from tools.simulator import Plan
from tools.stack import Stack

STAGES = "mqtt,normalizer,ingestor,caching"


@pytest.mark.stack
def test_everything_acknowledged_is_stored_or_a_dead_letter(stack: Stack, tmp_path: Path) -> None:
    """500 messages, some sent twice, late, or unreadable: none is missing, none is there twice, order is kept."""
    with realm(stack, tmp_path, STAGES=STAGES) as own:
        worker = own.worker().start()
        plan = Plan(devices=40, seed=7, rate=0, messages=500, duplicates=0.2, poison=0.05, late=0.1)
        fleet = own.fleet(plan)
        fleet.start()
        assert fleet.join(120)
        report = own.settle(fleet)
        assert report.clean, f"{report.text()}\n{worker.tail()}"
        assert report.acknowledged == 500
        assert report.stored + report.dead_lettered == 500
        assert report.dead_lettered > 0
        worker.wait(lambda: worker.metric("headrace_in_flight") == 0, "idle")
        assert worker.metric("headrace_dead_letters_total", stage="normalizer") > 0
        assert worker.stop() == 0


@pytest.mark.stack
def test_killed_worker_loses_nothing(stack: Stack, tmp_path: Path) -> None:
    """SIGKILL in the middle of 2,000 messages; after the next start all of them are accounted for."""
    with realm(stack, tmp_path, STAGES=STAGES) as own:
        worker = own.worker().start()
        fleet = own.fleet(Plan(devices=40, seed=8, rate=500, messages=2000, poison=0.01))
        fleet.start()
        worker.wait(lambda: fleet.acknowledged > 700, "under load")
        worker.kill()
        assert worker.exit_code == -9
        worker.start()
        assert fleet.join(120)
        report = own.settle(fleet)
        assert report.ok, f"{report.text()}\n{worker.tail()}"
        assert report.acknowledged == 2000
