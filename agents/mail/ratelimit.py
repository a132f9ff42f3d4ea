"""How many mails go out, in all and to each recipient, and what waits for a digest.

Guarantees: a token bucket each holds at most a minute's mails, so no recipient gets more than twice its rate in any
minute, and in the long run no more than the rate. Nothing is thrown away: what is held back waits, in order, in a
mapping that survives a crash where the caller's does, and whoever has something waiting gets what follows in the same
digest, so that no mail overtakes another. Pure: the clock is an argument (monotonic seconds, but for
:class:`HeldBack`).
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Final

import msgspec

from devices.alarms.model import Alert

# Recipients whose bucket is full again are forgotten; this many at least are looked at before that is worth it.
_SWEEP_FROM: Final = 1_000


class TokenBucket:
    """Tokens that come back at ``per_minute`` and never are more than that."""

    __slots__ = ("_at", "_per_second", "_tokens", "size")

    def __init__(self, per_minute: float, now: float) -> None:
        self.size = float(per_minute)
        self._per_second = per_minute / 60
        self._tokens = self.size
        self._at = now

    def tokens(self, now: float) -> float:
        """Return how many there are; a clock that goes back brings none."""
        if now > self._at:
            self._tokens = min(self.size, self._tokens + (now - self._at) * self._per_second)
            self._at = now
        return self._tokens

    def take(self, now: float) -> None:
        """Take one."""
        self._tokens = self.tokens(now) - 1

    def ready_at(self, now: float) -> float:
        """Return when there will be one."""
        missing = 1 - self.tokens(now)
        return now if missing <= 0 else now + missing / self._per_second


class RateLimiter:
    """One bucket in all, one for each recipient. Raises ``ValueError`` for a rate below one a minute."""

    def __init__(self, per_minute: float, per_recipient_per_minute: float) -> None:
        if per_minute < 1 or per_recipient_per_minute < 1:
            raise ValueError(f"mail rates of {per_minute} and {per_recipient_per_minute} a minute would send nothing")
        self._per_minute = per_minute
        self._per_recipient = per_recipient_per_minute
        self._all: TokenBucket | None = None
        self._each: dict[str, TokenBucket] = {}
        self._sweep_at = _SWEEP_FROM

    def _buckets(self, recipient: str, now: float) -> tuple[TokenBucket, TokenBucket]:
        if self._all is None:
            self._all = TokenBucket(self._per_minute, now)
        bucket = self._each.get(recipient)
        if bucket is None:
            if len(self._each) >= self._sweep_at:
                self._each = {name: one for name, one in self._each.items() if one.tokens(now) < one.size}
                self._sweep_at = max(_SWEEP_FROM, 2 * len(self._each))
            bucket = self._each[recipient] = TokenBucket(self._per_recipient, now)
        return self._all, bucket

    def admit(self, recipient: str, now: float) -> bool:
        """Take a token of both buckets, or none where one of them has none."""
        both = self._buckets(recipient, now)
        # A billionth is what adding up fractions of a token may lose.
        if any(bucket.tokens(now) < 1 - 1e-9 for bucket in both):
            return False
        for bucket in both:
            bucket.take(now)
        return True

    def ready_at(self, recipient: str, now: float) -> float:
        """Return when :meth:`admit` would say yes, if nobody else came before."""
        return max(bucket.ready_at(now) for bucket in self._buckets(recipient, now))


class Held(msgspec.Struct, array_like=True):
    """One transition that waits for a recipient's digest; ``since`` is epoch seconds, so that it survives a restart."""

    since: float
    number: int
    recipient: str
    alert: Alert


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Held)


class HeldBack:
    """What waits, by recipient, in the order in which it came.

    ``store`` maps ``recipient|transition`` to packed :class:`Held`. Times are epoch seconds. The same transition twice
    is held once.
    """

    def __init__(self, store: MutableMapping[str, bytes], digest_seconds: float) -> None:
        self._store = store
        self._digest_seconds = digest_seconds
        self._waiting: dict[str, dict[str, Held]] = {}
        self._number = 0
        stored = sorted(
            ((_decoder.decode(packed), key) for key, packed in store.items()), key=lambda pair: pair[0].number
        )
        for held, key in stored:
            self._waiting.setdefault(held.recipient, {})[key] = held
            self._number = max(self._number, held.number + 1)

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def waits(self, recipient: str) -> bool:
        """Tell whether something is held back for the recipient."""
        return recipient in self._waiting

    def add(self, recipient: str, transition: str, alert: Alert, now: float) -> None:
        """Hold one transition back."""
        key = f"{recipient}|{transition}"
        mine = self._waiting.setdefault(recipient, {})
        if key not in mine:
            mine[key] = held = Held(now, self._number, recipient, alert)
            self._number += 1
            self._store[key] = _encoder.encode(held)

    def due_at(self, recipient: str) -> float:
        """Return when the recipient's digest has gathered long enough. Raises ``KeyError`` where nothing waits."""
        return next(iter(self._waiting[recipient].values())).since + self._digest_seconds

    def due(self, now: float) -> Iterator[str]:
        """Yield the recipients whose digest is due, the one that waits longest first."""
        # A clock that was set back must not hold mails for as long as it went.
        ready = [
            (since, recipient)
            for recipient, held in self._waiting.items()
            if not 0 <= now - (since := next(iter(held.values())).since) < self._digest_seconds
        ]
        for _, recipient in sorted(ready):
            yield recipient

    def peek(self, recipient: str) -> list[Alert]:
        """Return what waits for the recipient, in order."""
        return [held.alert for held in self._waiting.get(recipient, {}).values()]

    def clear(self, recipient: str, count: int) -> None:
        """Forget the first ``count`` that wait, once they are sent."""
        mine = self._waiting.get(recipient, {})
        for key in list(mine)[:count]:
            del mine[key]
            self._store.pop(key, None)
        if not mine:
            self._waiting.pop(recipient, None)
