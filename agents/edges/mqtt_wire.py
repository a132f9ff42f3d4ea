"""MQTT on the wire, as far as a connector needs it: addresses and filters, packets in, acknowledgements out.

Everything here is pure. Guarantees:

- :class:`PacketReader` cuts a byte stream into packets in the order in which they came, however the network split it.
- A PUBLISH whose payload is longer than ``max_message_bytes`` never lies in memory as a whole: its size, its SHA-256
  and its first KiB are kept.
- :class:`AckQueue` gives out acknowledgements in the order of arrival [MQTT-4.6.0-2], whatever the order of completion.

Section numbers are those of the OASIS standards MQTT 3.1.1 and 5.0.
"""

from __future__ import annotations

import hashlib
import struct
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple
from urllib.parse import unquote, urlsplit

import msgspec

# Control packet types, first byte without flags (2.1.2)
PUBLISH: Final = 0x30
PUBREL: Final = 0x60
PINGRESP: Final = 0xD0

CONNECTORS: Final = "headrace/connectors"
"""Below this topic the connectors' records stand (``mqtt_presence``); they are nobody's device messages."""

OVERSIZE_HEAD_BYTES: Final = 1024
_MAX_TOPIC_BYTES: Final = 65535
_MICROSECOND: Final = timedelta(microseconds=1)
_SECOND: Final = timedelta(seconds=1)


class Malformed(ValueError):
    """The bytes are not MQTT. The connection cannot go on; the broker delivers again on the next one."""


class Arrival(msgspec.Struct, kw_only=True, gc=False):
    """One message as the broker delivered it.

    ``qos`` is that of the delivery, ``retain`` tells that it was stored before we subscribed, ``dup`` that the broker
    has sent it before. ``properties`` holds the MQTT 5 properties by snake-case name, None where there are none. For a
    message above the limit ``sha256`` is set, ``payload`` is its first KiB and ``size_bytes`` its whole length.
    """

    topic: str
    payload: bytes
    qos: int
    retain: bool
    dup: bool
    mid: int
    arrived_at: datetime
    size_bytes: int
    properties: dict[str, Any] | None = None
    sha256: str | None = None

    @property
    def oversize(self) -> bool:
        """Tell whether the payload was above the limit and only its head is here."""
        return self.sha256 is not None


class Packet(NamedTuple):
    """A control packet other than PUBLISH: first byte and what follows the remaining length."""

    command: int
    body: bytes


class BrokerUrl(NamedTuple):
    """Where the broker is and who we are to it."""

    host: str
    port: int
    tls: bool
    username: str | None
    password: str | None

    def __str__(self) -> str:
        return f"{'mqtts' if self.tls else 'mqtt'}://{self.host}:{self.port}"


def parse_url(url: str) -> BrokerUrl:
    """Read ``mqtt://[user[:password]@]host[:1883]`` or ``mqtts://…[:8883]``; user and password are percent-decoded.

    Raises ValueError that names the setting and never shows the password.
    """
    parts = urlsplit(url)
    if parts.scheme not in {"mqtt", "mqtts"}:
        raise ValueError(f"MQTT_URL: scheme {parts.scheme!r} is not mqtt or mqtts; write mqtt://host:1883")
    try:
        port = parts.port
    except ValueError as exc:
        raise ValueError(f"MQTT_URL: {exc}; write mqtt://host:1883") from None
    if not parts.hostname:
        raise ValueError("MQTT_URL: no host; write mqtt://host:1883")
    if parts.path not in {"", "/"} or parts.query or parts.fragment:
        raise ValueError(
            f"MQTT_URL: nothing may follow the port, found {parts.path or parts.query or parts.fragment!r}"
        )
    tls = parts.scheme == "mqtts"
    return BrokerUrl(
        parts.hostname,
        port or (8883 if tls else 1883),
        tls,
        unquote(parts.username) if parts.username else None,
        unquote(parts.password) if parts.password is not None else None,
    )


def check_filter(topic_filter: str) -> str:
    """Return ``topic_filter`` if it is a topic filter of MQTT (4.7), else raise ValueError that says why."""
    where = f"MQTT_TOPICS: filter {topic_filter!r}"
    if not topic_filter or "\0" in topic_filter:
        raise ValueError(f"{where} is empty or holds a NUL")
    if len(topic_filter.encode("utf-8", "surrogatepass")) > _MAX_TOPIC_BYTES:
        raise ValueError(f"{where[:60]}… is longer than {_MAX_TOPIC_BYTES} bytes")
    levels = topic_filter.split("/")
    for depth, level in enumerate(levels):
        if "#" in level and (level != "#" or depth != len(levels) - 1):
            raise ValueError(f"{where}: '#' must be the last level and stand alone in it")
        if "+" in level and level != "+":
            raise ValueError(f"{where}: '+' must stand alone in its level")
    if levels[0] == "$share":
        raise ValueError(f"{where}: name the group in MQTT_SHARE instead")
    return topic_filter


