"""Memory of a worker while a sink is away, and what it takes to come back.

One worker with all stages, ``--load`` messages a second over MQTT from the simulated fleet, some of whose controllers
raise an alarm now and then and clear it. After a warm-up one server is stopped (SIGTERM) for ``--seconds`` and started
again.
Resident memory is read each second; *at the start* is the median of the last ten seconds before the outage, *slope* a
line through the last two thirds of it, when all that is held back by design is there. Membership is kept when every
consumer group has the same member ids after the outage and no client was created anew. *Resumed*: from the server's
first answer to the first message that the stage in question has handled; *caught up*: until no more waits before the
connector and the stages than in the last ten seconds before the outage. At the end the simulator's ledger says whether
what the devices were told is safe is in the database.

``--sinks`` measures some of them; rows that another run of the same length has written are kept.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from aiokafka.admin import AIOKafkaAdminClient

from bench import report
from bench.child import BenchError
from bench.work import ROOT
from tools.simulator import Fleet, Places, Plan, settle
from tools.stack import Stack
from tools.worker import Worker

#: Messages a second unless ``--load`` says otherwise.
RATE = 200.0
#: Length of an outage unless ``--seconds`` says otherwise.
SECONDS = 600.0
#: Each sink: the part of the stack that is stopped, and the stage that cannot go on without it.
SINKS = {
    "database": ("postgresql", "ingestor"),
    "cache": ("valkey", "caching"),
    "mail server": ("smtp", "mailer"),
    "Kafka": ("kafka", "mqtt"),
}
#: Stages with a consumer group of their own.
GROUPS = ("normalizer", "ingestor", "caching", "alarms", "mailer", "commands")
ALLOWED_MIB = 20.0
PATIENCE_SECONDS = 900.0
#: How long the worker may be too busy to answer.
ANSWER_SECONDS = 120.0
#: Status bits that the simulated controllers raise and clear now and then: about one alert in ten seconds for each.
_BITS = ("BIT_ERROR_RTC", "BIT_ERROR_SD_CARD", "BIT_ERROR_MODBUS")
_RULE = """
  - id: {bit}
    profile: fluxor
    index: S
    label: {bit}
    alarm_type: Status
    math_operator: "=="
    threshold: true
    level: WARNING
    recipients: [operators@localhost]
