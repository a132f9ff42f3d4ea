"""Where a consumer goes on, where the logs end, and how far it lags behind.

Guarantees: it goes on at the committed offsets; where the log no longer has one, it does what ``OFFSET_OUT_OF_RANGE``
says and tells of it, never silently; the end of a log is known also for a partition that is not read just now.
"""

from __future__ import annotations

from typing import Any

from faust.transport.drivers import aiokafka as driver
from faust.types import TP

from streams.resilience.accounts import Accounts
from streams.resilience.commits import Ledgers
from streams.resilience.consumer_thread import ConsumerThread
from streams.resilience.failures import Fatal
from streams.resilience.options import ResilienceOptions


class Positions(driver.Consumer):
    """The part of a consumer that knows offsets."""

    app: Any
    transport: Any
    _thread: ConsumerThread
    ledgers: Ledgers[TP]
    ends: dict[TP, int]

    @property
    def options(self) -> ResilienceOptions:
        """The options of the app that owns this consumer."""
        options: ResilienceOptions = self.transport.app.resilience
        return options

    @property
    def accounts(self) -> Accounts:
        """The accounts of the app that owns this consumer."""
        accounts: Accounts = self.app.accounts
        return accounts

    async def perform_seek(self) -> None:
        """Go to the committed offsets; where the log no longer has one, as ``OFFSET_OUT_OF_RANGE`` says, never
        silently.
        """
        await super().perform_seek()
        committed = {
            tp: offset
            for tp, offset in self._committed_offset.items()
            if offset is not None and self.app.topics.acks_enabled_for(tp.topic)
        }
        if not committed:
            return
        first = await self.earliest_offsets(*committed)
        end = await self.highwaters(*committed)
        for tp, offset in committed.items():
            low, high = first.get(tp), end.get(tp)
            if low is not None and high is not None and not low <= offset <= high:
                await self._out_of_range(tp, offset, low, high)

    async def _out_of_range(self, tp: TP, committed: int, first: int, end: int) -> None:
        policy = self.options.offset_out_of_range
        self.accounts.offset_resets += 1
        lost = (
            f"{first - committed} record(s) before offset {first} are gone"
            if committed < first
            else "its log began anew"
        )
        self.log.error(
            "%s[%d] in group %s: committed offset %d is out of range (%d … %d): %s; OFFSET_OUT_OF_RANGE=%s",
            tp.topic,
            tp.partition,
            self.app.conf.id,
            committed,
            first,
            end,
            lost,
            policy,
        )
        if policy == "stop":
            self.app.fatal(
                Fatal(
                    f"{tp.topic}[{tp.partition}]: committed offset {committed} is out of range ({first} … {end}), and "
                    "OFFSET_OUT_OF_RANGE=stop; set the group's offset, or choose earliest or latest"
                )
            )
            return
        wanted = end if policy == "latest" else first
        await self.seek(tp, wanted)
        self._committed_offset[tp] = None

    async def look_up_ends(self, bound_seconds: float) -> None:
        """Ask the broker for the ends of the logs that are read here; raises what aiokafka raises, and TimeoutError."""
        tps = [tp for tp, _ in self.ledgers.items()]
        if tps:
            self.ends = await self._thread.end_offsets(tps, bound_seconds)

    def end_of(self, tp: TP) -> int | None:
        """Return the end of a log as far as known, None where nothing is."""
        known = self.ends.get(tp)
        try:
            fetched = self.highwater(tp)
        except Exception as exc:
            self.log.debug("no end offset of %s: %r", tp, exc)
            return known
        return fetched if known is None else max(known, fetched or 0)

    def lags(self) -> dict[TP, int]:
        """Return, for each partition read so far, the records between what is committed and the end of the log."""
        found = {}
        for tp, ledger in self.ledgers.items():
            end = self.end_of(tp)
            done = ledger.committed if ledger.committed is not None else ledger.mark
            if end is not None and done is not None:
                found[tp] = max(0, end - done)
        return found
