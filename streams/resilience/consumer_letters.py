"""Dead letters of the resilient consumers, and who is told of a failure.

Guarantee: :meth:`Letters.bury` returns True only once Kafka has acknowledged the dead letter; while it cannot be
written it is tried again, with backoff, for as long as the partition is held.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import aiokafka
from aiokafka.errors import MessageSizeTooLargeError, RecordTooLargeError

from streams.resilience.bounds import within
from streams.resilience.consumer_options import ConsumerOptions, inside_handler
from streams.resilience.deadletter import Failure, Headers, headers_of, truncated

log = logging.getLogger("streams.resilience.consumers")

CLOSE_SECONDS = 5.0
#: How long a callback of the caller's is waited for.
CALLBACK_SECONDS = 60.0


class Letters:
    """Writes the dead letters of one consumer; its producer is made when the first one is needed."""

    def __init__(self, options: ConsumerOptions, owner: object = None) -> None:
        self.options = options
        self.owner = owner
        self.topic = options.dead_letter_topic
        self._producer: aiokafka.AIOKafkaProducer | None = None
        self._lock = asyncio.Lock()
        self.written = 0

    async def tell(self, exc: BaseException, record: Any) -> None:
        """Tell ``on_error_callback``, within a bound; whatever it raises or returns changes nothing."""
        if self.options.on_error_callback is None:
            return
        try:
            await within(self._tell(exc, record), CALLBACK_SECONDS)
        except TimeoutError as late:
            log.warning("on_error_callback of group %s is not waited for any longer: %s", self.options.group_id, late)
        except Exception:
            log.exception("on_error_callback of group %s raised; it decides nothing", self.options.group_id)

    async def _tell(self, exc: BaseException, record: Any) -> None:
        # It may stop its own consumer, which must not wait for it.
        inside_handler.set(self.owner)
        callback: Any = self.options.on_error_callback
        if inspect.iscoroutinefunction(callback):
            await callback(exc, record)
        else:
            # In a thread: a callback that blocks must not cost the group membership.
            result = await asyncio.to_thread(callback, exc, record)
            if inspect.isawaitable(result):
                await result

    async def bury(self, record: Any, failure: Failure, *, wanted: Callable[[], bool]) -> bool:
        """Write ``record`` (its original bytes) to the dead letters; False when it is no longer ``wanted``."""
        assert self.topic is not None
        headers = headers_of(record, failure, stage=self.options.group_id, group=self.options.group_id)
        value = record.value
        backoff = self.options.retry_backoff()
        while wanted():
            try:
                await self._send(record.key, value, headers)
            except (MessageSizeTooLargeError, RecordTooLargeError):
                value, headers = truncated(record.value, headers)
            except Exception as exc:
                delay = backoff.next()
                log.warning(
                    "Dead letter of %s[%d] offset %d cannot be written to %s (%s: %s); trying again in %.1f s",
                    record.topic,
                    record.partition,
                    record.offset,
                    self.topic,
                    type(exc).__name__,
                    exc,
                    delay,
                )
                await self._discard()
                until = asyncio.get_running_loop().time() + delay
                while wanted() and asyncio.get_running_loop().time() < until:
                    await asyncio.sleep(min(0.1, delay))
            else:
                self.written += 1
                log.warning(
                    "Dead letter (%s) in %s: %s[%d] offset %d after %d attempt(s), %s: %s",
                    failure.kind,
                    self.topic,
                    record.topic,
                    record.partition,
                    record.offset,
                    failure.attempts,
                    type(failure.exception).__name__,
                    failure.exception,
                )
                return True
        return False

    async def _send(self, key: bytes | None, value: bytes | None, headers: Headers) -> None:
        async with self._lock:
            if self._producer is None:
                producer = aiokafka.AIOKafkaProducer(**self.options.producer)
                try:
                    await producer.start()
                except BaseException:
                    await _close(producer)
                    raise
                self._producer = producer
            producer = self._producer
        await producer.send_and_wait(self.topic, value, key, headers=headers)

    async def _discard(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            await _close(producer)

    async def close(self) -> None:
        """Close the producer, within a bound."""
        await self._discard()


async def _close(producer: aiokafka.AIOKafkaProducer) -> None:
    with contextlib.suppress(Exception):
        await within(producer.stop(), CLOSE_SECONDS)


def failure(kind: str, exc: BaseException, attempts: int, first: datetime, record: Any) -> Failure:
    """Return why ``record`` is a dead letter, with the request id that it carries where it does."""
    request_id = next((v for k, v in record.headers or () if k == "request_id"), None)
    text = request_id.decode("utf-8", "replace") if isinstance(request_id, bytes) else request_id
    return Failure(kind, exc, attempts, first, datetime.now(UTC), text)
