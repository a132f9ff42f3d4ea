"""Request ids: 48 bits of milliseconds, so that ids sort by time, and 80 random bits, in hexadecimal digits."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Final

_RANDOM_BYTES: Final = 10
#: Drawn at once: asking the system costs more than making an id.
_POOL_IDS: Final = 256


def _random(draw: Callable[[int], bytes]) -> Iterator[str]:
    while True:
        pool = draw(_RANDOM_BYTES * _POOL_IDS).hex()
        for at in range(0, len(pool), 2 * _RANDOM_BYTES):
            yield pool[at : at + 2 * _RANDOM_BYTES]


_NEXT: Final = _random(os.urandom).__next__


def new_request_id() -> str:
    """Return a request id that no other is equal to."""
    return f"{time.time_ns() // 1_000_000:012x}{_NEXT()}"
