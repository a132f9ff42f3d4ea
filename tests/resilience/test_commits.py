"""The low-water mark: whatever the order, it never passes what is not complete."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from streams.resilience.commits import Ledgers, PartitionLedger, Span

CLOCK = [0.0]


def ledger(committed: int | None = None) -> PartitionLedger:
    """Return a ledger with a clock that a test sets."""
    return PartitionLedger(committed, lambda: CLOCK[0])


@st.composite
def spans(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Draw ``first … last`` of consecutive deliveries; the log lacks offsets within and between them."""
    found = []
    offset = draw(st.integers(0, 1000))
    for _ in range(draw(st.integers(1, 30))):
        first = offset + draw(st.integers(0, 5))
        last = first + draw(st.integers(0, 10))
        found.append((first, last))
        offset = last + 1
    return found


@given(st.data(), spans())
def test_the_mark_never_passes_an_incomplete_span(data: st.DataObject, ranges: list[tuple[int, int]]) -> None:
    """For any interleaving of deliver and complete: all below the mark is complete, and the mark never falls."""
    book = ledger()
    waiting = list(ranges)
    open_spans: list[Span] = []
    incomplete: set[int] = set()
    mark = -1
    while waiting or open_spans:
        deliver = bool(waiting) and (not open_spans or data.draw(st.booleans()))
        if deliver:
            first, last = waiting.pop(0)
            span = book.deliver(first, last, last - first + 1, 10)
            assert span is not None
            open_spans.append(span)
            incomplete |= set(range(first, last + 1))
        else:
            span = open_spans.pop(data.draw(st.integers(0, len(open_spans) - 1)))
            moved = book.complete(span)
            incomplete -= set(range(span.first, span.last + 1))
            assert moved == (book.mark is not None and book.mark > mark)
        assert book.mark is None or all(offset >= book.mark for offset in incomplete)
        assert (book.mark if book.mark is not None else -1) >= mark
        mark = book.mark if book.mark is not None else -1
        assert book.in_flight == len(incomplete)
        assert book.in_flight_bytes == 10 * len(open_spans)
    assert book.mark == ranges[-1][1] + 1
    assert book.oldest_in_flight() is None


def test_completing_twice_counts_once() -> None:
    """A second completion of a span changes nothing."""
    book = ledger()
    span = book.deliver(5, 7, 3, 100)
    assert span is not None
    assert book.complete(span)
    assert not book.complete(span)
    assert (book.mark, book.in_flight, book.in_flight_bytes) == (8, 0, 0)


def test_records_that_were_delivered_before_are_refused() -> None:
    """What begins before the end of what was read gives no span."""
    book = ledger()
    assert book.deliver(0, 4, 5)
    assert book.deliver(4, 9, 6) is None
    assert book.deliver(5, 9, 5)


def test_nothing_is_committable_twice() -> None:
    """The mark is offered until a commit of it succeeded, and again once it has moved; never below that."""
    book = ledger(committed=3)
    first, second = book.deliver(3, 4, 2), book.deliver(5, 5, 1)
    assert first and second
    assert book.committable() is None
    book.complete(first)
    assert book.committable() == 5
    book.committed = 5
    assert book.committable() is None
    book.complete(second)
    assert book.committable() == 6


def test_the_head_that_holds_the_mark_is_known() -> None:
    """The oldest span in flight, with its age and what it holds back."""
    book = ledger()
    CLOCK[0] = 10.0
    first, second = book.deliver(0, 0, 1), book.deliver(1, 1, 1)
    assert first and second
    CLOCK[0] = 20.0
    book.complete(second)
    assert book.oldest_in_flight() is first
    assert first.delivered_at == 10.0
    assert book.last_progress == 20.0
    assert book.mark is None


def test_a_closed_partition_returns_what_was_in_flight() -> None:
    """Closing forgets the partition, says how many come again elsewhere, and completing them later changes nothing."""
    books: Ledgers[str] = Ledgers(1000)
    one, two = books.open("p0", committed=7), books.open("p1")
    span = one.deliver(7, 9, 3, 30)
    two.deliver(0, 0, 1, 10)
    assert span
    assert (books.in_flight, books.in_flight_bytes) == (4, 40)
    assert books.close(["p0", "unknown"]) == 3
    assert "p0" not in books
    assert not one.live
    one.complete(span)
    assert books.committable() == {}
    assert books.in_flight == 1


def test_a_partition_that_comes_back_begins_anew() -> None:
    """After a revocation nothing of the earlier generation is left: neither its mark nor what it had read."""
    books: Ledgers[str] = Ledgers(1000)
    span = books.open("p0").deliver(0, 9, 10)
    assert span
    books["p0"].complete(span)
    books.close(["p0"])
    again = books.open("p0", committed=4)
    assert again.mark is None
    assert again.deliver(4, 9, 6)


def test_a_commit_is_noted_for_what_is_held_and_never_goes_back() -> None:
    """An answer that comes late, for a partition that is gone or for an older mark, changes nothing."""
    books: Ledgers[str] = Ledgers(1000)
    book = books.open("p0")
    books.committed({"p0": 5, "gone": 9})
    books.committed({"p0": 3})
    assert book.committed == 5


def test_room_is_bounded_for_all_and_for_one() -> None:
    """One partition has room for half, the whole for all of it; a partition with nothing in flight always has some."""
    books: Ledgers[str] = Ledgers(100)
    spans = [books.open("p0").deliver(0, 0, 1, 50), books.open("p1").deliver(0, 0, 1, 49)]
    assert books.with_room(["p0", "p1", "p2"]) == {"p1", "p2"}
    books["p1"].deliver(1, 1, 1, 1)
    assert books.with_room(["p0", "p1", "p2"]) == {"p2"}
    books.open("p2").deliver(0, 0, 1, 1)
    assert books.with_room(["p0", "p1", "p2"]) == set()
    assert spans[0]
    books["p0"].complete(spans[0])
    assert books.with_room(["p0", "p1", "p2"]) == {"p0", "p2"}


def test_what_has_no_record_is_passed_over() -> None:
    """A stretch without records right behind what was delivered moves the mark; one behind records to come does not."""
    ledger = PartitionLedger(10)
    span = ledger.deliver(10, 12, 3)
    assert span is not None
    assert not ledger.pass_over(15, 16), "13 and 14 are still to be delivered"
    assert ledger.pass_over(13, 15)
    assert ledger.committable() is None, "10 to 12 are in flight"
    assert not ledger.pass_over(13, 15), "it was passed over before"
    ledger.complete(span)
    assert ledger.committable() == 15
    assert (ledger.in_flight, ledger.in_flight_bytes) == (0, 0)
    assert ledger.deliver(14, 14, 1) is None
    assert ledger.deliver(15, 15, 1) is not None
    assert not ledger.pass_over(16, 16)
