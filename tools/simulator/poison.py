"""Messages that no pipeline can read, each of them identifiable all the same.

The device's own message is spoilt, so that run and sequence number are in its bytes still; an empty one, which has
no bytes, is sent under a device id that is used once. `KINDS` names them; each has to become a dead letter.
"""

import dataclasses
from collections.abc import Callable

from tools.simulator.message import Message, Outcome

__all__ = ["KINDS", "spoil"]

# Above MAX_MESSAGE_BYTES's default: the connector keeps the first KiB and the hash.
_LARGE_BYTES = 1024 * 1024 + 1
_DEEP = 5000


def _with_field(payload: bytes, field: bytes) -> bytes:
    """Return a JSON payload with one more field at the end; of an array, in its last object."""
    text = payload.removesuffix(b"]")
    closing = payload[len(text) :]
    return text.removesuffix(b"}") + b"," + field + b"}" + closing


_JSON: dict[str, Callable[[Message], bytes]] = {
    "invalid_json": lambda m: m.payload[:-1],
    "not_a_number": lambda m: _with_field(m.payload, b'"x":NaN'),
    "huge_integer": lambda m: _with_field(m.payload, b'"x":1' + b"0" * 400),
    "deep_nesting": lambda m: _with_field(m.payload, b'"x":' + b'{"x":' * _DEEP + b"1" + b"}" * _DEEP),
    "invalid_utf8": lambda m: _with_field(m.payload, b'"x":"\xff\xfe"'),
    "wrong_type": lambda m: b'"' + m.payload.hex().encode() + b'"',
    "too_large": lambda m: _with_field(m.payload, b'"x":"' + b"x" * _LARGE_BYTES + b'"'),
    "empty": lambda _: b"",
}
_FLUXOR: dict[str, Callable[[Message], bytes]] = {
    "too_short": lambda m: m.payload[:-2],
    "too_long": lambda m: m.payload + b"00",
    "no_hexadecimal": lambda m: b"zz" + m.payload[2:],
    "odd_digits": lambda m: m.payload[:-1],
    "another_device": lambda m: f"{int(m.payload[:2], 16) ^ 1:02x}".encode() + m.payload[2:],
    "invalid_utf8": lambda m: bytes.fromhex(m.payload.decode()) + b"\xff",
    "empty": lambda _: b"",
}
KINDS = tuple(sorted({*_JSON, *_FLUXOR}))


def kinds_of(message: Message) -> tuple[str, ...]:
    """Return what can be wrong with a message of this family; over CoAP it would be refused, and nobody's."""
    if message.protocol == "coap":
        return ()
    return tuple(_JSON if message.sampled_at is not None else _FLUXOR)


def spoil(message: Message, kind: str) -> Message:
    """Return `message` spoilt in the way that `kind` names; KeyError for a kind that its family has not."""
    table = _JSON if message.sampled_at is not None else _FLUXOR
    device_id, route = message.device_id, message.route
    if kind == "empty":
        device_id = f"{message.device_id}-{message.seq}"
        route = message.route.replace(f"/{message.device_id}/", f"/{device_id}/")
    return dataclasses.replace(
        message,
        device_id=device_id,
        route=route,
        payload=table[kind](message),
        expect=Outcome.DEAD,
        poison=kind,
        rows=0,
    )
