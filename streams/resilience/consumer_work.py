"""How the records of one partition reach a handler, one call per record.

Guarantees: records with the same key are handled in the order of the log, and with ``concurrency=1`` all records of
a partition are. A record that is not done (False, or an exception that is to be tried again) is delivered again after a
backoff, and until it is done no later record of its partition begins; the slot is free meanwhile, so other partitions
go on. A record is complete in the ledger only when its handler is done with it or its dead letter is acknowledged. A
sync handler runs in a thread, and a record is never handled while an earlier life of the consumer still handles it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import inspect
import logging
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from streams.resilience.accounts import Accounts
from streams.resilience.backoff import Backoff
from streams.resilience.commits import PartitionLedger, Span
from streams.resilience.consumer_letters import Letters, failure
from streams.resilience.consumer_options import ConsumerOptions, Handler, NotDone, Undecodable, inside_handler
from streams.resilience.failures import FailureClass, Retryable, classify

log = logging.getLogger("streams.resilience.consumers")

#: A lane gives its slot back after this long, so that quick handlers share the loop and the slots fairly.
SLICE_SECONDS = 0.02

Item = tuple[Any, Span]


def is_async(handler: Handler) -> bool:
    """Tell whether calling ``handler`` gives a coroutine."""
    return inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(getattr(handler, "__call__", None))  # noqa: B004


class Work:
    """What all partitions of one consumer share, across its recreations."""

    def __init__(self, options: ConsumerOptions, handler: Handler, letters: Letters, owner: object) -> None:
        self.options = options
        self.handler = handler
        self.owner = owner
        self.is_async = is_async(handler)
        self.letters = letters
        self.accounts = Accounts(options.group_id)
        self.gate = asyncio.Semaphore(options.concurrency)
        self.fatal: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.on_room: Callable[[], None] = lambda: None
        self._executor: concurrent.futures.ThreadPoolExecutor | None = None
        self._calls: dict[Any, dict[concurrent.futures.Future[Any], Partition]] = {}

    def die(self, exc: BaseException) -> None:
        """End consume_messages with ``exc``."""
        if not self.fatal.done():
            self.fatal.set_exception(exc)

    async def in_thread(self, parts: list[Partition], call: Callable[[], Any]) -> Any:
        """Run ``call`` in a thread, on record for ``parts`` until it has really ended."""
        if self._executor is None:
            self._executor = concurrent.futures.ThreadPoolExecutor(
                self.options.concurrency, f"kafka-{self.options.group_id}"
            )
        future = self._executor.submit(contextvars.copy_context().run, call)
        for part in parts:
            self._calls.setdefault(part.tp, {})[future] = part
        future.add_done_callback(lambda done: [self._calls[part.tp].pop(done, None) for part in parts])
        return await asyncio.wrap_future(future)

    async def wait_for_stragglers(self, part: Partition) -> None:
        """Wait until no call of an earlier life is under way for the partition."""
        while any(other is not part for other in list(self._calls.get(part.tp, {}).values())) and part.taking:
            await asyncio.sleep(0.02)

    def settle(self, part: Partition, span: Span, dead: str | None = None, dropped: str | None = None) -> None:
        """Note that a record is complete."""
        if part.ledger.live:
            part.ledger.complete(span)
            self.accounts.settle(1, {dead: 1} if dead else None, {dropped: 1} if dropped else None)

    async def verdict(self, part: Partition, item: Item, exc: BaseException, attempts: int, first: datetime) -> bool:
        """Settle a record that failed, where that can be done now; False when it is to come again.

        ``record`` holds its original bytes. Dead letters need a topic; without one a handler's message comes again for
        ever, and one that does not decode is the callback's, or comes again too.
        """
        record, span = item
        options = self.options
        kind = classify(exc)
        if not isinstance(exc, NotDone):
            await self.letters.tell(exc, record)
        if kind is FailureClass.FATAL:
            self.die(exc)
            part.taking = False
            return False
        if kind is FailureClass.RETRY:
            return False
        if isinstance(exc, Undecodable) and options.dead_letter_topic is None and options.on_error_callback is not None:
            log.error("%s; on_error_callback has been told, no dead_letter_topic is given, the group goes on", exc)
            self.settle(part, span, dropped="undecodable")
            return True
        if kind is FailureClass.UNCLASSIFIED and attempts < options.resilience.max_attempts:
            return False
        if options.dead_letter_topic is None:
            log.error(
                "%s[%d] offset %d cannot be handled after %d attempt(s) (%s: %s) and holds its partition: "
                "no dead_letter_topic is given to AsyncResilientKafkaConsumer, and nothing is skipped without one",
                record.topic,
                record.partition,
                record.offset,
                attempts,
                type(exc).__name__,
                exc,
            )
            return False
        name = {FailureClass.POISON: "poison", FailureClass.REJECTED: "rejected"}.get(kind, "exhausted")
        if not await self.letters.bury(record, failure(name, exc, attempts, first, record), wanted=lambda: part.taking):
            return False
        self.settle(part, span, dead=name)
        return True

    def close(self) -> None:
        """Let the threads end when what they do is done."""
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)


def cancelled_within(exc: asyncio.CancelledError) -> Retryable:
    """Return the failure that a cancellation within a handler is; raises ``exc`` where it is this very task's own."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise exc
    return Retryable(f"something within the handler was cancelled: {exc!r}")


