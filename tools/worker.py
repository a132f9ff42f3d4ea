"""A worker as a child process, for the demo and for the tests that kill it.

    worker = Worker(stack.env | {"STAGES": "normalizer,ingestor"}, log=folder / "worker.log")
    worker.start()                      # until /health/ready says so
    worker.kill(); worker.start()       # SIGKILL; a new process, on a new port
    worker.metric("headrace_received_total", stage="ingestor")
    worker.stop()                       # SIGTERM, its exit code; SIGKILL after its patience

Guarantees: `start` returns when every stage is ready, or raises WorkerError with the reasons and the last lines of the
log; a signal is only ever sent to the process that was started here. Everything blocks and belongs to no event loop.
"""

import contextlib
import http.client
import json
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from settings import declarations, environment
from tools.stack import ports, processes
from tools.stack.processes import ProcessId

__all__ = ["Worker", "WorkerError"]

ROOT = Path(__file__).resolve().parent.parent
_POLL_SECONDS = 0.05
_ANSWER_SECONDS = 20.0
_METRIC = re.compile(r"^(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})? (?P<value>\S+)$")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class WorkerError(Exception):
    """A worker did not become ready, ended, did not end, or did not answer; with the last lines of its log."""


class Worker:
    """`faust -A streams worker` (or another module's app, with `app`) with settings of its own.

    `env` holds settings; all others are unset, whatever the caller's environment says. `WEB_BIND` and `COAP_BIND` are
    free ports, chosen at each start, unless `env` names them. The log is appended to. `record(id)` is called with each
    process before it can do anything.
    """

    def __init__(
        self,
        env: Mapping[str, str],
        *,
        log: Path,
        name: str = "worker",
        app: str = "streams",
        log_level: str = "info",
        record: Callable[[ProcessId], None] = lambda _process: None,
    ) -> None:
        self.env = dict(env)
        self.log = log
        self.name = name
        self.starts = 0
        #: when it first was ready (`time.monotonic`), None before; and whether `stop` ended it
        self.ready_at: float | None = None
        self.stopped = False
        self._app = app
        self._log_level = log_level
        self._record = record
        self._child: subprocess.Popen[bytes] | None = None
        self._process: ProcessId | None = None
        self._address = ""
        self._log_offset = 0

    # -- life

    @property
    def pid(self) -> int | None:
        """The id of the running process, None while there is none."""
        return self._process.pid if self._process is not None and self.alive else None

    @property
    def alive(self) -> bool:
        """Whether the process runs (a paused one does)."""
        return self._child is not None and self._child.poll() is None

    @property
    def exit_code(self) -> int | None:
        """How the last process ended: its exit code, minus the signal's number, or None while it runs."""
        return None if self._child is None else self._child.poll()

    @property
    def url(self) -> str:
        """Where its web server is, `http://127.0.0.1:PORT`."""
        return f"http://{self._address}"

    def start(self, *, wait: bool = True, patience_seconds: float = 90.0) -> Self:
        """Start a process, unless one runs; with `wait` until it is ready. Raises WorkerError."""
        if not self.alive:
            self.spawn()
        if wait:
            self.wait_ready(patience_seconds)
        return self

    def spawn(self) -> None:
        """Start a process and do not wait for anything."""
        known = {declared.variable for declared in declarations()}
        base = {name: value for name, value in environment().items() if name not in known}
        rng = random.SystemRandom()
        self._address = self.env.get("WEB_BIND") or f"127.0.0.1:{ports.choose(set(), rng)}"
        coap = self.env.get("COAP_BIND") or f"127.0.0.1:{ports.choose(set(), rng, socket.SOCK_DGRAM)}"
        env = {**base, "PYTHONUNBUFFERED": "1", **self.env, "WEB_BIND": self._address, "COAP_BIND": coap}
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output:
            self._log_offset = output.tell()
            # A session of its own: Ctrl-C on the terminal is for the caller, who ends this process in order.
            self._child = subprocess.Popen(
                [sys.executable, "-m", "faust", "-A", self._app, "worker", "-l", self._log_level],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=env,
                start_new_session=True,
            )
        self._process = ProcessId(self._child.pid, processes.start_mark(self._child.pid) or "gone")
        self._record(self._process)
        self.starts += 1
        self.stopped = False

    def wait_ready(self, patience_seconds: float = 90.0) -> None:
        """Wait until `/health/ready` says 200. Raises WorkerError when the process ends or the time is over."""
        self.wait(self.ready, "ready", patience_seconds)

    def wait(self, holds: Callable[[], object], what: str, patience_seconds: float = 60.0) -> None:
        """Wait for a condition while the process lives. Raises WorkerError that says `what` was waited for."""
        deadline = time.monotonic() + patience_seconds
        while not holds():
            if not self.alive:
                raise WorkerError(
                    f"{self.name} ended with exit code {self.exit_code} before it was {what}.\n{self.tail()}"
                )
            if time.monotonic() > deadline:
                raise WorkerError(
                    f"{self.name} was not {what} within {patience_seconds:.0f} s; failing checks: "
                    f"{self.failing() or 'none, or no answer'}.\n{self.tail()}"
                )
            time.sleep(_POLL_SECONDS)

    def wait_exit(self, patience_seconds: float = 60.0) -> int:
        """Wait until the process has ended and return its exit code. Raises WorkerError."""
        if self._child is None:
            raise WorkerError(f"{self.name} was not started")
        try:
            return self._child.wait(patience_seconds)
        except subprocess.TimeoutExpired:
            raise WorkerError(f"{self.name} did not end within {patience_seconds:.0f} s.\n{self.tail()}") from None

    def stop(self, patience_seconds: float = 40.0) -> int | None:
        """End the process with SIGTERM, with SIGKILL after `patience_seconds`; return its exit code."""
        if self.alive:
            self.stopped = True
            self.resume()
            self.signal(signal.SIGTERM)
            try:
                self.wait_exit(patience_seconds)
            except WorkerError:
                self.kill()
        return self.exit_code

    def kill(self) -> None:
        """Send SIGKILL and wait until the process, and whatever it has started, is gone."""
        if self._process is not None and self._child is not None and self.alive:
            processes.end(self._process, polite=signal.SIGKILL, patience_seconds=0)
            self._child.wait(20)

    def signal(self, number: signal.Signals) -> None:
        """Send any signal to the process; nothing happens when it has ended."""
        if self._child is not None:
            self._child.send_signal(number)

    def pause(self) -> None:
        """Freeze the process (SIGSTOP): connections stay, nothing answers."""
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a frozen process go on (SIGCONT)."""
        self.signal(signal.SIGCONT)

    def restart(self, *, wait: bool = True) -> int | None:
        """Stop and start again; return the exit code of the process before."""
        code = self.stop()
        self.start(wait=wait)
        return code

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _at: TracebackType | None
    ) -> None:
        self.stop()

    # -- what it says of itself

    def get(self, path: str, timeout_seconds: float = 5.0) -> tuple[int, bytes]:
        """Return status and body of a page; status 0 where nothing answers."""
        try:
            with urllib.request.urlopen(f"{self.url}{path}", timeout=timeout_seconds) as answer:  # noqa: S310
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        except (OSError, http.client.HTTPException):
            # the latter where the process ends in the midst of its answer
            return 0, b""

    def health(self) -> dict[str, Any]:
        """Return the JSON of `/health/ready`; empty while nothing answers."""
        with contextlib.suppress(ValueError):
            found: dict[str, Any] = json.loads(self.get("/health/ready")[1])
            return found
        return {}

    def ready(self) -> bool:
        """Tell whether `/health/ready` says 200."""
        found = self.get("/health/ready")[0] == 200
        if found and self.ready_at is None:
            self.ready_at = time.monotonic()
        return found

    def failing(self) -> dict[str, str]:
        """Return the reason of each check that fails."""
        checks = self.health().get("checks", {})
        return {name: check.get("reason", "") for name, check in checks.items() if not check["ok"]}

    def metrics(self) -> list[tuple[str, dict[str, str], float]]:
        """Return all samples of `/metrics`: name, labels, value; empty while nothing answers."""
        samples = []
        for line in self.get("/metrics")[1].decode().splitlines():
            if found := _METRIC.match(line):
                labels = dict(_LABEL.findall(found["labels"] or ""))
                samples.append((found["name"], labels, float(found["value"])))
        return samples

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of the samples of `name` that have these labels; 0 where there is none.

        Raises WorkerError when the process has ended, or does not answer for long.
        """
        deadline = time.monotonic() + _ANSWER_SECONDS
        while not (samples := self.metrics()):
            if not self.alive:
                raise WorkerError(f"{self.name} does not run, and was asked for {name}.\n{self.tail()}")
            if time.monotonic() > deadline:
                raise WorkerError(f"{self.name} did not tell {name} within {_ANSWER_SECONDS:.0f} s.\n{self.tail()}")
            time.sleep(_POLL_SECONDS)
        return sum(value for found, has, value in samples if found == name and labels.items() <= has.items())

    def output(self) -> str:
        """Return what the present (or last) process has logged."""
        with self.log.open("rb") as file:
            file.seek(self._log_offset)
            return file.read().decode(errors="replace")

    def tail(self, lines: int = 40) -> str:
        """Return the last lines of the log, for an error message."""
        try:
            last = self.output().splitlines()[-lines:]
        except OSError:
            last = []
        return f"--- {self.log}, its last {len(last)} lines\n" + "\n".join(last)
