"""One line a minute of each kind that aiokafka repeats, and a word about the others."""

from __future__ import annotations

import logging

from mode.utils.logging import ExtensionFormatter

from streams.logs import Calm, calm_kafka


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
