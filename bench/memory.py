"""Highest resident memory of a worker that finds a large backlog.

Three backlogs: Fluxor frames through the normalizer alone; the same through normalizer, ingestor and caching; and plain
JSON arrays of 300 samples each, whose readings are many times as large as the messages that they come in.
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


def peak(stack: Stack, folder: Path, name: str, stages: str, records: Iterator[tuple[bytes, bytes]]) -> dict[str, Any]:
    """Fill a raw topic, let a worker with ``stages`` do all of it, and return its highest memory."""
    broker = Broker(stack.env["KAFKA_BOOTSTRAP_SERVERS"])
    source, middle = f"{name}_iot_raw_data", f"{name}_iot_validated_data"
    broker.create(source, middle)
    broker.fill(source, records)
    messages = sum(broker.ends(source))
    env = {**stack.env, "STAGES": stages, "APP_ID": name, "TOPIC_PREFIX": f"{name}_"}
    worker = Worker({**env, "DATA_DIR": str(folder / name)}, log=folder / f"{name}.log")
    last = stages.rpartition(",")[2]
    try:
        worker.spawn()
        for stage, topic in (("normalizer", source), (last, middle if last != "normalizer" else source)):
            ends = sum(broker.ends(topic))
            group = f"{name}-{stage}"
            follow(
                lambda: alive(worker),
                lambda group=group, topic=topic: sum(broker.committed(group, topic)),  # type: ignore[misc]
                ends,
                patience_seconds=90,
                poll_seconds=0.5,
            )
        found = peak_mib(alive(worker))
    finally:
        worker.stop()
        broker.close()
    print(f"{name}: {messages:,} messages through {stages}: peak {found:.0f} MiB", flush=True)
    return {"stages": stages, "messages": messages, "peak_mib": found}


def run(options: argparse.Namespace) -> None:
    """Measure, print, write."""
    backlog = 30_000 if options.quick else options.backlog
    facts = report.machine()
    devices = balanced_devices(partition_of)
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as name:
        stack = Stack.temporary(("kafka", "postgresql", "valkey"), report=print)
        try:
            stack.start()
            for case, stages, records in (
                ("frames", "normalizer", raw_messages(backlog, devices)),
                ("stored", "normalizer,ingestor,caching", raw_messages(backlog, devices)),
                ("arrays", "normalizer", arrays(backlog // 100, devices)),
            ):
                results[case] = peak(stack, Path(name), case, stages, records)
        finally:
            stack.stop(discard=True)
    rows = [
        (case, found["stages"], f"{found['messages']:,}", f"{found['peak_mib']:.0f}") for case, found in results.items()
    ]
    body = report.table(("backlog", "stages", "messages", "peak MiB"), rows)
    body += f"\n\nframes, stored: Fluxor frames, 7 readings each; arrays: plain JSON, {SAMPLES} readings each."
    data = {"cases": results}
    report.publish("memory-quick" if options.quick else "memory", "Memory with a backlog", body, data, facts)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    parser.add_argument("--backlog", type=int, default=300_000, help="messages that wait (default %(default)s)")
