"""The event loop is blocked: a driver in an endless loop, a call that never returns.

Guarantee: when the loop has not turned for ``STUCK_SECONDS``, the worker says where it is (the stack, and the record at
hand) and ends, non-zero, for its supervisor; no commit has passed the record. A record that has ended the worker twice
becomes a dead letter at the third try, before any handler sees it, so that the stage goes on without it.

A thread of its own watches, since nothing in the loop can. A process that was stopped as a whole (``SIGSTOP``, a frozen
virtual machine) is not taken for a blocked one: then the watch stood still too.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

log = logging.getLogger(__name__)

EXIT_CODE: Final = 70
ENDED_TWICE: Final = 2
_LOOK_SECONDS: Final = 0.5


class AtHand:
    """The record that a pure handler works on just now; one assignment per message."""

    record: Any = None


AT_HAND = AtHand()


def name_of(record: Any) -> str | None:
    """Return ``topic:partition:offset`` of a record, None where it is none."""
    try:
        return f"{record.topic}:{record.partition}:{record.offset}"
    except AttributeError:
        return None


class Culprits:
    """Which records have ended this worker how often; kept in a file, since the worker does not live to tell."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: dict[str, int] = {}
        try:
            self.counts = msgspec.json.decode(path.read_bytes(), type=dict[str, int])
        except FileNotFoundError:
            pass
        except (OSError, msgspec.MsgspecError) as exc:
            log.warning("%s cannot be read (%s); records that ended the worker before are forgotten", path, exc)

    def condemned(self) -> frozenset[str]:
        """Return the records that are to become dead letters."""
        return frozenset(name for name, count in self.counts.items() if count >= ENDED_TWICE)

    def blame(self, record: Any) -> str | None:
        """Note that ``record`` ends the worker now; return its name."""
        name = name_of(record)
        if name is not None:
            self.counts[name] = self.counts.get(name, 0) + 1
            self.path.parent.mkdir(parents=True, exist_ok=True)
            draft = self.path.with_suffix(".new")
            draft.write_bytes(msgspec.json.encode(self.counts))
            draft.replace(self.path)
        return name


class Watchdog(threading.Thread):
    """Ends the process when :meth:`beat` has not been called for ``limit_seconds``."""

    def __init__(
        self,
        limit_seconds: float,
        culprits: Culprits,
        *,
        clock: Callable[[], float] = time.monotonic,
        end: Callable[[int], Any] = os._exit,
    ) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.limit_seconds = limit_seconds
        self.culprits = culprits
        self._clock = clock
        self._end = end
        self._loop_thread = threading.get_ident()
        self._beaten = clock()
        self._looked = clock()
        self._stopped = threading.Event()

    def beat(self) -> None:
        """Tell that the loop turns."""
        self._beaten = self._clock()

    def stop(self) -> None:
        """Watch no longer."""
        self._stopped.set()

    def run(self) -> None:
        """Look twice a second until stopped."""
        while not self._stopped.wait(_LOOK_SECONDS):
            if self.look():
                return

    def look(self) -> bool:
        """Judge once; ends the process, and returns True, when the loop is blocked."""
        now = self._clock()
        asleep, self._looked = now - self._looked, now
        if asleep > 10 * _LOOK_SECONDS:
            # This thread did not run either: the process was stopped, not the loop.
            self._beaten = now
        if now - self._beaten < self.limit_seconds:
            return False
        name = self.culprits.blame(AT_HAND.record)
        frame = sys._current_frames().get(self._loop_thread)
        stack = "".join(traceback.format_stack(frame)) if frame is not None else "(no stack)"
        log.critical(
            "The event loop has not turned for %.0f s (STUCK_SECONDS); record at hand: %s. The worker ends with exit "
            "code %d, nothing beyond that record is committed. It is here:\n%s",
            now - self._beaten,
            name or "none",
            EXIT_CODE,
            stack,
        )
        for handler in logging.getLogger().handlers:
            handler.flush()
        self._end(EXIT_CODE)
        return True
