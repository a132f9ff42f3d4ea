"""The Faust app under Headrace's resilience layer.

Guarantee: every agent of such an app, whether it takes chunks or one event at a time, gets the promise of
:mod:`streams.resilience.streams`; the end of the worker and a revocation wait a bounded time for what is in flight.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from typing import Any

import faust
from aiokafka.errors import MessageSizeTooLargeError, RecordListTooLargeError
from faust.types import TP

from streams.resilience.accounts import Accounts
from streams.resilience.agents import Agent
from streams.resilience.backoff import Backoff
from streams.resilience.chunks import Decode
from streams.resilience.deadletter import Failure, cut
from streams.resilience.ending import Worker
from streams.resilience.failures import FailureClass, Fatal, Retryable, classify, is_local_store
from streams.resilience.options import ResilienceOptions
from streams.resilience.producer import Outgoing, Producer
from streams.resilience.recovery import TableManager
from streams.resilience.streams import Stream
from streams.resilience.topics import Event, Topic
from streams.resilience.transport import Consumer, Transport

#: Large enough never to be reached: what is in flight is bounded in bytes by the transport.
BUFFER_EVENTS = 1 << 20
#: What Faust is told whatever else its configuration says.
FAUST_OPTIONS: dict[str, Any] = {
    "Stream": Stream,
    "Event": Event,
    "Topic": Topic,
    "Agent": Agent,
    "TableManager": TableManager,
    "Worker": Worker,
    "stream_buffer_maxsize": BUFFER_EVENTS,
    "stream_wait_empty": False,
}


class Listener:
    """Told of what happens to messages; each method may log and count, and must not raise or block."""

    def retry(self, app: App, exc: BaseException, kind: FailureClass, delay_seconds: float) -> None:
        """A handler failed and is called again after ``delay_seconds``."""

    def dead_letter(self, app: App, record: Any, failure: Failure) -> None:
        """``record`` becomes a dead letter."""

    def drop(self, app: App, record: Any, reason: str) -> None:
        """Nothing comes of ``record``."""

    def guard(self, app: App, reason: str | None) -> None:
        """The dead-letter guard has stopped ``app`` for ``reason``, or lets it go on (None)."""

    def handled(self, app: App, seconds: float) -> None:
        """A body has done a chunk; it had it in hand for so long."""

    def agent_failure(self, app: App, agent: Any, exc: BaseException) -> None:
        """The body of ``agent`` raised and is run again."""


class App(faust.App):
    """One stage: one consumer group, one transport, one set of accounts."""

    def __init__(
        self,
        id: str,  # noqa: A002 - Faust's name
        *,
        resilience: ResilienceOptions,
        listener: Listener | None = None,
        **options: Any,
    ) -> None:
        self.begin_resilience(resilience, listener)
        super().__init__(id, **{**FAUST_OPTIONS, **options})

    def begin_resilience(self, resilience: ResilienceOptions, listener: Listener | None) -> None:
        """Set up what an app under commit control has over and above Faust's; called once."""
        self.resilience = resilience
        self.listener = listener or Listener()
        self.accounts = Accounts(resilience.stage)
        self.guard = resilience.new_guard()
        #: records that no handler is to see again, see :mod:`streams.resilience.watchdog`
        self.condemned: frozenset[str] = frozenset()
        self.chunk_topics: dict[str, Decode] = {}
        self.resilient_streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        self.background: set[asyncio.Future[Any]] = set()
        #: dead letters on their way
        self.letters: set[asyncio.Future[None]] = set()
        self._letter_lock = asyncio.Lock()
        #: what agents under ``test_context`` sent, in order
        self.captured: list[Outgoing] = []
        self.testing = False
        self.ready_since: float | None = None

    def _new_transport(self) -> Transport:
        return Transport(self.conf.broker_consumer, self)

    def _new_producer_transport(self) -> Transport:
        return Transport(self.conf.broker_producer, self)

    def chunk_topic(self, name: str, decode: Decode, **options: Any) -> Any:
        """Return a topic whose agents get :class:`~streams.resilience.chunks.Chunk` events, decoded by ``decode``."""
        self.chunk_topics[name] = decode
        return self.topic(name, value_type=None, key_type=None, value_serializer="raw", **options)

    # -- what streams ask ---------------------------------------------------------------------------------------------

    async def send_outgoing(self, producer: Producer, outgoing: list[Outgoing]) -> list[asyncio.Future[Any]]:
        """Hand ``outgoing`` to Kafka, however long that takes.

        Raises ``MessageSizeTooLargeError``, with nothing sent, where one record is larger than a request may be.
        """
        if self.testing:
            await self.capture(outgoing)
            return []
        backoff = self.resilience.infrastructure_backoff()
        while True:
            try:
                sent: list[asyncio.Future[Any]] = await producer.send_many(outgoing)
            except Exception as exc:
                if classify(exc) is not FailureClass.RETRY or self.should_stop:
                    raise
                await self._again(exc, backoff)
            else:
                return sent

    def send_letters(self, letters: list[Outgoing], wanted: Callable[[], bool]) -> asyncio.Future[None]:
        """Have dead letters written; the future resolves once Kafka has acknowledged all of them.

        What Kafka says to them is never a reason to skip one: it is tried again, with backoff, for as long as
        ``wanted()``; one that is too large for its topic is cut.
        """
        task = asyncio.ensure_future(self._write_letters(letters, wanted))
        self.letters.add(task)
        task.add_done_callback(self.letters.discard)
        return task

    async def _write_letters(self, letters: list[Outgoing], wanted: Callable[[], bool]) -> None:
        if self.testing:
            await self.capture(letters)
            return
        # One after another: a letter that is refused must not be in a batch with somebody else's.
        async with self._letter_lock:
            if len(letters) > 1:
                try:
                    await self._until_written(letters, wanted)
                except (MessageSizeTooLargeError, RecordListTooLargeError) as exc:
                    self.log.debug("one of %d dead letters is too large for its topic: %s", len(letters), exc)
                else:
                    return
            for letter in letters:
                await self._until_written_or_cut(letter, wanted)

    async def _until_written_or_cut(self, letter: Outgoing, wanted: Callable[[], bool]) -> None:
        backoff = self.resilience.infrastructure_backoff()
        while True:
            try:
                await self._until_written([letter], wanted)
            except (MessageSizeTooLargeError, RecordListTooLargeError) as exc:
                shorter = cut(letter)
                if shorter == letter:
                    self.fatal(
                        Fatal(
                            f"topic {letter[0]} takes no record of {len(letter[2] or b'')} bytes with the headers of a "
                            f"dead letter ({exc}): raise its max.message.bytes"
                        )
                    )
                    await self._again(exc, backoff)
                letter = shorter
            else:
                return

    async def _until_written(self, letters: list[Outgoing], wanted: Callable[[], bool]) -> None:
        """Return once ``letters`` are acknowledged; raises when one of them is too large, or when nobody wants them."""
        backoff = self.resilience.infrastructure_backoff()
        while True:
            if self.should_stop or not wanted():
                raise Retryable("dead letters not written: their partition was given back")
            try:
                producer: Any = self.producer
                results = await asyncio.gather(*await producer.send_many(letters), return_exceptions=True)
                for result in results:
                    if isinstance(result, BaseException):
                        raise result
            except (MessageSizeTooLargeError, RecordListTooLargeError):
                raise
            except Exception as exc:
                if classify(exc) is FailureClass.FATAL:
                    self.fatal(exc)
                await self._again(exc, backoff)
            else:
                return

    async def _again(self, exc: BaseException, backoff: Backoff) -> None:
        delay = backoff.next()
        self.accounts.retries += 1
        self.listener.retry(self, exc, FailureClass.RETRY, delay)
        await self.sleep(delay)

    async def send_and_wait(self, outgoing: list[Outgoing]) -> None:
        """Send ``outgoing`` and return once Kafka has acknowledged all of it."""
        if self.testing:
            await self.capture(outgoing)
            return
        producer: Any = await self.maybe_start_producer()
        futures = await self.send_outgoing(producer, outgoing)
        if futures:
            await asyncio.gather(*futures)

    async def capture(self, outgoing: list[Outgoing]) -> None:
        """Keep what an agent under ``test_context`` sent."""
        self.captured += outgoing

    def on_retry(self, exc: BaseException, kind: FailureClass, delay: float) -> None:
        """Tell the listener of a retry."""
        self.listener.retry(self, exc, kind, delay)

    def on_dead_letter(self, record: Any, failure: Failure) -> None:
        """Tell the listener of a dead letter."""
        self.listener.dead_letter(self, record, failure)

    def on_drop(self, record: Any, reason: str) -> None:
        """Tell the listener of a drop."""
        self.listener.drop(self, record, reason)

    def on_guard(self) -> None:
        """Tell the listener that the dead-letter guard stopped the stage, or let it go on."""
        self.listener.guard(self, self.guard.tripped)

    def on_handled(self, seconds: float) -> None:
        """Tell the listener how long a body had a chunk in hand."""
        self.listener.handled(self, seconds)

    def on_agent_failure(self, agent: Any, exc: BaseException) -> None:
        """Tell the listener that a body raised."""
        self.listener.agent_failure(self, agent, exc)

    async def on_fetch_failure(self, exc: BaseException) -> None:
        """Decide what a failed fetch means; the health checks create the consumer anew when it goes on."""
        if classify(exc) is FailureClass.FATAL:
            self.fatal(exc)

    def fatal(self, exc: BaseException) -> None:
        """End the worker, non-zero: going on would be wrong."""
        if is_local_store(exc):
            exc = Fatal(
                f"a local table cannot be written or read ({exc}); make room on the disk of {self.conf.datadir}, or "
                "delete that folder where it is damaged (it is rebuilt from the changelog), and start again"
            )
        self.log.error("Stage %s cannot go on: %s", self.resilience.stage, exc)
        task = asyncio.ensure_future(self.crash(exc if isinstance(exc, Fatal) else Fatal(str(exc))))
        self.background.add(task)
        task.add_done_callback(self.background.discard)

    def forget(self, tps: set[TP]) -> None:
        """Drop what streams of this app know of partitions that were revoked."""
        for stream in list(self.resilient_streams):
            stream.forget(tps)

    # -- the life of the app ----------------------------------------------------------------------------------------

    def on_rebalance_end(self) -> None:
        """Let the reader begin: positions are set, tables restored, queues empty."""
        super().on_rebalance_end()
        if self.typed_consumer is not None:
            self.typed_consumer.wake_reader()

    async def on_stop(self) -> None:
        """Drain and commit; dead letters that are still on their way come again."""
        await super().on_stop()
        for task in list(self.letters):
            task.cancel()

    async def _consumer_wait_empty(self, consumer: Any, logger: Any) -> None:  # noqa: ARG002
        options = self.resilience
        await consumer.drain(options.shutdown_seconds if self.should_stop else options.drain_seconds)

    async def _producer_flush(self, logger: Any) -> None:  # noqa: ARG002
        # What counts is awaited record by record before its input is committed; a flush here would add a second wait
        # without a bound.
        return

    async def _on_agent_error(self, agent: Any, exc: BaseException) -> None:
        self.log.error("Agent %s failed outside of an event and is restarted: %r", agent.name, exc, exc_info=exc)

    @property
    def assigned(self) -> set[TP] | None:
        """The partitions that this app holds, or None while the group has not settled."""
        if self._assignment is None or self.rebalancing:
            return None
        return set(self._assignment)

    @property
    def typed_consumer(self) -> Consumer | None:
        """The consumer, where there is one yet; asking does not create it."""
        found: Any = self._consumer
        consumer: Consumer | None = found
        return consumer
