"""`honcho start`: every process of the Procfile whose stage there is, on free ports, and its end."""

from __future__ import annotations

import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Self

import psutil

from settings import declarations, environment
from tests.faults.worker import Realm
from tools.stack import ports
from tools.worker import ROOT

#: honcho gives each process the port of the one before and 100.
_STEP = 100


class Honcho:
    """The Procfile's processes over the services of a realm; its end is SIGTERM to honcho, which hands it on."""

    def __init__(self, own: Realm, log: Path) -> None:
        self.names = [line.partition(":")[0] for line in (ROOT / "Procfile").read_text().splitlines() if line.strip()]
        self._own = own
        self._log = log
        self._child: subprocess.Popen[bytes] | None = None
        self._base = _free_base(len(self.names))

    def __enter__(self) -> Self:
        known = {declared.variable for declared in declarations()}
        base = {name: value for name, value in environment().items() if name not in known and name != "PORT"}
        coap = ports.choose(set(), random.SystemRandom(), socket.SOCK_DGRAM)
        env = {**base, "COAP_BIND": f"127.0.0.1:{coap}", **self._own.env}
        env.pop("STAGES", None)
        with self._log.open("ab") as output:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "honcho", "start", "--no-colour", "-p", str(self._base)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=env,
                start_new_session=True,
            )
        return self

    def wait_ready(self, seconds: float) -> None:
        """Wait until every process answers 200 on /health/ready; AssertionError with the log's end otherwise."""
        until = time.monotonic() + seconds
        waiting = dict(zip(self.names, range(self._base, self._base + _STEP * len(self.names), _STEP), strict=True))
        while waiting:
            assert self._child is not None
            assert self._child.poll() is None, f"honcho ended\n{self.tail()}"
            assert time.monotonic() < until, f"not ready: {', '.join(waiting)}\n{self.tail()}"
            waiting = {name: port for name, port in waiting.items() if not _ready(port)}
            time.sleep(0.3)

    def tail(self) -> str:
        """Return the end of what the processes have logged."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-60:])

    def __exit__(self, *_: object) -> None:
        if self._child is None:
            return
        family = psutil.Process(self._child.pid).children(recursive=True)
        self._child.send_signal(signal.SIGTERM)
        try:
            self._child.wait(60)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait(20)
        _gone, left = psutil.wait_procs(family, 60)
        for process in left:
            process.kill()


def _ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health/ready", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _free_base(count: int) -> int:
    rng = random.SystemRandom()
    while True:
        base = rng.randrange(20_000, 30_000)
        if all(_is_free(base + _STEP * number) for number in range(count)):
            return base


def _is_free(port: int) -> bool:
    with socket.socket() as sock:
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
