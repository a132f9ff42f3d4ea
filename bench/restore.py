"""How long a worker of the alarms stage takes to have its states back, and how much memory that costs.

The changelog of the table is filled with what the stage's own engine stores: 10,000 devices, each reading of ten
values under ten rules, so a hundred states a device, one in a hundred of them an open alarm. Then a worker starts with
an empty ``DATA_DIR`` (everything from the changelog), is killed, and starts with the folder that it left. *Ready* is
``/health/ready``; *counting* is the moment when Kafka has the alert of a reading that was written once it was ready.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import tempfile
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from bench import report
from bench.child import cpu_seconds, peak_mib
from bench.kafka import partition_of
from bench.work import PARTITIONS
from devices.alarms.engine import AlarmEngine
from devices.alarms.model import Alert
from devices.alarms.rules import load
from devices.model import Reading
from streams.messages import encode
from tools.stack import Stack
from tools.worker import Worker

APP = "restore"
CONFIG = Path(__file__).resolve().parent.parent / "config"
LABELS = [f"CH{number}" for number in range(10)]
THRESHOLDS = range(90, 100)
RULE = """
  - {{id: "limit-{0}", profile: plain_json, math_operator: ">", threshold: {0}, clear_threshold: {1}, recipients: []}}
"""
START_PATIENCE_SECONDS = 600.0


def reading_of(device: str, values: list[float], moment: datetime) -> Reading:
    """Return a reading of all labels."""
    return Reading(
        request_id=f"{device}-{moment.timestamp():.0f}",
        timestamp=moment,
        device_id=device,
        index="T",
        values=values,
        labels=LABELS,
        display_names=LABELS,
        metadata={"units": ["°C"] * len(LABELS), "profile": "plain_json", "category": "measurements"},
    )


def make_states(config: Path, count: int) -> tuple[dict[str, bytes], list[Alert]]:
    """Return at least ``count`` states as the engine stores them, and the alarms that are open among them."""
    rng = random.Random(7)
    states: dict[str, bytes] = {}
    engine = AlarmEngine(states, load(config / "alarms.yaml"))
    now = datetime.now(UTC)
    alerts: list[Alert] = []
    for number in range(-(-count // (len(LABELS) * len(THRESHOLDS)))):
        values = [200.0 if rng.random() < 0.01 else rng.uniform(15, 30) for _ in LABELS]
        alerts += engine.process(reading_of(f"device-{number}", values, now), None, now.timestamp())
    return states, alerts


class Bench:
    """A Kafka, a configuration with ten rules, and a worker of the alarms stage."""

    def __init__(self, stack: Stack, folder: Path) -> None:
        self.bootstrap = stack.env["KAFKA_BOOTSTRAP_SERVERS"]
        self.config = folder / "config"
        shutil.copytree(CONFIG, self.config)
        rules = "".join(RULE.format(number, number - 5) for number in THRESHOLDS)
        (self.config / "alarms.yaml").write_text(f"alarms:{rules}")
        self.data = folder / "data"
        env = {**stack.env, "STAGES": "alarms", "APP_ID": APP, "TOPIC_PREFIX": f"{APP}_"}
        env |= {"CONFIG_PATH": str(self.config), "DATA_DIR": str(self.data)}
        self.worker = Worker(env, log=folder / "worker.log")
        self.changelog = f"{APP}-alarms-alarm_states-changelog"
        self._probes = 0

    def started(self, name: str) -> dict[str, Any]:
        """Start the worker; return what that took until it is ready, and until it raises an alarm."""
        begin = time.monotonic()
        self.worker.spawn()
        self.worker.wait_ready(START_PATIENCE_SECONDS)
        ready = time.monotonic() - begin
        pid = self.worker.pid or 0
        cpu, at_ready = cpu_seconds(pid), peak_mib(pid)
        asyncio.run(self._probe())
        found = {
            "ready_seconds": ready,
            "counting_seconds": time.monotonic() - begin,
            "cpu_seconds": cpu,
            "peak_mib_at_ready": at_ready,
            "peak_mib": peak_mib(pid),
        }
        print(f"{name}: " + ", ".join(f"{key} {value:.1f}" for key, value in found.items()), flush=True)
        return found

    async def _probe(self) -> None:
        """Write a reading of a new device to each partition and return once Kafka has an alert of each."""
        self._probes += 1
        chosen: dict[int, str] = {}
        number = 0
        while len(chosen) < PARTITIONS:
            device = f"probe-{self._probes}-{number}"
            chosen.setdefault(partition_of(device.encode()), device)
            number += 1
        consumer = AIOKafkaConsumer(bootstrap_servers=self.bootstrap, enable_auto_commit=False)
        producer = AIOKafkaProducer(bootstrap_servers=self.bootstrap)
        topic = f"{APP}_iot_alerts"
        async with consumer, producer:
            partitions = [TopicPartition(topic, number) for number in range(PARTITIONS)]
            consumer.assign(partitions)
            await consumer.seek_to_end(*partitions)
            for tp in partitions:
                await consumer.position(tp)
            for partition, device in chosen.items():
                value = encode(reading_of(device, [200.0] * len(LABELS), datetime.now(UTC)))
                await producer.send(f"{APP}_iot_validated_data", value, key=device.encode(), partition=partition)
            waiting = {device.encode() for device in chosen.values()}
            async with asyncio.timeout(START_PATIENCE_SECONDS):
                while waiting:
                    record = await consumer.getone()
                    waiting.discard(record.key or b"")

    def fill(self, states: dict[str, bytes], opened: list[Alert]) -> int:
        """Write states and open alarms as the stage does; returns how many bytes of keys and values."""
        rows = [
            (self.changelog, partition_of(key.partition("|")[0].encode()), key.encode(), value)
            for key, value in states.items()
        ]
        following = f"{APP}_{APP}-alarms-open"
        rows += [(following, partition_of(alert.id.encode()), alert.id.encode(), encode(alert)) for alert in opened]
        asyncio.run(self._fill(rows))
        return sum(len(key) + len(value) for topic, _, key, value in rows if topic == self.changelog)

    async def _fill(self, rows: Iterable[tuple[str, int, bytes, bytes]]) -> None:
        producer = AIOKafkaProducer(
            bootstrap_servers=self.bootstrap, compression_type="zstd", max_batch_size=1 << 20, linger_ms=5
        )
        async with producer:
            sent: set[asyncio.Future[Any]] = set()
            for number, (topic, partition, key, value) in enumerate(rows):
                sent.add(await producer.send(topic, value, key=key, partition=partition))
                if number % 20_000 == 0:
                    await asyncio.gather(*sent)
                    sent.clear()
            await asyncio.gather(*sent)


def run(options: argparse.Namespace) -> None:
    """Measure, print, write."""
    count = 100_000 if options.quick else options.states
    facts = report.machine()
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as name:
        stack = Stack.temporary(("kafka",), report=print)
        try:
            stack.start()
            bench = Bench(stack, Path(name))
            try:
                empty = bench.started("no states")
                bench.worker.stop()
                states, opened = make_states(bench.config, count)
                size = bench.fill(states, opened)
                print(f"{len(states):,} states, {size / 2**20:.0f} MiB, {len(opened):,} open alarms", flush=True)
                shutil.rmtree(bench.data)
                restored = bench.started("from the changelog")
                bench.worker.kill()
                again = bench.started("with its folder")
                disk = sum(file.stat().st_size for file in bench.data.rglob("*") if file.is_file())
            finally:
                bench.worker.stop()
        finally:
            stack.stop(discard=True)
    rows = [
        (title, *(f"{found[key]:.1f}" for key in ("ready_seconds", "counting_seconds", "cpu_seconds")), f"{mib:.0f}")
        for title, found in (
            ("no states", empty),
            (f"{len(states):,} states, empty folder", restored),
            (f"{len(states):,} states, killed, its folder there", again),
        )
        for mib in (found["peak_mib"],)
    ]
    body = report.table(("start of a worker", "ready after s", "counting after s", "CPU s", "peak MiB"), rows)
    body += (
        f"\n\n{len(states):,} states of {size / len(states):.0f} bytes with their keys, {len(opened):,} of them open"
        f" alarms, {PARTITIONS} partitions; {disk / 2**20:.0f} MiB on disk. From the start of the process on, its"
        " imports included. Kafka and worker share the machine."
    )
    data = {"states": len(states), "open": len(opened), "bytes": size, "disk_bytes": disk}
    data |= {"empty": empty, "restored": restored, "folder": again}
    report.publish("restore-quick" if options.quick else "restore", "Alarm states come back", body, data, facts)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    parser.add_argument("--states", type=int, default=1_000_000, help="states in the changelog (%(default)s)")
