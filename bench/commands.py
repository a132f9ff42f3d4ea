"""From ``POST /api/v1/commands`` to a connected device, and to its word.

A worker with mqtt, normalizer, ingestor and commands; twenty climate controllers behind one field broker, which answers
each command at once. Commands go out one at a time, each over HTTP. *To the device*: from before the POST until the
device's MQTT client has the command. *To SUCCESSFUL*: from before the POST until ``GET /api/v1/commands/{request_id}``
says so, asked every 10 ms; the device's feedback, Kafka and PostgreSQL are in it. First with nothing else to do, then
while a fleet sends readings.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from bench import report
from bench.child import BenchError
from devices.fluxor import frame
from tools.simulator import Controllers, Fleet, Message, Plan
from tools.simulator.mqtt import Publisher
from tools.stack import Stack
from tools.worker import Worker

DEVICES: Final = 20
BROKER_ID: Final = "77"
FIRST_ID: Final = 3_000_000
WARM_UP: Final = 20
POLL_SECONDS: Final = 0.01
PATIENCE_SECONDS: Final = 60.0
PARTS: Final = ("median_ms", "p95_ms")


class Desk:
    """Sends commands and takes the times."""

    def __init__(self, url: str) -> None:
        self._url = f"{url}/api/v1/commands"
        self._received: dict[str, float] = {}
        self._news = threading.Condition()

    def received(self, uid: str) -> None:
        """Note that a device has a command."""
        with self._news:
            self._received[uid.rpartition("-")[0]] = time.monotonic()
            self._news.notify_all()

    def command(self, name: str, number: int) -> tuple[float, float]:
        """Send one; returns seconds to the device and to SUCCESSFUL. Raises BenchError where it ends otherwise."""
        body = {
            "request_id": name,
            "device_id": str(FIRST_ID + number % DEVICES),
            "command_type": "config",
            "payload": {"T_consigne": 15 + number % 100 / 10},
        }
        begun = time.monotonic()
        self._ask(self._url, body)
        with self._news:
            if not self._news.wait_for(lambda: name in self._received, PATIENCE_SECONDS):
                raise BenchError(f"command {name} has not reached its device within {PATIENCE_SECONDS:.0f} s")
        while True:
            found = self._ask(f"{self._url}/{name}")
            if found.get("state") == "SUCCESSFUL":
                return self._received[name] - begun, time.monotonic() - begun
            if time.monotonic() - begun > PATIENCE_SECONDS:
                raise BenchError(f"command {name} is {found.get('state')} after {PATIENCE_SECONDS:.0f} s")
            time.sleep(POLL_SECONDS)

    @staticmethod
    def _ask(url: str, body: Any = None) -> Any:
        request = urllib.request.Request(  # noqa: S310 - the worker's own address
            url, None if body is None else json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
                return json.load(answer)
        except urllib.error.HTTPError as exc:
            if exc.code == 404:
                return {}
            raise BenchError(f"{url}: {exc.code} {exc.read().decode(errors='replace')}") from exc


def introduce(mqtt_url: str) -> None:
    """Have every device send a frame, so that its broker is known."""
    done = threading.Semaphore(0)
    publisher = Publisher(mqtt_url, on_ack=lambda *_: done.release(), on_refused=lambda *_: None)
    publisher.start()
    try:
        for device in range(FIRST_ID, FIRST_ID + DEVICES):
            payload = frame.build_frame(
                device,
                [(21.0, 50.0), None, None, None],
                sen_typ=(0x63, 0, 0, 0),
                reg_typ=frame.REG_TEMPERATURE,
                humidity_set_point=50.0,
                humidity_hysteresis=1.0,
                temperature_set_point=20.0,
                temperature_hysteresis=1.0,
            )
            route = f"broker_data/{BROKER_ID}/{device}/data"
            publisher.publish(Message(device_id=str(device), seq=0, route=route, payload=payload))
        for _ in range(DEVICES):
            if not done.acquire(timeout=PATIENCE_SECONDS):
                raise BenchError("the connector has not taken the devices' first messages")
    finally:
        publisher.stop()


def figures(name: str, found: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Return medians and 95th percentiles, in ms."""
    result: dict[str, Any] = {"run": name, "commands": len(found)}
    for what, seconds in zip(("to_device", "to_successful"), zip(*found, strict=True), strict=True):
        cuts = statistics.quantiles((value * 1000 for value in seconds), n=20)
        result[what] = {"median_ms": cuts[9], "p95_ms": cuts[18], "max_ms": max(seconds) * 1000}
    return result


def measure(stack: Stack, folder: Path, count: int, rate: int) -> list[dict[str, Any]]:
    """Measure without and with readings at ``rate`` messages a second."""
    env = {**stack.env, "STAGES": "mqtt,normalizer,ingestor,commands", "DATA_DIR": str(folder / "data")}
    env["COMMAND_RATE_PER_MINUTE"] = "1000000"
    worker = Worker(env, log=folder / "worker.log")
    results = []
    try:
        desk = Desk(worker.start().url)
        controllers = Controllers(env["MQTT_URL"], client_id="bench-controllers", on_command=desk.received)
        controllers.start()
        try:
            introduce(env["MQTT_URL"])
            for number in range(WARM_UP):
                desk.command(f"warm-{number}", number)
            results.append(figures("idle", [desk.command(f"idle-{number}", number) for number in range(count)]))
            print(results[-1], flush=True)
            with Fleet(Plan(rate=float(rate)), env["MQTT_URL"]):
                time.sleep(3.0)
                found = [desk.command(f"busy-{number}", number) for number in range(count)]
            results.append(figures(f"{rate} messages/s beside it", found))
            print(results[-1], flush=True)
        finally:
            controllers.stop()
    finally:
        worker.stop()
    return results


def run(options: argparse.Namespace) -> None:
    """Measure, print, write."""
    count = 50 if options.quick else options.commands
    facts = report.machine()
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as name:
        stack = Stack.temporary(("kafka", "postgresql", "mqtt"), report=print)
        try:
            stack.start()
            results = measure(stack, Path(name), count, options.command_readings)
        finally:
            stack.stop(discard=True)
    body = report.table(
        ("ms from the POST", "to the device: median", "p95", "to SUCCESSFUL: median", "p95"),
        [
            (found["run"], *(f"{found[what][part]:.0f}" for what in ("to_device", "to_successful") for part in PARTS))
            for found in results
        ],
    )
    body += (
        f"\n\n{count} commands each, one at a time, to {DEVICES} connected MQTT devices that answer at once; SUCCESSFUL"
        " as GET tells it, asked every 10 ms. Kafka, PostgreSQL, MQTT broker, devices and worker share the machine."
    )
    name = "commands-quick" if options.quick else "commands"
    report.publish(name, "Commands reach devices", body, {"runs": results}, facts)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    parser.add_argument("--commands", type=int, default=300, help="commands of each run (%(default)s)")
    parser.add_argument(
        "--command-readings", type=int, default=200, help="messages a second of the second run (%(default)s)"
    )
