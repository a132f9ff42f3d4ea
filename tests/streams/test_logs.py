"""One line a minute of each kind that aiokafka repeats, and a word about the others."""

from __future__ import annotations

import json
import logging
import sys

import faust
import pytest
from mode.utils.logging import ExtensionFormatter

from streams.logs import Calm, JsonLines, calm_kafka, worker_type


class Shown(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.setFormatter(ExtensionFormatter(fmt="%(message)s", no_color=True))

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line, as a worker's handlers write it."""
        self.lines.append(self.format(record))


def test_a_kind_is_shown_once_a_minute_with_how_many_it_stands_for() -> None:
    """Ten lines a second for two minutes are three lines; another kind, another level and INFO are their own."""
    now = 0.0
    log, shown = logging.getLogger("try.calm"), Shown()
    log.addHandler(shown)
    log.propagate = False
    log.setLevel(logging.DEBUG)
    log.addFilter(Calm(lambda: now))
    for tick in range(1201):
        now = tick / 10
        log.error("Failed fetch messages from %s: %s", tick % 3, "NodeNotReadyError")
    assert shown.lines == [
        "Failed fetch messages from 0: NodeNotReadyError",
        "Failed fetch messages from 0: NodeNotReadyError (and 599 more like it since the last such line)",
        "Failed fetch messages from 0: NodeNotReadyError (and 599 more like it since the last such line)",
    ]
    shown.lines.clear()
    log.warning("Failed fetch messages from %s: %s", 1, "a level of its own")
    log.error("Unable to request metadata from node 1: 100% away")
    log.error("Unable to request metadata from node 2: 100% away")
    for _ in range(3):
        log.info("Discovered coordinator %s", 1)
    assert shown.lines == [
        "Failed fetch messages from 1: a level of its own",
        "Unable to request metadata from node 1: 100% away",
        *["Discovered coordinator 1"] * 3,
    ]


def test_every_logger_of_aiokafka_is_calm() -> None:
    """The loggers of clients, consumers and producers have one filter each, however often it is asked for."""
    names = calm_kafka()
    assert {"aiokafka", "aiokafka.conn", "aiokafka.consumer.fetcher", "aiokafka.consumer.group_coordinator"} <= set(
        names
    )
    assert calm_kafka() == names
    for name in names:
        assert sum(isinstance(found, Calm) for found in logging.getLogger(name).filters) == 1


def test_a_record_is_one_line_of_json() -> None:
    """Time, level, logger and message, and the traceback of an exception, whatever line ends are in them."""
    try:
        raise ValueError("no\nsuch thing")
    except ValueError:
        record = logging.LogRecord("streams.x", logging.ERROR, "x.py", 1, "lost %d", (3,), sys.exc_info())
    line = JsonLines().format(record)
    assert "\n" not in line
    found = json.loads(line)
    assert (found["level"], found["logger"], found["message"]) == ("ERROR", "streams.x", "lost 3")
    assert found["time"].endswith("Z")
    assert "ValueError: no\nsuch thing" in found["exception"]


@pytest.mark.parametrize(("given", "level"), [(None, "ERROR"), ("debug", "debug")])
def test_the_log_is_as_the_settings_say(given: str | None, level: str) -> None:
    """LOG_LEVEL counts unless a level is given; with LOG_FORMAT=json every handler writes JSON."""
    app = faust.App("logs", broker="kafka://127.0.0.1:1")
    worker = worker_type("ERROR", "json")(app, loglevel=given)
    assert worker.loglevel == level
    logger, shown = logging.getLogger("try.json"), Shown()
    logger.addHandler(shown)
    logger.propagate = False
    worker.on_setup_root_logger(logger, logging.ERROR)
    logger.error("it is %s", "late")
    assert json.loads(shown.lines[0])["message"] == "it is late"
