"""Events, topics, streams and agents as Faust knows them, under commit control.

Guarantees, for agents of chunk topics and for ordinary agents alike (one event at a time, tables, ``take``, ``group_by``):

- an event is acknowledged only when the agent's body has come back for the next one; a body that raises has not;
- what the body sent, changelog records included, is acknowledged by Kafka before its event counts as done;
- a body that raised is called again with the same events, in order, after a backoff, while their partition is paused
  (*retry*); or the event becomes a dead letter (*poison*, *rejected*, *exhausted*); neither ends the agent;
- bytes that do not decode are a dead letter, and the body never sees them.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import time
from collections import deque
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import faust
from faust.agents import agent as faust_agent
from faust.events import Event as FaustEvent
from faust.exceptions import DecodeError, Skip
from faust.streams import Stream as FaustStream
from faust.topics import Topic as FaustTopic
from faust.types import ChannelT, EventT, TP

from streams.resilience.chunks import Chunk, Decode, failure_of
from streams.resilience.deadletter import Failure, headers_of, truncated
from streams.resilience.failures import FailureClass, Poison, Retryable, classify
from streams.resilience.producer import Outgoing
from streams.resilience.transport import Delivery

_LETTER_KINDS = {FailureClass.POISON: "poison", FailureClass.REJECTED: "rejected"}
_WAKE = object()

#: The stream whose event the running task works on.
current_stream: contextvars.ContextVar[Stream | None] = contextvars.ContextVar("current_stream", default=None)


class Undecodable:
    """Stands for a value that could not be decoded, until it is a dead letter."""

    __slots__ = ("exception",)

    def __init__(self, exception: BaseException) -> None:
        self.exception = exception


class Event(FaustEvent):
    """An event that knows its stream, acknowledges once, and not at all once it has been delivered again."""

    stream: Stream | None = None
    void = False

    def ack(self) -> bool:
        """Acknowledge the event; a second time, or after it was delivered anew, changes nothing."""
        if self.void or self.acked:
            return False
        self.acked = True
        if self.stream is not None:
            self.stream.finished(self)
        return bool(super().ack())


class Topic(FaustTopic):
    """A topic whose sends are debts of the event at hand, and whose undecodable records reach the dead letters."""

    def _compile_decode(self) -> None:
        super()._compile_decode()
        decode_value = self.decode

        async def decode(message: Any, *, propagate: bool = False) -> Any:
            if isinstance(message, Delivery) and message.records is not None:
                chunk = Chunk(message.records, self.app.chunk_topics[message.topic], delivery=message)
                return self.app.conf.Event(self.app, None, chunk, None, message)
            try:
                return await decode_value(message, propagate=True)
            except DecodeError as exc:
                if not isinstance(message, Delivery):
                    raise
                return self.app.conf.Event(self.app, None, Undecodable(exc), None, message)

        self.decode = decode

    async def publish_message(self, fut: Any, wait: bool = False) -> Any:
        """Publish, and let the events at hand wait for it."""
        sent = await super().publish_message(fut, wait=wait)
        stream = current_stream.get()
        if stream is not None and not wait:
            stream.owe(sent)
        return sent

    def send_soon(self, **kwargs: Any) -> Any:
        """Buffer a record (as tables do for their changelog), and let the events at hand wait for it."""
        fut = super().send_soon(**kwargs)
        stream = current_stream.get()
        if stream is not None:
            stream.owe(fut)
        return fut


class Lane:
    """Events of one partition that wait to be delivered again, in order, and those that came in behind them."""

    __slots__ = ("busy", "due", "events")

    def __init__(self) -> None:
        self.events: deque[Event] = deque()
        self.due = 0.0
        self.busy: Event | None = None


class Stream(FaustStream[Any]):
    """A Faust stream that acknowledges what was done, and nothing else."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.in_flight: dict[Event, None] = {}
        self._lanes: dict[TP, Lane] = {}
        self._attempts: dict[tuple[TP, int], tuple[int, datetime]] = {}
        #: set on the stream of a chunk agent under ``test_context``, which gets single values as well
        self.wrap_values: Decode | None = None
        self.on_done: Any = None
        options = self.app.resilience
        self._retry_backoff = options.infrastructure_backoff()
        self._attempt_backoff = options.attempt_backoff()
        self.app.resilient_streams.add(self)

    # -- iteration --------------------------------------------------------------------------------------------------

    def __aiter__(self) -> AsyncIterator[Any]:
        iterator = self._iterate()
        self._active_agens.add(iterator)  # type: ignore[arg-type]
        return iterator

    async def _iterate(self) -> AsyncIterator[Any]:
        self._finalized = True
        started_here = await self.maybe_start()
        try:
            while not self.should_stop:
                event, value = await self._next_item()
                if event is None and value is _WAKE:
                    continue
                current_stream.set(self)
                self._set_current_event(event)
                if event is not None and not await self._admit(event):
                    continue
                sensor_state = None
                if event is not None:
                    sensor_state = self._on_stream_event_in(event.message.tp, event.message.offset, self, event)
                acknowledge = self.enable_acks
                try:
                    for processor in self._processors:
                        result = processor(value)
                        value = await result if hasattr(result, "__await__") else result
                    value = await self.on_merge(value)
                except Skip:
                    if event is not None:
                        event.ack()
                    continue
                if self.wrap_values is not None and not isinstance(value, Chunk):
                    value = self._wrap(event, value)
                self.events_total += 1
                yield value
                # Only a body that asks for the next event has done this one: whatever else ends the wait at this
                # yield (an exception, a stop, a rebalance) leaves the event as it is.
                if event is not None:
                    self._on_stream_event_out(event.message.tp, event.message.offset, self, event, sensor_state)
                    if acknowledge:
                        event.ack()
                if self.on_done is not None:
                    await self.on_done(value)
        except StopAsyncIteration:
            return
        finally:
            self._channel_stop_iteration(self.channel)
            if started_here:
                await self.stop()
                self.service_reset()

    async def _next_item(self) -> tuple[Event | None, Any]:
        ready = self._ready()
        if ready is not None:
            return ready, ready.value
        channel = self.channel
        item = await channel.__anext__()
        if not isinstance(item, EventT):
            return None, item
        event: Event = item  # type: ignore[assignment]
        lane = self._lanes.get(event.message.tp) if self._lanes else None
        if lane is not None:
            lane.events.append(event)
            return None, _WAKE
        return event, event.value

    async def _admit(self, event: Event) -> bool:
        """Return whether the body gets ``event``: not one of an earlier generation, nor one that does not decode."""
        message = event.message
        if not isinstance(message, Delivery):
            event.stream = self
            self.in_flight[event] = None
            if isinstance(event.value, Chunk):
                event.value.owner = self
            return True
        if message.ledger is None or not message.ledger.live:
            return False
        event.stream = self
        self.in_flight[event] = None
        self.app.consumer.busy.add(message)
        value = event.value
        if isinstance(value, Undecodable):
            await self._bury(event, Poison(f"does not decode: {value.exception}"), "poison")
            return False
        if isinstance(value, Chunk):
            value.owner = self
        return True

    def _wrap(self, event: Event | None, value: Any) -> Chunk:
        """Make a chunk of one value that was put in by a test: bytes as Kafka has them, or a decoded message."""
        record = RecordOf(event.message) if event is not None else RecordOf(_NO_MESSAGE)
        record.value = value
        decode = self.wrap_values if isinstance(value, bytes) else _as_it_is
        chunk = Chunk([record], decode or _as_it_is, self)
        if event is not None:
            event.value = chunk
        return chunk

    async def ack(self, event: Any) -> bool:
        """Acknowledge ``event``, as ``take`` and its kin do."""
        return bool(event.ack())

    def finished(self, event: Event) -> None:
        """Note that ``event`` is acknowledged."""
        self.in_flight.pop(event, None)
        message = event.message
        for key in [key for key in self._attempts if key[0] == message.tp and key[1] <= message.offset]:
            del self._attempts[key]
        lane = self._lanes.get(message.tp)
        if lane is not None and lane.busy is event:
            lane.busy = None
            self._retry_backoff.healthy()
            self._attempt_backoff.reset()
            if lane.events:
                self._wake()
            else:
                self._end_lane(message.tp)

    # -- debts ------------------------------------------------------------------------------------------------------

    def owe(self, future: Any) -> None:
        """Let every event that the body has in hand wait for ``future``."""
        for event in self.in_flight:
            message = event.message
            if isinstance(message, Delivery) and message.span is not None:
                self.app.consumer.owe(message, future, Owner(self, event))

    def delivery_failed(self, event: Event, exc: BaseException) -> None:
        """Deliver ``event`` again: something that it sent has not arrived."""
        if event.message.ledger is None or not event.message.ledger.live:
            return
        if isinstance(exc, asyncio.CancelledError):
            exc = Retryable("the producer was closed before Kafka acknowledged what was sent")
        if isinstance(event.value, Chunk):
            event.value.pending = list(range(len(event.value.records)))
        event.message.incref()
        self._settle_failure([event], exc)

    # -- failures ---------------------------------------------------------------------------------------------------

    def recover(self, exc: BaseException) -> bool:
        """Settle what the body had in hand when it raised ``exc``; False where there is nothing to settle."""
        events = [event for event in self.in_flight if isinstance(event.message, Delivery)]
        if not events:
            return False
        self._settle_failure(events, exc)
        return True

    def _settle_failure(self, events: list[Event], exc: BaseException) -> None:
        kind = classify(exc)
        by_partition: dict[TP, list[Event]] = {}
        for event in events:
            by_partition.setdefault(event.message.tp, []).append(self._renew(event))
        alone = len(events) == 1 and not (isinstance(events[0].value, Chunk) and len(events[0].value) > 1)
        if not alone and kind not in (FailureClass.RETRY, FailureClass.FATAL):
            # The guilty one is not known. Delivered one by one, in order, it shows itself.
            for tp, renewed in by_partition.items():
                self._hold(tp, [single for event in renewed for single in self._singles(event)], 0.0)
            return
        for tp, renewed in by_partition.items():
            if alone and self._verdict(renewed[0], exc, kind):
                task = asyncio.ensure_future(self._bury(renewed[0], exc, self._letter_kind(kind)))
                self._hold(tp, [], 0.0, busy=renewed[0])
                self.app.background.add(task)
                task.add_done_callback(self.app.background.discard)
            else:
                self._hold(tp, renewed, self._delay(exc, kind))

    def _renew(self, event: Event) -> Event:
        """Return a new event for the same message; acknowledging the old one no longer means anything."""
        event.void = True
        self.in_flight.pop(event, None)
        renewed: Event = self.app.conf.Event(self.app, event.key, event.value, event.headers, event.message)
        self.app.consumer.busy.discard(event.message)
        return renewed

    def _singles(self, event: Event) -> list[Event]:
        chunk = event.value
        if not isinstance(chunk, Chunk) or len(chunk) <= 1:
            return [event]
        singles = []
        for number in chunk.pending:
            single = Chunk([chunk.records[number]], chunk._decode, self, chunk.delivery)
            singles.append(self.app.conf.Event(self.app, None, single, None, event.message))
        event.message.incref(len(singles) - 1)
        return singles

    def _verdict(self, event: Event, exc: BaseException, kind: FailureClass) -> bool:
        """Return whether the one message of ``event`` is to become a dead letter now."""
        return self._give_up(event.message.tp, self._offset_of(event), exc, kind)

    @staticmethod
    def _offset_of(event: Event) -> int:
        value = event.value
        if isinstance(value, Chunk) and value.records:
            return int(value.records[0].offset)
        return int(event.message.offset)

    def _give_up(self, tp: TP, offset: int, exc: BaseException, kind: FailureClass) -> bool:
        if kind is FailureClass.RETRY:
            return False
        count, first = self._attempts.get((tp, offset), (0, datetime.now(UTC)))
        count += 1
        self._attempts[(tp, offset)] = (count, first)
        if kind in _LETTER_KINDS:
            return True
        if kind is FailureClass.FATAL:
            self.app.fatal(exc)
            return False
        return kind is FailureClass.UNCLASSIFIED and count >= self.app.resilience.max_attempts

    @staticmethod
    def _letter_kind(kind: FailureClass) -> str:
        return _LETTER_KINDS.get(kind, "exhausted")

    def _delay(self, exc: BaseException, kind: FailureClass) -> float:
        self.app.accounts.retries += 1
        backoff = self._attempt_backoff if kind is FailureClass.UNCLASSIFIED else self._retry_backoff
        delay = backoff.next()
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
            return self._letter(record, failure_of(_LETTER_KINDS[kind], exc, 1, None, record))
        tp = delivery.tp
        if not self._give_up(tp, record.offset, exc, kind):
            return None
        count, first = self._attempts.pop((tp, record.offset))
        name = self._letter_kind(kind)
        delivery.note_dead(name)
        failure = failure_of(name, exc, count, first, record)
        self.app.on_dead_letter(record, failure)
        return self._letter(record, failure)

    def _letter(self, record: Any, failure: Failure) -> Outgoing:
        options = self.app.resilience
        headers = headers_of(record, failure, stage=options.stage, group=self.app.conf.id)
        return (options.dead_letter_topic, record.key, record.value, headers)

    def dropped(self, record: Any, reason: str) -> None:
        """Count and log a message that nothing comes of."""
        self.app.on_drop(record, reason)

    async def forward(self, chunk: Chunk, outgoing: list[Outgoing], failure: BaseException | None) -> None:
        """Send what came of ``chunk``; hold back what is left of it when there was a ``failure``."""
        event = next((event for event in self.in_flight if event.value is chunk), None)
        if outgoing:
            await self._send_all(chunk, event, outgoing)
        if failure is None:
            return
        if event is None:
            raise failure
        renewed = self._renew(event)
        self._hold(event.message.tp, [renewed], self._delay(failure, classify(failure)))

    async def _send_all(self, chunk: Chunk, event: Event | None, outgoing: list[Outgoing]) -> None:
        if chunk.delivery is None or event is None:
            await self.app.capture(outgoing)
            return
        producer, consumer = self.app.producer, self.app.consumer
        owner = Owner(self, event)
        for future in await self.app.send_outgoing(producer, outgoing):
            consumer.owe(chunk.delivery, future, owner)

    # -- redelivery -------------------------------------------------------------------------------------------------

    def _hold(self, tp: TP, events: list[Event], delay: float, busy: Event | None = None) -> None:
        lane = self._lanes.get(tp)
        if lane is None:
            lane = self._lanes[tp] = Lane()
            self.app.consumer.hold(tp)
        lane.events.extendleft(reversed(events))
        lane.busy = busy
        lane.due = time.monotonic() + delay
        if delay > 0:
            asyncio.get_running_loop().call_later(delay, self._wake)
        else:
            self._wake()

    def _wake(self) -> None:
        if isinstance(self.channel, ChannelT):
            self.channel.queue.force_put_nowait(_WAKE)

    def _ready(self) -> Event | None:
        if not self._lanes:
            return None
        now = time.monotonic()
        for tp, lane in list(self._lanes.items()):
            if lane.busy is None and lane.due <= now:
                if lane.events:
                    lane.busy = lane.events.popleft()
                    return lane.busy
                self._end_lane(tp)
        return None

    def _end_lane(self, tp: TP) -> None:
        self._lanes.pop(tp, None)
        self.app.consumer.release(tp)

    def forget_redeliveries(self) -> None:
        """Drop what waits to be delivered again: its partition is gone and Kafka delivers it anew."""
        self._lanes.clear()
        self._attempts.clear()

    async def _bury(self, event: Event, exc: BaseException, kind: str) -> None:
        """Make a dead letter of the one message of ``event`` and acknowledge it once Kafka has it."""
        message = event.message
        record = event.value.records[0] if isinstance(event.value, Chunk) else RecordOf(message)
        count, first = self._attempts.pop((message.tp, record.offset), (1, None))
        failure = failure_of(kind, exc, count, first, record)
        if event.stream is None:
            event.stream = self
            self.in_flight[event] = None
        message.note_dead(kind)
        self.app.on_dead_letter(record, failure)
        owner = Owner(self, event)
        for future in await self.app.send_outgoing(self.app.producer, [self._letter(record, failure)]):
            self.app.consumer.owe(message, future, owner)
        event.ack()


