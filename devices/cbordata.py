"""CBOR (RFC 8949) as devices send it: bytes become the data that JSON could have held, or a DecodeError.

Refused: what does not end where the bytes end, nesting beyond 32, a key that comes twice, and the tags that are for
programs and not for measurements (shared references, string references, regular expressions, bigfloats whose value
would not fit any memory).
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any, Final, NoReturn

import cbor2

from devices import jsontext
from devices.model import DecodeError

MAX_DEPTH: Final = 32


def _refuse(*_: Any) -> NoReturn:
    raise ValueError("this tag is no measurement")


_TAGS: Final[Mapping[int, Any]] = dict.fromkeys((5, 25, 28, 29, 30, 35, 36, 256), _refuse)


def parse(data: bytes) -> Any:
    """Return the one data item in ``data``; raises DecodeError."""
    file = io.BytesIO(data)
    try:
        decoder = cbor2.CBORDecoder(
            file, max_depth=MAX_DEPTH, allow_duplicate_keys=False, semantic_decoders=_TAGS, str_errors="strict"
        )
        found = decoder.decode()
    except (cbor2.CBORDecodeError, ValueError, OverflowError, RecursionError, TypeError) as exc:
        raise DecodeError(f"the payload is not CBOR: {exc}") from None
    if file.tell() != len(data):
        raise DecodeError(f"the CBOR ends after {file.tell()} of {len(data)} bytes")
    return found


def scalar(value: Any) -> Any:
    """Return a data item as JSON could have held it: decimals as numbers, times as RFC 3339, bytes as hexadecimal text.

    None for what is no value: null, undefined, simple values, tags nobody knows.
    """
    kind = type(value)
    if kind is float or kind is bool or kind is str:
        return value
    if kind is int:
        return jsontext.number(value)
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).isoformat()
    if isinstance(value, date):
        return value.isoformat()
    return None


def plain(value: Any, names: Mapping[str, str] | None = None) -> Any:
    """Return a data item with text keys (integers as digits, or as ``names`` says) and scalars; raises DecodeError."""
    if isinstance(value, Mapping):
        found: dict[str, Any] = {}
        for key, item in value.items():
            if type(key) not in (str, int):
                raise DecodeError(f"a key of the map is neither text nor an integer: {type(key).__name__}")
            text = str(key) if type(key) is str else str(jsontext.number(key))
            if names is not None:
                text = names.get(text, text)
            if text in found:
                raise DecodeError(f"two keys of the map are {text!r:.80}")
            found[text] = plain(item, names)
        return found
    if isinstance(value, (list, tuple)):
        return [plain(item, names) for item in value]
    return scalar(value)
