"""Where a consumer goes on, where the logs end, and how far it lags behind.

Guarantees: it goes on at the committed offsets; where the log no longer has the offset that is to be read next, when a
partition is assigned or while it is read (retention has overtaken it, the topic was made anew), it does what
``OFFSET_OUT_OF_RANGE`` says and tells of it, never silently; the end of a log is known also for a partition that is not
read just now.
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
    #: what this consumer has committed last of each partition that it has ever held
    reached: dict[TP, int]

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
        held = {tp for tp in self.assignment() if self.app.topics.acks_enabled_for(tp.topic)}
        committed = {tp: offset for tp, offset in self._committed_offset.items() if offset is not None and tp in held}
        # A broker that has lost its data has lost what was committed, too.
        forgotten = {tp: offset for tp, offset in self.reached.items() if tp in held and tp not in committed}
        wanted = {**committed, **forgotten}
        for tp, (first, end) in (await self._thread.ranges(list(wanted), self.options.commit_timeout_seconds)).items():
            if tp in forgotten or not first <= wanted[tp] <= end:
                self.reached.pop(tp, None)
                await self._out_of_range(tp, wanted[tp], first, end)

    async def find_positions(self) -> None:
        """Go on where a log does not have the offset that is to be read next.

        A changelog whose beginning was cleaned begins later; a partition that nothing was committed of begins where the
        app says; of any other, records are gone, and ``OFFSET_OUT_OF_RANGE`` decides.
        """
        missing, held = self._thread.without_position, self.assignment()
        ranges = await self._thread.ranges([tp for tp in missing if tp in held], self.options.commit_timeout_seconds)
        for tp, offset in list(missing.items()):
            first, end = ranges.get(tp, (-1, -1))
            if tp not in held or first < 0:
                continue
            if not self.app.topics.acks_enabled_for(tp.topic):
                await self.seek(tp, first)
            elif offset is None:
                await self.seek(tp, first if self._thread.from_beginning else end)
            elif first <= offset <= end:
                await self.seek(tp, offset)
            else:
                await self._out_of_range(tp, offset, first, end)
        missing.clear()

    async def _out_of_range(self, tp: TP, offset: int, first: int, end: int) -> None:
        policy = self.options.offset_out_of_range
        self.accounts.offset_resets += 1
        if offset < first:
            lost = f"{first - offset} record(s) before offset {first} are gone"
        elif offset > end:
            lost = "its log began anew"
        else:
            lost = "the group has forgotten it"
        self.log.error(
            "%s[%d] in group %s: offset %d, the next to be read, is out of range (%d … %d): %s; OFFSET_OUT_OF_RANGE=%s",
            tp.topic,
            tp.partition,
            self.app.conf.id,
            offset,
            first,
            end,
            lost,
            policy,
        )
        if policy == "stop":
            self.app.fatal(
                Fatal(
                    f"{tp.topic}[{tp.partition}]: offset {offset} is out of range ({first} … {end}), and "
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
