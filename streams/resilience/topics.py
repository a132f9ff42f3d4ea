"""Events and topics as Faust knows them, under commit control.

Guarantees: an event is acknowledged once, and not at all once it has been given up or delivered anew; what an agent's
body sends to a topic, changelog records of tables included, is a debt of the events that it has in hand; bytes that do
not decode reach the stream as :class:`Undecodable`, which makes a dead letter of them.
"""

from __future__ import annotations

import contextvars
from typing import TYPE_CHECKING, Any

from faust.events import Event as FaustEvent
from faust.topics import Topic as FaustTopic

from streams.resilience.chunks import Chunk
from streams.resilience.delivery import Delivery
from streams.resilience.failures import FailureClass, classify

if TYPE_CHECKING:
    from streams.resilience.settling import Settling

#: The stream whose events the running task works on.
current_stream: contextvars.ContextVar[Settling | None] = contextvars.ContextVar("current_stream", default=None)


class Undecodable:
    """Stands for a value that could not be decoded, until it is a dead letter."""

    __slots__ = ("exception",)

    def __init__(self, exception: BaseException) -> None:
        self.exception = exception


class Event(FaustEvent):
    """An event that knows its stream; ``void`` once acknowledging it no longer means anything."""

    app: Any
    message: Any
    value: Any
    stream: Settling | None = None
    void = False
    #: it was given while nothing else of its stream was under way: what fails then is its own
    alone = False

    def ack(self) -> bool:
        """Acknowledge the event; a second time, or after it was delivered anew, changes nothing."""
        if self.void or self.acked:
            return False
        self.acked = True
        if self.stream is not None:
            self.stream.finished(self)
        return bool(super().ack())

    @property
    def live(self) -> bool:
        """Tell whether the event still counts: its partition has not been revoked since."""
        message = self.message
        return not isinstance(message, Delivery) or (message.ledger is not None and message.ledger.live)

    @property
    def first_offset(self) -> int:
        """The place of the event in its partition."""
        value = self.value
        if isinstance(value, Chunk) and value.records:
            return int(value.records[0].offset)
        return int(self.message.offset)

    def offsets(self) -> list[int]:
        """Return the offsets of the records that this event holds."""
        value = self.value
        if isinstance(value, Chunk):
            return [record.offset for record in value.records]
        return [self.message.offset]

    def anew(self, value: Any = None) -> Event:
        """Return another event of the same message, for the same value or for a part of it."""
        event: Event = self.app.conf.Event(
            self.app, self.key, self.value if value is None else value, self.headers, self.message
        )
        return event


class Topic(FaustTopic):
    """A topic whose sends are debts of the events at hand, and whose undecodable records reach the dead letters."""

    app: Any

    def _compile_decode(self) -> None:
        super()._compile_decode()
        decode_value = self.decode

        async def decode(message: Any, *, propagate: bool = False) -> Any:  # noqa: ARG001
            if isinstance(message, Delivery) and message.records is not None:
                chunk = Chunk(message.records, self.app.chunk_topics[message.topic], delivery=message)
                return self.app.conf.Event(self.app, None, chunk, None, message)
            try:
                return await decode_value(message, propagate=True)
            except Exception as exc:
                # Whatever a decoder raises: Faust would let it end the worker, or acknowledge the record.
                if not isinstance(message, Delivery):
                    raise
                return self.app.conf.Event(self.app, None, Undecodable(exc), None, message)

        self.decode = decode  # type: ignore[method-assign]

    async def declare(self) -> None:
        """Create the topic where it is missing; a broker that is away meanwhile is waited for."""
        backoff = self.app.resilience.infrastructure_backoff()
        while True:
            try:
                await super().declare()
            except Exception as exc:
                if classify(exc) is not FailureClass.RETRY or self.app.should_stop:
                    raise
                delay = backoff.next()
                self.app.on_retry(exc, FailureClass.RETRY, delay)
                await self.app.sleep(delay)
            else:
                return

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
