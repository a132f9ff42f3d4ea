"""Workers end in order, at once, or become many and one again: what was drained is committed and not read anew."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from tests.faults.processes import Honcho
from tests.faults.support import LIVENESS_SECONDS, STAGES, oracle, settled, wait_for
from tests.faults.topics import Switches
from tests.faults.worker import realm
from tools.simulator import Plan
from tools.stack import Stack

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_ended_in_order_under_load(breakable: Stack, tmp_path: Path, number: signal.Signals, seed: int) -> None:
    """Ended twice under load: exit code 0, and nothing of what was drained is handled again."""
    rng = random.Random(seed)
    with realm(breakable, tmp_path, STAGES=STAGES, SHUTDOWN_SECONDS="60") as own:
        worker = own.worker().start()
        switches = Switches(own)
        fleet = own.fleet(Plan(messages=6000, rate=500))
        fleet.start()
        for _ in range(2):
            before = fleet.acknowledged
            wait_for("under load", lambda before=before: fleet.acknowledged > before + 500)
            time.sleep(rng.uniform(0.2, 1.5))
            worker.signal(number)
            assert worker.wait_exit(LIVENESS_SECONDS) == 0, worker.tail()
            switches.note()
            worker.start()
        report = settled(own, fleet)
        assert report.kafka_copies == 0, "an orderly connector leaves nothing unacknowledged"
        assert switches.read_anew() == (0, [])


def test_a_second_signal_ends_at_once(breakable: Stack, tmp_path: Path) -> None:
    """The sink hangs, so that the drain would last; a second SIGTERM ends the worker, and nothing is lost."""
    with realm(breakable, tmp_path, STAGES=STAGES, SHUTDOWN_SECONDS="600") as own:
        worker = own.worker().start()
        fleet = own.fleet(Plan(messages=2000, rate=400))
        fleet.start()
        wait_for("rows", lambda: worker.metric("headrace_forwarded_total", stage="ingestor"))
        breakable.part("postgresql").pause()
        wait_for("rows that wait", lambda: worker.metric("headrace_in_flight", stage="ingestor") > 20)
        worker.signal(signal.SIGTERM)
        time.sleep(2)
        assert worker.alive, "the first signal drains"
        worker.signal(signal.SIGTERM)
        worker.wait_exit(60)
        breakable.part("postgresql").resume()
        worker.start()
        settled(own, fleet)


def test_one_worker_then_the_procfile_then_one_worker(breakable: Stack, tmp_path: Path) -> None:
    """One worker, `honcho start`, one worker, all under load: nothing lost, nothing committed is read anew."""
    with realm(breakable, tmp_path) as own, oracle(own) as watch:
        switches = Switches(own)
        fleet = own.fleet(Plan(seconds=60, rate=150, poison=0.005))
        worker = own.worker().start()
        fleet.start()
        wait_for("rows", lambda: worker.metric("headrace_forwarded_total", stage="ingestor") > 300)
        assert worker.stop(LIVENESS_SECONDS) == 0, worker.tail()
        switches.note()
        before = fleet.acknowledged
        with Honcho(own, tmp_path / "honcho.log") as processes:
            processes.wait_ready(LIVENESS_SECONDS)
            wait_for("traffic through the processes", lambda: fleet.acknowledged > before + 1500)
        switches.note()
        worker.start()
        settled(own, fleet)
        again, wrong = switches.read_anew()
        print(f"handled again: {again}, of these committed before: {len(wrong)}")
        assert wrong == []
        assert watch.violations == []
