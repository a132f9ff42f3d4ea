"""Confirmed requests a second into Kafka, and how long a device waits for its 2.04.

A worker with the stage ``coap``, a Kafka of its own, and 200 devices that each send the next message once the last one
is answered: as fast as that goes, then at a fixed rate. All on this machine, the devices in this process, so that their
work is part of what is measured; what each of the three used of the processors is told.
"""

from __future__ import annotations

import argparse
import random
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench import report
from bench.child import cpu_seconds
from bench.coap_devices import Fleet, Result
from bench.kafka import Broker
from tools.stack import Stack, ports
from tools.worker import Worker

DEVICES = 200


class Used:
    """Processor time of what takes part, in seconds."""

    def __init__(self, meters: dict[str, Callable[[], float]]) -> None:
        self._meters = meters
        self._begun = {name: meter() for name, meter in meters.items()}

    def per_message(self, messages: int) -> dict[str, float]:
        """Return microseconds a message since this was made."""
        return {name: (meter() - self._begun[name]) / messages * 1e6 for name, meter in self._meters.items()}


def measure(stack: Stack, worker: Worker, address: str, messages: int, rate: float) -> dict[str, dict[str, float]]:
    """Warm up, measure without a limit and at ``rate``; return what each run gave, and what Kafka has."""
    host, _, port = address.partition(":")
    fleet = Fleet(DEVICES, (host, int(port)))
    broker = Broker(stack.env["KAFKA_BOOTSTRAP_SERVERS"])
    meters = {
        "worker": lambda: cpu_seconds(worker.pid or 0),
        "kafka": lambda: cpu_seconds(stack.part("kafka").pid or 0),
        "devices": time.process_time,
    }
    try:
        fleet.run(2_000, 0)
        runs = {}
        for name, wanted in (("no limit", 0.0), (f"{rate:.0f}/s wanted", rate)):
            before = sum(broker.ends("iot_raw_data"))
            used = Used(meters)
            found = fleet.run(messages, wanted)
            stored = sum(broker.ends("iot_raw_data")) - before
            runs[name] = {**figures(found, messages), "lost": messages - stored, **used.per_message(messages)}
        return runs
    finally:
        broker.close()
        fleet.close()


def figures(found: Result, messages: int) -> dict[str, float]:
    """Return what is told of a run."""
    return {
        "messages": messages,
        "per_second": len(found.latencies) / found.seconds,
        "p50_ms": found.percentile(0.5),
        "p99_ms": found.percentile(0.99),
        "longest_ms": found.percentile(1.0),
        "repeated": found.repeated,
        "unavailable": found.unavailable,
        "refused": found.refused,
        "unanswered": found.unanswered,
    }


def run(options: argparse.Namespace) -> None:
    """Start a Kafka and a worker, measure, print, write."""
    messages = 5_000 if options.quick else options.coap_messages
    facts = report.machine()
    stack = Stack.temporary()
    with tempfile.TemporaryDirectory() as folder:
        try:
            stack.acquire()
            stack.start("kafka")
            address = f"127.0.0.1:{ports.choose(set(), random.SystemRandom(), socket.SOCK_DGRAM)}"
            env = {name: value for name, value in stack.env.items() if name not in ("WEB_BIND", "COAP_BIND")}
            env |= {"STAGES": "coap", "COAP_BIND": address, "DATA_DIR": f"{folder}/data"}
            worker = Worker(env, log=Path(folder) / "worker.log")
            try:
                runs = measure(stack, worker.start(), address, messages, options.coap_rate)
            finally:
                worker.stop()
        finally:
            stack.stop(discard=True)
    rows = [
        (
            name,
            f"{found['per_second']:,.0f}",
            *(f"{found[key]:.0f}" for key in ("p50_ms", "p99_ms", "longest_ms")),
            *(f"{found[key]:.0f}" for key in ("lost", "unanswered", "unavailable", "repeated")),
            *(f"{found[key]:.0f}" for key in ("worker", "kafka", "devices")),
        )
        for name, found in runs.items()
    ]
    header = (
        "200 devices",
        "confirmed/s",
        "p50 ms",
        "p99 ms",
        "longest ms",
        "lost",
        "unanswered",
        "5.03",
        "repeated",
    )
    body = report.table((*header, "worker µs", "Kafka µs", "devices µs"), rows)
    body += (
        f"\n\n{messages:,} messages a run, each confirmed once Kafka (acks=all) has its record; lost: not in the topic."
        " At a fixed rate the time counts from when a message was due. µs: processor time a message."
    )
    report.publish("coap-quick" if options.quick else "coap", "CoAP requests into Kafka", body, {"runs": runs}, facts)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    parser.add_argument("--coap-messages", type=int, default=30_000, help="of each run (default %(default)s)")
    parser.add_argument("--coap-rate", type=float, default=1_500, help="requests/s of the second run (%(default)s)")


def main() -> None:
    """Measure CoAP alone."""
    parser = argparse.ArgumentParser(prog="python -m bench.coap", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a short run")
    arguments(parser)
    run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
