"""What becomes of the events that a stream's body has in hand: done, again, or a dead letter.

Guarantees: see :mod:`streams.resilience.streams`, whose streams are made of this; an event that was settled once is
void, and nothing that its former body still does with it counts.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from faust.types import TP

from streams.resilience.chunks import Chunk, failure_of
from streams.resilience.deadletter import headers_of
from streams.resilience.delivery import Delivery
from streams.resilience.failures import FailureClass, Retryable, SetAside, classify
from streams.resilience.options import ResilienceOptions
from streams.resilience.producer import Outgoing
from streams.resilience.redelivery import Redelivery
from streams.resilience.topics import Event, RecordOf

_LETTER_KINDS = {FailureClass.POISON: "poison", FailureClass.REJECTED: "rejected"}


class Owner:
    """Who is told when something that was sent for an event has not arrived."""

    __slots__ = ("event", "stream")

    def __init__(self, stream: Settling, event: Event) -> None:
        self.stream = stream
        self.event = event

    def __hash__(self) -> int:
        return hash(self.event)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Owner) and other.event is self.event

    @property
    def done(self) -> bool:
        """Tell whether the body is done with the event."""
        return self.event.acked

    def delivery_failed(self, exc: BaseException) -> None:
        """Have the event delivered again."""
        self.stream.delivery_failed(self.event, exc)


class Settling:
    """The part of a stream that settles events."""

    app: Any
    manual: bool
    _in_batches: bool

    def start_settling(self) -> None:
        """Begin with nothing in hand."""
        #: the body has got something since it was run
        self.began = False
        #: what the body has in hand, in the order in which it got it
        self.in_flight: dict[Event, None] = {}
        self._attempts: dict[tuple[TP, int], tuple[int, datetime]] = {}
        #: deliveries whose outputs have to arrive before an event is tried alone: Kafka refuses batches, not records
        self._ahead: set[Delivery] = set()
        self.redelivery: Redelivery[TP, Event] = Redelivery(
            lambda event: event.first_offset,
            lambda tp: self.app.consumer.hold(tp, self),
            lambda tp: self.app.consumer.release(tp, self),
        )
        options: ResilienceOptions = self.app.resilience
        self._retry_backoff = options.infrastructure_backoff()
        self._attempt_backoff = options.attempt_backoff()

    def wake(self) -> None:
        """Let the stream look again whether an event may be given."""
        raise NotImplementedError

    @property
    def condemned(self) -> frozenset[str]:
        """Return the records that have ended the worker twice, by ``topic:partition:offset``."""
        found: frozenset[str] = self.app.condemned
        return found

    # -- acknowledgement and debts ----------------------------------------------------------------------------------

    async def ack(self, event: Any) -> bool:
        """Acknowledge ``event``."""
        return bool(event.ack())

    def finished(self, event: Event) -> None:
        """Note that ``event`` is acknowledged."""
        self.in_flight.pop(event, None)
        if event.value.__class__ is Chunk:
            # a chunk and its event would keep each other, and all records of a fetch, until the collector finds them
            event.value.event = None
        if self._attempts:
            tried = [
                offset for offset in event.offsets() if self._attempts.pop((event.message.tp, offset), None) is not None
            ]
            if tried:
                self._attempt_backoff.reset()
        self._retry_backoff.healthy()
        if isinstance(event.message, Delivery):
            self.app.consumer.settle_failures(event.message)
        if (
            self.app.guard.watching
            and not isinstance(event.value, Chunk)
            and self.app.guard.passed((event.message.key,), ((event.message.tp, event.first_offset),))
        ):
            self.app.on_guard()
        if self.redelivery:
            if self.redelivery.alone is event:
                self._ahead.add(event.message)
            self.redelivery.finished(event)
            self.wake()

    def under_way(self) -> int:
        """Return how much has to be finished before an event can be tried alone."""
        self._ahead = {message for message in self._ahead if message.debts and message.ledger and message.ledger.live}
        return len(self.in_flight) + len(self._ahead)

    def owe(self, future: Any) -> None:
        """Let every event that the body has in hand wait for ``future``."""
        for event in self.in_flight:
            if event.message.__class__ is Delivery and event.live:
                self.app.consumer.owe(event.message, future, Owner(self, event))

    def delivery_failed(self, event: Event, exc: BaseException) -> None:
        """Deliver ``event``, whose message has been given one reference more, again: what it sent has not arrived."""
        if isinstance(exc, asyncio.CancelledError):
            exc = Retryable("the producer was closed before Kafka acknowledged what was sent")
        if isinstance(event.value, Chunk):
            event.value.pending = list(range(len(event.value.records)))
        event.message.forget_fates(event.offsets())
        if classify(exc) in _LETTER_KINDS and not event.alone:
            # What was refused is a batch. It may be the record of another message that is too large.
            self._hold(self._parts(self._renew(event)), 0.0, alone=True)
        else:
            self._settle_failure([event], exc)

    # -- failures ---------------------------------------------------------------------------------------------------

    def recover(self, exc: BaseException) -> bool:
        """Settle what the body had in hand when it raised ``exc``; False for one that never got anything in this run.

        An event of a plain channel has nowhere to come again from: whoever put it there learns nothing of it.
        """
        live = []
        for event in list(self.in_flight):
            if isinstance(event.message, Delivery) and event.live:
                live.append(event)
            else:
                self._give_up(event)
        if live:
            self._settle_failure(live, exc)
        return self.began

    def _settle_failure(self, events: list[Event], exc: BaseException) -> None:
        kind = classify(exc)
        by_itself = self.manual and not self._in_batches and not isinstance(events[-1].value, Chunk)
        renewed = [self._renew(event) for event in events]
        alone = len(renewed) == 1 and len(_todo(renewed[0].value)) <= 1
        if kind in (FailureClass.RETRY, FailureClass.FATAL):
            if kind is FailureClass.FATAL:
                self.app.fatal(exc)
            self._hold(renewed, self._delay(exc, kind))
        elif alone or by_itself:
            guilty = renewed[-1]
            count, first = self._count_attempt(guilty.message.tp, guilty.first_offset)
            final = kind in _LETTER_KINDS or count >= self.app.resilience.max_attempts
            if final and self._may_bury(guilty.message.key, exc, (guilty.message.tp, guilty.first_offset)):
                self._hold(renewed[:-1], 0.0)
                guilty.stream = self
                self._bury(guilty, exc, _LETTER_KINDS.get(kind, "exhausted"), count, first)
            else:
                self._hold(renewed, self._delay(exc, kind))
        else:
            self._hold([part for event in renewed for part in self._parts(event)], 0.0, alone=True)

    def _hold(self, events: Iterable[Event], delay: float, *, alone: bool = False) -> None:
        by_partition: dict[TP, list[Event]] = {}
        for event in events:
            by_partition.setdefault(event.message.tp, []).append(event)
        due = time.monotonic() + delay
        if alone:
            self._ahead.update(message for message in self.app.consumer.busy if message.debts)
        for tp, group in by_partition.items():
            self.redelivery.hold(tp, group, due=due, alone=alone)
        self.wake()

    def _give_up(self, event: Event) -> None:
        event.void = True
        self.in_flight.pop(event, None)
        self.redelivery.finished(event)

    def _renew(self, event: Event) -> Event:
        """Return a new event for the same message; acknowledging the old one no longer means anything."""
        self._give_up(event)
        self.app.consumer.busy.discard(event.message)
        return event.anew()

    def _parts(self, event: Event) -> list[Event]:
        """Take a chunk apart, in parts of a size that finds the guilty message of 2,000 in less than 100 steps."""
        chunk, todo = event.value, _todo(event.value)
        if len(todo) <= 1:
            return [event]
        size = math.isqrt(len(todo))
        parts = [event.anew(chunk.part(todo[start : start + size])) for start in range(0, len(todo), size)]
        event.message.incref(len(parts) - 1)
        return parts

    def _may_bury(self, key: bytes | None, exc: BaseException, message: tuple[TP, int]) -> bool:
        """Ask the guard whether a message may become a dead letter; tell of a stop."""
        allowed: bool = self.app.guard.allows(key, str(exc), message)
        if not allowed:
            self.app.on_guard()
        return allowed

    def _count_attempt(self, tp: TP, offset: int) -> tuple[int, datetime]:
        count, first = self._attempts.get((tp, offset), (0, datetime.now(UTC)))
        self._attempts[(tp, offset)] = (count + 1, first)
        return count + 1, first

    def _delay(self, exc: BaseException, kind: FailureClass) -> float:
        self.app.accounts.retries += 1
        backoff = self._attempt_backoff if kind is FailureClass.UNCLASSIFIED else self._retry_backoff
        delay: float = backoff.next()
        if self.app.guard.tripped is not None:
            delay = min(delay, self.app.resilience.guard_probe_seconds)
        self.app.on_retry(exc, kind, delay)
        return delay

    # -- chunks: what Chunk.each and Chunk.all ask of their owner ----------------------------------------------------

    def judge(self, record: Any, exc: BaseException, delivery: Any) -> Outgoing | None:
        """Return the dead letter that ``record`` becomes, or None when it is to be tried again."""
        kind = classify(exc)
        if delivery is None:
            # under test_context there is no Kafka to come again from: what is no dead letter is the test's to see
            if kind not in _LETTER_KINDS:
                raise exc
            return self._letter(record, exc, _LETTER_KINDS[kind], 1, None)
        if kind in (FailureClass.RETRY, FailureClass.FATAL):
            return None
        count, first = self._count_attempt(delivery.tp, record.offset)
        if kind is FailureClass.UNCLASSIFIED and count < self.app.resilience.max_attempts:
            return None
        if not isinstance(exc, SetAside) and not self._may_bury(record.key, exc, (delivery.tp, record.offset)):
            return None
        name = _LETTER_KINDS.get(kind, "exhausted")
        delivery.note_dead(record.offset, name)
        return self._letter(record, exc, name, count, first)

    def _letter(self, record: Any, exc: BaseException, kind: str, attempts: int, first: datetime | None) -> Outgoing:
        options = self.app.resilience
        failure = failure_of(kind, exc, attempts, first, record)
        self.app.on_dead_letter(record, failure)
        headers = headers_of(record, failure, stage=options.stage, group=self.app.conf.id)
        return (options.dead_letter_topic, record.key, record.value, headers)

    def dropped(self, record: Any, reason: str, delivery: Any) -> None:
        """Count and log a message that nothing comes of."""
        if delivery is not None:
            delivery.note_dropped(record.offset, reason)
        self.app.on_drop(record, reason)

    async def forward(
        self,
        chunk: Chunk,
        outgoing: list[Outgoing],
        letters: list[Outgoing],
        rest: list[int],
        failure: BaseException | None,
    ) -> bool:
        """Send what came of ``chunk``; ``rest``, its messages still to do, comes again after ``failure``.

        Returns whether the chunk still counts here. Raises what Kafka says to a record that it can never take; the
        chunk then is as it was before.
        """
        event, delivery = chunk.event, chunk.delivery
        if self.app.guard.watching:
            self._tell_guard(chunk, rest)
        if delivery is None:
            await self.app.capture(outgoing + letters)
            chunk.pending = rest
            if failure is not None:
                raise failure
            return True
        if event is None or event.void or not event.live:
            # It was acknowledged before; or it comes anew where its partition is now, and there its outputs count.
            return False
        if outgoing:
            futures = await self.app.send_outgoing(self.app.producer, outgoing)
            owner = Owner(self, event)
            for future in futures:
                self.app.consumer.owe(delivery, future, owner)
        if letters:
            self._send_letters(event, letters)
        chunk.pending = rest
        if failure is not None and not event.void:
            kind = classify(failure)
            if kind is FailureClass.FATAL:
                self.app.fatal(failure)
            self._hold([self._renew(event)], self._delay(failure, kind))
        return not event.void

    def _tell_guard(self, chunk: Chunk, rest: list[int]) -> None:
        held, delivery = set(rest), chunk.delivery
        dead = (delivery.dead if delivery is not None else None) or {}
        handled = [chunk.records[number] for number in chunk.pending if number not in held]
        handled = [record for record in handled if record.offset not in dead]
        messages = [] if delivery is None else [(delivery.tp, record.offset) for record in handled]
        if self.app.guard.passed([record.key for record in handled], messages):
            self.app.on_guard()

    # -- dead letters and revocation --------------------------------------------------------------------------------

    def _bury(self, event: Event, exc: BaseException, kind: str, attempts: int, first: datetime | None) -> None:
        """Make a dead letter of the one message of ``event``, which is complete once Kafka has it."""
        message = event.message
        record = event.value.records[_todo(event.value)[0]] if isinstance(event.value, Chunk) else RecordOf(message)
        message.note_dead(record.offset, kind)
        self._send_letters(event, [self._letter(record, exc, kind, attempts, first)])
        event.ack()

    def _send_letters(self, event: Event, letters: list[Outgoing]) -> None:
        task = self.app.send_letters(letters, lambda: event.live)
        self.app.consumer.owe(event.message, task, Owner(self, event))

    def forget(self, tps: set[TP]) -> None:
        """Drop what is known of partitions that were revoked: Kafka delivers it anew where they are now."""
        for event in list(self.in_flight):
            if event.message.tp in tps and not event.live:
                self._give_up(event)
        self.redelivery.forget(tps)
        for key in [key for key in self._attempts if key[0] in tps]:
            del self._attempts[key]
        if self.app.guard.forget(lambda message: message[0] in tps):
            self.app.on_guard()
        self.wake()


def _todo(value: Any) -> list[int]:
    """Return the messages of a chunk that failed; all, where the body raised only after it had handled all of them."""
    return (value.pending or list(range(len(value.records)))) if isinstance(value, Chunk) else []
