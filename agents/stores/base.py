"""What every store of readings promises, and how one is chosen by its URL.

Guarantees that ``tests/conformance`` tries on each store:

- **At least once is once.** The same rows written again, also by two writers at the same time, change nothing.
- **All or an exception.** When ``write_readings`` returns, every row is stored durably, except those it returns. When
  it raises, any part may be stored, and writing the same rows again is right.
- **One bad row is one bad row.** A row that the server can never take is handed back; its neighbours are stored.
- **An absent server is an exception, within a bound.** No call waits for ever, none retries on its own: backoff and
  pausing are the caller's. Once the server is back, the next call connects anew by itself.

A new store is one file with a class of this shape and one entry in :data:`_OPENERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol
from urllib.parse import urlsplit

from streams.resilience.failures import FailureClass, Poison, classify

__all__ = ["BadRow", "Row", "Store", "open_store"]

Row = tuple[str, str, str, datetime, float | None, str | None, str | None, str | None]
"""``(device_id, index, label, time, value, value_text, unit, request_id)``: a plain tuple, a chunk has thousands."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """What a store can never take, and why: ``row`` is what was handed over, a Row, or the message itself.

    ``exception`` is poison to :func:`streams.resilience.failures.classify`, ready for a dead letter.
    """

    row: Any
    exception: Exception

    @classmethod
    def because(cls, row: Any, reason: Exception) -> BadRow:
        """Return a BadRow whose ``exception`` is poison: ``reason`` itself, or a Poison caused by it."""
        if classify(reason) in (FailureClass.POISON, FailureClass.REJECTED):
            return cls(row, reason)
        poison = Poison(f"{type(reason).__name__}: {reason}")
        poison.__cause__ = reason
        return cls(row, poison)


class Store(Protocol):
    """A store of readings. Every call may suspend; none blocks the event loop longer than encoding one chunk takes."""

    async def start(self) -> None:
        """Prepare, without connecting: returns at once and does not raise when the server is away."""

    async def stop(self) -> None:
        """Close what is open, within seconds. Does not raise when the server is away. May be called twice."""

    async def ping(self) -> None:
        """Return when the server answers and has the schema; raise the client library's exception when not."""

    async def write_readings(self, rows: Sequence[Row]) -> list[BadRow]:
        """Store ``rows``, in any order, and return those that can never be stored.

        Several calls may be under way at the same time. Raises the client library's own exceptions (``OSError``,
        ``TimeoutError``, …) for everything that may succeed later, :class:`streams.resilience.failures.Fatal` for
        what a restart alone cannot cure.
        """
        ...


def _open_postgresql(url: str, options: dict[str, Any]) -> Store:
    from agents.stores.postgresql import ReadingStore

    return ReadingStore(url, **options)


_OPENERS: dict[str, Callable[[str, dict[str, Any]], Store]] = {
    "postgresql": _open_postgresql,
    "postgres": _open_postgresql,
}


def open_store(url: str, **options: Any) -> Store:
    """Return the store that ``url``'s scheme names, not yet started; ``options`` go to its constructor.

    Raises ``ValueError`` for a scheme that no store has.
    """
    scheme = urlsplit(url).scheme
    opener = _OPENERS.get(scheme)
    if opener is None:
        known = ", ".join(f"{name}://" for name in _OPENERS)
        raise ValueError(f"DATABASE_URL has the scheme {scheme!r}, for which there is no store; use one of {known}")
    return opener(url, options)
