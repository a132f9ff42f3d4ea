"""Stores that are slow, frozen, locked, or lose connections: partitions wait, memory is flat, nothing is lost."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import psutil
import pytest
import redis

from tests.faults.proxy import Proxy
from tests.faults.support import STAGES, settled, wait_for
from tests.faults.worker import Realm, Worker, realm
from tools.simulator import Plan
from tools.stack import Stack

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

_MIB = 1 << 20
_SLOW = """
CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(1); RETURN NULL; END $$;
CREATE TRIGGER slow BEFORE INSERT ON readings FOR EACH STATEMENT EXECUTE FUNCTION slow();
"""


def execute(url: str, statement: str) -> None:
    """Run statements in a database."""

    async def run() -> None:
        connection = await asyncpg.connect(url)
        try:
            await connection.execute(statement)
        finally:
            await connection.close()

    asyncio.run(run())


@contextmanager
def between(own: Realm, variable: str) -> Iterator[Proxy]:
    """Put a proxy before the service that ``variable`` leads to, for workers that are made from now on."""
    url = urlsplit(own.env[variable])
    with Proxy(url.hostname or "127.0.0.1", url.port or 0) as proxy:
        login = url.netloc.rpartition("@")[0]
        place = f"{login}@127.0.0.1:{proxy.port}" if login else f"127.0.0.1:{proxy.port}"
        own.over = {**own.over, variable: urlunsplit(url._replace(netloc=place))}
        yield proxy


def forwarded(worker: Worker, stage: str) -> float:
    """Return how many messages a stage has handled."""
    return worker.metric("headrace_forwarded_total", stage=stage)


def test_a_slow_database(breakable: Stack, tmp_path: Path, short: bool) -> None:
    """Each statement takes a second: membership lives, in flight and memory are bounded; then all of it is stored."""
    bounds = {"IN_FLIGHT_BYTES": "1MiB", "MAX_MESSAGE_BYTES": "64KiB", "KAFKA_FETCH_PARTITION_MAX_BYTES": "128KiB"}
    with realm(breakable, tmp_path, STAGES=STAGES, DB_CHUNK_ROWS="50", **bounds) as own:
        worker = own.worker().start()
        process = psutil.Process(worker.pid)
        fleet = own.fleet(Plan(seconds=20 if short else 300, rate=250))
        fleet.start()
        wait_for("rows", lambda: forwarded(worker, "ingestor"))
        execute(own.env["DATABASE_URL"], _SLOW)
        held = worker.metric("headrace_assigned_partitions", stage="ingestor")
        wait_for("a lag", lambda: worker.metric("headrace_lag", stage="ingestor") > 500)
        before = process.memory_info().rss
        assert fleet.join(400)
        assert worker.metric("headrace_assigned_partitions", stage="ingestor") == held
        assert worker.metric("headrace_recreations_total", stage="ingestor") == 0
        # on top of the bound comes what is taken at once of each of four partitions: 2,000 readings of some 800 bytes
        assert worker.metric("headrace_in_flight_bytes", stage="ingestor") < 8 * _MIB
        assert process.memory_info().rss - before < 64 * _MIB
        execute(own.env["DATABASE_URL"], "DROP TRIGGER slow ON readings")
        settled(own, fleet)
        assert worker.starts == 1 and worker.alive


def test_the_database_frozen_for_longer_than_a_session(breakable: Stack, tmp_path: Path) -> None:
    """PostgreSQL takes connections and answers nothing: statements run out, caching goes on, all is stored later."""
    with realm(breakable, tmp_path, STAGES=STAGES, DB_STATEMENT_TIMEOUT_SECONDS="3") as own:
        worker = own.worker().start()
        fleet = own.fleet(Plan(seconds=20, rate=200))
        fleet.start()
        wait_for("rows", lambda: forwarded(worker, "ingestor"))

        def retries() -> float:
            return worker.metric("headrace_retries_total", stage="ingestor")

        before = retries()
        breakable.part("postgresql").pause()
        time.sleep(2)
        cached, stored = forwarded(worker, "caching"), forwarded(worker, "ingestor")
        time.sleep(8)
        # the server cannot end a statement; the worker does, with its slack for connecting on top
        wait_for("the frost is felt", lambda: retries() > before)
        wait_for("caching meanwhile", lambda: forwarded(worker, "caching") > cached + 200)
        assert forwarded(worker, "ingestor") == stored, "a frozen database has taken rows"
        breakable.part("postgresql").resume()
        settled(own, fleet)
        assert worker.alive


def test_a_locked_table_and_deadlocks(breakable: Stack, tmp_path: Path) -> None:
    """Somebody locks the table for longer than a statement may take, then provokes deadlocks: all is stored."""
    with realm(breakable, tmp_path, STAGES=STAGES, DB_STATEMENT_TIMEOUT_SECONDS="2") as own:
        worker = own.worker().start()
        fleet = own.fleet(Plan(seconds=12, rate=200))
        fleet.start()
        wait_for("rows", lambda: forwarded(worker, "ingestor"))
        stopped = threading.Event()

        async def disturb() -> None:
            connection = await asyncpg.connect(own.env["DATABASE_URL"])
            try:
                async with connection.transaction():
                    await connection.execute("LOCK TABLE readings IN ACCESS EXCLUSIVE MODE")
                    await asyncio.sleep(6)
                while not stopped.is_set():
                    # rows in an order of its own, against the ingestor's: now and then one of the two is a victim
                    try:
                        async with connection.transaction():
                            await connection.execute(
                                "UPDATE readings SET unit = unit WHERE ctid IN "
                                "(SELECT ctid FROM readings ORDER BY random() LIMIT 200)"
                            )
                    except asyncpg.PostgresError:
                        continue
                    await asyncio.sleep(0.05)
            finally:
                await connection.close()

        thread = threading.Thread(target=lambda: asyncio.run(disturb()), daemon=True)
        thread.start()
        try:
            assert fleet.join(120)
        finally:
            stopped.set()
            thread.join(60)
        settled(own, fleet)
        assert worker.metric("headrace_retries_total") > 0, "the lock was never felt"
        assert worker.metric("headrace_dead_letters_total") == 0


def test_connections_to_the_database_reset_in_the_midst(breakable: Stack, tmp_path: Path) -> None:
    """Connections end with RST in the middle of a COPY, then fall into a black hole: no row lost, none twice."""
    with (
        realm(breakable, tmp_path, STAGES=STAGES, DB_STATEMENT_TIMEOUT_SECONDS="3") as own,
        between(own, "DATABASE_URL") as proxy,
    ):
        worker = own.worker().start()
        fleet = own.fleet(Plan(seconds=20, rate=250))
        fleet.start()
        wait_for("rows", lambda: forwarded(worker, "ingestor"))
        proxy.reset(after_bytes=20_000)
        wait_for("connections that were reset", lambda: proxy.resets >= 5)
        proxy.clear()
        stored = forwarded(worker, "ingestor")
        wait_for("rows after the resets", lambda: forwarded(worker, "ingestor") > stored)
        proxy.hole()
        time.sleep(6)
        proxy.clear()
        settled(own, fleet)
        assert worker.alive


def test_connections_to_the_cache_in_a_black_hole(breakable: Stack, tmp_path: Path) -> None:
    """Valkey's packets vanish, then connections are refused: rows go on, and the cache catches up."""
    with (
        realm(breakable, tmp_path, STAGES=STAGES, REDIS_TIMEOUT_SECONDS="1") as own,
        between(own, "REDIS_URL") as proxy,
    ):
        worker = own.worker().start()
        fleet = own.fleet(Plan(seconds=15, rate=200))
        fleet.start()
        wait_for("something cached", lambda: forwarded(worker, "caching"))
        proxy.hole()
        stored = forwarded(worker, "ingestor")
        wait_for("rows meanwhile", lambda: forwarded(worker, "ingestor") > stored + 200)
        proxy.refuse()
        stored = forwarded(worker, "ingestor")
        wait_for("rows meanwhile", lambda: forwarded(worker, "ingestor") > stored + 200)
        proxy.clear()
        settled(own, fleet)
        received = worker.metric("headrace_received_total", stage="ingestor")
        wait_for("the cache has caught up", lambda: forwarded(worker, "caching") >= received)
        assert worker.alive


