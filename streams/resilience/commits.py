"""Commit control: which offset of a partition may be committed.

Guarantee: :attr:`PartitionLedger.mark` never passes a record whose handling is not complete. A record is complete when
its handler succeeded **and** everything that it sent has been acknowledged by Kafka, or when its dead letter has been.
Why not Faust's own book-keeping: it takes an event in flight at the head of a partition for a gap in the log and
commits past it (``Consumer._new_offset`` in 0.15.3).

Usable without Faust and without Kafka: offsets in, one offset out. Not thread-safe; one event loop owns a ledger.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

TP = TypeVar("TP")


class Span:
    """Records ``first … last`` of one partition that were delivered together and complete together."""

    __slots__ = ("bytes", "complete", "count", "delivered_at", "first", "last")

    def __init__(self, first: int, last: int, count: int, size_bytes: int, delivered_at: float) -> None:
        self.first = first
        self.last = last
        self.count = count
        self.bytes = size_bytes
        self.delivered_at = delivered_at
        self.complete = False

    def __repr__(self) -> str:
        return f"<Span {self.first}…{self.last} {'complete' if self.complete else 'in flight'}>"


class PartitionLedger:
    """What was delivered of one partition in one generation of the group, in order, and how far it is complete.

    ``mark`` is the offset that may be committed: one past the last record of the unbroken run of complete spans, None
    while nothing is. Offsets that the log lacks (compaction, transaction markers) need no care between records; at
    the end of the log they are passed over, so that the group gets there. ``committed`` is the last offset that a
    commit succeeded with.
    """

    __slots__ = (
        "clock",
        "committed",
        "in_flight",
        "in_flight_bytes",
        "last_progress",
        "live",
        "mark",
        "read_to",
        "spans",
    )

    def __init__(self, committed: int | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.spans: deque[Span] = deque()
        self.mark: int | None = None
        self.committed = committed
        self.read_to: int | None = None
        self.in_flight = 0
        self.in_flight_bytes = 0
        self.last_progress = clock()
        # False once the partition is somebody else's: completing what was in flight then changes nothing here.
        self.live = True

    def deliver(self, first: int, last: int, count: int, size_bytes: int = 0) -> Span | None:
        """Note that ``count`` records from offset ``first`` to ``last`` go to their handlers.

        Returns None for records that were delivered before in this generation (a fetch that was rewound).
        """
        if self.read_to is not None and first < self.read_to:
            return None
        span = Span(first, last, count, size_bytes, self.clock())
        self.spans.append(span)
        self.read_to = last + 1
        self.in_flight += count
        self.in_flight_bytes += size_bytes
        return span

    def pass_over(self, first: int, to: int) -> bool:
        """Note that the log has no record from offset ``first`` up to, not including, ``to``; False where records
        before ``first`` are still to be delivered, or some from there on were.
        """
        if self.read_to != first or to <= first:
            return False
        span = Span(first, to - 1, 0, 0, self.clock())
        self.spans.append(span)
        self.read_to = to
        self.complete(span)
        return True

    def complete(self, span: Span) -> bool:
        """Note that ``span`` is complete; return whether the mark moved."""
        if span.complete:
            return False
        span.complete = True
        self.in_flight -= span.count
        self.in_flight_bytes -= span.bytes
        self.last_progress = self.clock()
        moved = False
        spans = self.spans
        while spans and spans[0].complete:
            self.mark = spans.popleft().last + 1
            moved = True
        return moved

    def committable(self) -> int | None:
        """Return the offset to commit, or None when the broker has it already."""
        if self.mark is None or (self.committed is not None and self.mark <= self.committed):
            return None
        return self.mark

    def oldest_in_flight(self) -> Span | None:
        """Return the span that holds the mark back, or None when nothing is in flight."""
        return self.spans[0] if self.spans else None


class Ledgers(Generic[TP]):
    """The ledgers of all partitions that a consumer holds, and the bound on what is in flight."""

    def __init__(self, in_flight_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.limit_bytes = in_flight_bytes
        self._ledgers: dict[TP, PartitionLedger] = {}
        self.on_room: Callable[[], None] | None = None

    def __getitem__(self, tp: TP) -> PartitionLedger:
        return self._ledgers[tp]

    def __contains__(self, tp: object) -> bool:
        return tp in self._ledgers

    def __iter__(self) -> Iterator[TP]:
        return iter(self._ledgers)

    def get(self, tp: TP) -> PartitionLedger | None:
        """Return the ledger of ``tp``, or None where this consumer does not hold it."""
        return self._ledgers.get(tp)

    def items(self) -> Iterable[tuple[TP, PartitionLedger]]:
        """Return every partition with its ledger."""
        return list(self._ledgers.items())

    def open(self, tp: TP, committed: int | None = None) -> PartitionLedger:
        """Return the ledger of ``tp``, made anew where there is none."""
        ledger = self._ledgers.get(tp)
        if ledger is None:
            ledger = self._ledgers[tp] = PartitionLedger(committed, self.clock)
        return ledger

    def close(self, tps: Iterable[TP]) -> int:
        """Forget partitions that were revoked; return how many records were in flight in them."""
        returned = 0
        for tp in list(tps):
            ledger = self._ledgers.pop(tp, None)
            if ledger is not None:
                ledger.live = False
                returned += ledger.in_flight
        return returned

    def committable(self) -> dict[TP, int]:
        """Return, for every partition with something to commit, the offset to commit."""
        found = {}
        for tp, ledger in self._ledgers.items():
            offset = ledger.committable()
            if offset is not None:
                found[tp] = offset
        return found

    def committed(self, offsets: dict[TP, int]) -> None:
        """Note that a commit of ``offsets`` succeeded; an offset never goes back."""
        for tp, offset in offsets.items():
            ledger = self._ledgers.get(tp)
            if ledger is not None and (ledger.committed is None or ledger.committed < offset):
                ledger.committed = offset

    @property
    def in_flight(self) -> int:
        """Records delivered and not complete."""
        return sum(ledger.in_flight for ledger in self._ledgers.values())

    @property
    def in_flight_bytes(self) -> int:
        """Bytes of the records delivered and not complete."""
        return sum(ledger.in_flight_bytes for ledger in self._ledgers.values())

    def spans_of(self, tp: TP) -> int:
        """Return how many spans of ``tp`` are not complete."""
        ledger = self._ledgers.get(tp)
        return 0 if ledger is None else len(ledger.spans)

    def with_room(self, tps: Iterable[TP]) -> set[TP]:
        """Return those of ``tps`` that may be read: the whole is under its limit, and the partition under its share.

        The share is half of the limit, so that one partition that is held up cannot starve the others; and one with
        nothing in flight may be read in any case, so that two cannot either. What that adds to the limit is one fetch
        for each partition.
        """
        share = self.limit_bytes // 2 if self.in_flight_bytes < self.limit_bytes else 1
        found = set()
        for tp in tps:
            ledger = self._ledgers.get(tp)
            if ledger is None or ledger.in_flight_bytes < share:
                found.add(tp)
        return found
