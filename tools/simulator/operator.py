"""An operator: sends commands to devices of a fleet over HTTP, one after the other, and looks what became of each.

Guarantee: a command that was answered 202 is followed until it has a terminal state; :meth:`Operator.finish` waits for
the last ones, a bounded time. While the API does not answer, the same request is posted again: its id makes that safe.
"""

import json
import statistics
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from devices.commands.model import TERMINAL

__all__ = ["Operator", "Target"]

_HTTP_SECONDS = 5.0
_LOOK_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Target:
    """A device, and the command that it gets each time: `payload(n)` for the n-th one."""

    device_id: str
    command_type: str
    payload: Callable[[int], dict[str, Any]]
    protocol: str


@dataclass(slots=True)
class _Sent:
    state: str = "QUEUED"
    seconds: float | None = None

    @property
    def ended(self) -> bool:
        return self.state in TERMINAL


class Operator:
    """Sends a command each `every_seconds` to `targets` in turn, from a thread of its own; `url` is the worker's."""

    def __init__(self, url: str, targets: Sequence[Target], *, name: str, every_seconds: float) -> None:
        self._url = f"{url}/api/v1/commands"
        self._targets = targets
        self._name = name
        self._every = every_seconds
        self._sent: dict[str, _Sent] = {}
        self._stop = threading.Event()
        self._end = threading.Event()
        self._threads = [
            threading.Thread(target=work, name=f"operator {work.__name__}", daemon=True)
            for work in (self._send, self._follow)
        ]

    @property
    def states(self) -> Counter[str]:
        """How many commands are in which state."""
        return Counter(sent.state for sent in list(self._sent.values()))

    @property
    def open(self) -> list[str]:
        """The request ids without a terminal state."""
        return [name for name, sent in list(self._sent.items()) if not sent.ended]

    @property
    def median_seconds(self) -> float | None:
        """The median time from QUEUED to SUCCESSFUL."""
        found = [sent.seconds for sent in list(self._sent.values()) if sent.seconds is not None]
        return statistics.median(found) if found else None

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def finish(self, patience_seconds: float) -> bool:
        """Send nothing more and wait for the last ends; False where a command has none by then."""
        self._stop.set()
        until = time.monotonic() + patience_seconds
        while self.open and time.monotonic() < until:
            time.sleep(0.1)
        self.close()
        return not self.open

    def close(self) -> None:
        """Neither send nor look any more."""
        self._stop.set()
        self._end.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(2 * _HTTP_SECONDS)

    def line(self) -> str:
        """Return how many commands there were, and what became of them."""
        states = self.states
        ended = ", ".join(f"{count} {state}" for state, count in states.most_common() if state in TERMINAL)
        open_ = sum(count for state, count in states.items() if state not in TERMINAL)
        return f"commands {states.total()}: {ended or '0 ended'}" + (f", {open_} on the way" if open_ else "")

    def report(self) -> str:
        """Return the last word on all commands."""
        median = self.median_seconds
        text = self.line() + (
            f"; median from QUEUED to SUCCESSFUL {median * 1000:.0f} ms" if median is not None else ""
        )
        return text + "".join(f"\n  {name} has no end, it is {self._sent[name].state}" for name in self.open)

    def _send(self) -> None:
        number = 0
        while self._targets and not self._stop.wait(self._every if number else 0.0):
            target = self._targets[number % len(self._targets)]
            name = f"{self._name}-{number}"
            body = {
                "request_id": name,
                "device_id": target.device_id,
                "command_type": target.command_type,
                "payload": target.payload(number // len(self._targets)),
                "protocol": target.protocol,
            }
            while not self._stop.is_set():
                try:
                    self._ask(self._url, body)
                except (OSError, ValueError):
                    self._stop.wait(1.0)
                else:
                    self._sent[name] = _Sent()
                    break
            number += 1

    def _follow(self) -> None:
        while not self._end.wait(_LOOK_SECONDS):
            for name in self.open:
                try:
                    found = self._ask(f"{self._url}/{name}")
                except (OSError, ValueError):
                    # not in the database yet, or it does not answer
                    continue
                sent = self._sent[name]
                steps = found["transitions"]
                if found["state"] == "SUCCESSFUL":
                    first, last = (datetime.fromisoformat(steps[position]["time"]) for position in (0, -1))
                    sent.seconds = (last - first).total_seconds()
                sent.state = found["state"]

    @staticmethod
    def _ask(url: str, body: Any = None) -> Any:
        request = urllib.request.Request(  # noqa: S310 - the worker's own address
            url, None if body is None else json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=_HTTP_SECONDS) as answer:  # noqa: S310
            return json.load(answer)