"""


class Moment(NamedTuple):
    """Resident memory of the worker, in MiB, ``at`` seconds after the outage began (negative before)."""

    at: float
    rss_mib: float


def slope(moments: Sequence[Moment]) -> float:
    """Return the slope of the least squares line through ``moments``, in MiB a minute; 0 for fewer than two."""
    if len(moments) < 2:
        return 0.0
    found = statistics.linear_regression([moment.at for moment in moments], [moment.rss_mib for moment in moments])
    return found.slope * 60


def summary(moments: Sequence[Moment], seconds: float) -> dict[str, float]:
    """Return memory at the start of an outage of ``seconds``, its maximum and its end, in MiB, and the slope."""
    before = [moment.rss_mib for moment in moments if -10 <= moment.at < 0]
    during = [moment for moment in moments if 0 <= moment.at <= seconds]
    if not before or not during:
        raise BenchError(f"no samples before or within the outage: {len(before)} and {len(during)}")
    return {
        "start_mib": round(statistics.median(before), 1),
        "max_mib": round(max(moment.rss_mib for moment in during), 1),
        "end_mib": round(statistics.median(moment.rss_mib for moment in during[-10:]), 1),
        "slope_mib_per_minute": round(slope([moment for moment in during if moment.at >= seconds / 3]), 3),
    }


async def members(bootstrap: str, groups: Sequence[str]) -> dict[str, list[str]]:
    """Return the member ids of consumer groups, as the broker knows them."""
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        found = {}
        for group in groups:
            (answer,) = await admin.describe_consumer_groups([group])
            for entry in answer.groups:
                found[entry[1]] = sorted(member[0] for member in entry[5])
        return found
    finally:
        await admin.close()


def mails(inbox_url: str) -> int:
    """Return how many mails the inbox holds; 0 while it is away."""
    try:
        with urllib.request.urlopen(f"{inbox_url}/messages.json", timeout=5) as answer:  # noqa: S310 - the stack's own page
            return len(json.load(answer))
    except OSError:
        return 0


def figure(worker: Worker, name: str, **labels: str) -> float:
    """Return the sum of a metric's samples with these labels; waits for the answer of a worker that is busy.

    Raises BenchError when it has ended, or has not answered for ``ANSWER_SECONDS``.
    """
    until = time.monotonic() + ANSWER_SECONDS
    while not (samples := worker.metrics()):
        if worker.pid is None or time.monotonic() > until:
            raise BenchError(f"the worker has not answered for {ANSWER_SECONDS:.0f} s, or has ended\n{worker.tail()}")
    return sum(value for found, has, value in samples if found == name and labels.items() <= has.items())


class Outage:
    """A stack, a worker and a fleet of its own; one server that goes away."""

    def __init__(self, sink: str, folder: Path, *, rate: float, warm_up_seconds: float, seconds: float) -> None:
        self.rate = rate
        self.sink = sink
        self.part_name, self.stage = SINKS[sink]
        self.warm_up_seconds = warm_up_seconds
        self.seconds = seconds
        self.moments: list[Moment] = []
        #: messages and records that wait, at each moment
        self.waiting: list[float] = []
        self.mails = 0
        self.stack = Stack.temporary()
        config = folder / "config"
        shutil.copytree(ROOT / "config", config)
        (config / "alarms.yaml").write_text("alarms:" + "".join(_RULE.format(bit=bit) for bit in _BITS))
        self.env_over = {
            "CONFIG_PATH": str(config),
            "MAIL_RATE_PER_MINUTE": "100000",
            "MAIL_RATE_PER_RECIPIENT_PER_MINUTE": "100000",
        }
        self.log = folder / "worker.log"

    def run(self) -> dict[str, Any]:
        """Play the outage and return what was found. Raises BenchError when the worker ends."""
        try:
            self.stack.start()
            env = {**self.stack.env, **self.env_over}
            worker = Worker(env, log=self.log, name="the worker")
            fleet = Fleet(Plan(rate=self.rate, hot=None), env["MQTT_URL"], drain_seconds=120)
            try:
                worker.start(patience_seconds=180)
                fleet.start()
                return self._play(worker, fleet, env)
            finally:
                fleet.close()
                worker.stop()
        finally:
            self.stack.stop(discard=True)

    def _play(self, worker: Worker, fleet: Fleet, env: dict[str, str]) -> dict[str, Any]:
        groups = [f"{env.get('APP_ID', 'headrace')}-{stage}" for stage in GROUPS]
        bootstrap = env["KAFKA_BOOTSTRAP_SERVERS"]
        self._watch(worker, fleet, self.warm_up_seconds, -self.warm_up_seconds)
        before = asyncio.run(members(bootstrap, groups))
        if not all(before.values()) or len(before) != len(groups):
            raise BenchError(f"groups without members before the outage: {before}")
        handled = self._handled(worker)
        if not handled:
            raise BenchError(f"stage {self.stage} had nothing to do before the outage\n{worker.tail()}")
        usual = max(self.waiting[-10:])
        part = self.stack.part(self.part_name)
        part.stop()
        self._watch(worker, fleet, self.seconds, 0.0)
        meanwhile = self._handled(worker) - handled
        handled = self._handled(worker)
        part.start()
        back = time.monotonic()
        self._until(worker, lambda: self._handled(worker) > handled, f"{self.stage} goes on")
        resumed = time.monotonic() - back
        self._until(worker, lambda: self._waiting(worker, fleet) <= usual, "all is caught up")
        caught_up = time.monotonic() - back
        after = asyncio.run(members(bootstrap, groups))
        recreations = figure(worker, "headrace_recreations_total")
        fleet.stop()
        if not fleet.join(180):
            raise BenchError("the fleet did not get its last acknowledgements")
        ledger = settle(fleet.book, Places.from_env(env), patience_seconds=60, bound_seconds=600)
        self._until(worker, lambda: figure(worker, "headrace_lag") == 0, "no lag is left")
        print(f"{self.sink}: the ledger\n{ledger.text()}", flush=True)
        return {
            **summary(self.moments, self.seconds),
            "seconds": self.seconds,
            "rate": self.rate,
            "warm_up_seconds": self.warm_up_seconds,
            "handled_meanwhile": meanwhile,
            "waiting_before": usual,
            "waiting_at_the_end": self.waiting[-1],
            "same_members": after == before,
            "recreations": recreations,
            "worker_starts": worker.starts,
            "resumed_seconds": round(resumed, 1),
            "caught_up_seconds": round(caught_up, 1),
            "acknowledged": ledger.acknowledged,
            "missing": len(ledger.missing),
            "duplicate_rows": len(ledger.duplicates),
            "dead_letters": ledger.dead_lettered,
            "mails": mails(env["INBOX_URL"]),
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
            "curve_mib": [round(moment.rss_mib, 1) for moment in self.moments[:: max(1, len(self.moments) // 120)]],
        }

    def _handled(self, worker: Worker) -> float:
        if self.stage == "mqtt":
            return figure(worker, "headrace_connector_acks_total", connector="mqtt")
        if self.stage == "mailer":
            # The stage handles the ticks of its timers too; mails are what counts.
            self.mails = max(self.mails, mails(self.stack.env["INBOX_URL"]))
            return self.mails
        return figure(worker, "headrace_forwarded_total", stage=self.stage)

    @staticmethod
    def _waiting(worker: Worker, fleet: Fleet) -> float:
        """Return the messages that wait for the connector and the records that wait for the stages, roughly."""
        taken = figure(worker, "headrace_connector_acks_total", connector="mqtt")
        return max(0.0, fleet.acknowledged - taken) + figure(worker, "headrace_lag")

    def _watch(self, worker: Worker, fleet: Fleet, seconds: float, begin: float) -> None:
        """Read the worker's memory, and what waits, each second; ``begin`` is the moment of the first reading."""
        started = time.monotonic()
        number = 0
        while (now := time.monotonic() - started) < seconds:
            if worker.pid is None:
                raise BenchError(f"the worker ended by itself\n{worker.tail()}")
            self.moments.append(Moment(begin + now, psutil.Process(worker.pid).memory_info().rss / 2**20))
            self.waiting.append(self._waiting(worker, fleet))
            if number % 30 == 0:
                told = f"{self.moments[-1].rss_mib:.1f} MiB, {self.waiting[-1]:,.0f} wait, {self._handled(worker):,.0f}"
                print(f"{self.sink}: {begin + now:6.0f} s  {told} handled by {self.stage}", flush=True)
            number += 1
            time.sleep(max(0.0, started + number - time.monotonic()))

    @staticmethod
    def _until(worker: Worker, holds: Any, what: str) -> None:
        worker.wait(holds, what, PATIENCE_SECONDS)


