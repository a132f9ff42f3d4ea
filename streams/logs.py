"""The log stays readable while Kafka is away: one line a minute of each kind that aiokafka repeats.

aiokafka logs each of its attempts, some ten lines a second and client. ``Calm`` lets the first warning or error of a
kind pass, and then one a minute that says how many it held back. A kind is a logger with a message's pattern, whatever
numbers are in it. What Headrace says itself (which stage waits for what) and lines below WARNING are left alone.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable

import aiokafka  # noqa: F401  (its loggers exist once it is loaded)

from streams.events import Digest

_NUMBERS = re.compile(r"\d+")


class Calm(logging.Filter):
    """Holds back lines that repeat."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._digest = Digest(clock)

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether ``record`` may go out; one that stands for others says so."""
        if record.levelno < logging.WARNING:
            return True
        held = self._digest.admit((record.name, record.levelno, _NUMBERS.sub("#", str(record.msg))))
        if held is None:
            return False
        if held:
            record.msg = f"{record.getMessage()} (and {held} more like it since the last such line)"
            # not None: Faust's formatter takes that for an argument
            record.args = ()
        return True


def calm_kafka(calm: Calm | None = None) -> list[str]:
    """Put one filter on every logger of aiokafka and return their names; twice is once."""
    names = [name for name in logging.root.manager.loggerDict if name == "aiokafka" or name.startswith("aiokafka.")]
    calm = calm or Calm()
    for name in names:
        logger = logging.getLogger(name)
        if not any(isinstance(found, Calm) for found in logger.filters):
            logger.addFilter(calm)
    return names