def check_share(group: str) -> str:
    """Return ``group`` if it can name a shared subscription (5.0, 4.8.2), else raise ValueError."""
    if any(char in group for char in "/+#\0"):
        raise ValueError(f"MQTT_SHARE: group {group!r} must not hold '/', '+', '#' or NUL")
    return group


_pack = struct.Struct("!BBH").pack


def ack_bytes(acks: Iterable[tuple[int, int]]) -> bytes:
    """Return the packets that take over responsibility for ``(mid, qos)``: PUBACK for QoS 1, PUBREC for QoS 2 (4.3)."""
    return b"".join([_pack(0x40 if qos == 1 else 0x50, 2, mid) for mid, qos in acks])


def pubcomp_bytes(pubrel_body: bytes) -> bytes:
    """Return the PUBCOMP that answers a PUBREL."""
    return b"\x70\x02" + pubrel_body[:2]


def _string(data: bytes, at: int) -> tuple[str, int]:
    end = at + 2 + (data[at] << 8 | data[at + 1])
    if end > len(data):
        raise IndexError
    return data[at + 2 : end].decode("utf-8", "replace"), end


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 21:
            raise Malformed("a length of more than four bytes")


def _properties(data: bytes, at: int, end: int) -> dict[str, Any]:
    """Read the properties of a PUBLISH (5.0, 3.3.2.3)."""
    found: dict[str, Any] = {}
    while at < end:
        kind = data[at]
        at += 1
        if kind == 0x26:
            name, at = _string(data, at)
            value, at = _string(data, at)
            found.setdefault("user_properties", []).append((name, value))
        elif kind in {0x03, 0x08}:
            found["content_type" if kind == 0x03 else "response_topic"], at = _string(data, at)
        elif kind == 0x02:
            found["message_expiry_seconds"] = int.from_bytes(data[at : at + 4], "big")
            at += 4
        elif kind == 0x01:
            found["payload_is_text"] = data[at] == 1
            at += 1
        elif kind == 0x09:
            length = data[at] << 8 | data[at + 1]
            found["correlation_data"] = data[at + 2 : at + 2 + length]
            at += 2 + length
        elif kind == 0x0B:
            identifier, at = _varint(data, at)
            found.setdefault("subscription_identifiers", []).append(identifier)
        else:
            raise Malformed(f"property {kind:#x} has no place in a PUBLISH to us")
    return found


@dataclass(slots=True)
class _Oversize:
    """A PUBLISH of which only the head is kept, while the rest of it streams by."""

    arrival: Arrival
    left_bytes: int
    digest: Any = field(default_factory=hashlib.sha256)

    def take(self, data: bytes) -> None:
        self.digest.update(data)
        self.left_bytes -= len(data)
        room = OVERSIZE_HEAD_BYTES - len(self.arrival.payload)
        if room > 0:
            self.arrival.payload += data[:room]


