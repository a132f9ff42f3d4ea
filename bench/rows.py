"""From the raw topic to rows in PostgreSQL, and from a device to its row.

*Rows a second*: a topic full of Fluxor frames, one worker with normalizer and ingestor; from the first commit to the
last. *Device to row*: 500 messages a second over MQTT, half of them Fluxor frames, half plain JSON that carries the
time of sending; one worker with mqtt, normalizer, ingestor and caching. A row counts as there when a listener on the
database is told of its transaction (a statement trigger and NOTIFY, so after the commit), whatever else polls.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import asyncpg
import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion

from agents.stores.base import open_store
from agents.stores.rows import rows_of
from bench import report
from bench.child import BenchError, cpu_seconds, peak_mib
from bench.kafka import Broker, partition_of
from bench.work import balanced_devices, make_expand, raw_messages
from devices.fluxor.frame import build_frame
from streams.messages import Reading, decoder
from tools.stack import Stack
from tools.worker import Worker

PREFIX = "rows_"
TRIGGER = """
CREATE OR REPLACE FUNCTION bench_tell() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN PERFORM pg_notify('bench', pg_current_xact_id()::text); RETURN NULL; END $$;
CREATE OR REPLACE TRIGGER bench_tell AFTER INSERT ON readings FOR EACH STATEMENT EXECUTE FUNCTION bench_tell();
"""
WARM_UP_SECONDS = 5.0
#: How long messages are sent over MQTT unless ``--seconds`` says otherwise.
SECONDS = 30.0


class Witness:
    """Notes when each transaction that wrote readings could be seen, in a thread with an event loop of its own."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.seen: dict[int, float] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._call(self._start())
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._connection.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(120)

    async def _start(self) -> None:
        store = open_store(self._url)
        await store.start()
        await store.ping()
        await store.stop()
        self._connection = await asyncpg.connect(self._url)
        await self._connection.execute(TRIGGER)
        await self._connection.execute("TRUNCATE readings")
        await self._connection.add_listener("bench", self._told)

    def _told(self, _connection: Any, _pid: int, _channel: str, payload: str) -> None:
        self.seen[int(payload)] = time.time()

    def fetch(self, query: str) -> list[Any]:
        """Return the rows of a query."""
        found: list[Any] = self._call(self._connection.fetch(query))
        return found


def await_rows(witness: Witness, worker: Worker, query: str, wanted: int, patience_seconds: float = 60) -> None:
    """Wait until ``query`` counts ``wanted``. Raises BenchError when it stands still."""
    last, at = -1, time.monotonic()
    while (found := witness.fetch(query)[0][0]) < wanted:
        if worker.pid is None:
            raise BenchError(f"the worker ended by itself\n{worker.tail()}")
        if found > last:
            last, at = found, time.monotonic()
        elif time.monotonic() - at > patience_seconds:
            raise BenchError(f"{found} of {wanted} rows, and none for {patience_seconds:.0f} s\n{worker.tail()}")
        time.sleep(0.5)


def rows_a_second(stack: Stack, folder: Path, messages: int) -> dict[str, Any]:
    """Fill the raw topic, start a worker, and measure from the first commit of rows to the last."""
    broker = Broker(stack.env["KAFKA_BOOTSTRAP_SERVERS"])
    devices = balanced_devices(partition_of)
    source = f"{PREFIX}iot_raw_data"
    broker.create(source)
    broker.fill(source, raw_messages(messages, devices))
    broker.close()
    _, first = next(raw_messages(1, devices))
    decode, expand = decoder(Reading).decode, make_expand()
    rows_per_message = sum(len(rows_of(decode(value))) for _, value in expand(first))
    wanted = messages * rows_per_message
    env = {**stack.env, "STAGES": "normalizer,ingestor", "APP_ID": "rows", "TOPIC_PREFIX": PREFIX}
    worker = Worker({**env, "DATA_DIR": str(folder / "rows")}, log=folder / "rows.log")
    with Witness(stack.env["DATABASE_URL"]) as witness:
        try:
            worker.spawn()
            while not witness.seen:
                if worker.pid is None:
                    raise BenchError(f"the worker ended by itself\n{worker.tail()}")
                time.sleep(0.02)
            cpu = cpu_seconds(worker.pid or 0)
            await_rows(witness, worker, "SELECT count(*) FROM readings", wanted)
            cpu = cpu_seconds(worker.pid or 0) - cpu
            peak = peak_mib(worker.pid or 0)
        finally:
            worker.stop()
        counts = dict(witness.fetch("SELECT xmin::text::bigint, count(*) FROM readings GROUP BY 1"))
        commits = sorted((witness.seen[xid], count) for xid, count in counts.items())
    if sum(counts.values()) != wanted:
        raise BenchError(f"{sum(counts.values())} rows stored, {wanted} expected")
    seconds = commits[-1][0] - commits[0][0]
    rows = wanted - commits[0][1]
    return {
        "messages": messages,
        "rows": wanted,
        "rows_per_message": rows_per_message,
        "rows_per_second": rows / seconds,
        "messages_per_second": rows / rows_per_message / seconds,
        "cpu_seconds_per_100k_rows": cpu / rows * 1e5,
        "peak_mib": peak,
    }


