"""A whole worker: started without a broker, told to stop, both spellings, and its accounts at /metrics."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from settings import declarations, environment
from streams.messages import RawMessage, encode
from tests.resilience.conftest import PATIENCE_SECONDS, ROOT, Log, _admin
from tools.stack import Stack, ports
from tools.worker import Worker

pytestmark = pytest.mark.stack


def raw(number: int, payload: str) -> bytes:
    """Return a device message as a connector writes it."""
    message = RawMessage(
        request_id=f"r{number}",
        timestamp=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        device_id="d1",
        protocol="mqtt",
        payload=payload,
        metadata={"mqtt_topic": "devices/d1/telemetry", "mqtt_qos": 1, "mqtt_retain": False},
    )
    return encode(message)


async def test_a_worker_waits_for_its_broker_and_its_accounts_add_up(own_stack: Stack, tmp_path: Path) -> None:
    """Live and not ready while there is no broker; once there is one it works, and /metrics has the identity."""
    broker = own_stack.part("kafka")
    servers = own_stack.env["KAFKA_BOOTSTRAP_SERVERS"]
    await asyncio.to_thread(broker.kill)
    env = {
        "KAFKA_BOOTSTRAP_SERVERS": servers,
        "BROKER_PROFILE": "fast",
        "STAGES": "normalizer",
        "DATA_DIR": str(tmp_path / "data"),
        "COMMIT_INTERVAL_SECONDS": "0.2",
    }
    worker = Worker(env, log=tmp_path / "worker.log")
    log = Log(servers)
    try:
        await asyncio.to_thread(worker.start, wait=False)
        await log.until(lambda: worker.get("/health/live")[0] == 200, "it lives")
        await log.until(lambda: "trying again" in worker.output(), "it has tried to connect")
        assert worker.get("/health/ready")[0] == 503
        await asyncio.to_thread(broker.start)
        await asyncio.to_thread(worker.wait_ready, PATIENCE_SECONDS)
        good = [raw(number, json.dumps({"temperature": number})) for number in range(50)]
        await log.write("iot_raw_data", *good[:25], b"not JSON", b'{"request_id": 1}', *good[25:], raw(99, "{oops"))
        await log.until(lambda: worker.metric("headrace_forwarded_total", stage="normalizer") >= 50, "it is handled")
        await log.until(lambda: worker.metric("headrace_in_flight", stage="normalizer") == 0, "nothing is in flight")
        log.admin = await _admin(servers)
        await log.until_committed("headrace-normalizer", "iot_raw_data", 53)
        await log.admin.close()
        names = ("received", "forwarded", "dead_letters", "dropped", "returned")
        counts = {name: worker.metric(f"headrace_{name}_total", stage="normalizer") for name in names}
        assert counts["received"] == 53
        assert counts["dead_letters"] == 3
        assert counts["received"] == sum(counts[name] for name in names[1:])
        assert len(await log.read("iot_validated_data", 50)) == 50
        assert len(await log.read("iot_errors", 3)) == 3
        assert await asyncio.to_thread(worker.stop) == 0
    finally:
        worker.kill()


@pytest.mark.parametrize(
    "spelling",
    [
        ["-A", "streams", "worker", "-l", "info"],
        ["worker", "-A", "streams", "-l", "info"],
    ],
    ids=["faust -A streams worker", "faust worker -A streams"],
)
async def test_both_spellings_start_and_sigterm_ends_one_that_waits(spelling: list[str], tmp_path: Path) -> None:
    """The command line of Faust and the other one; while no broker is there, SIGTERM ends the worker in order."""
    known = {declared.variable for declared in declarations()}
    web, absent = (ports.choose(set(), random.SystemRandom()) for _ in range(2))
    env = {name: value for name, value in environment().items() if name not in known} | {
        "KAFKA_BOOTSTRAP_SERVERS": f"127.0.0.1:{absent}",
        "BROKER_PROFILE": "fast",
        "STAGES": "normalizer",
        "DATA_DIR": str(tmp_path / "data"),
        "WEB_BIND": f"127.0.0.1:{web}",
        "PYTHONUNBUFFERED": "1",
    }
    command = [str(Path(sys.executable).with_name("faust")), *spelling]
    output = tmp_path / "worker.log"
    with output.open("wb") as file:
        child = subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=file, start_new_session=True)
    try:
        await Log.until(lambda: "trying again" in output.read_text() or child.poll() is not None, "it waits for Kafka")
        assert child.poll() is None, output.read_text()
        child.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(child.wait, PATIENCE_SECONDS) == 0, output.read_text()
    finally:
        child.kill()
        child.wait()
