"""``AsyncResilientKafkaConsumer``, for services that are no Faust apps.

    consumer = AsyncResilientKafkaConsumer("orders", "billing", "localhost:9092", dead_letter_topic="orders_errors")
    async with consumer:
        await consumer.consume_messages(handle)       # handle(message) -> True | None: done; False: again

Guarantees: what is committed was handled, is a dead letter, or was told to ``on_error_callback`` where that is all
there is; nothing is skipped. A message that is not done comes again, in order, and nothing behind it on its partition
before. An absent broker is waited for; a consumer that failed or is stuck is closed and created anew. Backoff, failure
table, low-water mark, dead letters and health judgement are those of the Faust transport, and neither Faust nor the
settings are loaded.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from aiokafka.errors import KafkaError

from streams.resilience.consumer_letters import Letters
from streams.resilience.consumer_options import (
    ConsumerOptions,
    ErrorCallback,
    Handler,
    KafkaUnavailable,
    Topic,
    consumer_options,
    inside_handler,
)
from streams.resilience.consumer_session import Session
from streams.resilience.consumer_work import Work
from streams.resilience.failures import FailureClass, classify

log = logging.getLogger(__name__)


class AsyncResilientKafkaConsumer:
    """Consume topics with at-least-once delivery, in the running event loop.

    ``topic``: a name, a list of names or a compiled pattern. ``bootstrap_servers``: ``host:port``, several in a list or
    separated by commas. ``max_retries``: attempts to create a consumer before ``consume_messages`` raises, None: for
    ever. ``base_delay``: the first backoff in seconds; it doubles up to ``max_delay``. ``on_error_callback(exception,
    message)``: told of each failure (message None for the connection's, what the handler got for a batch's), sync or
    async; decides nothing. ``raw=True`` leaves values as bytes; else they arrive decoded from JSON
    (``value_deserializer``, ``key_deserializer``: decode otherwise). ``dead_letter_topic``: where goes what can never
    be handled; without one nothing is given up and such a message holds its partition. ``concurrency``: handlers in
    parallel; order is kept per key (records without a key count as one key of their partition). ``config_overrides``:
    keyword arguments of ``aiokafka.AIOKafkaConsumer``, over the tuned values of ``get_optimized_consumer_config``.

    Further: ``max_attempts`` at what nobody has classified before it is a dead letter; ``health_check_interval``,
    ``stuck_after``, ``drain_timeout`` (how long a rebalance or a stop waits for running handlers), ``commit_interval``
    in seconds; ``in_flight_bytes``: bound on what is fetched and not done.

    Raises ValueError or TypeError for arguments that cannot be; connects to nothing.
    """

    def __init__(  # noqa: PLR0917 - the order is the contract's
        self,
        topic: Topic,
        group_id: str,
        bootstrap_servers: str | Sequence[str],
        auto_offset_reset: str = "earliest",
        max_retries: int | None = None,
        base_delay: float = 1,
        on_error_callback: ErrorCallback | None = None,
        *,
        raw: bool = False,
        dead_letter_topic: str | None = None,
        concurrency: int = 1,
        max_delay: float = 64.0,
        max_attempts: int = 5,
        health_check_interval: float = 30.0,
        stuck_after: float = 120.0,
        drain_timeout: float = 10.0,
        commit_interval: float = 1.0,
        in_flight_bytes: int = 32 * 1024 * 1024,
        **config_overrides: Any,
    ) -> None:
        self.options: ConsumerOptions = consumer_options(
            topic,
            group_id,
            bootstrap_servers,
            auto_offset_reset=auto_offset_reset,
            max_retries=max_retries,
            base_delay=base_delay,
            on_error_callback=on_error_callback,
            raw=raw,
            dead_letter_topic=dead_letter_topic,
            concurrency=concurrency,
            max_delay=max_delay,
            max_attempts=max_attempts,
            health_check_interval=health_check_interval,
            stuck_after=stuck_after,
            drain_timeout=drain_timeout,
            commit_interval=commit_interval,
            in_flight_bytes=in_flight_bytes,
            overrides=config_overrides,
        )
        #: how often a consumer was created anew
        self.recreations = 0
        self._stopping = False
        self._stop: asyncio.Event | None = None
        self._ended: asyncio.Event | None = None
        self._session: Session | None = None
        self._work: Work | None = None

    async def consume_messages(
        self, handler: Handler, commit_offset: bool = True, batch_processing: bool = False
    ) -> None:
        """Give every message to ``handler`` until :meth:`stop`.

        ``handler(message)`` is a coroutine function, or a plain one, which runs in a thread. ``message`` has topic,
        partition, offset, timestamp (ms), key (bytes), value, headers. It returns True or None: done; False: not done,
        the same message comes again after a backoff; what it raises is classed by ``failures.classify``: *retry* comes
        again for ever, *poison* and *rejected* are dead letters at once, what nobody has classified is after
        ``max_attempts``, *fatal* ends this call. ``batch_processing``: ``handler({TopicPartition: [messages]})``, which
        may return how many of each partition it finished. ``commit_offset=False`` commits nothing; :meth:`commit`
        does.

        Raises:
            KafkaUnavailable: ``max_retries`` attempts to create a consumer have failed in a row.
            RuntimeError: it is running already.
            Exception: what a handler raised of class *fatal*.
        """
        if self._ended is not None:
            raise RuntimeError(f"consume_messages of group {self.options.group_id} is running already")
        if self._stopping:
            return
        self._stop, self._ended = asyncio.Event(), asyncio.Event()
        letters = Letters(self.options, self)
        work = self._work = Work(self.options, handler, letters, self)
        try:
            await self._live(work, self._stop, commit=commit_offset, batches=batch_processing)
        finally:
            self._session = None
            work.fatal.cancel()
            work.close()
            try:
                await letters.close()
            finally:
                self._ended.set()
                self._ended = None

    async def _live(self, work: Work, stop: asyncio.Event, *, commit: bool, batches: bool) -> None:
        backoff = self.options.retry_backoff()
        again = False
        while not stop.is_set():
            if again and await _stopped_within(stop, backoff.next()):
                return
            attempt = 0
            session: Session | None = None
            while session is None:
                attempt += 1
                session = Session(self.options, work, commit=commit, batches=batches)
                try:
                    await session.open()
                except (KafkaError, OSError, TimeoutError) as exc:
                    session = None
                    await self._not_created(exc, attempt, work)
                    delay = backoff.next()
                    log.warning(
                        "Kafka cannot be reached for topic '%s', group %s (%s: %s); attempt %d, next in %.1f s. "
                        "bootstrap_servers=%s",
                        self.options.label,
                        self.options.group_id,
                        type(exc).__name__,
                        exc,
                        attempt,
                        delay,
                        ",".join(self.options.config["bootstrap_servers"]),
                    )
                    if await _stopped_within(stop, delay):
                        return
            log.info("AsyncResilientKafkaConsumer successfully created for topic '%s'", self.options.label)
            if again:
                self.recreations += 1
                work.accounts.recreations += 1
                log.info("Successfully recreated consumer after error (attempt %d)", attempt)
            self._session = session
            why = await session.run(stop)
            self._session = None
            if why is None:
                return
            log.warning("Recreating the consumer of topic '%s': %s", self.options.label, why)
            backoff.healthy()
            again = True

    async def _not_created(self, exc: BaseException, attempt: int, work: Work) -> None:
        await work.letters.tell(exc, None)
        if classify(exc) is FailureClass.FATAL:
            raise exc
        most = self.options.max_retries
        if most is not None and attempt >= most:
            raise KafkaUnavailable(
                f"no consumer for topic '{self.options.label}' could be created in {attempt} attempt(s) "
                f"(max_retries={most}); bootstrap_servers={','.join(self.options.config['bootstrap_servers'])}: "
                f"{type(exc).__name__}: {exc}"
            ) from exc

    async def commit(self) -> bool:
        """Commit what is complete now, without waiting for the interval; True when the broker has it."""
        return self._session is not None and await self._session.commit()

    async def stop(self) -> None:
        """End ``consume_messages``: wait for running handlers (``drain_timeout``), commit, leave the group.

        Final: ``consume_messages`` returns at once afterwards. A handler may call it; it does not wait for itself.
        """
        self._stopping = True
        ended = self._ended
        if self._session is not None:
            self._session.halt()
        if self._stop is not None:
            self._stop.set()
        if ended is not None and inside_handler.get() is not self:
            await ended.wait()

    def is_healthy(self) -> bool:
        """Tell whether a consumer is in its group, reaches a broker and gets on. Never raises."""
        session = self._session
        return session is not None and session.running and session.verdict().well

    def why_unhealthy(self) -> str:
        """Return in words what is wrong, empty when nothing is."""
        session = self._session
        if session is None or not session.running:
            return "there is no consumer: it is not started, or Kafka cannot be reached"
        return session.verdict().reason

    def accounts(self) -> dict[str, object]:
        """Return the counts since ``consume_messages`` began: received, forwarded (done), dead letters and so on."""
        return self._work.accounts.as_dict() if self._work is not None else {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()


async def _stopped_within(stop: asyncio.Event, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await stop.wait()
    except TimeoutError:
        return False
    return True