class Fleet:
    """Publishes at an even rate over MQTT at QoS 1: Fluxor frames and plain JSON in turn."""

    def __init__(self, url: str, rate: int) -> None:
        host, _, port = url.removeprefix("mqtt://").partition(":")
        self.client = paho.Client(CallbackAPIVersion.VERSION2, client_id="bench-fleet", protocol=paho.MQTTv5)
        self.client.max_inflight_messages_set(5000)
        self.client.connect(host, int(port or 1883))
        self.client.loop_start()
        self.rate = rate
        self.worst_lag = 0.0

    def publish(self, seconds: float) -> int:
        """Publish for that long; return how many probes (plain JSON) went out."""
        begin, probes = time.monotonic(), 0
        for number in range(int(seconds * self.rate)):
            lag = time.monotonic() - begin - number / self.rate
            if lag < 0:
                time.sleep(-lag)
            self.worst_lag = max(self.worst_lag, lag)
            device = number // 2 % 150
            if number % 2:
                probes += 1
                sent = {"ts": datetime.now(UTC).isoformat(), "level": number / 7, "pump": number % 4 == 1}
                self.client.publish(f"devices/probe-{device}/telemetry", json.dumps(sent).encode(), qos=1)
            else:
                frame = build_frame(3_000_000 + device, [(20.0, 50.0 + number % 40), (5.0, 60.0)], reg_typ=17_731)
                self.client.publish(f"broker_data/b1/{3_000_000 + device}/data", frame, qos=1)
        return probes

    def close(self) -> None:
        """Disconnect."""
        self.client.disconnect()
        self.client.loop_stop()


def device_to_row(stack: Stack, folder: Path, rate: int, seconds: float) -> dict[str, Any]:
    """Publish through the embedded broker and compare each row's moment with its time of sending."""
    env = {**stack.env, "STAGES": "mqtt,normalizer,ingestor,caching", "APP_ID": "latency", "TOPIC_PREFIX": "latency_"}
    worker = Worker({**env, "DATA_DIR": str(folder / "latency")}, log=folder / "latency.log")
    with Witness(stack.env["DATABASE_URL"]) as witness:
        fleet = Fleet(stack.env["MQTT_URL"], rate)
        try:
            worker.start()
            pid = worker.pid or 0
            fleet.publish(WARM_UP_SECONDS)
            begin, cpu = datetime.now(UTC), cpu_seconds(pid)
            probes = fleet.publish(seconds)
            cpu = cpu_seconds(pid) - cpu
            mine = f"FROM readings WHERE device_id LIKE 'probe-%' AND label = 'level' AND time >= '{begin.isoformat()}'"
            await_rows(witness, worker, f"SELECT count(*) {mine}", probes)
            found = witness.fetch(f"SELECT xmin::text::bigint, extract(epoch FROM time)::float8 {mine}")  # noqa: S608
        finally:
            fleet.close()
            worker.stop()
        delays = sorted((witness.seen[xid] - sent) * 1000 for xid, sent in found)
    if len(delays) != probes:
        raise BenchError(f"{probes} probes sent, {len(delays)} stored")
    cuts = statistics.quantiles(delays, n=100)
    return {
        "rate": rate,
        "seconds": seconds,
        "probes": probes,
        "median_ms": statistics.median(delays),
        "p95_ms": cuts[94],
        "p99_ms": cuts[98],
        "max_ms": delays[-1],
        "cpu_share_of_a_core": cpu / seconds,
        "publisher_worst_lag_ms": fleet.worst_lag * 1000,
    }


def run(options: argparse.Namespace) -> None:
    """Measure both, print, write."""
    messages, seconds = (10_000, 8.0) if options.quick else (options.row_messages, options.seconds or SECONDS)
    facts = report.machine()
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as name:
        folder = Path(name)
        stack = Stack.temporary(("kafka", "postgresql", "valkey", "mqtt"), report=print)
        try:
            stack.start()
            throughput = rows_a_second(stack, folder, messages)
            print(f"{throughput['rows_per_second']:,.0f} rows/s", flush=True)
            latency = device_to_row(stack, folder, options.rate, seconds)
        finally:
            stack.stop(discard=True)
    body = report.table(
        ("raw topic to rows", ""),
        [
            ("rows/s", f"{throughput['rows_per_second']:,.0f}"),
            ("messages/s", f"{throughput['messages_per_second']:,.0f}"),
            ("rows", f"{throughput['rows']:,}"),
            ("worker's CPU s per 100k rows", f"{throughput['cpu_seconds_per_100k_rows']:.1f}"),
            ("worker's peak MiB", f"{throughput['peak_mib']:.0f}"),
        ],
    )
    body += "\n\n" + report.table(
        (f"device to row at {latency['rate']} messages/s", "ms"),
        [
            ("median", f"{latency['median_ms']:.0f}"),
            ("95th percentile", f"{latency['p95_ms']:.0f}"),
            ("99th percentile", f"{latency['p99_ms']:.0f}"),
            ("longest", f"{latency['max_ms']:.0f}"),
        ],
    )
    body += (
        f"\n\n{throughput['rows_per_message']} rows a Fluxor frame; Kafka, PostgreSQL, MQTT broker, publisher and"
        f" worker share the machine. At {latency['rate']} messages/s the worker (mqtt, normalizer, ingestor, caching)"
        f" took {latency['cpu_share_of_a_core']:.0%} of a core."
    )
    data = {"raw_to_rows": throughput, "device_to_row": latency}
    report.publish("rows-quick" if options.quick else "rows", "Readings become rows", body, data, facts)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    parser.add_argument("--row-messages", type=int, default=60_000, help="messages to make rows of (%(default)s)")
    parser.add_argument("--rate", type=int, default=500, help="messages a second over MQTT (%(default)s)")
