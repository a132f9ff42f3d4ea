"""Alarms and their mails through kills, lost folders and a mail server that is away."""

from __future__ import annotations

import asyncio
import json
import random
import re
import shutil
import threading
import time
import urllib.request
from collections import Counter
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from aiokafka import AIOKafkaProducer

import settings
from streams.messages import Reading, encode
from tests.faults.support import LIVENESS_SECONDS, wait_for
from tests.faults.worker import Realm, realm
from tools.simulator import Plan
from tools.stack import Stack

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]

DEVICES = 12
CONFIG = Path(__file__).parents[2] / "config"
#: A transition as a subject and a digest's line tell it.
LINE = re.compile(r"\[(?P<kind>[A-Z]+)\] (?P<device>d\d\d):")
RULES = """
alarms:
  - id: storm
    tag: storm
    index: T
    math_operator: ">"
    threshold: 40
    level: CRITICAL
    recipients: [{recipient}]
"""


class Storm(threading.Thread):
    """Devices whose readings go over the threshold and back, again and again, straight to ``iot_validated_data``."""

    def __init__(self, own: Realm, *, every_seconds: float = 2.0) -> None:
        super().__init__(daemon=True)
        self.own = own
        self.cycles = 0
        self.failure: BaseException | None = None
        self._every = every_seconds
        self._end = threading.Event()
        self._at = datetime.now(UTC) - timedelta(hours=1)

    def run(self) -> None:
        """Play until :meth:`end`."""
        try:
            asyncio.run(self._play())
        except BaseException as exc:
            self.failure = exc

    def end(self) -> int:
        """Stop after a whole cycle; returns how many there were."""
        self._end.set()
        self.join(LIVENESS_SECONDS)
        assert self.failure is None, self.failure
        return self.cycles

    def play(self, *values: float) -> None:
        """Have every device send these values, and return once Kafka has them."""
        asyncio.run(self._send(*values))

    async def _play(self) -> None:
        while not self._end.is_set():
            await self._send(50.0, 20.0)
            self.cycles += 1
            await asyncio.sleep(self._every)

    async def _send(self, *values: float) -> None:
        producer = AIOKafkaProducer(bootstrap_servers=self.own.env["KAFKA_BOOTSTRAP_SERVERS"])
        await producer.start()
        try:
            for value in values:
                self._at += timedelta(seconds=1)
                for number in range(DEVICES):
                    device = f"d{number:02}"
                    reading = Reading(
                        request_id=f"{device}-{self._at.timestamp():.0f}",
                        timestamp=self._at,
                        device_id=device,
                        index="T",
                        values=[value],
                        labels=["t"],
                        display_names=["t"],
                        metadata={"units": ["°C"], "profile": "plain_json"},
                    )
                    topic = self.own.env["TOPIC_PREFIX"] + "iot_validated_data"
                    await producer.send(topic, encode(reading), key=device.encode())
            await producer.flush()
        finally:
            await producer.stop()


def prepared(stack: Stack, folder: Path, stages: str, **over: str) -> Any:
    """Return a realm with the rule and its devices, and mails at any rate unless ``over`` says otherwise."""
    config = folder / "config"
    shutil.copytree(CONFIG, config)
    devices = "".join(f'  - {{device_id: "d{number:02}", tags: [storm]}}\n' for number in range(DEVICES))
    (config / "devices.yaml").write_text(f"devices:\n{devices}")
    own = realm(
        stack,
        folder,
        STAGES=stages,
        CONFIG_PATH=str(config),
        **{"MAIL_RATE_PER_MINUTE": "100000", "MAIL_RATE_PER_RECIPIENT_PER_MINUTE": "100000", **over},
    )
    (config / "alarms.yaml").write_text(RULES.format(recipient=recipient(folder)))
    return own


def recipient(folder: Path) -> str:
    """Return the address that this test's mails go to."""
    return f"{re.sub('[^a-z0-9]', '-', folder.name.lower())}@example.org"


