"""A live view of a run: how much is stored, how many dead letters there are, how long device → row takes.

It looks from outside, like a user would: it reads the table once a second, follows the topic `iot_errors`, and asks
every 10 ms for a few messages that were just sent until their row is there. While a server is away the figures stand.
"""

import asyncio
import contextlib
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import datetime

import asyncpg

from tools.simulator.checker import is_complete, match_groups, since
from tools.simulator.evidence import (
    DeadLetter,
    Places,
    assign_from,
    dead_letter,
    open_consumer,
    stored_groups,
)
from tools.simulator.ledger import Book, Key
from tools.simulator.message import Message, Outcome

__all__ = ["Watch"]

_SEEN = """
SELECT wanted.n FROM unnest($1::int[], $2::text[], $3::timestamptz[]) AS wanted(n, device_id, time)
JOIN readings r ON r.device_id = wanted.device_id AND r.index = 'seq' AND r.label = 'seq' AND r.time = wanted.time
"""
_PROBE_SECONDS = 0.01
_PROBE_EVERY_SECONDS = 0.05
_PROBE_PATIENCE_SECONDS = 30.0
_PROBES = 16


class Watch:
    """Watches `book`, which a fleet writes meanwhile; `on_first(device_id, seconds)` tells of the first stored message.

    `sent` is a fleet's `on_sent`. `seconds` counts from `begun`, a reading of the monotonic clock.
    """

    def __init__(
        self,
        book: Book,
        places: Places,
        *,
        begun: float | None = None,
        on_first: Callable[[str, float], None] = lambda _device, _seconds: None,
    ) -> None:
        self._book, self._places = book, places
        self._begun = time.monotonic() if begun is None else begun
        self._on_first = on_first
        self._is_first = True
        self._latencies: deque[float] = deque(maxlen=200)
        self._probes: dict[int, tuple[str, datetime, float]] = {}
        self._probed_at = 0.0
        self._number = 0
        self._open: set[Key] = set()
        self._known = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._work()), name="watch", daemon=True)
        self.stored = 0
        self.dead_letters = 0

    @property
    def latency_seconds(self) -> float | None:
        """The median time from sending to the stored row, of the last 200 probes."""
        latencies = list(self._latencies)
        return statistics.median(latencies) if latencies else None

    def sent(self, message: Message) -> None:
        """Take some of the messages as probes."""
        now = time.monotonic()
        if (
            message.sampled_at is None
            or message.expect is not Outcome.STORED
            or message.late
            or len(self._probes) >= _PROBES
            or now - self._probed_at < _PROBE_EVERY_SECONDS
        ):
            return
        self._probed_at = now
        self._number += 1
        self._probes[self._number] = (message.device_id, message.sampled_at, now)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(10)

    async def _work(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._forever(self._probe, _PROBE_SECONDS))
            group.create_task(self._forever(self._count, 1.0))
            group.create_task(self._letters())

    async def _forever(self, look: Callable[[asyncpg.Pool], object], every_seconds: float) -> None:
        pool = asyncpg.create_pool(self._places.database_url, min_size=0, max_size=1, timeout=5, command_timeout=10)
        try:
            await pool
            while not self._stop.is_set():
                with contextlib.suppress(Exception):  # a server that is away; the figures stand until it is back
                    await look(pool)  # type: ignore[misc]
                await asyncio.sleep(every_seconds)
        finally:
            pool.terminate()

    async def _probe(self, pool: asyncpg.Pool) -> None:
        now = time.monotonic()
        for number, (_, _, sent_at) in list(self._probes.items()):
            if now - sent_at > _PROBE_PATIENCE_SECONDS:
                self._probes.pop(number, None)
        wanted = list(self._probes.items())
        if not wanted:
            return
        seen = await pool.fetch(
            _SEEN, [n for n, _ in wanted], [device for _, (device, _, _) in wanted], [at for _, (_, at, _) in wanted]
        )
        now = time.monotonic()
        for (number,) in seen:
            device, _, sent_at = self._probes.pop(number)
            self._latencies.append(now - sent_at)
            if self._is_first:
                self._is_first = False
                self._on_first(device, now - self._begun)

    async def _count(self, pool: asyncpg.Pool) -> None:
        fresh = self._book.order[self._known :]
        self._known += len(fresh)
        self._open.update(key for key in fresh if self._book.entries[key].expect is Outcome.STORED)
        if not self._open:
            return
        devices = sorted({device for device, _ in self._open})
        found = match_groups(self._book, await stored_groups(pool, devices, since(self._book, self._open)))
        done = {key for key in self._open if key in found and is_complete(self._book, key, found[key])}
        self._open -= done
        self.stored += len(done)

    async def _letters(self) -> None:
        topic = self._places.topic("iot_errors")
        while not self._stop.is_set():
            self.dead_letters = 0
            with contextlib.suppress(Exception):  # begins anew once Kafka is back
                async with open_consumer(self._places) as consumer:
                    await assign_from(consumer, topic, self._book.started)
                    while consumer.assignment() and not self._stop.is_set():
                        for batch in (await consumer.getmany(timeout_ms=500)).values():
                            self.dead_letters += sum(1 for record in batch if self._is_ours(dead_letter(record)))
            await asyncio.sleep(0.5)

    def _is_ours(self, letter: DeadLetter) -> bool:
        # The device of an empty message has its sequence number behind its id.
        device = letter.device_id
        return device in self._book.own_time or device.rpartition("-")[0] in self._book.own_time
