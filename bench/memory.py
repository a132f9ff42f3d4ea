"""Highest resident memory of a worker that finds a large backlog, with the profile of the larger buffers.

*frames*: Fluxor frames through the normalizer; *readings*: what that gave, through ingestor and caching, as after a
night without a database; *stored*: frames through all three; *arrays*: plain JSON, each message 300 samples, whose
readings are many times as large as the messages that they come in.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec

from bench import report
from bench.child import follow, peak_mib
from bench.kafka import Broker, partition_of
from bench.race import alive
from bench.work import START, balanced_devices, raw_messages
from streams.messages import RawMessage, encode
from tools.stack import Stack
from tools.worker import Worker

SAMPLES = 300
#: The topic that each stage works off.
SOURCES = {"normalizer": "iot_raw_data", "ingestor": "iot_validated_data", "caching": "iot_validated_data"}


def arrays(count: int, devices: list[str]) -> Iterator[tuple[bytes, bytes]]:
    """Yield raw messages of plain JSON, each an array of ``SAMPLES`` samples of one value."""
    for number in range(count):
        device = devices[number % len(devices)]
        begin = START + timedelta(seconds=number)
        samples = [{"ts": begin + timedelta(milliseconds=step), "level": number + step / 7} for step in range(SAMPLES)]
        message = RawMessage(
            request_id=f"{number:032x}",
            timestamp=begin,
            device_id=device,
            protocol="mqtt",
            payload=msgspec.json.encode(samples).decode(),
            metadata={"mqtt_topic": f"devices/{device}/telemetry", "mqtt_qos": 1, "mqtt_retain": False},
        )
        yield device.encode(), encode(message)


class Backlogs:
    """Topics full of messages, and workers that work them off."""

    def __init__(self, stack: Stack, folder: Path) -> None:
        self.stack = stack
        self.folder = folder
        self.broker = Broker(stack.env["KAFKA_BOOTSTRAP_SERVERS"])
        self.results: dict[str, dict[str, Any]] = {}

    def fill(self, prefix: str, records: Iterator[tuple[bytes, bytes]]) -> None:
        """Make the topics of ``prefix`` and write raw messages."""
        self.broker.create(*{f"{prefix}_{topic}" for topic in SOURCES.values()})
        self.broker.fill(f"{prefix}_iot_raw_data", records)

    def work_off(self, case: str, prefix: str, stages: str) -> None:
        """Let a worker do all that there is, and note its highest memory."""
        names = stages.split(",")
        first = f"{prefix}_{SOURCES[names[0]]}"
        messages = sum(self.broker.ends(first))
        env = {**self.stack.env, "STAGES": stages, "APP_ID": case, "TOPIC_PREFIX": f"{prefix}_"}
        env |= {"BROKER_PROFILE": "resilient", "DATA_DIR": str(self.folder / case)}
        worker = Worker(env, log=self.folder / f"{case}.log")
        try:
            worker.spawn()
            for stage in names:
                self._await(worker, f"{case}-{stage}", f"{prefix}_{SOURCES[stage]}")
            peak = peak_mib(alive(worker))
        finally:
            worker.stop()
        print(f"{case}: {messages:,} messages through {stages}: peak {peak:.0f} MiB", flush=True)
        self.results[case] = {"stages": stages, "messages": messages, "peak_mib": peak}

    def _await(self, worker: Worker, group: str, topic: str) -> None:
        follow(
            lambda: alive(worker),
            lambda: sum(self.broker.committed(group, topic)),
            sum(self.broker.ends(topic)),
            patience_seconds=90,
            poll_seconds=0.5,
        )


def run(options: argparse.Namespace) -> None:
    """Measure, print, write."""
    backlog = 30_000 if options.quick else options.backlog
    facts = report.machine()
    devices = balanced_devices(partition_of)
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as name:
        stack = Stack.temporary(("kafka", "postgresql", "valkey"), report=print)
        try:
            stack.start()
            backlogs = Backlogs(stack, Path(name))
            backlogs.fill("frames", raw_messages(backlog, devices))
            backlogs.work_off("frames", "frames", "normalizer")
            backlogs.work_off("readings", "frames", "ingestor,caching")
            backlogs.fill("stored", raw_messages(backlog, devices))
            backlogs.work_off("stored", "stored", "normalizer,ingestor,caching")
            backlogs.fill("arrays", arrays(backlog // 50, devices))
            backlogs.work_off("arrays", "arrays", "normalizer")
            backlogs.broker.close()
        finally:
            stack.stop(discard=True)
    rows = [
        (case, found["stages"], f"{found['messages']:,}", f"{found['peak_mib']:.0f}")
        for case, found in backlogs.results.items()
    ]
    body = report.table(("backlog", "stages", "messages", "peak MiB"), rows)
    body += (
        "\n\nframes: Fluxor frames, 7 readings each; readings: what they gave, after a night without a database;"
        f" stored: frames, all three stages; arrays: plain JSON, {SAMPLES} readings each."
    )
    name = "memory-quick" if options.quick else "memory"
    report.publish(name, "Memory with a backlog", body, {"cases": backlogs.results}, facts)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    parser.add_argument("--backlog", type=int, default=300_000, help="messages that wait (default %(default)s)")
