"""The dead-letter guard: a wrong deployment must not turn a whole topic into dead letters.

When most of a window of at least ``messages`` messages from at least ``devices`` devices would be dead letters, and
most of the devices are concerned, the stage stops taking: what would be the next dead letter is held instead, tried
again with backoff, and nothing behind it on its partition is read. It goes on by itself once one of those that it holds
is handled (a probe), or when an operator says so; that other messages of a bad fleet are good proves nothing. One noisy
device, however loud, trips nothing.

Pure: the stage tells it what became of messages. A window opens with a dead letter and costs nothing before it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field


@dataclass(slots=True)
class Guard:
    """``share``: the part of messages, and of devices, from which on a window is bad; 0.5 is more than half."""

    messages: int = 1000
    devices: int = 10
    share: float = 0.5
    enabled: bool = True
    #: why the stage has stopped taking, None while it has not
    tripped: str | None = None
    trips: int = 0
    #: the messages that are tried again while it has
    held: set[Hashable] = field(default_factory=set)
    _total: int = 0
    _dead: int = 0
    _keys: set[bytes | None] = field(default_factory=set)
    _dead_keys: set[bytes | None] = field(default_factory=set)

    @property
    def watching(self) -> bool:
        """Tell whether messages that passed have to be told: a window is open, or the stage has stopped."""
        return self._total > 0 or self.tripped is not None

    def allows(self, key: bytes | None, why: str, message: Hashable) -> bool:
        """Tell whether ``message``, of device ``key``, may become a dead letter; False: hold it, it is a probe now."""
        if not self.enabled:
            return True
        if self.tripped is not None:
            self.held.add(message)
            return False
        self._dead += 1
        self._dead_keys.add(key)
        self._count(1, (key,))
        if self._total >= self.messages and self._bad():
            self.tripped = (
                f"{self._dead} of {self._total} messages, from {len(self._dead_keys)} of {len(self._keys)} devices, "
                f"would be dead letters; the last: {why}"
            )
            self.trips += 1
            self._open()
            self.held.add(message)
            return False
        if self._total >= self.messages and not self._undecided():
            self._open()
        return True

    def passed(self, keys: Iterable[bytes | None], messages: Iterable[Hashable]) -> bool:
        """Tell that ``messages``, of these devices, were handled; returns True when that ends a stop."""
        if self.tripped is not None:
            if self.held.isdisjoint(messages):
                return False
            self.release()
            return True
        told = tuple(keys)
        if self._total and told:
            self._count(len(told), told)
        return False

    def forget(self, gone: Callable[[Hashable], bool]) -> bool:
        """Tell that some messages are no longer this stage's; returns True when that ends a stop, for want of probes.

        Where they are now, another guard counts them.
        """
        if self.tripped is None:
            return False
        self.held = {message for message in self.held if not gone(message)}
        if self.held:
            return False
        self.release()
        return True

    def release(self) -> None:
        """Go on, with a new window: a probe has succeeded, or an operator says so."""
        self.tripped = None
        self.held.clear()
        self._open()

    def _count(self, number: int, keys: Iterable[bytes | None]) -> None:
        self._total += number
        self._keys.update(keys)

    def _bad(self) -> bool:
        return (
            self._dead > self.share * self._total
            and len(self._dead_keys) >= self.devices
            and len(self._dead_keys) > self.share * len(self._keys)
        )

    def _undecided(self) -> bool:
        """Tell whether the window is worth going on with: most messages are bad, but of too few devices so far."""
        return self._dead > self.share * self._total and self._total < 10 * self.messages

    def _open(self) -> None:
        self._total = self._dead = 0
        self._keys.clear()
        self._dead_keys.clear()
