"""Dead letters: the headers of the contract, and what is cut when a letter is too large."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta, timezone

from streams.resilience.deadletter import (
    MESSAGE_LIMIT_CHARACTERS,
    Failure,
    cut,
    describe,
    header,
    headers_of,
    truncated,
)
from streams.resilience.failures import Poison
from tests.resilience.harness import Record

CONTRACT = [
    "dlq-stage",
    "dlq-topic",
    "dlq-partition",
    "dlq-offset",
    "dlq-timestamp",
    "dlq-group",
    "dlq-class",
    "dlq-exception",
    "dlq-message",
    "dlq-attempts",
    "dlq-first-failure",
    "dlq-last-failure",
]
FIRST = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone(timedelta(hours=2)))
LAST = datetime(2026, 1, 2, 3, 4, 6, 500_000, tzinfo=UTC)


def failure(exc: BaseException, request_id: str | None = None) -> Failure:
    """Return a failure of class poison at its third attempt."""
    return Failure("poison", exc, 3, FIRST, LAST, request_id)


def test_headers_say_everything() -> None:
    """Every header of the contract, times in RFC 3339 and UTC; those of the record itself come first."""
    record = Record("iot_raw_data", 42, b"x", partition=3, headers=(("trace", b"t"), ("dlq-class", b"earlier")))
    headers = headers_of(record, failure(Poison("no good"), "r1"), stage="normalizer", group="headrace-normalizer")
    assert [name for name, _ in headers] == ["trace", *CONTRACT, "dlq-request-id"]
    values = {name: value.decode() for name, value in headers}
    assert values == {
        "trace": "t",
        "dlq-stage": "normalizer",
        "dlq-topic": "iot_raw_data",
        "dlq-partition": "3",
        "dlq-offset": "42",
        "dlq-timestamp": "2023-11-14T22:13:20.042000Z",
        "dlq-group": "headrace-normalizer",
        "dlq-class": "poison",
        "dlq-exception": "streams.resilience.failures.Poison",
        "dlq-message": "no good",
        "dlq-attempts": "3",
        "dlq-first-failure": "2026-01-02T01:04:05Z",
        "dlq-last-failure": "2026-01-02T03:04:06.500000Z",
        "dlq-request-id": "r1",
    }


def test_the_request_id_is_left_out_where_there_is_none() -> None:
    """No header rather than an empty one."""
    headers = headers_of(Record("t", 0, b""), failure(Poison("x")), stage="s", group="g")
    assert header(headers, "dlq-request-id") is None


def test_a_message_is_bounded_and_names_its_cause() -> None:
    """A message of any length and content becomes a header; an empty one gets the exception's name."""
    outer = Poison("x" * 10_000)
    assert len(describe(outer)) == MESSAGE_LIMIT_CHARACTERS
    caused = Poison("outer")
    caused.__cause__ = ValueError("inner")
    assert describe(caused) == "outer (caused by ValueError: inner)"
    assert describe(KeyError()) == "KeyError"
    surrogate = headers_of(Record("t", 0, b""), failure(Poison("\ud800")), stage="s", group="g")
    assert header(surrogate, "dlq-message") == "?"


def test_nothing_keeps_a_message_from_becoming_a_letter() -> None:
    """An exception that cannot be printed, a record of any time: the headers are there all the same."""

    class Unprintable(Exception):
        def __str__(self) -> str:
            raise ZeroDivisionError

    record = Record("t", 0, b"")
    for timestamp, expected in ((2**62, "9999-"), (-(2**62), "0001-"), (0, "1970-"), (-1, "1969-")):
        record.timestamp = timestamp
        headers = headers_of(record, failure(Unprintable()), stage="s", group="g")
        assert (header(headers, "dlq-timestamp") or "").startswith(expected)
        assert "Unprintable" in (header(headers, "dlq-message") or "")


def test_a_value_too_large_is_cut_with_its_size_and_hash() -> None:
    """1,024 bytes stay; whoever has the original can tell that it is the one."""
    value = bytes(range(256)) * 40
    short, headers = truncated(value, [("dlq-topic", b"t")])
    assert short == value[:1024]
    assert header(headers, "dlq-topic") == "t"
    assert header(headers, "dlq-truncated") == "1"
    assert header(headers, "dlq-size") == str(len(value))
    assert header(headers, "dlq-sha256") == hashlib.sha256(value).hexdigest()


def test_a_letter_is_cut_step_by_step_until_nothing_is_left_to_cut() -> None:
    """First the value, then the record's own headers and the key; then cutting changes nothing any more."""
    letter = ("errors", b"k" * 5000, b"v" * 5000, [("own", b"h" * 5000), ("dlq-topic", b"t")])
    once = cut(letter)
    assert (once[1], once[2]) == (b"k" * 5000, b"v" * 1024)
    assert header(once[3] or [], "own") is not None
    twice = cut(once)
    assert (twice[1], twice[2]) == (b"k" * 1024, b"v" * 1024)
    assert header(twice[3] or [], "own") is None
    assert header(twice[3] or [], "dlq-size") == "5000"
    assert cut(twice) == twice
