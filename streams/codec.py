"""Message Structs on ordinary Faust topics: an agent written one event at a time gets decoded messages too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from faust.exceptions import KeyDecodeError, ValueDecodeError
from faust.serializers.schemas import Schema

from streams.messages import encode


class StructSchema(Schema[Any, Any]):
    """Values through a decoder of :mod:`streams.messages`, keys as text. A record without a value is None (a
    tombstone).
    """

    def __init__(self, decode: Callable[[bytes], Any]) -> None:
        super().__init__(key_type=str, value_serializer="raw", allow_empty=True)
        self._decode_value = decode

    def loads_key(self, app: Any, message: Any, **_: Any) -> Any:  # noqa: ARG002
        """Return the key as text; raises KeyDecodeError where it is none."""
        if message.key is None:
            return None
        try:
            return bytes(message.key).decode()
        except UnicodeDecodeError as exc:
            raise KeyDecodeError(f"the key of {message.topic} is not UTF-8") from exc

    def loads_value(self, app: Any, message: Any, **_: Any) -> Any:  # noqa: ARG002
        """Return the message; raises ValueDecodeError for bytes that are none."""
        try:
            return self._decode_value(message.value)
        except (msgspec.MsgspecError, ValueError, RecursionError) as exc:
            raise ValueDecodeError(f"not a message of {message.topic}: {exc}") from exc

    def dumps_key(self, app: Any, key: Any, *, serializer: Any = None, headers: Any) -> Any:  # noqa: ARG002
        """Return a key's bytes."""
        return (key.encode() if isinstance(key, str) else key), headers

    def dumps_value(self, app: Any, value: Any, *, serializer: Any = None, headers: Any) -> Any:  # noqa: ARG002
        """Return a message's bytes."""
        return (value if value is None or isinstance(value, bytes) else encode(value)), headers
