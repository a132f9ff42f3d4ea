"""Block-wise transfer (RFC 7959) of a server: requests put together from blocks, answers handed out in blocks.

Guarantee: memory is bounded in bodies and in bytes; the oldest are given up first, and whoever comes for one of those
gets 4.08 and begins again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from typing import Any, Final

from aiocoap.message import Message
from aiocoap.numbers import codes

MAX_BODIES: Final = 2_000
MAX_BYTES: Final = 64 * 1024 * 1024
LIFETIME_SECONDS: Final = 247.0
LARGEST_SIZE_EXPONENT: Final = 6  # 1024 bytes; 7 is for TCP


class BlockError(Exception):
    """A block that cannot be used; ``code`` is the answer's."""

    def __init__(self, code: int, message: str, size1: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.size1 = size1


class _Bounded:
    """Bodies by key, oldest first."""

    def __init__(self, clock: Callable[[], float], max_bodies: int, max_bytes: int) -> None:
        self._clock = clock
        self._max_bodies, self._max_bytes = max_bodies, max_bytes
        self._bodies: dict[Hashable, tuple[float, Any]] = {}
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._bodies)

    def get(self, key: Hashable) -> Any:
        """Return the body of that key, None where there is none."""
        found = self._bodies.get(key)
        return None if found is None else found[1]

    def put(self, key: Hashable, body: Any) -> None:
        """Keep a body as the youngest."""
        self.drop(key)
        self._bodies[key] = (self._clock() + LIFETIME_SECONDS, body)
        self.bytes += len(body)
        self._trim()

    def drop(self, key: Hashable) -> None:
        """Give up a body."""
        found = self._bodies.pop(key, None)
        if found is not None:
            self.bytes -= len(found[1])

    def _trim(self) -> None:
        now = self._clock()
        while self._bodies:
            key = next(iter(self._bodies))
            fits = len(self._bodies) <= self._max_bodies and self.bytes <= self._max_bytes
            if fits and self._bodies[key][0] > now:
                return
            self.drop(key)


class Requests:
    """Puts bodies together; one at a time for a key (endpoint, method, path)."""

    def __init__(self, clock: Callable[[], float], *, max_bodies: int = MAX_BODIES, max_bytes: int = MAX_BYTES) -> None:
        self.bodies = _Bounded(clock, max_bodies, max_bytes)

    def add(self, key: Hashable, message: Message, limit_bytes: int) -> bytes | None:
        """Take a block; return the whole body with the last one, None where more is to come. Raises BlockError."""
        block, payload = message.opt.block1, message.payload
        if block.size_exponent > LARGEST_SIZE_EXPONENT:
            raise BlockError(codes.BAD_REQUEST, "Block1 with size exponent 7, which is for TCP")
        if block.more and len(payload) != block.size:
            raise BlockError(codes.BAD_REQUEST, f"block of {len(payload)} bytes says it has {block.size}")
        announced = message.opt.size1 or 0
        if max(announced, block.start + len(payload)) > limit_bytes:
            self.bodies.drop(key)
            raise BlockError(codes.REQUEST_ENTITY_TOO_LARGE, f"MAX_MESSAGE_BYTES={limit_bytes}", size1=limit_bytes)
        body = b"" if block.block_number == 0 else self.bodies.get(key)
        if body is None or len(body) not in (block.start, block.start + len(payload)):
            raise BlockError(codes.REQUEST_ENTITY_INCOMPLETE, f"block {block.block_number} without those before it")
        body = body[: block.start] + payload
        if block.more:
            self.bodies.put(key, body)
            return None
        self.bodies.drop(key)
        return body


class _Body:
    """An answer that is handed out in blocks."""

    __slots__ = ("code", "content_format", "payload")

    def __init__(self, message: Message) -> None:
        self.code, self.content_format, self.payload = message.code, message.opt.content_format, message.payload

    def __len__(self) -> int:
        return len(self.payload)


class Answers:
    """Hands out what does not fit one message."""

    def __init__(self, clock: Callable[[], float], *, max_bodies: int = MAX_BODIES, max_bytes: int = MAX_BYTES) -> None:
        self.bodies = _Bounded(clock, max_bodies, max_bytes)

    def first(self, key: Hashable, request: Message, answer: Message) -> Message:
        """Return the first block of ``answer``, or ``answer`` itself where it fits and no blocks were asked for."""
        wanted = request.opt.block2
        exponent = min(LARGEST_SIZE_EXPONENT, LARGEST_SIZE_EXPONENT if wanted is None else wanted.size_exponent)
        if len(answer.payload) <= 2 ** (exponent + 4):
            return answer
        body = _Body(answer)
        self.bodies.put(key, body)
        return _block(body, 0, exponent)

    def next(self, key: Hashable, request: Message) -> Message:
        """Return the block that a later request asks for; raises BlockError where nothing is known of it."""
        wanted = request.opt.block2
        body = self.bodies.get(key)
        if body is None or wanted.size_exponent > LARGEST_SIZE_EXPONENT:
            raise BlockError(codes.REQUEST_ENTITY_INCOMPLETE, f"no answer of which block {wanted.block_number} is left")
        if wanted.start >= len(body):
            raise BlockError(codes.BAD_OPTION, f"the answer has no block {wanted.block_number}")
        return _block(body, wanted.block_number, wanted.size_exponent)


def _block(body: _Body, number: int, exponent: int) -> Message:
    size = 2 ** (exponent + 4)
    part = body.payload[number * size : (number + 1) * size]
    message = Message(code=body.code, payload=part)
    message.opt.content_format = body.content_format
    message.opt.block2 = (number, (number + 1) * size < len(body.payload), exponent)
    message.opt.etag = hashlib.sha256(body.payload).digest()[:8]
    if number == 0:
        message.opt.size2 = len(body.payload)
    return message