class PacketReader:
    """Cut what a socket brings into packets.

    ``mqtt5`` says whether a PUBLISH carries properties; ``max_message_bytes`` bounds the payload that is kept whole.
    """

    def __init__(self, *, mqtt5: bool, max_message_bytes: int) -> None:
        self._mqtt5 = mqtt5
        self._limit = max_message_bytes
        self._rest = b""
        self._oversize: _Oversize | None = None
        self._arrived_at = datetime.fromtimestamp(0, UTC)

    def feed(self, data: bytes, now: datetime) -> list[Arrival | Packet]:
        """Return the packets that ``data`` completes, in order, arrived ``now``. Raises :class:`Malformed`.

        Messages that one read brings arrived a microsecond apart: the time of arrival is the sample's time, and so a
        part of the row's key, where a device does not say when it sampled.
        """
        if timedelta(0) <= self._arrived_at - now < _SECOND:
            now = self._arrived_at + _MICROSECOND
        packets: list[Arrival | Packet] = []
        if self._oversize is not None:
            taken = self._oversize.left_bytes
            self._oversize.take(data[:taken])
            if self._oversize.left_bytes:
                return packets
            packets.append(self._finish_oversize())
            data = data[taken:]
        elif self._rest:
            data = self._rest + data
        try:
            at = self._cut(data, packets, now)
        except IndexError:
            raise Malformed("a packet is shorter than its own lengths say") from None
        self._rest = data[at:]
        return packets

    def _cut(self, data: bytes, packets: list[Arrival | Packet], now: datetime) -> int:
        at, size = 0, len(data)
        append = packets.append
        while size - at >= 2:
            command = data[at]
            length = data[at + 1]
            body = at + 2
            if length >= 0x80:
                if size - at < 5:  # the length may not be all here, and a packet that long cannot be
                    break
                length, body = _varint(data, at + 1)
            end = body + length
            if command & 0xF0 == PUBLISH:
                if length > self._limit:
                    started = self._start_oversize(data, command, body, end, now)
                    if started is None and size < end:
                        break
                    if started is not None:
                        if self._oversize is None:
                            append(started)
                            at = end
                            continue
                        return size
                if end > size:
                    break
                append(self._publish(data[body:end], command, now))
                self._arrived_at = now
                now += _MICROSECOND
            else:
                if end > size:
                    break
                append(Packet(command, data[body:end]))
            at = end
        return at

    def _header(self, data: bytes, command: int) -> tuple[str, int, dict[str, Any] | None, int]:
        """Return topic, packet id, properties and where the payload begins."""
        topic_end = 2 + (data[0] << 8 | data[1])
        at = topic_end
        mid = 0
        if command & 0x06:
            mid = data[at] << 8 | data[at + 1]
            at += 2
        properties = None
        if self._mqtt5:
            length = data[at]
            at += 1
            if length:
                length, at = _varint(data, at - 1)
                end = at + length
                if end > len(data):
                    raise IndexError
                properties = _properties(data, at, end)
                at = end
        elif at > len(data):
            raise IndexError
        return data[2:topic_end].decode("utf-8", "backslashreplace"), mid, properties, at

    def _publish(self, data: bytes, command: int, now: datetime) -> Arrival:
        topic, mid, properties, at = self._header(data, command)
        if not topic:
            raise Malformed("a PUBLISH without a topic (we allow no topic aliases)")
        payload = data[at:]
        return Arrival(
            topic=topic,
            payload=payload,
            qos=command >> 1 & 3,
            retain=bool(command & 1),
            dup=bool(command & 8),
            mid=mid,
            arrived_at=now,
            size_bytes=len(payload),
            properties=properties,
        )

    def _start_oversize(self, data: bytes, command: int, body: int, end: int, now: datetime) -> Arrival | None:
        """Begin to stream a payload above the limit by; None where it is within it, or its header is not all here."""
        try:
            topic, mid, properties, at = self._header(data[body:end], command)
        except IndexError:
            return None
        size_bytes = end - body - at
        if size_bytes <= self._limit:
            return None
        arrival = Arrival(
            topic=topic,
            payload=b"",
            qos=command >> 1 & 3,
            retain=bool(command & 1),
            dup=bool(command & 8),
            mid=mid,
            arrived_at=now,
            size_bytes=size_bytes,
            properties=properties,
        )
        self._oversize = _Oversize(arrival, size_bytes)
        self._oversize.take(data[body + at : end])
        return arrival if self._oversize.left_bytes else self._finish_oversize()

    def _finish_oversize(self) -> Arrival:
        assert self._oversize is not None
        arrival = self._oversize.arrival
        arrival.sha256 = self._oversize.digest.hexdigest()
        self._oversize = None
        return arrival


@dataclass(slots=True)
class Unacked:
    """The acknowledgements that one batch owes, in order of arrival."""

    acks: Sequence[tuple[int, int]]
    done: bool = False


class AckQueue:
    """The low-water mark over batches: what is complete goes out once all that came before it has gone out."""

    def __init__(self) -> None:
        self._queue: deque[Unacked] = deque()

    def __len__(self) -> int:
        """Return the number of messages that the broker waits for."""
        return sum(len(entry.acks) for entry in self._queue)

    def add(self, acks: Sequence[tuple[int, int]]) -> Unacked:
        """Queue what arrived next."""
        entry = Unacked(acks)
        self._queue.append(entry)
        return entry

    def complete(self, entry: Unacked) -> list[tuple[int, int]]:
        """Mark ``entry`` complete; return what is due now in order of arrival, nothing while an earlier one is open."""
        entry.done = True
        due: list[tuple[int, int]] = []
        while self._queue and self._queue[0].done:
            due.extend(self._queue.popleft().acks)
        return due
