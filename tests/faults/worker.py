"""A Headrace of a test's own on the session's stack, and the workers and fleets that play in it.

    with realm(stack, tmp_path) as own:
        worker = own.worker(STAGES="mqtt,normalizer,ingestor").start()
        fleet = own.fleet(Plan(messages=20_000, rate=0))
        fleet.start()
        worker.kill(); worker.start()
        fleet.join()
        report = own.settle(fleet)
        assert report.ok, report.text()

The end of the ``with`` block is a check as well: while it was open, accounts balanced and committed offsets never went
back; now nothing is in flight, every group has committed the ends of its logs, and each device's order is kept
(`tests/faults/rest.py`). A scenario that ends without a worker has ended its last ones with `Worker.stop`.

Guarantees: topics, groups, database and MQTT session are the realm's alone, so that tests do not disturb each other; at
its end its workers and fleets are ended and its database and session are gone. Only processes that were started here
get signals.
"""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from tests.conformance.databases import drop_database
from tests.faults.oracle import Oracle
from tests.faults.rest import Bookkeeping, at_rest, overtaken, watched
from tools.simulator import Fleet, Places, Plan, Report, check, settle
from tools.stack import Stack
from tools.worker import Worker, WorkerError

__all__ = ["Realm", "Worker", "WorkerError", "realm"]


class Realm:
    """What one test has for itself: `env`, its settings; `folder`, its logs, tables and ledgers."""

    def __init__(self, stack: Stack, folder: Path, settings: dict[str, str]) -> None:
        self.stack = stack
        self.folder = folder
        self.name = f"t{secrets.token_hex(4)}"
        url = urlsplit(stack.env["DATABASE_URL"])
        self._maintenance_url = stack.env["DATABASE_URL"]
        own = {
            "TOPIC_PREFIX": f"{self.name}.",
            "APP_ID": self.name,
            "DATABASE_URL": urlunsplit(url._replace(path=f"/{self.name}")),
            "DATA_DIR": str(folder / "data"),
            "LOG_LEVEL": "INFO",
        }
        # Each worker chooses its own addresses.
        shared = {name: value for name, value in stack.env.items() if name not in ("WEB_BIND", "COAP_BIND")}
        self.env: dict[str, str] = {**shared, **own, **settings}
        #: settings of workers alone; the checkers go by `env`
        self.over: dict[str, str] = {}
        self.workers: list[Worker] = []
        self.oracle = Oracle(self.env["KAFKA_BOOTSTRAP_SERVERS"], f"{self.name}-")
        self.bookkeeping = Bookkeeping(self)
        self._fleets: list[Fleet] = []

    @property
    def places(self) -> Places:
        """Where to look for what became of messages."""
        return Places.from_env(self.env)

    def worker(self, name: str = "worker", *, app: str = "streams", **settings: str) -> Worker:
        """Return a worker, not started yet; a second one under another name has tables of its own."""
        folder = self.folder / "data" / name if self.workers else Path(self.env["DATA_DIR"])
        env = {**self.env, "DATA_DIR": str(folder), **self.over, **settings}
        worker = Worker(env, log=self.folder / f"{name}.log", name=name, app=app)
        self.workers.append(worker)
        return worker

    def fleet(self, plan: Plan, **options: Any) -> Fleet:
        """Return a fleet, not started yet, with its ledger in the realm's folder; `options` are `Fleet`'s."""
        options.setdefault("ledger_path", self.folder / f"ledger-{len(self._fleets)}.jsonl")
        fleet = Fleet(plan, self.env["MQTT_URL"], **options)
        self._fleets.append(fleet)
        return fleet

    def check(self, fleet: Fleet) -> Report:
        """Check a fleet's ledger as things are now."""
        return check(fleet.book, self.places)

    def settle(self, fleet: Fleet, *, patience_seconds: float = 60.0, bound_seconds: float = 600.0) -> Report:
        """Check a fleet's ledger until nothing is missing, or nothing has changed for `patience_seconds`."""
        return settle(fleet.book, self.places, patience_seconds=patience_seconds, bound_seconds=bound_seconds)

    def logs(self) -> str:
        """Return the tails of all workers' logs, for a failure's message."""
        return "\n".join(worker.tail() for worker in self.workers if worker.starts)

    def rest(self) -> None:
        """Wait until all is at rest, and check what every scenario ends with; AssertionError with what is wrong."""
        at_rest(self)
        watched(self)
        behind = overtaken(self)
        assert not behind, f"not in the order of iot_raw_data: {len(behind)} messages, the first {behind[:10]}"

    def open(self) -> None:
        """Create the database."""
        statement = f'CREATE DATABASE "{self.name}"'
        asyncio.run(_maintain(self._maintenance_url, lambda connection: connection.execute(statement)))

    def close(self) -> None:
        """End all that was started, let all that was paused go on, and remove database and MQTT session."""
        for name in ("kafka", "postgresql", "valkey", "mqtt"):
            self.stack.part(name).resume()
        for fleet in self._fleets:
            fleet.close()
        for worker in self.workers:
            worker.resume() if worker.alive else None
            worker.stop()
        if self.stack.part("postgresql").alive:
            asyncio.run(_maintain(self._maintenance_url, lambda connection: drop_database(connection, self.name)))
        if self.stack.part("mqtt").alive:
            self._forget_session()

    def _forget_session(self) -> None:
        # Otherwise the broker would keep all that later tests publish, for a connector that never comes back.
        url = urlsplit(self.env["MQTT_URL"])
        client_id = self.env.get("MQTT_CLIENT_ID") or f"{self.name}-mqtt"
        client = paho.Client(CallbackAPIVersion.VERSION2, client_id=client_id, protocol=MQTTProtocolVersion.MQTTv5)
        try:
            client.connect(url.hostname or "127.0.0.1", url.port or 1883, clean_start=True)
            for _ in range(50):
                client.loop(0.1)
                if client.is_connected():
                    break
            client.disconnect()
            client.loop(0.1)
        except OSError:
            return


async def _maintain(url: str, work: Callable[[Any], Awaitable[Any]]) -> None:
    connection = await asyncpg.connect(url)
    try:
        await work(connection)
    finally:
        await connection.close()


@contextmanager
def realm(stack: Stack, folder: Path, **settings: str) -> Iterator[Realm]:
    """Open a realm on the stack; `settings` are over and above its own. When the test fails, the logs are printed."""
    own = Realm(stack, folder, settings)
    own.open()
    with ExitStack() as watching:
        watching.callback(own.close)
        watching.enter_context(own.oracle)
        watching.enter_context(own.bookkeeping)
        try:
            yield own
            own.rest()
        except BaseException:
            print(own.logs())
            raise
