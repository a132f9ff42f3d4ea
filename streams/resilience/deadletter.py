"""Dead letters: the original key and value, bytes unchanged, and headers that say why.

Guarantee: a message that becomes a dead letter is complete only when Kafka has acknowledged its dead letter. A record
that the broker refuses as too large is replaced by its first bytes with a pointer to where the whole of it is.
"""

from __future__ import annotations

import hashlib
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

Headers = list[tuple[str, bytes]]
#: Topic, key, value and headers.
Letter = tuple[str, bytes | None, bytes | None, Headers | None]

#: Bytes of a value kept when the whole of it cannot be written.
TRUNCATED_BYTES = 1024
MESSAGE_LIMIT_CHARACTERS = 2000


class Record(Protocol):
    """What is needed of a consumed record; aiokafka's ``ConsumerRecord`` has it."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes]]


@dataclass(slots=True)
class Failure:
    """Why a message is a dead letter: its class (``poison|exhausted|rejected``), the exception, and its history."""

    kind: str
    exception: BaseException
    attempts: int
    first_failure: datetime
    last_failure: datetime
    request_id: str | None = None


def _rfc3339(moment: datetime) -> bytes:
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z").encode()


def describe(exc: BaseException) -> str:
    """Return the message of ``exc``, with that of its cause, on a bounded number of characters."""
    try:
        text = str(exc) or "".join(traceback.format_exception_only(exc)).strip()
        if exc.__cause__ is not None:
            text = f"{text} (caused by {type(exc.__cause__).__name__}: {exc.__cause__})"
    except Exception as broken:
        # an exception that cannot even be printed must not keep its message from becoming a dead letter
        text = f"{type(exc).__name__} without a message ({type(broken).__name__} while printing it)"
    return text[:MESSAGE_LIMIT_CHARACTERS]


def _moment(milliseconds: int) -> datetime:
    """Return a record's time; producers may write any 64-bit number, and most are in no year that can be written."""
    try:
        return datetime.fromtimestamp(milliseconds / 1000, UTC)
    except (ValueError, OverflowError, OSError):
        return datetime.min.replace(tzinfo=UTC) if milliseconds < 0 else datetime.max.replace(tzinfo=UTC)


def headers_of(record: Record, failure: Failure, *, stage: str, group: str) -> Headers:
    """Return the headers of the contract for ``record``; headers that the record had itself come first."""
    headers: Headers = [(k, v) for k, v in (record.headers or ()) if not k.startswith("dlq-")]
    headers += [
        ("dlq-stage", stage.encode()),
        ("dlq-topic", record.topic.encode()),
        ("dlq-partition", str(record.partition).encode()),
        ("dlq-offset", str(record.offset).encode()),
        ("dlq-timestamp", _rfc3339(_moment(record.timestamp or 0))),
        ("dlq-group", group.encode()),
        ("dlq-class", failure.kind.encode()),
        ("dlq-exception", f"{type(failure.exception).__module__}.{type(failure.exception).__qualname__}".encode()),
        ("dlq-message", describe(failure.exception).encode("utf-8", "replace")),
        ("dlq-attempts", str(failure.attempts).encode()),
        ("dlq-first-failure", _rfc3339(failure.first_failure)),
        ("dlq-last-failure", _rfc3339(failure.last_failure)),
    ]
    if failure.request_id is not None:
        headers.append(("dlq-request-id", failure.request_id.encode("utf-8", "replace")))
    return headers


def truncated(value: bytes | None, headers: Headers) -> tuple[bytes | None, Headers]:
    """Return the first bytes of a value that is too large, its size and hash in further headers.

    ``dlq-topic``, ``dlq-partition`` and ``dlq-offset`` point to the whole of it for as long as its topic keeps it.
    """
    whole = value or b""
    return whole[:TRUNCATED_BYTES], [
        *headers,
        ("dlq-truncated", b"1"),
        ("dlq-size", str(len(whole)).encode()),
        ("dlq-sha256", hashlib.sha256(whole).hexdigest().encode()),
    ]


def cut(letter: Letter) -> Letter:
    """Return a dead letter that is too large for its topic, cut; one that is cut already, cut more.

    The value goes first; then the headers that the record had itself, and all of the key but its first bytes.
    """
    topic, key, value, headers = letter
    if header(headers or [], "dlq-truncated") is None:
        return (topic, key, *truncated(value, headers or []))
    ours = [(name, content) for name, content in headers or [] if name.startswith("dlq-")]
    return (topic, key[:TRUNCATED_BYTES] if key is not None else None, value, ours)


def header(headers: Sequence[tuple[str, Any]], name: str) -> str | None:
    """Return the text of the header ``name``, or None."""
    for key, value in headers:
        if key == name:
            return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    return None
