"""What is lost: the same Faust agent on Faust's own transport and on Headrace's, broken in the same ways.

Raw topic, agent, output topic on Apache Kafka, four partitions. A writer (acks=all, idempotent) numbers its messages
per device and keeps those that Kafka has acknowledged to it. When nothing moves any more: acknowledged minus (output
and dead letters) is *lost*; records beyond the first of a message are *copies*. The app is
``bench/rivals/forwarder.py``, on either side the same but for ``app.transport = …``; plain Faust runs in the
environment of the rivals.

A worker that ends by itself is started again, as a supervisor would; one that makes no progress for ``HUNG_SECONDS``
with work before it, or does not end on SIGTERM within ``END_SECONDS``, is killed and, where the scenario goes on,
started again: the table says so. ``--seed`` decides when things break.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bench import report
from bench.child import BenchError, ensure_rivals
from bench.kafka import Broker
from bench.ledger import Load, Tally, read_keys, tally
from bench.rivals.forwarder import Job
from bench.work import ROOT
from tools.stack import Stack

SIDES = {"faust": "plain Faust", "headrace": "Headrace"}
#: No output and no commit for so long, with work before it: hung.
HUNG_SECONDS = 90.0
#: How long a worker may take to end on SIGTERM.
END_SECONDS = 60.0
#: Nothing new for so long, and all committed: quiet.
QUIET_SECONDS = 8.0
#: A worker that has to be killed this often is given up.
MOST_HELP = 3


class Process:
    """One worker: started, signalled and ended by its id."""

    def __init__(self, command: list[str], log: Path) -> None:
        with log.open("ab") as output:
            self._child = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )

    @property
    def pid(self) -> int:
        """The process id."""
        return self._child.pid

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._child.poll() is None

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        if self.alive:
            self._child.kill()
        self._child.wait(20)

    def terminate(self) -> bool:
        """SIGTERM; tell whether it ended within ``END_SECONDS``, and SIGKILL where it did not."""
        if self.alive:
            self._child.send_signal(signal.SIGTERM)
        try:
            self._child.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            return False
        return True


class Run:
    """One scenario on one side: topics, writer, workers, and what had to be done for them by hand."""

    def __init__(self, course: Course, name: str, side: str, **options: Any) -> None:
        self.course = course
        self.rng = random.Random(f"{course.seed} {name}")
        self.folder = course.folder / f"{name}-{side}"
        self.folder.mkdir()
        self.job = Job(
            transport=side,
            bootstrap=course.broker.bootstrap,
            source=f"{name}-{side}-in",
            target=f"{name}-{side}-out",
            dead_letters=f"{name}-{side}-errors",
            group=f"{name}-{side}",
            folder=str(self.folder),
            **options,
        )
        course.broker.create(self.job.source, self.job.target, self.job.dead_letters)
        self.load: Load | None = None
        self.workers: list[Process] = []
        self.notes: list[str] = []
        self.ended_by_itself = 0
        self.hung = 0
        self.not_ended = 0

    # -- what scenarios are made of

    def write(self, count: int, rate: float = 100.0) -> None:
        """Begin to write."""
        self.load = Load(self.job.bootstrap, self.job.source, count=self.course.scaled(count), rate=rate)
        self.load.start()

    def start(self) -> Process:
        """Start a worker and do not wait for it."""
        description = json.dumps(dataclasses.asdict(self.job))
        command = [self.course.interpreters[self.job.transport], "-m", "bench.rivals.forwarder", description]
        worker = Process(command, self.folder / "worker.log")
        self.workers.append(worker)
        return worker

    def begun(self, worker: Process, seconds: float = HUNG_SECONDS) -> float | None:
        """Wait until ``worker`` has begun with a message; return how long that took, None when it has not."""
        started = time.monotonic()
        while not (self.folder / f"begun-{worker.pid}").exists():
            if time.monotonic() - started > seconds or not worker.alive:
                return None
            time.sleep(0.05)
        return time.monotonic() - started

    def slow_ones(self) -> set[str]:
        """Return the names of slow messages that were begun."""
        return {path.name for path in self.folder.glob("slow-*")}

    def next_slow(self) -> bool:
        """Wait until another slow message is in hand; False when none comes any more."""
        known = self.slow_ones()
        until = time.monotonic() + HUNG_SECONDS
        while time.monotonic() < until:
            if self.slow_ones() - known:
                return True
            time.sleep(0.05)
        return False

    def sleep(self, low: float, high: float) -> None:
        """Wait for a time that the seed decides."""
        time.sleep(self.rng.uniform(low, high))

    def terminate(self, worker: Process) -> None:
        """SIGTERM; one that does not end is killed, and that is noted, as is one that had ended by itself."""
        self.ended_by_itself += not worker.alive
        if not worker.terminate():
            self.not_ended += 1

    # -- the end

    def settle(self) -> Tally:
        """Wait for the end of the writing and of the work; return what became of all messages."""
        assert self.load is not None
        self.load.finish(600)
        broker, job = self.course.broker, self.job
        ends = broker.ends(job.source)
        helped = 0
        seen: Any = None
        since = time.monotonic()
        while True:
            state = (broker.committed(job.group, job.source), broker.ends(job.target), broker.ends(job.dead_letters))
            now = time.monotonic()
            if state != seen:
                seen, since = state, now
            if state[0] == ends and now - since > QUIET_SECONDS:
                break
            alive = [worker for worker in self.workers if worker.alive]
            hung = now - since > HUNG_SECONDS
            if hung or not alive:
                if helped == MOST_HELP:
                    self.notes.append("given up")
                    break
                helped += 1
                self.hung += hung
                self.ended_by_itself += not alive
                for worker in alive:
                    worker.kill()
                self.start()
                since = time.monotonic()
            time.sleep(0.5)
        for worker in self.workers:
            if worker.alive:
                self.terminate(worker)
        outputs, letters = (broker.run(read_keys(job.bootstrap, topic)) for topic in (job.target, job.dead_letters))
        return tally(self.load.acknowledged, outputs, letters)

    def close(self) -> None:
        """End what still runs."""
        for worker in self.workers:
            worker.kill()

    def worker_text(self) -> str:
        """Return what had to be done for the worker besides what the scenario did to it."""
        told = []
        if self.ended_by_itself:
            told.append(f"ended by itself {self.ended_by_itself} ×, started again")
        if self.hung:
            told.append(f"hung {self.hung} ×, killed after {HUNG_SECONDS:.0f} s and started again")
        if self.not_ended:
            told.append(f"did not end on SIGTERM {self.not_ended} ×, killed after {END_SECONDS:.0f} s")
        return "; ".join([*(told or ["lived"]), *self.notes])


def agent_raises(run: Run) -> None:
    """1: in 300, one message can never be handled, another one fails once (what it needs is away for a moment)."""
    run.start()
    run.write(3000)


def killed_with_the_head_in_flight(run: Run) -> None:
    """2: SIGKILL while the head is in a slow handler and the second body has gone on; started again at once."""
    worker = run.start()
    run.write(6000)
    for _ in range(run.course.rounds(4)):
        if not run.next_slow():
            break
        run.sleep(5, 8)
        worker.kill()
        worker = run.start()


def broker_killed(run: Run) -> None:
    """3: the broker is killed twice in mid-stream, away for some seconds, and started again on its data."""
    run.start()
    run.write(4500)
    part = run.course.stack.part("kafka")
    for _ in range(run.course.rounds(2)):
        run.sleep(6, 10)
        part.kill()
        run.sleep(3, 6)
        part.start()


def revoked(run: Run) -> None:
    """7: a second worker joins while a handler of the first one takes 15 s, works for a while, and leaves (SIGTERM)."""
    run.start()
    run.write(6000)
    waits = []
    for _ in range(run.course.rounds(3)):
        if not run.next_slow():
            break
        run.sleep(0.5, 2)
        second = run.start()
        waited = run.begun(second)
        waits.append("never" if waited is None else f"{waited:.0f} s")
        run.sleep(2, 5)
        run.terminate(second)
    run.notes.append(f"the second worker had work after {', '.join(waits)}")


def terminated(run: Run) -> None:
    """30: SIGTERM under load, started again, five times."""
    worker = run.start()
    run.write(8000, rate=200.0)
    for _ in range(run.course.rounds(5)):
        run.begun(worker)
        run.sleep(1, 4)
        run.terminate(worker)
        worker = run.start()


class Scenario(NamedTuple):
    """What the table calls it, the fields of the job, and what is done."""

    title: str
    options: dict[str, Any]
    play: Callable[[Run], None]


SCENARIOS = {
    "1": Scenario("1 an agent raises", {"never_every": 300, "once_every": 300}, agent_raises),
    "2": Scenario(
        "2 SIGKILL, head in flight, concurrency 2",
        {"concurrency": 2, "slow_every": 1200, "slow_seconds": 10.0},
        killed_with_the_head_in_flight,
    ),
    "3": Scenario("3 broker killed in mid-stream", {}, broker_killed),
    "7": Scenario(
        "7 revocation during a slow handler", {"concurrency": 2, "slow_every": 1200, "slow_seconds": 15.0}, revoked
    ),
    "30": Scenario("30 SIGTERM under load", {}, terminated),
}


class Course:
    """The stack, the two interpreters and the seed that all runs share."""

    def __init__(self, stack: Stack, folder: Path, seed: int, *, quick: bool) -> None:
        self.stack = stack
        self.folder = folder
        self.seed = seed
        self.quick = quick
        self.broker = Broker(stack.env["KAFKA_BOOTSTRAP_SERVERS"])
        self.interpreters = {"faust": ensure_rivals(), "headrace": sys.executable}

    def scaled(self, count: int) -> int:
        """Return how many messages to write."""
        return count // 2 if self.quick else count

    def rounds(self, count: int) -> int:
        """Return how often something is broken."""
        return max(1, count // 2) if self.quick else count

    def play(self, name: str, side: str) -> dict[str, Any]:
        """Play one scenario on one side."""
        scenario = SCENARIOS[name]
        run = Run(self, f"scenario-{name}", side, **scenario.options)
        try:
            scenario.play(run)
            found = run.settle()
        except BaseException:
            log = run.folder / "worker.log"
            if log.exists():
                print("\n".join(log.read_text(errors="replace").splitlines()[-30:]), flush=True)
            raise
        finally:
            run.close()
        result = {**dataclasses.asdict(found), "worker": run.worker_text(), "hung": run.hung}
        print(f"{scenario.title}, {SIDES[side]}: {result}", flush=True)
        return result


def table(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Return the table, a row for each scenario and side."""
    header = ("scenario", "", "acknowledged", "lost", "dead letters", "copies", "the worker")
    rows = []
    for name, sides in found.items():
        for side, one in sides.items():
            rows.append(
                (
                    SCENARIOS[name].title,
                    SIDES[side],
                    f"{one['acknowledged']:,}",
                    f"**{one['lost']:,}**",
                    f"{one['dead_lettered']:,}",
                    f"{one['copies']:,}",
                    one["worker"],
                )
            )
    return report.table(header, rows)


def run(options: argparse.Namespace) -> None:
    """Play all scenarios on both sides, print, write."""
    facts = report.machine()
    found: dict[str, dict[str, dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as folder:
        stack = Stack.temporary(("kafka",), report=print)
        try:
            stack.start()
            course = Course(stack, Path(folder), options.seed, quick=options.quick)
            for name in options.scenarios or SCENARIOS:
                found[name] = {side: course.play(name, side) for side in SIDES}
            course.broker.close()
        finally:
            stack.stop(discard=True)
    if lost := {name: sides["headrace"]["lost"] for name, sides in found.items() if sides["headrace"]["lost"]}:
        raise BenchError(f"Headrace has lost messages: {lost}\n{table(found)}")
    body = (
        f"The same Faust agent on both transports, raw topic to output topic on Apache Kafka, seed {options.seed}.\n\n"
        f"{table(found)}"
    )
    name = "losses-quick" if options.quick else "losses"
    report.publish(name, "What is lost", body, {"seed": options.seed, "scenarios": found}, facts)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    parser.add_argument("--seed", type=int, default=20_261_123, help="decides when things break (default %(default)s)")
    parser.add_argument("--scenarios", nargs="*", choices=list(SCENARIOS), help="only these (default: all)")
