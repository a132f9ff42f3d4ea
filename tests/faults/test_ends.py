"""Workers end in order, at once, or become many and one again: what was drained is committed and not read anew."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from tests.faults.processes import Honcho
from tests.faults.support import LIVENESS_SECONDS, STAGES, settled, wait_for
from tests.faults.topics import Switches
from tests.faults.worker import Worker, realm
from tools.simulator import Plan
from tools.stack import Stack

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]


#: What a revocation waits with profile `fast`, and what closing clients takes, generously.
_DRAIN_SECONDS = 3.0
_CLOSING_SECONDS = 30.0


def test_ended_in_order_under_load(breakable: Stack, tmp_path: Path, seed: int) -> None:
    """Ended by TERM, INT and HUP under load: exit code 0, and nothing of what was drained is handled again."""
    rng = random.Random(seed)
    with realm(breakable, tmp_path, STAGES=STAGES, SHUTDOWN_SECONDS="60") as own:
        worker = own.worker().start()
        switches = Switches(own)
        fleet = own.fleet(Plan(rate=400))
        fleet.start()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            before = fleet.acknowledged
            wait_for("under load", lambda before=before: fleet.acknowledged > before + 500)
            time.sleep(rng.uniform(0.2, 1.5))
            worker.signal(number)
            assert worker.wait_exit(LIVENESS_SECONDS) == 0, worker.tail()
            switches.note()
            worker.start()
        fleet.stop()
        report = settled(own, fleet)
        assert report.kafka_copies == 0, "an orderly connector leaves nothing unacknowledged"
        assert switches.read_anew() == (0, [])


def test_a_sink_that_hangs_at_the_end(breakable: Stack, tmp_path: Path) -> None:
    """The end waits SHUTDOWN_SECONDS for a sink that hangs, and no longer; a second signal ends the wait at once."""
    with realm(breakable, tmp_path, STAGES=STAGES) as own:
        fleet = own.fleet(Plan(rate=100))
        fleet.start()

        def hanging(shutdown_seconds: str) -> Worker:
            worker = own.worker(f"drains-{shutdown_seconds}", SHUTDOWN_SECONDS=shutdown_seconds).start()
            wait_for("rows", lambda: worker.metric("headrace_forwarded_total", stage="ingestor"))
            breakable.part("postgresql").pause()
            wait_for("rows that wait", lambda: worker.metric("headrace_in_flight", stage="ingestor") > 20)
            worker.signal(signal.SIGTERM)
            return worker

        worker = hanging("1")
        assert worker.wait_exit(_CLOSING_SECONDS) == 0, "the bound is over: the rest comes again"
        assert "still in flight after 1.0 s" in worker.output(), worker.tail()
        breakable.part("postgresql").resume()

        worker = hanging("600")
        time.sleep(_DRAIN_SECONDS + 3)
        assert worker.alive, "the first signal drains, for longer than a revocation would"
        worker.signal(signal.SIGTERM)
        assert worker.wait_exit(_CLOSING_SECONDS) == 128 + signal.SIGTERM, worker.tail()
        breakable.part("postgresql").resume()
        fleet.stop()
        worker.start()
        settled(own, fleet)


def test_one_worker_then_the_procfile_then_one_worker(breakable: Stack, tmp_path: Path) -> None:
    """One worker, `honcho start`, one worker, all under load: nothing lost, nothing committed is read anew."""
    with realm(breakable, tmp_path) as own:
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
