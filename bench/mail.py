"""From a device's message over its threshold to the mail in the SMTP server, at 500 messages/s.

The fleet of :mod:`bench.rows` (MQTT at QoS 1, Fluxor frames and plain JSON) with 40 devices more, of which one goes
over its threshold, or back, twice a second. One worker runs mqtt, normalizer, ingestor, caching, alarms and mailer;
each mail has its chart. The clock runs from the publish to the end of DATA in the server. The steps in between are
taken from the timestamps of the records in Kafka, which the producers set when they take a record up.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import shutil
import statistics
import tempfile
import time
import urllib.request
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition

from bench import report
from bench.child import BenchError, cpu_seconds
from bench.rows import WARM_UP_SECONDS, Fleet
from bench.work import PARTITIONS
from tools.stack import Stack
from tools.worker import Worker

CONFIG = Path(__file__).resolve().parent.parent / "config"
STAGES = "mqtt,normalizer,ingestor,caching,alarms,mailer"
PREFIX = "mail_"
DEVICES = 40
TRANSITIONS_PER_SECOND = 2
PATIENCE_SECONDS = 60.0
RULE = """alarms:
  - {id: heat, profile: plain_json, index: heat, math_operator: ">", threshold: 40, recipients: [bench@example.org]}
"""
DEVICE = re.compile(r"\bheat-\d+\b")
STEPS = ("publish → iot_raw_data", "→ iot_validated_data", "→ iot_alerts", "→ DATA")

#: Moments (epoch seconds) of each device, in order.
Moments = dict[str, list[float]]


class HeatedFleet(Fleet):
    """The fleet of ``rows`` with devices among it that change sides of their threshold at known times."""

    def __init__(self, url: str, rate: int) -> None:
        super().__init__(url, rate)
        self.sent: Moments = defaultdict(list)

    def heat(self, number: int) -> None:
        """Have the device whose turn it is send a value on the other side of its threshold."""
        device = f"heat-{number % DEVICES}"
        value = 20.0 if number // DEVICES % 2 else 50.0
        now = time.time()
        body = {"ts": datetime.fromtimestamp(now, UTC).isoformat(), "heat": value + number / 1000}
        self.sent[device].append(now)
        self.client.publish(f"devices/{device}/telemetry", json.dumps(body).encode(), qos=1)

    def play(self, seconds: float, first: int) -> int:
        """Publish for that long, changing sides from transition ``first`` on; returns the number of the next one."""
        for number in range(first, first + int(seconds * TRANSITIONS_PER_SECOND)):
            self.publish(1 / TRANSITIONS_PER_SECOND)
            self.heat(number)
        return first + int(seconds * TRANSITIONS_PER_SECOND)


def received(stack: Stack) -> Moments:
    """Return when the server had each device's mails."""
    with urllib.request.urlopen(f"{stack.env['INBOX_URL']}/messages.json", timeout=30) as answer:  # noqa: S310
        mails = json.load(answer)
    found: Moments = defaultdict(list)
    for mail in mails:
        device = DEVICE.search(mail["subject"])
        if device is not None:
            found[device[0]].append(datetime.fromisoformat(mail["received"]).timestamp())
    return found


def taken_up(stack: Stack, topic: str) -> Moments:
    """Return the timestamps of the records of each heated device, in order."""

    async def read() -> Moments:
        found: Moments = defaultdict(list)
        consumer = AIOKafkaConsumer(bootstrap_servers=stack.env["KAFKA_BOOTSTRAP_SERVERS"], enable_auto_commit=False)
        async with consumer:
            partitions = [TopicPartition(PREFIX + topic, number) for number in range(PARTITIONS)]
            consumer.assign(partitions)
            ends = await consumer.end_offsets(partitions)
            for tp, first in (await consumer.beginning_offsets(partitions)).items():
                consumer.seek(tp, first)
            while any([await consumer.position(tp) < ends[tp] for tp in partitions]):
                for records in (await consumer.getmany(timeout_ms=500)).values():
                    for record in records:
                        key = (record.key or b"").decode()
                        if DEVICE.fullmatch(key):
                            found[key].append(record.timestamp / 1000)
        return found

    return asyncio.run(read())