class Partition:
    """One partition for as long as it is assigned."""

    def __init__(self, tp: Any, ledger: PartitionLedger, work: Work) -> None:
        self.tp = tp
        self.ledger = ledger
        self.work = work
        #: False once it is being revoked: what has begun may end, nothing begins
        self.taking = True
        #: offsets that wait to be delivered again; nothing behind the first of them begins
        self.failing: set[int] = set()
        #: handlers that run just now
        self.running = 0
        self.tasks: set[asyncio.Task[None]] = set()
        self._lanes: dict[int, Lane] = {}
        self._changed = asyncio.Event()

    def put(self, record: Any, span: Span) -> None:
        """Give a record to its lane."""
        lanes = self.work.options.concurrency
        number = hash(record.key) % lanes if lanes > 1 else 0
        lane = self._lanes.get(number)
        if lane is None:
            lane = self._lanes[number] = Lane(self)
        lane.queue.append((record, span))

    def begin(self) -> None:
        """Start every lane that has something to do."""
        for lane in self._lanes.values():
            if lane.queue and lane.task is None:
                lane.start()

    def may_begin(self, offset: int) -> bool:
        """Tell whether the record at ``offset`` may be handled now."""
        return self.taking and (not self.failing or offset <= min(self.failing))

    async def until_changed(self, seconds: float) -> None:
        """Wait until something of the partition has changed, or for ``seconds``."""
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()

    def wake(self) -> None:
        """Tell those that wait for a change."""
        self._changed.set()

    def end(self) -> None:
        """Begin nothing more."""
        self.taking = False
        for lane in self._lanes.values():
            lane.queue.clear()
        self.wake()

    @property
    def held(self) -> bool:
        """Whether it waits on purpose: for a backoff, or for a slot."""
        return bool(self.failing) or (self.ledger.in_flight > 0 and not self.running)


