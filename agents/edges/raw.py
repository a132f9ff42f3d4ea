"""From what a broker delivered to a RawMessage, and to a Kafka record. Pure functions.

Guarantee: every message becomes exactly one RawMessage, whatever its bytes: valid UTF-8 stands in ``payload`` as it
came, all else in ``payload_hex``; there is always a device id, so that there is always a key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from agents.edges.mqtt_wire import Arrival
from streams.messages import RawMessage, encode

DeviceIdOf = Callable[[str], str | None]
NewId = Callable[[], str]


class RawRecord(NamedTuple):
    """A record for ``iot_raw_data``."""

    key: bytes
    value: bytes


def fallback_device_id(topic: str) -> str:
    """Return the last level of ``topic`` that is not empty, or the whole topic where there is none."""
    return next((level for level in reversed(topic.split("/")) if level), topic)


def _message(arrival: Arrival, device_id: str, request_id: str) -> RawMessage:
    text: str | None = None
    hexadecimal: str | None = None
    try:
        text = arrival.payload.decode()
    except UnicodeDecodeError:
        hexadecimal = arrival.payload.hex()
    return RawMessage(
        request_id=request_id,
        timestamp=arrival.arrived_at,
        device_id=device_id,
        protocol="mqtt",
        payload=text,
        payload_hex=hexadecimal,
        metadata={"mqtt_topic": arrival.topic, "mqtt_qos": arrival.qos, "mqtt_retain": arrival.retain},
    )


def raw_message(arrival: Arrival, device_id_of: DeviceIdOf, new_id: NewId) -> RawMessage:
    """Return ``arrival`` as a RawMessage.

    ``device_id_of(topic)`` knows the active profiles; where it returns None or an empty string the id is
    :func:`fallback_device_id`'s, and the normalizer tells what is wrong with the message.
    """
    return _message(arrival, device_id_of(arrival.topic) or fallback_device_id(arrival.topic), new_id())


def raw_records(arrivals: Iterable[Arrival], device_id_of: DeviceIdOf, new_id: NewId) -> list[RawRecord]:
    """Return key and encoded value of each of ``arrivals``, in order; a topic is looked up once."""
    records: list[RawRecord] = []
    ids: dict[str, tuple[str, bytes]] = {}
    for arrival in arrivals:
        topic = arrival.topic
        found = ids.get(topic)
        if found is None:
            device_id = device_id_of(topic) or fallback_device_id(topic)
            found = ids[topic] = (device_id, device_id.encode())
        records.append(RawRecord(found[1], encode(_message(arrival, found[0], new_id()))))
    return records


def refusal(arrival: Arrival, max_message_bytes: int) -> str:
    """Say why an oversize ``arrival`` was refused, for the dead letter that holds its first KiB."""
    return (
        f"message of {arrival.size_bytes} bytes on topic {arrival.topic!r} is above "
        f"MAX_MESSAGE_BYTES={max_message_bytes}; sha256 {arrival.sha256}; "
        f"the first {len(arrival.payload)} bytes are kept"
    )
