"""The embedded stack: Kafka, PostgreSQL, Valkey, an MQTT broker and an SMTP inbox on free ports of loopback.

Guarantees: what a stack starts it stops; what a killed stack left behind, the next one on the same folder ends before
it starts its own, and it touches nothing else. Data and ports survive a restart. Two stacks never share a folder.
"""

import asyncio
import contextlib
import os
import random
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from tools.stack import ports, processes
from tools.stack.brokers import Mqtt, Smtp
from tools.stack.errors import StackError
from tools.stack.kafka import Kafka
from tools.stack.part import Part
from tools.stack.state import State
from tools.stack.stores import PostgreSQL, Valkey

PARTS: tuple[type[Part], ...] = (Kafka, PostgreSQL, Valkey, Mqtt, Smtp)
ALL = frozenset(part.name for part in PARTS)
_TEMPORARY_PREFIX = "headrace-stack-"


class Stack:
    """The servers of one state folder.

    `parts` names those that `start()` starts (`kafka`, `postgresql`, `valkey`, `mqtt`, `smtp`); `start("kafka")` starts
    more later. `report` is called with one line for each step, from several threads. Nothing here belongs to an event
    loop: the methods block, `async with` runs them in a thread.
    """

    def __init__(
        self,
        folder: Path | str,
        parts: Collection[str] = ALL,
        *,
        report: Callable[[str], None] = lambda _line: None,
        rng: random.Random | None = None,
    ) -> None:
        if unknown := set(parts) - ALL:
            raise StackError(f"the stack has no part {', '.join(sorted(unknown))}; it has {', '.join(sorted(ALL))}")
        self.folder = Path(folder).absolute()
        self._wanted = frozenset(parts)
        self._report = report
        self._rng = rng or random.SystemRandom()
        self._state = State(self.folder)
        self._parts = {part.name: part(self._state, self._rng) for part in PARTS}
        self._held = False

    @classmethod
    def temporary(cls, parts: Collection[str] = ALL, *, report: Callable[[str], None] = lambda _line: None) -> Self:
        """Return a stack on a new folder below the temporary one; `stop(discard=True)` removes it.

        Folders of temporary stacks whose process was killed are cleared first, with what runs on them.
        """
        base = Path(tempfile.gettempdir())
        for left in base.glob(f"{_TEMPORARY_PREFIX}*-*"):
            with contextlib.suppress(StackError, OSError, ValueError):
                if processes.start_mark(int(left.name.removeprefix(_TEMPORARY_PREFIX).split("-")[0])):
                    continue
                stale = cls(left, ())
                stale.acquire()
                stale.stop(discard=True)
        return cls(tempfile.mkdtemp(prefix=f"{_TEMPORARY_PREFIX}{os.getpid()}-"), parts, report=report)

    def part(self, name: str) -> Part:
        """Return one server, to stop, kill, pause and start it."""
        return self._parts[name]

    @property
    def env(self) -> dict[str, str]:
        """The settings that lead to the servers that were started, and to free ports and a folder for the worker."""
        values: dict[str, str] = {}
        for part in self._parts.values():
            if self._state.get("processes", part.name) or self._state.get("ports", f"{part.name}.port"):
                values |= part.env()
        return values | {
            "BROKER_PROFILE": "fast",
            "COAP_BIND": f"127.0.0.1:{self._own_port('coap', socket.SOCK_DGRAM)}",
            "WEB_BIND": f"127.0.0.1:{self._own_port('web', socket.SOCK_STREAM)}",
            "DATA_DIR": str(self.folder / "data"),
        }

    def acquire(self) -> None:
        """Take the folder, and end what a killed stack left running on it. Raises StackError."""
        if self._held:
            return
        self._state.acquire()
        self._held = True
        for name, process in self._state.processes().items():
            if processes.is_running(process):
                self._report(
                    f"{self._parts[name].title}: ending process {process.pid}, left by a stack that was killed"
                )
                patience = self._parts[name].patience_seconds
                processes.end(process, polite=self._parts[name].stop_signal, patience_seconds=patience)
            self._state.put("processes", name, None)
        # Ports that somebody else uses meanwhile are chosen anew, once, before anything is told to anybody.
        for name, kind in (("coap", socket.SOCK_DGRAM), ("web", socket.SOCK_STREAM)):
            remembered = self._state.get("ports", name)
            if remembered is not None and not ports.is_free(remembered, kind):
                self._state.put("ports", name, None)

    def start(self, *names: str) -> None:
        """Start the named parts (none: those of the constructor) side by side, until all answer. Raises StackError.

        When one cannot start, those that this call has started are left to `stop()`.
        """
        self.acquire()
        chosen = [self._parts[name] for name in (names or sorted(self._wanted))]
        with ThreadPoolExecutor(max_workers=len(self._parts)) as pool:
            started = [pool.submit(self._start_one, part) for part in chosen]
        problems = [str(problem) for future in started if (problem := future.exception()) is not None]
        if problems:
            raise StackError("\n".join(problems))

    def cancel(self) -> None:
        """Make a `start` that runs in another thread give up (StackError); for signal handlers."""
        self._state.cancelled.set()

    @property
    def held(self) -> bool:
        """Whether this stack has its folder."""
        return self._held

    def stop(self, *, discard: bool = False) -> None:
        """Stop every part, side by side, each within its bound; with `discard` kill them and remove the folder."""
        if not self._held:
            return
        with ThreadPoolExecutor(max_workers=len(self._parts)) as pool:
            for part in self._parts.values():
                pool.submit(part.kill if discard else part.stop)
        if discard:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._state.release()
        self._held = False

    def ended(self) -> list[Part]:
        """Return the parts that were started, should run, and don't."""
        return [part for part in self._parts.values() if self._state.get("processes", part.name) and not part.alive]

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _at: TracebackType | None
    ) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        return await asyncio.to_thread(self.__enter__)

    async def __aexit__(self, *_error: object) -> None:
        await asyncio.to_thread(self.stop)

    def _start_one(self, part: Part) -> None:
        begun = time.monotonic()
        part.start()
        where = next(iter(part.env().values()))
        self._report(f"{part.title} answers after {time.monotonic() - begun:.1f} s: {where}")
        if warning := getattr(part, "warning", None):
            self._report(f"warning: {warning}")

    def _own_port(self, name: str, kind: socket.SocketKind) -> int:
        port = self._state.get("ports", name)
        if port is None:
            port = ports.choose(self._state.ports(), self._rng, kind)
            self._state.put("ports", name, port)
        return int(port)
