"""Requests from bytes, at a fraction of aiocoap's price for what comes again and again.

A fleet's requests differ in message id, token and payload; their options are the same a thousand times over. So options
are found by their lengths alone, decoded by aiocoap when they are new, and kept, bounded, as a :class:`Head` that also
carries what its user made of them. What is no CoAP raises aiocoap's ``UnparsableMessage`` (RFC 7252 section 3).
"""

from __future__ import annotations

from typing import Any, Final

from aiocoap import error
from aiocoap.message import Direction, Message
from aiocoap.numbers.types import ACK, CON, NON, RST

_TYPES: Final = (CON, NON, ACK, RST)
MAX_HEADS: Final = 16_384
MAX_HEAD_BYTES: Final = 512


class Head:
    """Code and options that requests have in common; nobody may change ``opt``. ``memo`` is for whoever reads them."""

    __slots__ = ("code", "memo", "opt")

    def __init__(self, message: Message) -> None:
        self.code = message.code
        self.opt = message.opt
        self.memo: Any = None


class Request(Message):
    """A request whose options may be shared with others: ``head`` is None where they are its own."""

    head: Head | None = None


def options_end(data: bytes, at: int) -> int:
    """Return where the options that begin at ``at`` end: at the payload marker, or the end of ``data``.

    Raises UnparsableMessage for options that say more than there is, and for a marker without payload.
    """
    size = len(data)
    while at < size:
        head = data[at]
        if head == 0xFF:
            if at + 1 == size:
                raise error.UnparsableMessage("a payload marker without payload")
            return at
        delta, length = head >> 4, head & 15
        at += 1
        if delta >= 13:
            if delta == 15:
                raise error.UnparsableMessage("option delta 15 is reserved")
            at += delta - 12
        if length >= 13:
            if length == 15:
                raise error.UnparsableMessage("option length 15 is reserved")
            wide = length - 12
            length = int.from_bytes(data[at : at + wide], "big") + (13 if wide == 1 else 269)
            at += wide
        at += length
    if at > size:
        raise error.UnparsableMessage("option announced but absent")
    return size


class Decoder:
    """Decodes requests; one for each server."""

    def __init__(self) -> None:
        self._heads: dict[bytes, Head] = {}

    def decode(self, data: bytes) -> Request:
        """Return the request in a datagram whose header has been looked at; raises aiocoap's errors and ValueError."""
        begin = 4 + (data[0] & 15)
        end = options_end(data, begin)
        key = data[1:2] + data[begin:end]
        head = self._heads.get(key)
        shared = head is not None
        if head is None:
            whole = Message.decode(data)
            head = Head(whole)
            shared = len(key) <= MAX_HEAD_BYTES and whole.opt.oscore is None
            if shared:
                if len(self._heads) >= MAX_HEADS:
                    self._heads.clear()
                self._heads[key] = head
        request = Request.__new__(Request)
        # What Message.__init__ sets, without its conversions.
        request.version = 1
        request.mtype = _TYPES[data[0] >> 4 & 3]
        request.mid = data[2] << 8 | data[3]
        request.code = head.code
        request.token = data[4:begin]
        request.payload = data[end + 1 :]
        request.opt = head.opt
        request.remote = None
        request.direction = Direction.INCOMING
        request.transport_tuning = None
        request.head = head if shared else None
        return request
