"""The machine runs out of something: descriptors, room on its disk. The worker waits or ends, and loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import psutil
import pytest

from tests.faults.support import LIVENESS_SECONDS, STAGES, settled, wait_for
from tests.faults.test_alarms import DEVICES, Storm, check_order, distinct, mails, prepared
from tests.faults.topics import read
from tests.faults.worker import Realm, Worker, realm
from tools.simulator import Plan
from tools.stack import Stack

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

_SPARE_DESCRIPTORS = 16
_DISK_BYTES = 64 << 20


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


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Mount a small file system of its own; needs root, or a sudo that asks nothing, as `make install` does."""
    sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
    folder.mkdir(parents=True)
    options = f"size={_DISK_BYTES},mode=0700,uid={os.getuid()}"
    subprocess.run([*sudo, "mount", "-t", "tmpfs", "-o", options, "headrace-test", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*sudo, "umount", "-l", folder], check=True)


def fill(folder: Path) -> Path:
    """Write a file into a file system until nothing more goes in; return the file."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 65536)
    with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0")
    return filler


def test_the_disk_is_full(breakable: Stack, tmp_path: Path) -> None:
    """Tables that cannot be written end their worker with a clear message; a log that cannot stops nobody.

    Nothing is lost, nothing is a dead letter, nothing is told twice; with room again all of it is told.
    """
    cycles = 10
    with small_disk(tmp_path / "disk") as disk, prepared(breakable, tmp_path, "alarms,mailer") as own:
        watcher = own.worker("watcher", DATA_DIR=str(disk / "watcher")).start()
        others = own.worker("others", DATA_DIR=str(disk / "others"), STAGES="mqtt,normalizer,ingestor")
        others.log = disk / "others.log"
        others.start()
        fleet = own.fleet(Plan(rate=50))
        fleet.start()
        storm = Storm(own)
        storm.play(50.0)
        wait_for("every alarm is open", lambda: distinct(own) == DEVICES)
        filler = fill(disk)
        assert shutil.disk_usage(disk).free == 0
        for _ in range(cycles):
            storm.play(20.0, 50.0)
        storm.play(20.0)
        assert watcher.wait_exit(LIVENESS_SECONDS) > 0
        assert "No space left on device" in watcher.output(), watcher.tail()
        assert "make room on the disk of" in watcher.output(), watcher.tail()
        watcher.start(wait=False)
        stored = others.metric("headrace_forwarded_total", stage="ingestor")
        wait_for("rows", lambda: others.metric("headrace_forwarded_total", stage="ingestor") > stored + 200)
        filler.unlink()
        # as a supervisor does
        wait_for("the tables", lambda: watcher.start(wait=False).ready())
        wait_for("every transition is mailed", lambda: distinct(own) == DEVICES * 2 * (cycles + 1))
        check_order(mails(own))
        fleet.stop()
        settled(own, fleet)
        assert others.starts == 1
        assert watcher.metric("headrace_dead_letters_total") == 0
        assert read(own, "iot_errors") == []
