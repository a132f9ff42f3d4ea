"""Streams as Faust knows them, under commit control.

Guarantees, for agents of chunk topics and for ordinary ones (one event at a time, tables, ``take``, ``group_by``):

- an event is acknowledged only when the body has come back for the next one; a body that raises has not;
- what the body sent, changelog records included, is acknowledged by Kafka before its event counts as done;
- a body that raised gets the same events again, in order, after a backoff, while their partition is paused (*retry*);
  or the event becomes a dead letter (*poison*, *rejected*, *exhausted*); neither ends the agent. Where it had several
  events in hand (``take``, ``noack_take``, a chunk) and the fault is a message's, they come again one at a time: the
  guilty one shows itself. A body on ``noack()`` is taken to have failed at the event that it got last;
- bytes that do not decode are a dead letter, and the body never sees them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

from faust.exceptions import Skip
from faust.streams import Stream as FaustStream
from faust.types import ChannelT, EventT
from mode.utils.times import want_seconds

from streams.resilience.chunks import Chunk, Decode
from streams.resilience.delivery import Delivery
from streams.resilience.failures import Poison
from streams.resilience.redelivery import Turn
from streams.resilience.settling import Settling
from streams.resilience.topics import Event, RecordOf, Undecodable, current_stream

_NOTHING = object()
#: How often it is looked whether what goes before an event that is tried alone has arrived; a rare moment.
_LOOK_AGAIN_SECONDS = 0.01
#: A body that never waits gives way to the rest of the loop after this many events.
_EVENTS_PER_TURN = 50


class Received(NamedTuple):
    """What the body gets next: the event (None for a plain value), its value, and what the sensors keep of it."""

    event: Event | None
    value: Any
    sensor_state: Any


class Stream(Settling, FaustStream[Any]):
    """A Faust stream that acknowledges what was done, and nothing else."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.start_settling()
        #: the body acknowledges by itself (``noack``)
        self.manual = not self.enable_acks
        self._in_batches = False
        self._waiter: asyncio.Future[None] | None = None
        self._started_by_iteration = False
        self._run = 0
        self._first_processors: list[Any] | None = list(self._processors) if self._processors else None
        #: set on the stream of a chunk agent under ``test_context``, which gets single values as well
        self.wrap_values: Decode | None = None
        self.on_done: Any = None
        self.app.resilient_streams.add(self)

    def clone(self, **kwargs: Any) -> Any:
        """Create a clone, as ``group_by`` and its kin do; a test's hooks go with it."""
        new: Any = super().clone(**kwargs)
        new.wrap_values, new.on_done = self.wrap_values, self.on_done
        return new

    def noack(self) -> Any:
        """Return a stream whose events the body acknowledges by itself; once is enough for a body that runs again."""
        return self if self.manual else super().noack()

    # -- iteration --------------------------------------------------------------------------------------------------

    def __aiter__(self) -> AsyncIterator[Any]:
        iterator = self._iterate()
        self._active_agens.add(iterator)  # type: ignore[arg-type]
        return iterator

    async def _iterate(self) -> AsyncIterator[Any]:
        run = await self._begin_iteration()
        failed = False
        try:
            while not self.should_stop:
                received = await self._receive(None, in_batch=False)
                if received is None:
                    continue
                started = time.perf_counter()
                yield received.value
                if isinstance(received.value, Chunk):
                    self.app.on_handled(time.perf_counter() - started)
                # Only a body that asks for the next event has done this one: whatever else ends the wait at this
                # yield (an exception, a stop, a rebalance) leaves the event as it is.
                await self._done_with(received, acknowledge=self.enable_acks)
        except StopAsyncIteration:
            return
        except Exception:
            failed = True
            raise
        finally:
            await self._end_iteration(run, failed)

    async def _batches(
        self, max_: int, within: Any, pick: Callable[[Received], Any], *, acknowledge: bool
    ) -> AsyncIterator[Any]:
        run = await self._begin_iteration()
        self._in_batches = True
        seconds = want_seconds(within) if within else None
        failed = False
        try:
            while not self.should_stop:
                batch = await self._gather(max_, seconds)
                if not batch:
                    continue
                yield [pick(received) for received in batch]
                for received in batch:
                    await self._done_with(received, acknowledge=acknowledge)
        except StopAsyncIteration:
            return
        except Exception:
            failed = True
            raise
        finally:
            await self._end_iteration(run, failed)

    async def _gather(self, max_: int, seconds: float | None) -> list[Received]:
        batch: list[Received] = []
        until = None
        while len(batch) < max_:
            received = await self._receive(until, in_batch=bool(batch))
            if received is None:
                break
            batch.append(received)
            if until is None and seconds is not None:
                until = time.monotonic() + seconds
            if self.redelivery.alone is not None:
                break
        # Of what waited here while its partition was revoked, somebody else takes care.
        return [received for received in batch if received.event is None or received.event.live]

    def take(self, max_: int, within: Any) -> Any:
        """Yield lists of up to ``max_`` values; a shorter one ``within`` seconds after its first value came."""
        return self._tracked(self._batches(max_, within, lambda received: received.value, acknowledge=True))

    def take_events(self, max_: int, within: Any) -> Any:
        """Yield lists of events as :meth:`take` does of values."""
        return self._tracked(self._batches(max_, within, lambda received: received.event, acknowledge=True))

    def take_with_timestamp(self, max_: int, within: Any, timestamp_field_name: str) -> Any:
        """Yield lists of values as :meth:`take` does; those that are dicts get the message's time, in epoch seconds."""

        def pick(received: Received) -> Any:
            if isinstance(received.value, dict) and timestamp_field_name and received.event is not None:
                received.value[timestamp_field_name] = received.event.message.timestamp
            return received.value

        return self._tracked(self._batches(max_, within, pick, acknowledge=True))

    def noack_take(self, max_: int, within: Any) -> Any:
        """Yield lists of events that the body acknowledges by itself."""
        return self._tracked(self._batches(max_, within, lambda received: received.event, acknowledge=False))

    def _tracked(self, generator: Any) -> Any:
        self._active_agens.add(generator)
        return generator

    async def _begin_iteration(self) -> int:
        self._finalized = True
        self._in_batches = False
        if await self.maybe_start():
            self._started_by_iteration = True
        return self._run

    async def _end_iteration(self, run: int, failed: bool) -> None:
        # A body that failed runs again on this stream: its channel stays subscribed and the stream started.
        if failed or run != self._run:
            return
        self._channel_stop_iteration(self.channel)
        if self._started_by_iteration:
            self._started_by_iteration = False
            await self.stop()
            self.service_reset()

    async def _receive(self, until: float | None, *, in_batch: bool) -> Received | None:
        """Return what the body gets next; None when ``until`` is over or when its batch must be finished first."""
        while True:
            item = await self._take_item(until, in_batch=in_batch)
            if item is _NOTHING:
                return None
            event, value = None, item
            if isinstance(item, EventT):
                event = self._admit(item)  # type: ignore[arg-type]
                if event is None:
                    continue
                value = event.value
            self.began = True
            current_stream.set(self)
            self._set_current_event(event)
            state = None
            if event is not None:
                state = self._on_stream_event_in(event.message.tp, event.message.offset, self, event)
            try:
                for processor in list(self._processors):
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
            if isinstance(value, Chunk) or self.events_total % _EVENTS_PER_TURN == 0:
                await asyncio.sleep(0)
            return Received(event, value, state)

    async def _done_with(self, received: Received, *, acknowledge: bool) -> None:
        event = received.event
        if event is not None:
            self._on_stream_event_out(event.message.tp, event.message.offset, self, event, received.sensor_state)
            if acknowledge:
                event.ack()
        if self.on_done is not None:
            await self.on_done(received.value)

    async def _take_item(self, until: float | None, *, in_batch: bool) -> Any:
        channel = self.channel
        if not isinstance(channel, ChannelT):
            return await channel.__anext__()
        queue: Any = channel.queue
        while True:
            due = None
            if self.redelivery:
                found = self.redelivery.next(time.monotonic(), self.under_way())
                if isinstance(found, Event):
                    found.alone = found is self.redelivery.alone
                    if not queue.empty():
                        # the channel's other streams (concurrency) may have slept through what we leave there
                        queue._wakeup_next(queue._getters)
                    return found
                if found is Turn.WAIT:
                    if in_batch:
                        return _NOTHING
                    await self._wait(None, time.monotonic() + _LOOK_AGAIN_SECONDS)
                    continue
                due = self.redelivery.due()
            if queue.empty():
                if until is not None and time.monotonic() >= until:
                    return _NOTHING
                await self._wait(queue, min((at for at in (due, until) if at is not None), default=None))
                continue
            item = queue.get_nowait()
            if self.redelivery and isinstance(item, EventT) and self.redelivery.behind(item.message.tp, item):  # type: ignore[arg-type]
                continue
            return item

    async def _wait(self, queue: Any, until: float | None) -> None:
        """Wait until ``queue`` has something, until ``until``, or until this very stream is woken.

        As ``asyncio.Queue.get`` waits; a wake-up that went through the queue could be taken by another stream on it.
        """
        loop = asyncio.get_running_loop()
        waiter = self._waiter = loop.create_future()
        timer = loop.call_later(max(0.0, until - time.monotonic()), self.wake) if until is not None else None
        if queue is not None:
            queue._getters.append(waiter)
        try:
            await waiter
        except BaseException:
            if queue is not None and not queue.empty() and waiter.done() and not waiter.cancelled():
                queue._wakeup_next(queue._getters)
            raise
        finally:
            self._waiter = None
            waiter.cancel()
            if timer is not None:
                timer.cancel()
            if queue is not None and waiter in queue._getters:
                queue._getters.remove(waiter)

    def wake(self) -> None:
        """Let the stream look again whether an event may be given."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _admit(self, event: Event) -> Event | None:
        """Return the event that the body gets, or None: for one of an earlier generation, or that does not decode."""
        message = event.message
        delivered = isinstance(message, Delivery)
        if delivered and not event.live:
            self.redelivery.finished(event)
            return None
        if event.stream is not None and event.stream is not self:
            # Faust gives one event to all channels of a topic with the same types; what becomes of it is each
            # stream's own.
            value = event.value
            event = event.anew(value.copy() if isinstance(value, Chunk) else value)
        event.stream = self
        self.in_flight[event] = None
        if delivered:
            self.app.consumer.busy.add(message)
            if isinstance(event.value, Undecodable):
                problem = event.value.exception
                self._bury(event, Poison(f"does not decode: {problem}"), "poison", 1, None)
                return None
        if isinstance(event.value, Chunk):
            event.value.owner, event.value.event = self, event
        return event

    def _wrap(self, event: Event | None, value: Any) -> Chunk:
        """Make a chunk of one value that was put in by a test: bytes as Kafka has them, or a decoded message."""
        record = RecordOf(event.message if event is not None else _NO_MESSAGE)
        record.value = value
        decode = self.wrap_values if isinstance(value, bytes) else _as_it_is
        chunk = Chunk([record], decode or _as_it_is, self)
        if event is not None:
            event.value = chunk
        return chunk

    async def _passive_drainer(self, channel: ChannelT[Any], declare: bool = False) -> None:
        """Read this stream for one made of it (``group_by``, ``through``); a failure is settled, not passed on."""
        try:
            if declare:
                await channel.maybe_declare()
            self._passive_started.set()
            while not self.should_stop:
                try:
                    async for _ in self:
                        pass
                except Exception as exc:
                    if not self.recover(exc):
                        raise
        finally:
            self._channel_stop_iteration(channel)
            self._passive = False

    async def _format_key(self, key: Any, value: Any) -> Any:
        """Return the key that ``group_by`` gives ``value``; what that raises is the message's failure, not a skip."""
        result = key.getattr(value) if hasattr(key, "getattr") else key(value)
        return await result if hasattr(result, "__await__") else result

    # -- running again ----------------------------------------------------------------------------------------------

    def remember_processors(self) -> None:
        """Remember the processors that were there before the body first ran."""
        if self._first_processors is None:
            self._first_processors = list(self._processors)

    def rewind(self) -> None:
        """Make the stream as it was before the body ran: the body that raised is run again on it.

        The iterator of the body that raised is closed by the interpreter, some time later; by then it ends nothing.
        """
        self._run += 1
        self._processors[:] = self._first_processors or []
        self._finalized = True
        self.began = False


class _NoMessage:
    topic, partition, offset, timestamp, key, value, headers = "<test>", 0, 0, None, None, None, None


_NO_MESSAGE = _NoMessage()


def _as_it_is(value: Any) -> Any:
    return value
