"""A record or chunk on its way through agents, and when it is complete.

Guarantees: a delivery is complete when every stream that got it has acknowledged it and everything sent on its behalf
has been acknowledged by Kafka, and its span of the partition's ledger is completed once, then; an output that has not
arrived brings its event back, before what waits behind it.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable
from functools import partial
from typing import Any

from faust.types.tuples import ConsumerMessage

from streams.resilience.commits import PartitionLedger, Span


class Delivery(ConsumerMessage):
    """A record, or the records of one chunk (``records``), on its way through agents of this app.

    It is complete when every stream that got it has acknowledged it (``handled``) and everything sent on its behalf has
    been acknowledged by Kafka (``debts`` is 0).
    """

    span: Span | None = None
    ledger: PartitionLedger | None = None
    records: list[Any] | None = None
    handled = False
    debts = 0
    failures: dict[Any, BaseException] | None = None
    #: what became of the records, by offset, that were not forwarded; each has one fate, whoever handled it how often
    dead: dict[int, str] | None = None
    dropped: dict[int, str] | None = None

    def note_dead(self, offset: int, kind: str) -> None:
        """Note that the record at ``offset`` becomes a dead letter of class ``kind``."""
        self.dead = self.dead or {}
        self.dead[offset] = kind

    def note_dropped(self, offset: int, reason: str) -> None:
        """Note that nothing comes of the record at ``offset``."""
        self.dropped = self.dropped or {}
        self.dropped[offset] = reason

    def forget_fates(self, offsets: Iterable[int]) -> None:
        """Forget what became of records that are handled once more."""
        for offset in offsets:
            for fates in (self.dead, self.dropped):
                if fates is not None:
                    fates.pop(offset, None)


class Completing:
    """The part of a consumer that completes deliveries."""

    app: Any
    busy: set[Delivery]
    _unacked_messages: Any

    def wake_reader(self) -> None:
        """Let the reader look again: there may be room."""
        raise NotImplementedError

    def ack(self, message: Any) -> bool:
        """Note that every stream is done with ``message``; it is complete once its debts are paid."""
        if message.acked:
            return False
        message.acked = True
        self._unacked_messages.discard(message)
        if isinstance(message, Delivery) and message.span is not None:
            message.handled = True
            self._settle(message)
        return True

    def owe(self, message: Delivery, future: asyncio.Future[Any], owner: Any) -> None:
        """Make ``message`` wait for ``future``; ``owner.delivery_failed(exc)`` is called when it fails."""
        message.debts += 1
        future.add_done_callback(partial(self._paid, message, owner))

    def _paid(self, message: Delivery, owner: Any, future: asyncio.Future[Any]) -> None:
        message.debts -= 1
        exc = asyncio.CancelledError() if future.cancelled() else future.exception()
        if exc is not None:
            message.failures = message.failures or {}
            message.failures[owner] = exc
        if message.handled or message.failures:
            self._settle(message)

    def settle_failures(self, message: Delivery) -> None:
        """Look at what of ``message`` has not arrived; for an event that is acknowledged, others of it not yet."""
        if message.failures:
            self._settle(message)

    def _settle(self, message: Delivery) -> None:
        if message.debts:
            return
        span, ledger = message.span, message.ledger
        if span is None or ledger is None or span.complete:
            return
        if message.failures:
            self._deliver_again(message, ledger)
            return
        if not message.handled:
            return
        self.busy.discard(message)
        if ledger.live:
            ledger.complete(span)
            dead = message.dead or {}
            dropped = [reason for offset, reason in (message.dropped or {}).items() if offset not in dead]
            self.app.accounts.settle(span.count, Counter(dead.values()), Counter(dropped))
        self.wake_reader()

    @staticmethod
    def _deliver_again(message: Delivery, ledger: PartitionLedger) -> None:
        """Have those events delivered again whose outputs have not arrived.

        At once where the body is done with an event, so that it comes before what waits behind it; with the last
        acknowledgement of the message where a body still has it, or has failed at it meanwhile.
        """
        failures = message.failures or {}
        now = {owner: exc for owner, exc in failures.items() if message.handled or owner.done}
        message.failures = {owner: exc for owner, exc in failures.items() if owner not in now} or None
        if not ledger.live or not now:
            return
        # All references before the first event is settled: it may be acknowledged again before the second one is.
        message.handled = message.acked = False
        message.incref(len(now))
        for owner, exc in now.items():
            owner.delivery_failed(exc)
