"""Exponential backoff with full jitter.

Guarantee: the *n*-th delay is uniform in ``[base/2, ceiling]`` where the ceiling doubles from ``base`` to ``cap``; the
ceiling falls back to ``base`` only through :meth:`Backoff.healthy`, and only after a stretch of health, so that a peer
that comes and goes is not hammered. Full jitter spreads the retries of many workers (AWS Architecture Blog, 2015); the
floor keeps one retry from following another at once.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(slots=True)
class Backoff:
    """Delays of 1, 2, 4 … ``cap`` seconds with jitter. Not safe to share between threads.

    ``health_seconds``: how long all must have been well before :meth:`healthy` resets the delay.
    """

    base_seconds: float = 1.0
    cap_seconds: float = 64.0
    health_seconds: float = 30.0
    rng: random.Random = field(default_factory=random.Random)
    clock: Callable[[], float] = time.monotonic
    attempt: int = 0
    _last_failure: float = float("-inf")

    def ceiling(self) -> float:
        """Return the highest delay, in seconds, that the next call to :meth:`next` can give."""
        # 2**63 would still be exact; the bound keeps the power small however long a peer stays away.
        return float(min(self.cap_seconds, self.base_seconds * 2 ** min(self.attempt, 30)))

    def next(self) -> float:
        """Count one failure and return the seconds to wait before trying again."""
        ceiling = self.ceiling()
        self.attempt += 1
        self._last_failure = self.clock()
        return self.rng.uniform(min(self.base_seconds, ceiling) / 2, ceiling)

    def healthy(self) -> None:
        """Tell that all is well; resets once that has been so for ``health_seconds`` since the last failure."""
        if self.attempt and self.clock() - self._last_failure >= self.health_seconds:
            self.attempt = 0

    def reset(self) -> None:
        """Start over at ``base_seconds``; for a retry whose object has succeeded."""
        self.attempt = 0