class Owner:
    """Who is told when something that was sent for an event has not arrived."""

    __slots__ = ("event", "stream")

    def __init__(self, stream: Stream, event: Event) -> None:
        self.stream = stream
        self.event = event

    def __hash__(self) -> int:
        return hash(self.event)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Owner) and other.event is self.event

    def delivery_failed(self, _message: Any, exc: BaseException) -> None:
        """Have the event delivered again."""
        self.stream.delivery_failed(self.event, exc)


class RecordOf:
    """A consumed record, made of the message that Faust keeps of it."""

    __slots__ = ("headers", "key", "offset", "partition", "timestamp", "topic", "value")

    def __init__(self, message: Any) -> None:
        self.topic: str = message.topic
        self.partition: int = message.partition
        self.offset: int = message.offset
        self.timestamp = int((message.timestamp or 0) * 1000)
        self.key: bytes | None = message.key
        self.value: bytes | None = message.value
        headers = message.headers or ()
        self.headers: list[tuple[str, bytes]] = list(headers.items() if isinstance(headers, dict) else headers)


class _NoMessage:
    topic, partition, offset, timestamp, key, value, headers = "<test>", 0, 0, None, None, None, None


_NO_MESSAGE = _NoMessage()


def _as_it_is(value: Any) -> Any:
    return value


