"""What happens in a stage: one function per event, which logs it and counts it together.

Drops and retries come in thousands when they come: they are logged once a minute for each reason, with how many there
were; dead letters once a minute for each class after the first ten.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from streams import metrics
from streams.resilience.accounts import INTENDED_DROPS
from streams.resilience.application import App, Listener
from streams.resilience.deadletter import Failure, describe
from streams.resilience.failures import FailureClass

log = logging.getLogger("headrace")

QUIET_SECONDS = 60.0
FIRST_DEAD_LETTERS = 10


class Digest:
    """Lets one line a minute through for each key, and says how many it held back."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, first: int = 1) -> None:
        self._clock = clock
        self._first = first
        self._seen: Counter[object] = Counter()
        self._held: Counter[object] = Counter()
        self._last: dict[object, float] = {}

    def admit(self, key: object) -> int | None:
        """Return how many lines were held back since the last one when this one may go out, else None."""
        if len(self._last) > 10_000:
            self._last.clear()
            self._seen.clear()
        now = self._clock()
        self._seen[key] += 1
        if self._seen[key] > self._first and now - self._last.get(key, float("-inf")) < QUIET_SECONDS:
            self._held[key] += 1
            return None
        self._last[key] = now
        return self._held.pop(key, 0)


class StageEvents(Listener):
    """Logs and counts for the stages of a worker."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._retries = Digest(clock, first=3)
        self._letters = Digest(clock, first=FIRST_DEAD_LETTERS)
        self._drops = Digest(clock)
        self._values = Digest(clock)
        self._refusals = Digest(clock)
        self._slow = Digest(clock)

    def retry(self, app: App, exc: BaseException, kind: FailureClass, delay_seconds: float) -> None:
        """A handler failed and is called again."""
        stage = app.resilience.stage
        metrics.RETRIES.labels(stage, kind.value).inc()
        held = self._retries.admit((stage, type(exc)))
        if held is not None:
            log.warning(
                "Stage %s: %s: %s; the same events again in %.1f s%s",
                stage,
                type(exc).__name__,
                describe(exc),
                delay_seconds,
                _more(held),
            )

    def dead_letter(self, app: App, record: Any, failure: Failure) -> None:
        """A record becomes a dead letter."""
        stage = app.resilience.stage
        held = self._letters.admit((stage, failure.kind))
        if held is not None:
            log.warning(
                "Stage %s: dead letter (%s) of %s[%d] offset %d, device %s: %s: %s%s",
                stage,
                failure.kind,
                record.topic,
                record.partition,
                record.offset,
                (record.key or b"-").decode("utf-8", "replace"),
                type(failure.exception).__name__,
                describe(failure.exception),
                _more(held),
            )

    def drop(self, app: App, record: Any, reason: str) -> None:
        """Nothing comes of a record."""
        if reason in INTENDED_DROPS:
            return
        stage = app.resilience.stage
        held = self._drops.admit((stage, reason))
        if held is not None:
            log.warning(
                "Stage %s dropped a message (%s) of device %s%s",
                stage,
                reason,
                (record.key or b"-").decode("utf-8", "replace"),
                _more(held),
            )

    def guard(self, app: App, reason: str | None) -> None:
        """The dead-letter guard has stopped a stage, or lets it go on."""
        stage = app.resilience.stage
        if reason is None:
            log.warning("Stage %s goes on: the dead-letter guard has let go", stage)
            return
        held = self._letters.admit((stage, "guard"))
        if held is not None:
            log.error(
                "Stage %s has stopped taking: %s. Most likely a profile or a deployment is wrong; correct it and "
                "restart, or let it go on with POST /api/v1/guard/%s/release. Nothing is lost meanwhile%s",
                stage,
                reason,
                stage,
                _more(held),
            )

    def handled(self, app: App, seconds: float) -> None:
        """A body has done a chunk."""
        metrics.HANDLER_SECONDS.labels(app.resilience.stage).observe(seconds)

    def agent_failure(self, app: App, agent: Any, exc: BaseException) -> None:
        """An agent's body raised and is run again."""
        held = self._retries.admit((app.resilience.stage, agent.name, type(exc)))
        if held is not None:
            log.warning(
                "Agent %s raised %s: %s; its events come again%s",
                agent.name,
                type(exc).__name__,
                describe(exc),
                _more(held),
                exc_info=exc,
            )

    def rejected_value(self, device_id: str, index: str, label: str, value: object, reason: str) -> None:
        """One value of a message was refused by validation; the others go on."""
        metrics.REJECTED_VALUES.inc()
        held = self._values.admit(device_id)
        if held is not None:
            log.warning(
                "Device %s: value refused, %s/%s = %.80r: %s%s", device_id, index, label, value, reason, _more(held)
            )

    def refused(self, reason: str, device_id: str, why: str) -> None:
        """A device's message was refused as a whole."""
        metrics.REFUSED.labels(reason).inc()
        held = self._refusals.admit(reason)
        if held is not None:
            log.warning("Device %s: message refused (%s): %s%s", device_id, reason, why, _more(held))

    def slow_driver(self, driver: str, seconds: float, *, aside_seconds: float | None) -> None:
        """A driver's call took longer than its limit; with ``aside_seconds`` it is not called for so long."""
        metrics.DRIVER_SLOW_CALLS.labels(driver).inc()
        if aside_seconds is not None:
            metrics.DRIVER_ASIDES.labels(driver).inc()
            log.error(
                "Driver %s keeps taking longer than DRIVER_LIMIT_SECONDS (%.3f s now) and is set aside for %.0f s: its "
                "messages become dead letters (driver_aside), to be replayed once it is mended; CoAP devices get 5.03",
                driver,
                seconds,
                aside_seconds,
            )
            return
        held = self._slow.admit(driver)
        if held is not None:
            log.warning("Driver %s took %.3f s for one message%s", driver, seconds, _more(held))


EVENTS = StageEvents()


def _more(held: int) -> str:
    return f" (and {held} more since the last such line)" if held else ""
