"""A seeded plan mixes faults for as long as it is told to, and every checker holds at its end.

`FAULTS_SECONDS` is how long (short form 30, else 300; 1200 and more for a soak); `FAULTS_SEED` repeats a plan. Each
step is printed before it is done. Memory is sampled and its curve printed: the soak's figures come from here.
"""

from __future__ import annotations

import json
import random
import signal
import time
from collections import defaultdict
from pathlib import Path

import psutil
import pytest

import settings
from tests.faults.support import LIVENESS_SECONDS, settled
from tests.faults.topics import read
from tests.faults.worker import Realm, Worker, realm
from tools.simulator import Plan
from tools.stack import Stack

pytestmark = [pytest.mark.faults, pytest.mark.timeout(7200)]


def unalternating(own: Realm) -> list[str]:
    """Return what is wrong with the alerts of each alarm and device: raised and resolved must take turns."""
    last: dict[tuple[str, str], tuple[str, bool]] = {}
    wrong = []
    for record in sorted(read(own, "iot_alerts"), key=lambda one: (one.partition, one.offset)):
        alert = json.loads(record.value)
        name = (alert["alarm_id"], alert["device_id"])
        now = (alert["id"], alert["is_resolved"])
        # told again, after a crash or as a reminder, it is the same transition
        if last.get(name) == now:
            continue
        before = last.get(name)
        if now[1] and (before is None or before[0] != now[0]):
            wrong.append(f"{name}: {now[0]} resolved, and {before} was the last")
        if not now[1] and before is not None and not before[1]:
            wrong.append(f"{name}: {now[0]} raised while {before[0]} was open")
        last[name] = now
    return wrong


class Mischief:
    """The faults that a plan is made of; each ends what it began."""

    def __init__(self, stack: Stack, workers: list[Worker], rng: random.Random) -> None:
        self.stack = stack
        self.workers = workers
        self.rng = rng
        self.done: dict[str, int] = defaultdict(int)

    def step(self) -> None:
        """Do one thing, chosen by the plan's random numbers."""
        chosen = self.rng.choice(
            [self.kill_worker, self.kill_worker, self.end_worker, self.freeze_worker, self.freeze, self.kill, self.mqtt]
        )
        self.done[chosen.__name__] += 1
        chosen()

    def _worker(self) -> Worker:
        return self.rng.choice(self.workers)

    def _tell(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)

    def _seconds(self, low: float, high: float) -> float:
        return self.rng.uniform(low, high)

    def kill_worker(self) -> None:
        """SIGKILL, and a new process soon."""
        worker, wait = self._worker(), self._seconds(0.1, 2)
        self._tell(f"{worker.name}: SIGKILL, away for {wait:.1f} s")
        worker.kill()
        time.sleep(wait)
        worker.spawn()

    def end_worker(self) -> None:
        """SIGTERM, which must give exit code 0, and a new process."""
        worker = self._worker()
        self._tell(f"{worker.name}: SIGTERM")
        if worker.alive:
            young = not worker.ready()
            worker.signal(signal.SIGTERM)
            code = worker.wait_exit(LIVENESS_SECONDS)
            # one that has not got as far as to handle signals ends by them
            assert code == 0 or (young and code == -signal.SIGTERM), worker.tail()
        worker.spawn()

    def freeze_worker(self) -> None:
        """SIGSTOP, for less or more than a session."""
        worker, wait = self._worker(), self._seconds(1, 9)
        self._tell(f"{worker.name}: SIGSTOP for {wait:.1f} s")
        worker.pause()
        time.sleep(wait)
        worker.resume()

    def freeze(self) -> None:
        """SIGSTOP of a server."""
        name, wait = self.rng.choice(["kafka", "postgresql", "valkey", "mqtt"]), self._seconds(1, 9)
        self._tell(f"{name}: SIGSTOP for {wait:.1f} s")
        self.stack.part(name).pause()
        time.sleep(wait)
        self.stack.part(name).resume()

    def kill(self) -> None:
        """SIGKILL of a server that promises to lose nothing by it."""
        name, wait = self.rng.choice(["kafka", "postgresql", "valkey"]), self._seconds(0.5, 6)
        self._tell(f"{name}: SIGKILL, away for {wait:.1f} s")
        self.stack.part(name).kill()
        time.sleep(wait)
        self.stack.part(name).start()

    def mqtt(self) -> None:
        """An orderly restart of the MQTT broker: killed, mosquitto forgets what it has not written yet."""
        wait = self._seconds(0.5, 4)
        self._tell(f"mqtt: restart, away for {wait:.1f} s")
        self.stack.part("mqtt").stop()
        time.sleep(wait)
        self.stack.part("mqtt").start()


def test_a_random_plan(breakable: Stack, tmp_path: Path, short: bool, seed: int) -> None:
    """Workers and servers are killed, ended and frozen at random: the ledger is clean and every checker holds."""
    seconds = float(settings.environment().get("FAULTS_SECONDS") or (30 if short else 300))
    rng = random.Random(seed)
    with realm(breakable, tmp_path, STAGES="normalizer,ingestor,caching,alarms") as own:
        workers = [own.worker("connector", STAGES="mqtt"), own.worker("worker-1"), own.worker("worker-2")]
        for worker in workers:
            worker.start()
        mischief = Mischief(breakable, workers, rng)
        fleet = own.fleet(Plan(rate=150, poison=0.01, duplicates=0.05, late=0.02), drain_seconds=LIVENESS_SECONDS)
        fleet.start()
        curve: list[str] = []
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(rng.uniform(1, 5))
            mischief.step()
            curve.append(" ".join(_megabytes(worker.pid) for worker in workers))
        fleet.stop()
        for worker in workers:
            worker.start(patience_seconds=LIVENESS_SECONDS)
        settled(own, fleet)
        print(f"steps: {dict(mischief.done)}; memory of each worker in MiB after each: {', '.join(curve)}")
        assert unalternating(own) == []


def _megabytes(pid: int | None) -> str:
    try:
        return str(psutil.Process(pid).memory_info().rss >> 20) if pid else "-"
    except psutil.Error:
        return "-"