def test_a_cache_that_takes_no_writes(breakable: Stack, tmp_path: Path) -> None:
    """Valkey is a replica (READONLY), then out of memory (OOM): rows go on, no dead letter, the cache catches up."""
    with realm(breakable, tmp_path, STAGES=STAGES) as own:
        client = redis.Redis.from_url(own.env["REDIS_URL"])
        worker = own.worker().start()
        fleet = own.fleet(Plan(rate=200))
        fleet.start()
        faults = {
            "ReadOnlyError": (lambda: client.replicaof("127.0.0.1", "1"), lambda: client.replicaof("NO", "ONE")),
            "OutOfMemoryError": (
                lambda: client.config_set("maxmemory", 1),
                lambda: client.config_set("maxmemory", 0),
            ),
        }
        for error, (begin, end) in faults.items():
            cached = forwarded(worker, "caching")
            wait_for("something cached", lambda cached=cached: forwarded(worker, "caching") > cached)
            begin()
            try:
                stored = forwarded(worker, "ingestor")
                wait_for("rows meanwhile", lambda stored=stored: forwarded(worker, "ingestor") > stored + 200)
                wait_for("the fault is felt", lambda error=error: error in worker.output())
            finally:
                end()
        fleet.stop()
        settled(own, fleet)
        received = worker.metric("headrace_received_total", stage="ingestor")
        wait_for("the cache has caught up", lambda: forwarded(worker, "caching") >= received)
        assert worker.metric("headrace_dead_letters_total") == 0
        client.close()
