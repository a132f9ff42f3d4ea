"""One server of the stack: how it is started, known to answer, stopped and killed.

Guarantee: `start` returns only after the server that *this* process started has answered a request of its own protocol
on the remembered port. A stranger's server on that port is never taken for ours: the listening socket must belong to
our process, and a port that is taken is exchanged for another one.

The methods block and belong to no event loop; from a coroutine call them with `asyncio.to_thread`.
"""

import abc
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from tools.stack import ports, processes
from tools.stack.errors import StackError
from tools.stack.processes import ProcessId
from tools.stack.state import State

ROOT = Path(__file__).resolve().parents[2]
_POLL_SECONDS = 0.05
_STARTS = 4
_PORT_PATIENCE_SECONDS = 1.0


class NotReadyError(Exception):
    """The server does not answer yet; the message is what it said instead."""


class Part(abc.ABC):
    """A server with its data in `state.folder / name`, its log in `state.folder / "logs" / f"{name}.log"`."""

    name: ClassVar[str]
    title: ClassVar[str]
    port_names: ClassVar[Sequence[str]]
    variable: ClassVar[str]  # the setting that points at one's own server instead
    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM
    patience_seconds: ClassVar[float] = 20.0
    ready_seconds: ClassVar[float] = 90.0

    def __init__(self, state: State, rng: random.Random) -> None:
        self.state = state
        self._rng = rng
        self._child: subprocess.Popen[bytes] | None = None
        self._process: ProcessId | None = None

    # -- what each server says of itself

    @abc.abstractmethod
    def prepare(self) -> None:
        """Write the configuration and, the first time, lay out the data; called before each start."""

    @abc.abstractmethod
    def command(self) -> Sequence[str | Path]:
        """Return the server's command line."""

    @abc.abstractmethod
    def probe(self) -> None:
        """Ask the server something in its own protocol; any exception means that it is not ready."""

    @abc.abstractmethod
    def env(self) -> dict[str, str]:
        """Return the settings (CONTRACT's names) that lead to this server."""

    def first_answer(self) -> None:  # noqa: B027 - most servers need nothing more
        """Do what needs the running server, each time it has become ready; may be called again on the same data."""

    # -- life

    @property
    def data(self) -> Path:
        """The folder of the server's data."""
        return self.state.folder / self.name

    @property
    def log(self) -> Path:
        """The file that has the server's output."""
        return self.state.folder / "logs" / f"{self.name}.log"

    @property
    def pid(self) -> int | None:
        """The id of the running server's process, None while there is none."""
        return self._process.pid if self._process and self.alive else None

    @property
    def alive(self) -> bool:
        """Whether the process runs (a stopped one, SIGSTOP, does)."""
        return self._process is not None and processes.is_running(self._process)

    def port(self, name: str = "port") -> int:
        """Return the port that was chosen under `name` (one of `port_names`)."""
        value = self.state.get("ports", f"{self.name}.{name}")
        if value is None:
            raise StackError(f"{self.title} has not been started yet, so it has no port")
        return int(value)

    def address(self, name: str = "port") -> str:
        """Return `127.0.0.1:PORT`."""
        return f"127.0.0.1:{self.port(name)}"

    def start(self) -> None:
        """Start the server and wait until it answers; nothing happens when it runs. Raises StackError.

        Ports and data are those of the last time; a port that somebody else has taken meanwhile is exchanged.
        """
        if self.alive:
            return
        for attempt in range(_STARTS):
            self._choose_ports(keep=attempt < 2)
            self.data.mkdir(parents=True, exist_ok=True)
            self.prepare()
            self._child = processes.spawn(self.command(), log=self.log, cwd=ROOT, record=self._record)
            try:
                self.wait_ready()
            except StackError:
                # It may have lost its port to somebody in the last milliseconds, or found what a killed
                # predecessor was still letting go of. Whoever still runs without an answer won't get better.
                if self.alive or self.state.cancelled.is_set() or attempt == _STARTS - 1:
                    self.stop()
                    raise
                time.sleep(0.5 * attempt)
            else:
                return

    def wait_ready(self, timeout_seconds: float | None = None) -> None:
        """Wait until the running server answers; StackError when it ends or the time is over."""
        deadline = time.monotonic() + (timeout_seconds or self.ready_seconds)
        while True:
            self._give_up_when_cancelled()
            if not self.alive:
                code = self._child.poll() if self._child else None
                raise StackError(f"{self.title} ended while it started (exit code {code}).{self.advice()}")
            try:
                self._probe_ours()
                self.first_answer()
            except StackError:
                raise
            except Exception as reason:
                if time.monotonic() > deadline:
                    raise StackError(
                        f"{self.title} did not answer on {self.address()} within "
                        f"{timeout_seconds or self.ready_seconds:.0f} s (last: {reason!r}).{self.advice()}"
                    ) from reason
                time.sleep(_POLL_SECONDS)
            else:
                return

    def stop(self) -> None:
        """Stop the server in order, within `patience_seconds`; then kill it."""
        if self._process is not None:
            processes.end(self._process, polite=self.stop_signal, patience_seconds=self.patience_seconds)
        self._forget()

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal; after SIGKILL, which goes to the children too, return when all of them are gone."""
        if self._process is None:
            return
        if number is signal.SIGKILL:
            processes.end(self._process, polite=signal.SIGKILL, patience_seconds=0)
            self._forget()
        elif self.alive:
            processes.send(self._process, number)

    def pause(self) -> None:
        """Freeze the server and its children (SIGSTOP): connections stay, nothing answers."""
        self.kill(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a frozen server go on (SIGCONT)."""
        self.kill(signal.SIGCONT)

    # -- for the servers

    def fresh_draft(self) -> Path:
        """Return a path in `data` where data are laid out before they get their name; a broken attempt is removed."""
        draft = self.data / "draft"
        shutil.rmtree(draft, ignore_errors=True)
        return draft

    def run(self, *command: str | Path) -> None:
        """Run a program of the server's to its end, on record like the server itself; StackError when it fails."""
        self._child = processes.spawn(command, log=self.log, cwd=ROOT, record=self._record)
        while (code := self._child.poll()) is None:
            self._give_up_when_cancelled()
            time.sleep(_POLL_SECONDS)
        self._forget()
        if code:
            raise StackError(f"{self.title} could not lay out its data in {self.data}.{self.advice()}")

    # -- inside

    def _probe_ours(self) -> None:
        assert self._process is not None
        for name in self.port_names:
            if not processes.listens(self._process, self.port(name)):
                raise NotReadyError(f"it does not listen on port {self.port(name)} yet")
        self.probe()

    def _give_up_when_cancelled(self) -> None:
        if self.state.cancelled.is_set():
            raise StackError(f"{self.title} was told to stop while it started")

    def _choose_ports(self, *, keep: bool) -> None:
        for name in self.port_names:
            key = f"{self.name}.{name}"
            remembered = self.state.get("ports", key)
            if remembered is None or not keep or not self._is_free_soon(remembered):
                self.state.put("ports", key, ports.choose(self.state.ports(), self._rng))

    def _is_free_soon(self, port: int) -> bool:
        # Clients of a part that runs again in the same stack know its port: a moment's patience before it gets another.
        deadline = time.monotonic() + (_PORT_PATIENCE_SECONDS if self._child is not None else 0)
        while not (free := ports.is_free(port)) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        return free

    def _record(self, process: ProcessId) -> None:
        self._process = process
        self.state.put("processes", self.name, process)

    def _forget(self) -> None:
        if self._child is not None:
            self._child.poll()
        if not self.alive:
            self._process = None
            self.state.put("processes", self.name, None)

    def advice(self) -> str:
        """Return where to look and what to set instead, for the end of an error message."""
        return (
            f" Its log: {self.log}{last_words(self.log)}\n"
            f"  To use a server of your own instead, set {self.variable} to it and run\n"
            f"  `make stack STACK_ARGS='--without {self.name}'`."
        )


def last_words(log: Path, lines: int = 5) -> str:
    """Return the last lines of a log, indented, for an error message."""
    try:
        tail = log.read_bytes()[-4096:].decode(errors="replace").splitlines()[-lines:]
    except OSError:
        return ""
    return "".join(f"\n    {line}" for line in tail)
