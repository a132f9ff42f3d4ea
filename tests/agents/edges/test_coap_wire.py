"""Requests from bytes are what aiocoap makes of them, also where their options were seen before."""

from __future__ import annotations

import pytest
from aiocoap import error
from aiocoap.message import Message
from aiocoap.numbers import codes
from aiocoap.numbers.types import CON
from hypothesis import given
from hypothesis import strategies as st

from agents.edges import coap_wire
from agents.edges.coap_wire import Decoder, options_end
from agents.edges.ids import new_request_id

DECODER = Decoder()

options = st.lists(st.tuples(st.integers(0, 2000), st.binary(max_size=400)), max_size=6)


def encoded(found: list[tuple[int, bytes]]) -> bytes:
    """Encode options (deltas of numbers, values) as RFC 7252 section 3.1 says."""
    out = b""
    for delta, value in found:
        nibbles, extra = 0, b""
        for shift, number in ((4, delta), (0, len(value))):
            if number < 13:
                nibbles |= number << shift
            elif number < 269:
                nibbles |= 13 << shift
                extra += bytes((number - 13,))
            else:
                nibbles |= 14 << shift
                extra += (number - 269).to_bytes(2, "big")
        out += bytes((nibbles,)) + extra + value
    return out


@given(options, st.binary(min_size=1, max_size=50))
def test_options_end_where_the_payload_begins(found: list[tuple[int, bytes]], payload: bytes) -> None:
    """Of any options, with any extended lengths, and values that look like a payload marker."""
    data = encoded(found)
    assert options_end(data, 0) == len(data)
    assert options_end(b"head" + data + b"\xff" + payload, 4) == 4 + len(data)
    with pytest.raises(error.UnparsableMessage):
        options_end(data + b"\xff", 0)


@given(st.binary(max_size=60), st.integers(0, 8))
def test_any_bytes_are_decoded_as_aiocoap_does_or_refused(body: bytes, token_bytes: int) -> None:
    """Nothing but UnparsableMessage and ValueError; what is decoded is equal, the second time too."""
    data = bytes((0x40 | token_bytes, 2, 0x12, 0x34)) + body
    if len(body) < token_bytes:
        return
    for _ in range(2):
        try:
            mine = DECODER.decode(data)
        except (error.Error, ValueError, IndexError):
            return
        theirs = Message.decode(data)
        assert (mine.code, mine.mid, mine.mtype, mine.token) == (theirs.code, theirs.mid, theirs.mtype, theirs.token)
        assert (mine.payload, mine.opt.encode()) == (theirs.payload, theirs.opt.encode())


def test_requests_with_the_same_options_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head is one object, until there are too many; an encrypted request has its own."""
    monkeypatch.setattr(coap_wire, "MAX_HEADS", 2)
    here = Decoder()

    def head(path: str, mid: int, secret: bytes | None = None) -> coap_wire.Head | None:
        message = Message(code=codes.POST, payload=b"x", _mtype=CON, _mid=mid, _token=b"t")
        message.opt.uri_path = (path,)
        if secret is not None:
            message.opt.oscore = secret
        return here.decode(message.encode()).head

    assert head("a", 1) is head("a", 2)
    first = head("a", 3)
    assert head("b", 4) is not first
    assert head("c", 5) is not None
    assert head("a", 6) is not first
    assert head("a", 7, b"\x09\x01\x01") is None


def test_request_ids_are_many_and_sorted_by_time() -> None:
    """32 hexadecimal digits, none twice."""
    found = [new_request_id() for _ in range(2000)]
    assert len(set(found)) == 2000
    assert {len(request_id) for request_id in found} == {32}
    assert [f[:12] for f in found] == sorted(f[:12] for f in found)