def table(found: dict[str, dict[str, Any]]) -> str:
    """Return the table of all outages."""
    header = (
        "away",
        "messages/s",
        "at the start, MiB",
        "highest",
        "at the end",
        "slope, MiB/min",
        "flat within 20",
        "waiting at the end",
        "membership",
        "resumed after",
        "caught up after",
        "acknowledged",
        "missing",
    )
    rows = []
    for sink in SINKS:
        if (one := found.get(sink)) is None:
            continue
        kept = one["same_members"] and not one["recreations"] and one["worker_starts"] == 1
        rows.append(
            (
                f"{sink}, {one['seconds']:.0f} s",
                f"{one['rate']:.0f}",
                f"{one['start_mib']:.0f}",
                f"{one['max_mib']:.0f}",
                f"{one['end_mib']:.0f}",
                f"{one['slope_mib_per_minute']:+.2f}",
                "yes" if one["max_mib"] - one["start_mib"] <= ALLOWED_MIB else "no",
                f"{one['waiting_at_the_end']:,.0f}",
                "kept" if kept else f"not kept ({one['recreations']:.0f} created anew)",
                f"{one['resumed_seconds']:.1f} s",
                f"{one['caught_up_seconds']:.0f} s",
                f"{one['acknowledged']:,}",
                f"{one['missing']:,}",
            )
        )
    return report.table(header, rows)


def earlier(path: Path, seconds: float) -> dict[str, dict[str, Any]]:
    """Return what runs of the same length have written."""
    if not path.exists():
        return {}
    cases: dict[str, dict[str, Any]] = json.loads(path.read_text())["cases"]
    return {sink: one for sink, one in cases.items() if one["seconds"] == seconds}


def run(options: argparse.Namespace) -> None:
    """Measure, print, write."""
    seconds, warm_up = (60.0, 60.0) if options.quick else (options.seconds or SECONDS, options.warm_up)
    facts = report.machine()
    name = "outage-quick" if options.quick else "outage"
    measured: dict[str, dict[str, Any]] = {}
    for sink in options.sinks or SINKS:
        with tempfile.TemporaryDirectory(prefix="headrace-bench-") as folder:
            outage = Outage(sink, Path(folder), rate=options.load, warm_up_seconds=warm_up, seconds=seconds)
            try:
                measured[sink] = outage.run()
            except Exception:
                if outage.log.exists():
                    print("\n".join(outage.log.read_text(errors="replace").splitlines()[-40:]), flush=True)
                raise
    found = {**earlier(report.RESULTS / f"{name}.json", seconds), **measured}
    body = (
        f"All stages in one worker, messages over MQTT, {seconds:.0f} s without the server after {warm_up:.0f} s of "
        f"work.\n\n{table(found)}"
    )
    report.publish(name, "Memory while a sink is away", body, {"cases": found}, facts)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    parser.add_argument("--warm-up", type=float, default=120.0, help="seconds of work before (default %(default)s)")
    parser.add_argument("--load", type=float, default=RATE, help="messages a second (default %(default)s)")
    parser.add_argument("--sinks", nargs="*", choices=list(SINKS), help="only these sinks")
