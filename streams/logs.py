"""The log of a worker: what ``LOG_LEVEL`` and ``LOG_FORMAT`` say, and readable while Kafka is away.

``JsonLines`` writes one JSON object a line: ``time`` (RFC 3339, UTC), ``level``, ``logger``, ``message``, and
``exception`` where there is one.

aiokafka logs each of its attempts, some ten lines a second and client. ``Calm`` lets the first warning or error of a
kind pass, and then one a minute that says how many it held back. A kind is a logger with a message's pattern, whatever
numbers are in it. What Headrace says itself (which stage waits for what) and lines below WARNING are left alone.
"""

from __future__ import annotations

import atexit
import logging
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, ClassVar

import aiokafka  # noqa: F401  (its loggers exist once it is loaded)
import click
import msgspec
from faust.cli.base import State

from streams.events import Digest
from streams.resilience import ending

_NUMBERS = re.compile(r"\d+")


class JsonLines(logging.Formatter):
    """Writes a record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its end."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


class Worker(ending.Worker):
    """A worker whose log is at ``log_level``, unless ``-l`` says otherwise, and in ``log_format``: text or json."""

    log_level: ClassVar[str] = "INFO"
    log_format: ClassVar[str] = "text"

    def __init__(self, *args: Any, loglevel: str | int | None = None, **kwargs: Any) -> None:
        # Faust makes a level of its own of a missing one; what was given on the command line is in its state.
        context = click.get_current_context(silent=True)
        state = context.find_object(State) if context is not None else None
        given = loglevel if state is None else state.loglevel
        super().__init__(*args, loglevel=given or self.log_level, **kwargs)
        if self.spinner is not None:
            # Above INFO Faust turns a spinner, also in files, and has every debug record of every library made for it.
            self.spinner._finish(self.spinner.file)
            atexit.unregister(self.spinner._finish)
            self.spinner = None

    def on_setup_root_logger(self, logger: logging.Logger, level: int) -> None:
        """Give the handlers their form."""
        super().on_setup_root_logger(logger, level)
        if self.log_format == "json":
            for handler in logger.handlers:
                handler.setFormatter(JsonLines())


def worker_type(log_level: str, log_format: str) -> type[Worker]:
    """Return the worker that logs as the settings say."""
    return type("Worker", (Worker,), {"log_level": log_level, "log_format": log_format})


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
