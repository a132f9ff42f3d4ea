"""A chunk: the records of one partition that one fetch brought, as one event of a stream.

Guarantee: each message of a chunk ends as done, dropped, or one dead letter, whatever its neighbours do; what a handler
sent counts only once it has returned; the chunk is complete when all of that is acknowledged by Kafka. Order is kept
per partition: a message that is to be tried again holds back those behind it.

:meth:`Chunk.each` is for pure functions ``(message, out)``, :meth:`Chunk.all` for sinks that take many at once.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from streams.resilience.deadletter import Failure
from streams.resilience.encoding import encode
from streams.resilience.failures import FailureClass, Poison, classify
from streams.resilience.producer import Outgoing
from streams.resilience.watchdog import AT_HAND, name_of

#: Decodes the bytes of a record's value; raises for bytes that are no such message.
Decode = Callable[[bytes], Any]
#: After so many outputs or messages they are handed on and the event loop goes round: Kafka takes the first while the
#: next are made, and a message that gives a thousand times its size is not multiplied by a chunk's length.
SLICE_OUTPUTS = 1024
SLICE_MESSAGES = 256

#: Takes many messages at once; may return the bad ones as (position, exception).
BulkHandler = Callable[[list[Any]], Awaitable[Iterable[tuple[int, BaseException]] | None]]


class Out:
    """Where a handler puts what it sends; nothing of it counts until the handler has returned."""

    __slots__ = ("_drop", "_sent", "add", "record")

    def __init__(self) -> None:
        self._sent: list[Outgoing] = []
        #: send a record that is already what Kafka is to have: (topic's name, key, value, headers)
        self.add: Callable[[Outgoing], None] = self._sent.append
        self._drop: str | None = None
        self.record: Any = None

    def send(
        self, topic: Any, value: Any, key: str | bytes | None = None, headers: list[tuple[str, bytes]] | None = None
    ) -> None:
        """Send ``value`` (bytes, or anything msgspec encodes) to ``topic`` (a name or a topic's declaration)."""
        self._sent.append(
            (
                topic if topic.__class__ is str else topic.name,
                key.encode() if isinstance(key, str) else key,
                value if value.__class__ is bytes else encode(value),
                headers,
            )
        )

    def drop(self, reason: str) -> None:
        """Say that nothing comes of this message, and why; ``accounts.INTENDED_DROPS`` lists the reasons."""
        self._drop = reason


class Chunk:
    """Messages of one partition, in order. ``len(chunk)`` counts those still to be handled."""

    __slots__ = ("_decode", "delivery", "event", "owner", "pending", "records")

    def __init__(self, records: Sequence[Any], decode: Decode, owner: Any = None, delivery: Any = None) -> None:
        self.records = records
        self.pending: list[int] = list(range(len(records)))
        self._decode = decode
        #: the stream that this chunk came through: it settles failures and takes what is sent
        self.owner = owner
        self.delivery = delivery
        #: the event that carries this chunk, where Kafka delivered it, until that is acknowledged
        self.event: Any = None

    def __len__(self) -> int:
        return len(self.pending)

    @property
    def ours(self) -> bool:
        """Whether its partition has not been revoked since it came."""
        return self.delivery is None or (self.event is not None and bool(self.event.live))

    def __repr__(self) -> str:
        first = self.records[0] if self.records else None
        where = f"{first.topic}[{first.partition}]@{first.offset}" if first is not None else "nowhere"
        return f"<Chunk of {len(self.records)} from {where}, {len(self.pending)} to do>"

    def part(self, numbers: Sequence[int]) -> Chunk:
        """Return a chunk of the messages ``numbers``, still to be handled."""
        return Chunk([self.records[number] for number in numbers], self._decode, self.owner, self.delivery)

    def copy(self) -> Chunk:
        """Return a chunk of the same records for another stream, none of them handled yet."""
        return Chunk(self.records, self._decode, None, self.delivery)

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the decoded messages still to be handled; raises Poison for one that does not decode."""
        return (self.message(number) for number in self.pending)

    def message(self, number: int) -> Any:
        """Return the decoded message at ``number``; raises Poison where its bytes are no such message."""
        record = self.records[number]
        value = record.value
        if value is None:
            raise Poison("the record has no value")
        try:
            return self._decode(value)
        except (msgspec.MsgspecError, ValueError, RecursionError) as exc:
            raise Poison(f"not a message of {record.topic}: {exc}") from exc

    async def each(self, handler: Callable[[Any, Out], Any]) -> None:
        """Call ``handler(message, out)`` for every message, in order; a coroutine function is awaited.

        Raises nothing for a message that fails: it becomes a dead letter, or is held back with those behind it and
        comes again in a later chunk. Raises ``MessageSizeTooLargeError`` for an output that Kafka can never take; the
        messages then come again one by one, and the guilty one becomes a dead letter.
        """
        out = Out()
        asynchronous = inspect.iscoroutinefunction(handler)
        records, decode = self.records, self._decode
        sent = out._sent
        outgoing: list[Outgoing] = []
        letters: list[Outgoing] = []
        pending = self.pending
        rest: list[int] = []
        failure: BaseException | None = None
        owner, delivery = self.owner, self.delivery
        at_hand, condemned = AT_HAND, owner.condemned if owner is not None else None
        for position, number in enumerate(pending):
            record = out.record = at_hand.record = records[number]
            try:
                if condemned and name_of(record) in condemned:
                    raise Poison("this record has blocked the event loop and ended the worker twice")
                value = record.value
                message = decode(value) if value is not None else self.message(number)
                result = handler(message, out)
                if asynchronous or (result is not None and inspect.isawaitable(result)):
                    await result
            except Exception as exc:
                sent.clear()
                out._drop = None
                letter = self._judge(record, exc)
                if letter is None:
                    rest, failure = pending[position:], exc
                    break
                letters.append(letter)
                continue
            if sent:
                outgoing += sent
                sent.clear()
            if out._drop is not None:
                owner.dropped(record, out._drop, delivery)
                out._drop = None
            if len(outgoing) >= SLICE_OUTPUTS or position % SLICE_MESSAGES == SLICE_MESSAGES - 1:
                at_hand.record = None
                if not await owner.forward(self, outgoing, letters, pending[position + 1 :], None):
                    return
                outgoing, letters = [], []
                await asyncio.sleep(0)
        at_hand.record = None
        await owner.forward(self, outgoing, letters, rest, failure)

    async def all(self, handler: BulkHandler) -> None:
        """Call ``await handler(messages)`` once with all messages; it may return the bad ones as (position, exception).

        When it raises something that is not infrastructure's fault, it is called again with one message at a time, so
        that only the guilty message becomes a dead letter.
        """
        letters: list[Outgoing] = []
        good: list[int] = []
        messages: list[Any] = []
        rest: list[int] = []
        failure: BaseException | None = None
        for position, number in enumerate(self.pending):
            try:
                messages.append(self.message(number))
                good.append(number)
            except Exception as exc:
                letter = self._judge(self.records[number], exc)
                if letter is None:
                    rest, failure = self.pending[position:], exc
                    break
                letters.append(letter)
        if messages:
            left, reason = await self._handle_all(handler, good, messages, letters)
            rest = left + rest
            failure = reason or failure
        await self.owner.forward(self, [], letters, rest, failure)

    async def _handle_all(
        self, handler: BulkHandler, numbers: list[int], messages: list[Any], letters: list[Outgoing]
    ) -> tuple[list[int], BaseException | None]:
        try:
            bad: list[tuple[int, BaseException]] = list(await handler(messages) or ())
        except Exception as exc:
            if classify(exc) in (FailureClass.RETRY, FailureClass.FATAL):
                return numbers, exc
            if len(numbers) > 1:
                return await self._one_by_one(handler, numbers, messages, letters)
            bad = [(0, exc)]
        for position, reason in sorted(bad, key=lambda entry: entry[0]):
            letter = self._judge(self.records[numbers[position]], reason)
            if letter is None:
                return numbers[position:], reason
            letters.append(letter)
        return [], None

    async def _one_by_one(
        self, handler: BulkHandler, numbers: list[int], messages: list[Any], letters: list[Outgoing]
    ) -> tuple[list[int], BaseException | None]:
        for position, number in enumerate(numbers):
            left, reason = await self._handle_all(handler, [number], [messages[position]], letters)
            if left:
                return numbers[position:], reason
        return [], None

    def _judge(self, record: Any, exc: BaseException) -> Outgoing | None:
        """Return the dead letter of ``record``, or None when it is to be tried again."""
        letter: Outgoing | None = self.owner.judge(record, exc, self.delivery)
        return letter


def request_id_of(record: Any) -> str | None:
    """Return the request id that the JSON value of ``record`` carries, where it can be read."""
    try:
        found = _RequestId.decode(record.value).request_id
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError):
        return None
    return found if isinstance(found, str) else None


class _HasRequestId(msgspec.Struct):
    request_id: str | None = None


_RequestId = msgspec.json.Decoder(_HasRequestId)


def failure_of(kind: str, exc: BaseException, attempts: int, first: datetime | None, record: Any) -> Failure:
    """Return the failure that a dead letter of ``record`` tells of."""
    now = datetime.now(UTC)
    return Failure(kind, exc, attempts, first or now, now, request_id_of(record))
