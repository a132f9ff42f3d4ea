"""States that wait until the alerts that they caused are safe.

A state that is stored before its alert is sent loses the alert when the process dies in between: the reading comes
again and counts for nothing, because the state has it already. So: evaluate on a :class:`StateBuffer`, send the alerts,
wait until they are acknowledged, and only then :meth:`~StateBuffer.flush`; commit the offset last. Dying at any point,
the reading comes again and makes the same alert with the same ids, or has been stored and told.

Guarantees: what was evaluated is seen at once by what is evaluated next, with several batches on their way; a flush
writes the states as they were when its batch was cut, never those of a later one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import ItemsView, Iterator, MutableMapping
from typing import NewType

# The changes of one batch, in no order; None: removed.
Changes = NewType("Changes", dict[str, bytes | None])


class _Nothing:
    """Stands for a key that was not there."""


_NOTHING = _Nothing()


def _put_back(where: dict[str, bytes | None], key: str, before: bytes | _Nothing | None) -> None:
    if isinstance(before, _Nothing):
        where.pop(key, None)
    else:
        where[key] = before


class StateBuffer(MutableMapping[str, bytes]):
    """A mapping over ``store`` whose writes wait for :meth:`cut` and :meth:`flush`. For one thread."""

    def __init__(self, store: MutableMapping[str, bytes]) -> None:
        self.store = store
        self._ahead: dict[str, bytes | None] = {}
        self._changes: dict[str, bytes | None] = {}
        # How many batches that were cut and not flushed have a key.
        self._waiting: Counter[str] = Counter()
        # What the keys written since the last mark had before.
        self._undo: dict[str, tuple[bytes | _Nothing | None, bytes | _Nothing | None]] = {}

    def mark(self) -> None:
        """Begin something that :meth:`rollback` can undo, until the next mark or cut."""
        self._undo.clear()

    def rollback(self) -> None:
        """Undo all writes since the last :meth:`mark`."""
        for key, (ahead, change) in self._undo.items():
            _put_back(self._ahead, key, ahead)
            _put_back(self._changes, key, change)
        self._undo.clear()

    def cut(self) -> Changes:
        """Return what has changed since the last call. Batches are flushed in the order in which they were cut."""
        changes, self._changes = self._changes, {}
        self._undo.clear()
        self._waiting.update(changes.keys())
        return Changes(changes)

    def flush(self, changes: Changes) -> None:
        """Write one batch to the store."""
        for key, value in changes.items():
            if value is not None:
                self.store[key] = value
            elif key in self.store:
                del self.store[key]
            self._waiting[key] -= 1
            if self._waiting[key] <= 0:
                del self._waiting[key]
                if key not in self._changes:
                    self._ahead.pop(key, None)

    def drop(self) -> None:
        """Forget all that was not flushed, when its partition is gone."""
        self._ahead.clear()
        self._changes.clear()
        self._waiting.clear()
        self._undo.clear()

    def __getitem__(self, key: str) -> bytes:
        value = self._ahead[key] if key in self._ahead else self.store[key]
        if value is None:
            raise KeyError(key)
        return value

    def get(self, key: str, default: bytes | None = None) -> bytes | None:  # type: ignore[override]
        """Return the state of ``key``."""
        return self._ahead[key] if key in self._ahead else self.store.get(key, default)

    def __setitem__(self, key: str, value: bytes) -> None:
        self._remember(key)
        self._ahead[key] = self._changes[key] = value

    def __delitem__(self, key: str) -> None:
        if key not in self:
            raise KeyError(key)
        self._remember(key)
        self._ahead[key] = self._changes[key] = None

    def _remember(self, key: str) -> None:
        if key not in self._undo:
            self._undo[key] = (self._ahead.get(key, _NOTHING), self._changes.get(key, _NOTHING))

    def __contains__(self, key: object) -> bool:
        return self._ahead[key] is not None if key in self._ahead else key in self.store

    def __iter__(self) -> Iterator[str]:
        for key in self.store:
            if key not in self._ahead:
                yield key
        yield from [key for key, value in self._ahead.items() if value is not None]

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def items(self) -> ItemsView[str, bytes]:
        """Return the pairs; where nothing is ahead, those of the store, as fast as it gives them."""
        return super().items() if self._ahead else self.store.items()
