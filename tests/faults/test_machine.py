"""The machine runs out of something: the worker waits, and loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import psutil
import pytest

from tests.faults.support import LIVENESS_SECONDS, STAGES, settled, wait_for
from tests.faults.worker import Realm, Worker, realm
from tools.simulator import Plan
from tools.stack import Stack

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

_SPARE_DESCRIPTORS = 16


def value(own: Realm, statement: str) -> int:
    """Return the one value of a statement in a realm's database, asked past every worker."""

    async def run() -> int:
        connection = await asyncpg.connect(own.env["DATABASE_URL"])
        try:
            return int(await connection.fetchval(statement))
        finally:
            await connection.close()

    return asyncio.run(run())


@contextlib.contextmanager
def flood(worker: Worker, connections: int) -> Iterator[None]:
    """Open connections to the web server of a worker, which send nothing and stay; all are closed in the end."""
    address = urlsplit(worker.url)
    held: list[socket.socket] = []
    try:
        for _ in range(connections):
            with contextlib.suppress(OSError):
                held.append(socket.create_connection((address.hostname or "", address.port or 0), timeout=5))
        yield
    finally:
        for one in held:
            one.close()


def test_descriptors_run_out(breakable: Stack, tmp_path: Path) -> None:
    """A flood takes every descriptor: what is connected works on, what must connect anew waits until it is over."""
    with realm(breakable, tmp_path, STAGES=STAGES) as own:
        worker = own.worker().start()
        process = psutil.Process(worker.pid)
        fleet = own.fleet(Plan(rate=100))
        fleet.start()
        wait_for("rows", lambda: worker.metric("headrace_forwarded_total", stage="ingestor"))
        before = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        limit = process.num_fds() + _SPARE_DESCRIPTORS
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (limit, before[1]))
        rows = "SELECT count(*) FROM readings"
        with flood(worker, 4 * _SPARE_DESCRIPTORS):
            wait_for("no descriptor is left", lambda: process.num_fds() >= limit - 1)
            stored = value(own, rows)
            wait_for("rows over the connections that there are", lambda: value(own, rows) > stored + 100)
            value(
                own,
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
                "WHERE pid <> pg_backend_pid() AND datname = current_database()",
            )
            with flood(worker, 4 * _SPARE_DESCRIPTORS):
                wait_for("the lack is felt", lambda: "Too many open files" in worker.output())
        wait_for("the web server answers", lambda: worker.get("/health/live")[0] == 200)
        fleet.stop()
        settled(own, fleet)
        worker.wait_ready(LIVENESS_SECONDS)
        assert worker.starts == 1
        assert worker.metric("headrace_dead_letters_total") == 0
