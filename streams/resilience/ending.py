"""The end of a worker: in order at the first signal, at once at the second, and never later than its bound, also after
a failure that it cannot go on from.

TERM, INT and HUP (a terminal that is closed; ``nohup`` keeps it away) end a worker in order: it reads no more, waits up
to ``shutdown_seconds`` for what is in flight, commits, leaves its groups and exits with 0. A second signal ends it at
once, and so does a bound that is over while something hangs: nothing is lost by that, what was not committed comes
again. The exit code is then that of the signal (128 + its number), or 1 after a failure.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from typing import Any

import faust

log = logging.getLogger(__name__)

#: What closing clients and leaving groups may take beyond the wait for what is in flight.
CLOSING_SECONDS = 20.0


class Worker(faust.Worker):
    """Faust's worker, with an end that is bounded."""

    _first: signal.Signals | None = None

    def _install_signal_handlers_unix(self) -> None:
        super()._install_signal_handlers_unix()
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            self.loop.add_signal_handler(signal.SIGHUP, self._on_sighup)

    def _on_sighup(self) -> None:
        self._flag_as_shutdown_by_signal()
        self._schedule_shutdown(signal.SIGHUP)

    def _schedule_shutdown(self, signal: signal.Signals) -> None:
        if self._first is not None:
            self.end_now(128 + signal, f"{signal.name} after {self._first.name}")
            return
        self._first = signal
        self._bound(128 + signal)
        super()._schedule_shutdown(signal)

    def stop_and_shutdown(self) -> None:
        """Stop, within the same bound, and with exit code 1 then, where a failure and no signal has ended it."""
        if self._first is None:
            self._bound(1)
        super().stop_and_shutdown()

    def _bound(self, code: int) -> None:
        bound = self.shutdown_seconds + CLOSING_SECONDS
        why = f"the end has taken {bound:.0f} s (SHUTDOWN_SECONDS, and {CLOSING_SECONDS:.0f} to close)"
        # a thread of its own, because the loop may be what hangs, or a thread that the interpreter waits for
        timer = threading.Timer(bound, self.end_now, (code, why))
        timer.daemon = True
        timer.start()

    @property
    def shutdown_seconds(self) -> float:
        """How long the end waits for what is in flight."""
        app: Any = self.app
        seconds: float = app.resilience.shutdown_seconds
        return seconds

    def end_now(self, code: int, why: str) -> None:
        """End the process with an exit code: nothing is waited for any more."""
        under_way = sorted({getattr(task.get_coro(), "__qualname__", "?") for task in asyncio.all_tasks(self.loop)})
        log.warning(
            "Ended at once: %s; what is not committed comes again. Under way: %s",
            why,
            ", ".join(under_way) or "nothing",
        )
        for handler in logging.getLogger().handlers:
            handler.flush()
        os._exit(code)