def measure(stack: Stack, folder: Path, rate: int, seconds: float) -> dict[str, Any]:
    """Publish, wait for the mails, and compare."""
    config = folder / "config"
    shutil.copytree(CONFIG, config)
    (config / "alarms.yaml").write_text(RULE)
    env = {**stack.env, "STAGES": STAGES, "APP_ID": "mail", "TOPIC_PREFIX": PREFIX, "CONFIG_PATH": str(config)}
    env |= {"MAIL_RATE_PER_MINUTE": "100000", "MAIL_RATE_PER_RECIPIENT_PER_MINUTE": "100000"}
    env |= {"BROKER_PROFILE": "resilient"}
    worker = Worker({**env, "DATA_DIR": str(folder / "data")}, log=folder / "worker.log")
    fleet = HeatedFleet(stack.env["MQTT_URL"], rate)
    try:
        worker.start()
        pid = worker.pid or 0
        first = fleet.play(WARM_UP_SECONDS, 0)
        cpu = cpu_seconds(pid)
        count = fleet.play(seconds, first)
        cpu = cpu_seconds(pid) - cpu
        until = time.monotonic() + PATIENCE_SECONDS
        while sum(map(len, received(stack).values())) < count:
            if time.monotonic() > until or worker.pid is None:
                raise BenchError(f"{sum(map(len, received(stack).values()))} of {count} mails\n{worker.tail()}")
            time.sleep(0.5)
    finally:
        fleet.close()
        worker.stop()
    places = [fleet.sent, *(taken_up(stack, f"iot_{name}") for name in ("raw_data", "validated_data", "alerts"))]
    places.append(received(stack))
    journeys: list[tuple[float, ...]] = []
    for device in fleet.sent:
        moments = [place[device] for place in places]
        if len(set(map(len, moments))) != 1:
            raise BenchError(f"{device}: {[len(found) for found in moments]} messages, records and mails")
        journeys += zip(*moments, strict=True)
    journeys = sorted(journeys)[first:]
    delays = sorted((journey[-1] - journey[0]) * 1000 for journey in journeys)
    steps = {
        name: statistics.median((journey[n + 1] - journey[n]) * 1000 for journey in journeys)
        for n, name in enumerate(STEPS)
    }
    return {
        "rate": rate,
        "seconds": seconds,
        "mails": len(delays),
        "median_ms": statistics.median(delays),
        "p95_ms": statistics.quantiles(delays, n=100)[94],
        "max_ms": delays[-1],
        "steps_median_ms": steps,
        "cpu_share_of_a_core": cpu / seconds,
        "publisher_worst_lag_ms": fleet.worst_lag * 1000,
    }


def run(options: argparse.Namespace) -> None:
    """Measure, print, write."""
    seconds = 10.0 if options.quick else options.seconds or 60.0
    facts = report.machine()
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as name:
        stack = Stack.temporary(("kafka", "postgresql", "valkey", "mqtt", "smtp"), report=print)
        try:
            stack.start()
            found = measure(stack, Path(name), options.rate, seconds)
        finally:
            stack.stop(discard=True)
    rows = [("median", f"{found['median_ms']:.0f}"), ("95th percentile", f"{found['p95_ms']:.0f}")]
    rows.append(("longest", f"{found['max_ms']:.0f}"))
    rows += [(f"median {step}", f"{value:.0f}") for step, value in found["steps_median_ms"].items()]
    body = report.table((f"device to mail at {found['rate']} messages/s", "ms"), rows)
    body += (
        f"\n\n{found['mails']} mails in {seconds:.0f} s, each with its chart; Kafka, PostgreSQL, Valkey, MQTT broker,"
        f" mail server, publisher and worker share the machine. The worker ({STAGES.replace(',', ', ')}) took"
        f" {found['cpu_share_of_a_core']:.0%} of a core."
    )
    report.publish("mail-quick" if options.quick else "mail", "Device to mail", body, found, facts)


def arguments(_parser: argparse.ArgumentParser) -> None:
    """Take the rate and the seconds of ``rows``."""
