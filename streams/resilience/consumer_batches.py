"""How the records of several partitions reach a handler in batches: ``{TopicPartition: [records]}``.

Guarantees: the records of a partition come in order, and it is in one batch at a time. What a handler says that it has
finished of each partition is complete, the rest is delivered again, in order and before anything behind it. When a
batch of several records fails with what is no *retry*, each of them is delivered alone, so that the guilty one
shows itself and its neighbours are not punished.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import time
from collections import deque
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from streams.resilience.consumer_options import NotDone, Undecodable, inside_handler
from streams.resilience.consumer_work import (
    Item,
    Partition,
    Work,
    cancelled_within,
    delay_of,
    log,
)
from streams.resilience.failures import FailureClass, classify

#: Key and value of a record before they were decoded.
Original = tuple[Any, Any]


class BatchPartition(Partition):
    """One partition whose records are handled in batches."""

    def __init__(self, tp: Any, ledger: Any, work: Work) -> None:
        super().__init__(tp, ledger, work)
        self.queue: deque[Item] = deque()
        self.busy = False
        #: not before this time (monotonic seconds)
        self.due = 0.0
        #: how many records are still to be delivered one by one
        self.alone = 0
        self.attempts = 0
        self.first = datetime.now(UTC)
        self.retry = work.options.retry_backoff()
        self.attempt = work.options.resilience.attempt_backoff()

    def put(self, record: Any, span: Any) -> None:
        """Queue a record."""
        self.queue.append((record, span))

    def begin(self) -> None:
        """Leave it to the batches."""

    def end(self) -> None:
        """Begin nothing more."""
        self.queue.clear()
        super().end()

    @property
    def held(self) -> bool:
        """Whether it waits on purpose."""
        return self.due > time.monotonic() or super().held

    def ready(self, now: float) -> bool:
        """Tell whether a batch can be taken from it."""
        return bool(self.queue) and not self.busy and self.taking and self.due <= now

    def give_back(self, items: list[Item]) -> None:
        """Put ``items`` in front of the queue again."""
        self.queue.extendleft(reversed(items))

    def progress(self) -> None:
        """Note that something was completed."""
        self.attempts = 0
        self.retry.reset()
        self.attempt.reset()

    def hold(self, exc: BaseException) -> None:
        """Deliver again after a backoff."""
        self.work.accounts.retries += 1
        limit = self.work.options.resilience.max_attempts
        self.due = time.monotonic() + delay_of(exc, self.attempts, self.retry, self.attempt, limit)


class Batches:
    """Forms batches of what is ready and gives them to the handler, ``concurrency`` at a time."""

    def __init__(self, work: Work, parts: Mapping[Any, Partition]) -> None:
        self.work = work
        self.parts = parts
        self._ready = asyncio.Event()

    def wake(self) -> None:
        """Look again for what is ready."""
        self._ready.set()

    async def run(self) -> None:
        """Form batches for ever."""
        while True:
            await self.work.gate.acquire()
            try:
                batch = await self._next()
            except BaseException:
                self.work.gate.release()
                raise
            task = asyncio.create_task(self._handle(batch))
            for part in batch:
                part.busy = True
                part.tasks.add(task)
            task.add_done_callback(lambda done, batch=batch: self._ended(done, batch))  # type: ignore[misc]

    def _ended(self, task: asyncio.Task[None], batch: Iterable[BatchPartition]) -> None:
        self.work.gate.release()
        for part in batch:
            part.busy = False
            part.tasks.discard(task)
            part.wake()
        if not task.cancelled() and task.exception() is not None:
            self.work.die(task.exception())  # type: ignore[arg-type]
        self.work.on_room()
        self.wake()

    async def _next(self) -> dict[BatchPartition, list[Item]]:
        while True:
            now = time.monotonic()
            parts = [part for part in self.parts.values() if isinstance(part, BatchPartition)]
            ready = [part for part in parts if part.ready(now)]
            alone = next((part for part in ready if part.alone), None)
            if alone is not None:
                alone.alone -= 1
                return {alone: [alone.queue.popleft()]}
            if ready:
                most = self.work.options.batch_records
                return {p: [p.queue.popleft() for _ in range(min(most, len(p.queue)))] for p in ready}
            waits = [part.due - now for part in parts if part.queue and not part.busy and part.due > now]
            self._ready.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.001, min(waits, default=1.0))):
                    await self._ready.wait()

    async def _handle(self, batch: dict[BatchPartition, list[Item]]) -> None:
        inside_handler.set(self.work.owner)
        for part in batch:
            await self.work.wait_for_stragglers(part)
        decoded: dict[BatchPartition, list[Item]] = {}
        originals: dict[BatchPartition, list[Original]] = {}
        for part, items in batch.items():
            good, kept = await self._decode(part, items)
            if good:
                decoded[part], originals[part] = good, kept
        for part in [part for part in decoded if not part.taking]:
            del decoded[part]
        if not decoded:
            return
        for part in decoded:
            part.running += 1
        try:
            result = await self._call(decoded)
            counts = counts_of(result, decoded)
        except Exception as exc:
            self._restore(decoded, originals)
            await self._failed(decoded, exc)
            return
        finally:
            for part in decoded:
                part.running -= 1
        for part, items in decoded.items():
            done = counts[part]
            for _, span in items[:done]:
                self.work.settle(part, span)
            if done:
                part.progress()
            if done < len(items):
                for (record, _), (key, value) in zip(items[done:], originals[part][done:], strict=True):
                    record.key, record.value = key, value
                self._again(part, items[done:])
                if not done:
                    part.attempts += 1
                    part.hold(NotDone("the handler finished none of the batch"))

    async def _decode(self, part: BatchPartition, items: list[Item]) -> tuple[list[Item], list[Original]]:
        """Decode in place up to the first record that does not and cannot be settled; that one and the rest wait.

        Returns the decoded records with the keys and values that they had.
        """
        good: list[Item] = []
        originals: list[Original] = []
        decode = self.work.options.decode
        for number, item in enumerate(items):
            record = item[0]
            original = record.key, record.value
            try:
                decode(record)
            except Undecodable as exc:
                record.key, record.value = original
                part.attempts += 1
                if await self.work.verdict(part, item, exc, part.attempts, datetime.now(UTC)):
                    part.attempts = 0
                    continue
                self._again(part, items[number:])
                if not good:
                    part.hold(exc)
                break
            good.append(item)
            originals.append(original)
        return good, originals

    async def _call(self, batch: dict[BatchPartition, list[Item]]) -> Any:
        given = {part.tp: [record for record, _ in items] for part, items in batch.items()}
        try:
            if self.work.is_async:
                return await self.work.handler(given)
            result = await self.work.in_thread(list(batch), lambda: self.work.handler(given))
            return await result if inspect.isawaitable(result) else result
        except asyncio.CancelledError as exc:
            raise cancelled_within(exc) from exc

    @staticmethod
    def _restore(batch: dict[BatchPartition, list[Item]], originals: dict[BatchPartition, list[Original]]) -> None:
        for part, items in batch.items():
            for (record, _), (key, value) in zip(items, originals[part], strict=True):
                record.key, record.value = key, value

    @staticmethod
    def _again(part: BatchPartition, items: list[Item]) -> None:
        if part.taking:
            part.give_back(items)

    async def _failed(self, batch: dict[BatchPartition, list[Item]], exc: BaseException) -> None:
        kind = classify(exc)
        records = [item for items in batch.values() for item in items]
        if len(records) > 1:
            await self.work.letters.tell(
                exc, {part.tp: [record for record, _ in items] for part, items in batch.items()}
            )
            if kind is FailureClass.FATAL:
                self.work.die(exc)
                return
            for part, items in batch.items():
                self._again(part, items)
                if kind is FailureClass.RETRY:
                    part.attempts += 1
                    part.hold(exc)
                else:
                    part.alone = len(items)
            log.warning("A batch of %d records failed (%s: %s)", len(records), type(exc).__name__, exc)
            return
        part, (item,) = next(iter(batch.items()))
        if part.attempts == 0:
            part.first = datetime.now(UTC)
        part.attempts += 1
        if await self.work.verdict(part, item, exc, part.attempts, part.first):
            part.progress()
        else:
            self._again(part, [item])
            part.alone += 1
            part.hold(exc)


def counts_of(result: Any, batch: Mapping[Any, list[Item]]) -> dict[Any, int]:
    """Return how many records of each partition are done by a batch handler's result.

    True or None: all; False: none; a mapping of TopicPartition to a number: so many, 0 where one is missing. Raises
    TypeError for anything else, ValueError for a number that cannot be.
    """
    if result is True or result is None:
        return {part: len(items) for part, items in batch.items()}
    if result is False:
        return dict.fromkeys(batch, 0)
    if not isinstance(result, Mapping):
        raise TypeError(
            f"a batch handler returned {type(result).__name__}; return True or None (all done), False (none), or "
            "{TopicPartition: number of records done}"
        )
    counts = {}
    for part, items in batch.items():
        number = result.get(part.tp, 0)
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= len(items):
            raise ValueError(f"a batch handler finished {number!r} of the {len(items)} records of {part.tp}")
        counts[part] = number
    return counts