class Agent(faust.Agent):
    """A Faust agent whose body is run again, on the same stream, after it raised."""

    def test_context(self, *args: Any, **kwargs: Any) -> Any:
        """Return Faust's wrapper for unit tests.

        ``put`` returns when the body has done the value (Faust's own returns when it was received). An agent of a chunk
        topic takes single values (bytes or messages) as well as a Chunk. What it sends is in ``app.captured``.
        """
        self.app.testing = True
        context: Any = super().test_context(*args, **kwargs)
        names = self.get_topic_names()
        decode = next((self.app.chunk_topics[name] for name in names if name in self.app.chunk_topics), None)
        context._stream.wrap_values = decode
        if not inspect.isasyncgenfunction(self.fun):
            context._stream.on_done = context._on_value_processed
            context._install_value_recorder = _leave_to_on_done
        return context

    async def _execute_actor(self, coro: Any, aref: Any) -> None:
        faust_agent._current_agent.set(self)
        while True:
            try:
                await coro
            except asyncio.CancelledError as exc:
                if self.should_stop:
                    raise
                self.log.info("Restarting on rebalance")
                await aref.crash(exc)
                self.supervisor.wakeup()
                return
            except Exception as exc:
                stream = aref.stream.get_active_stream()
                if not stream.recover(exc):
                    if self._on_error is not None:
                        await self._on_error(self, exc)
                    await aref.crash(exc)
                    self.supervisor.wakeup()
                    return
                self.app.on_agent_failure(self, exc)
                body = self.fun(stream)
                coro = self._slurp(aref, body.__aiter__()) if hasattr(body, "__aiter__") else body
            else:
                return


def _leave_to_on_done(_actor: Any) -> None:
    """Stand in for the recorder that tells a test of a value when it comes in."""


def truncate_letter(letter: Outgoing) -> Outgoing:
    """Return ``letter`` with a value that fits, and the pointer to the whole of it."""
    topic, key, value, headers = letter
    short, more = truncated(value, headers or [])
    return (topic, key, short, more)