class Lane:
    """Records of one partition that are handled one after the other: all of them, or those of some keys."""

    def __init__(self, part: Partition) -> None:
        self.part = part
        self.work = part.work
        self.queue: deque[Item] = deque()
        self.task: asyncio.Task[None] | None = None
        self._slice = self._slice_async if part.work.is_async else self._slice_in_thread

    def start(self) -> None:
        """Handle what is queued, in a task."""
        self.task = asyncio.create_task(self._run())
        self.part.tasks.add(self.task)
        self.task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.part.tasks.discard(task)
        self.task = None
        if not task.cancelled() and task.exception() is not None:
            self.work.die(task.exception())  # type: ignore[arg-type]
        elif self.queue and self.part.taking:
            self.start()

    async def _run(self) -> None:
        inside_handler.set(self.work.owner)
        await self.work.wait_for_stragglers(self.part)
        part = self.part
        while self.queue and part.taking:
            if not part.may_begin(self.queue[0][0].offset):
                await part.until_changed(1.0)
                continue
            async with self.work.gate:
                part.running += 1
                try:
                    failed = await self._slice()
                finally:
                    part.running -= 1
            self.work.on_room()
            if failed is not None:
                await self._again(*failed)
            else:
                await asyncio.sleep(0)

    async def _slice_async(self, single: Item | None = None) -> tuple[Item, BaseException] | None:
        """Handle records until one fails or the time is over; ``single``: only that one."""
        part, queue, handler = self.part, self.queue, self.work.handler
        decode, settle = self.work.options.decode, self.work.settle
        clock = time.monotonic
        until = clock() + SLICE_SECONDS
        while True:
            if single is not None:
                item = single
            elif queue and part.may_begin(queue[0][0].offset):
                item = queue.popleft()
            else:
                return None
            record = item[0]
            key, value = record.key, record.value
            try:
                decode(record)
                done = is_done(await handler(record))
            except asyncio.CancelledError as exc:
                record.key, record.value = key, value
                return item, cancelled_within(exc)
            except Exception as exc:
                record.key, record.value = key, value
                return item, exc
            if not done:
                record.key, record.value = key, value
                return item, NotDone("the handler returned False")
            settle(part, item[1])
            if single is not None or clock() >= until:
                return None

    async def _slice_in_thread(self, single: Item | None = None) -> tuple[Item, BaseException] | None:
        done: list[Span] = []
        try:
            failed, awaitable = await self.work.in_thread([self.part], lambda: self._call(single, done))
        finally:
            for span in done:
                self.work.settle(self.part, span)
        if awaitable is not None:
            # A plain function that gave back a coroutine: it is awaited here, in the loop.
            item, key, value, result = awaitable
            try:
                ok = is_done(await result)
                problem: BaseException = NotDone("the handler returned False")
            except asyncio.CancelledError as exc:
                ok, problem = False, cancelled_within(exc)
            except Exception as exc:
                ok, problem = False, exc
            if ok:
                self.work.settle(self.part, item[1])
                return None
            item[0].key, item[0].value = key, value
            return item, problem
        return failed  # type: ignore[no-any-return]

    def _call(self, single: Item | None, done: list[Span]) -> tuple[Any, Any]:
        """Run in the thread: handle records until one fails or the time is over."""
        part, queue, handler, decode = self.part, self.queue, self.work.handler, self.work.options.decode
        until = time.monotonic() + SLICE_SECONDS
        while True:
            if single is not None:
                item = single
            else:
                try:
                    if not part.may_begin(queue[0][0].offset):
                        return None, None
                    item = queue.popleft()
                except IndexError:
                    return None, None
            record = item[0]
            key, value = record.key, record.value
            try:
                decode(record)
                result = handler(record)
                if inspect.isawaitable(result):
                    return None, (item, key, value, result)
                ok = is_done(result)
            except Exception as exc:
                record.key, record.value = key, value
                return (item, exc), None
            except asyncio.CancelledError as exc:
                # of a loop of the handler's own: this thread has no task that somebody could cancel
                record.key, record.value = key, value
                return (item, Retryable(f"something within the handler was cancelled: {exc!r}")), None
            if not ok:
                record.key, record.value = key, value
                return (item, NotDone("the handler returned False")), None
            done.append(item[1])
            if single is not None or time.monotonic() >= until:
                return None, None

    async def _again(self, item: Item, exc: BaseException) -> None:
        """Deliver one record until it is settled, or the partition goes."""
        part, work = self.part, self.work
        record, _ = item
        offset = record.offset
        options = work.options.resilience
        retry, attempt = work.options.retry_backoff(), options.attempt_backoff()
        first = datetime.now(UTC)
        attempts = 1
        part.failing.add(offset)
        try:
            while part.taking and not await work.verdict(part, item, exc, attempts, first):
                await self._pause(delay_of(exc, attempts, retry, attempt, options.max_attempts))
                while part.taking and not part.may_begin(offset):
                    await part.until_changed(1.0)
                if not part.taking:
                    return
                work.accounts.retries += 1
                async with work.gate:
                    part.running += 1
                    try:
                        failed = await self._slice(item)
                    finally:
                        part.running -= 1
                if failed is None:
                    return
                exc = failed[1]
                attempts += 1
        finally:
            part.failing.discard(offset)
            part.wake()
            work.on_room()

    async def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while self.part.taking and (left := until - time.monotonic()) > 0:
            await self.part.until_changed(min(left, 1.0))


def delay_of(exc: BaseException, attempts: int, retry: Backoff, attempt: Backoff, max_attempts: int) -> float:
    """Return the seconds to wait: short ones between the capped attempts, the long ones for what has no cap."""
    if classify(exc) is FailureClass.UNCLASSIFIED and attempts < max_attempts:
        return attempt.next()
    return retry.next()


_odd_results: set[str] = set()


def is_done(result: Any) -> bool:
    """Return whether a handler's result means that it is done: anything but False; warns once of what is neither."""
    if result is True or result is None:
        return True
    if result is False:
        return False
    name = type(result).__name__
    if name not in _odd_results:
        _odd_results.add(name)
        log.warning("A handler returned a %s; that counts as done. Return True or None when done, False when not", name)
    return True