def inbox(own: Realm) -> list[dict[str, Any]]:
    """Return the mails of this test, in the order in which they came."""
    with urllib.request.urlopen(f"{own.stack.env['INBOX_URL']}/messages.json", timeout=30) as answer:  # noqa: S310 - the stack's own page
        return [mail for mail in json.load(answer) if recipient(own.folder) in mail["to"]]


def mails(own: Realm) -> list[tuple[str, str]]:
    """Return device and transition of each mail of this test, in the order in which they came."""
    told = []
    for mail in inbox(own):
        device = re.search(r"\bd\d\d\b", mail["subject"])
        assert device is not None, mail["subject"]
        told.append((device[0], dict(mail["headers"])["X-Headrace-Transition"]))
    return told


def distinct(own: Realm) -> int:
    """Return how many transitions have been mailed."""
    return len(set(mails(own)))


def check_order(told: list[tuple[str, str]]) -> None:
    """Each device's transitions, as they were first told, alternate between opening and closing of one alarm."""
    for number in range(DEVICES):
        device = f"d{number:02}"
        first = list(dict.fromkeys(transition for name, transition in told if name == device))
        alarms, kinds = zip(*(transition.rsplit("-", 1) for transition in first), strict=True)
        assert kinds == ("opened", "resolved") * (len(kinds) // 2), (device, kinds)
        assert alarms[::2] == alarms[1::2], device


def test_a_storm_with_a_worker_killed_again_and_again(breakable: Stack, tmp_path: Path, short: bool, seed: int) -> None:
    """Each transition is mailed at least once, in order, and at most once more for each kill."""
    rng = random.Random(seed)
    kills = 5 if short else 20
    with prepared(breakable, tmp_path, "alarms,mailer") as own:
        worker = own.worker().start()
        storm = Storm(own)
        storm.start()
        for _ in range(kills):
            before = distinct(own)
            wait_for("mails go out", lambda before=before: distinct(own) > before)
            time.sleep(rng.uniform(0.0, 2.0))
            worker.kill()
            worker.start()
        cycles = storm.end()
        everything = 2 * cycles * DEVICES
        wait_for("every transition is mailed", lambda: distinct(own) >= everything, 2 * LIVENESS_SECONDS)
        told = mails(own)
        counts = Counter(told)
        assert len(counts) == 2 * cycles * DEVICES
        print(f"{cycles} cycles, {len(counts)} transitions, {len(told) - len(counts)} repeated, {kills} kills")
        assert max(counts.values()) <= 1 + kills
        # One mail at a time is on its way, and its record is safe before the next one goes.
        assert len(told) - len(counts) <= kills
        check_order(told)


def test_the_table_comes_back_from_its_changelog(breakable: Stack, tmp_path: Path) -> None:
    """The folder of a worker is deleted: its open alarms are known again, told no second time, and resolve."""
    with prepared(breakable, tmp_path, "alarms,mailer") as own:
        worker = own.worker().start()
        storm = Storm(own)
        storm.play(50.0)
        wait_for("every alarm is open", lambda: distinct(own) == DEVICES)
        assert worker.stop() == 0
        shutil.rmtree(own.env["DATA_DIR"])
        worker.start()
        storm.play(55.0)
        storm.play(20.0)
        wait_for("every alarm is resolved", lambda: distinct(own) >= 2 * DEVICES)
        told = mails(own)
        assert len(told) == len(set(told)) == 2 * DEVICES
        check_order(told)


class Told(NamedTuple):
    """What the mails of a test say: how many transitions; the kinds of each device's in the order told; how many
    digests there were; when each mail came.

    A digest lists 500 and counts the rest: an empty kind stands where a device's transitions may be missing.
    """

    transitions: int
    kinds: dict[str, list[str]]
    digests: int
    received: list[datetime]


def read_all(own: Realm) -> Told:
    """Read mails and digests, each once however often it came."""
    count = digests = 0
    kinds: dict[str, list[str]] = {f"d{number:02}": [] for number in range(DEVICES)}
    unique = {dict(mail["headers"])["Message-ID"]: mail for mail in reversed(inbox(own))}
    ordered = sorted(unique.values(), key=lambda mail: mail["id"])
    for mail in ordered:
        lines = held = [mail["subject"]]
        if "X-Headrace-Transition" not in dict(mail["headers"]):
            digests += 1
            lines = [line for line in mail["text"].splitlines() if LINE.search(line)]
            held = lines + [""] * (int(mail["subject"].split()[0]) - len(lines))
        count += len(held)
        for line in lines:
            found = LINE.search(line)
            assert found is not None, line
            kinds[found["device"]].append(found["kind"])
        if len(held) > len(lines):
            for told in kinds.values():
                told.append("")
    return Told(count, kinds, digests, [datetime.fromisoformat(mail["received"]) for mail in inbox(own)])


@pytest.fixture
def outage_seconds(short: bool) -> float:
    """How long the mail server is away: ten minutes, 20 s in the short form, or ``FAULTS_OUTAGE_SECONDS``."""
    return float(settings.environment().get("FAULTS_OUTAGE_SECONDS") or (20 if short else 600))


def test_the_mail_server_away_under_load(breakable: Stack, tmp_path: Path, outage_seconds: float) -> None:
    """Rows and cache go on while mails cannot; afterwards everything is told, in order, under the rate."""
    stages = "mqtt,normalizer,ingestor,caching,alarms,mailer"
    rate = 30
    limits = {
        "MAIL_RATE_PER_MINUTE": "60",
        "MAIL_RATE_PER_RECIPIENT_PER_MINUTE": str(rate),
        "MAIL_DIGEST_SECONDS": "20",
    }
    with prepared(breakable, tmp_path, stages, **limits) as own:
        worker = own.worker().start()
        fleet = own.fleet(Plan(seconds=outage_seconds + 20, rate=100))
        fleet.start()
        storm = Storm(own, every_seconds=3.0)
        storm.start()
        wait_for("a first mail", lambda: inbox(own))

        def forwarded(stage: str) -> float:
            return worker.metric("headrace_forwarded_total", stage=stage) or 0

        smtp = breakable.part("smtp")
        smtp.kill()
        stored, cached = forwarded("ingestor"), forwarded("caching")
        begin = time.monotonic()
        enough = 20 * outage_seconds
        patience = LIVENESS_SECONDS + outage_seconds
        wait_for("rows during the outage", lambda: forwarded("ingestor") > stored + enough, patience)
        wait_for("cache during the outage", lambda: forwarded("caching") > cached + enough, patience)
        time.sleep(max(0.0, begin + outage_seconds - time.monotonic()))
        assert any("mailer.smtp" in reason for reason in worker.failing()), worker.failing()
        assert worker.alive
        smtp.start()
        cycles = storm.end()
        everything = 2 * cycles * DEVICES
        wait_for("every transition is told", lambda: read_all(own).transitions >= everything, 2 * LIVENESS_SECONDS)
        told = read_all(own)
        mails = len(told.received)
        print(f"{outage_seconds:.0f} s: {everything} transitions in {mails} mails, {told.digests} of them digests")
        assert told.transitions == everything
        assert told.digests
        for device, kinds in told.kinds.items():
            for before, after in pairwise(["RESOLVED", *kinds]):
                assert before != after or not before, (device, kinds)
        # A bucket holds a minute's mails, so that no minute sees more than two; what each partition had begun when the
        # server went had its token long before, and one answer may be lost.
        minute = max(sum(0 <= (other - at).total_seconds() < 60 for other in told.received) for at in told.received)
        assert minute <= 2 * rate + 4 + 1
        assert fleet.join(LIVENESS_SECONDS)
        report = own.settle(fleet)
        assert report.ok, report.text()
