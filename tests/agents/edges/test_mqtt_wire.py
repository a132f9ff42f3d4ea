"""Packets, properties and acknowledgement order, as pure functions."""

import hashlib
import struct
from datetime import UTC, datetime
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.edges.mqtt_wire import (
    AckQueue,
    Arrival,
    Malformed,
    Packet,
    PacketReader,
    ack_bytes,
    check_filter,
    parse_url,
    pubcomp_bytes,
)

NOW = datetime(2025, 1, 1, tzinfo=UTC)


def _varint(number: int) -> bytes:
    out = bytearray()
    while True:
        number, byte = divmod(number, 128)
        out.append(byte | (0x80 if number else 0))
        if not number:
            return bytes(out)


def _publish(topic: str, payload: bytes, *, qos: int = 1, mid: int = 1, properties: bytes | None = b"") -> bytes:
    name = topic.encode()
    body = struct.pack("!H", len(name)) + name + (struct.pack("!H", mid) if qos else b"")
    if properties is not None:
        body += _varint(len(properties)) + properties
    body += payload
    return bytes([0x30 | qos << 1]) + _varint(len(body)) + body


messages = st.lists(
    st.tuples(st.text("abcé/", min_size=1, max_size=200), st.binary(max_size=400), st.integers(0, 2)), max_size=12
)


@given(messages, st.lists(st.integers(0, 8000)), st.booleans(), st.sampled_from([16, 130, 10_000]))
def test_packets_are_the_same_however_the_network_splits_them(
    sent: list[tuple[str, bytes, int]], cuts: list[int], mqtt5: bool, limit: int
) -> None:
    """Any split gives the same messages in order; above the limit size, hash and head are right."""
    stream = b"".join(
        _publish(topic, payload, qos=qos, mid=number + 1, properties=b"" if mqtt5 else None) + b"\x40\x02\x00\x07"
        for number, (topic, payload, qos) in enumerate(sent)
    )
    reader = PacketReader(mqtt5=mqtt5, max_message_bytes=limit)
    edges = [0, *sorted(cut for cut in cuts if cut < len(stream)), len(stream)]
    found = [packet for a, b in pairwise(edges) for packet in reader.feed(stream[a:b], NOW)]
    assert found[1::2] == [Packet(0x40, b"\x00\x07")] * len(sent)
    for arrival, (number, (topic, payload, qos)) in zip(found[::2], enumerate(sent), strict=True):
        assert isinstance(arrival, Arrival)
        assert (arrival.topic, arrival.qos, arrival.mid) == (topic, qos, number + 1 if qos else 0)
        assert arrival.size_bytes == len(payload)
        assert arrival.oversize == (len(payload) > limit)
        if arrival.oversize:
            assert arrival.sha256 == hashlib.sha256(payload).hexdigest()
        assert arrival.payload == payload[:1024]


def test_properties_of_mqtt_5_are_read() -> None:
    """Every property that a broker may send with a message has a name; repeated ones are lists."""
    properties = (
        b"\x01\x01\x02\x00\x00\x00\x3c\x03\x00\x04text\x08\x00\x03a/b\x09\x00\x02\xff\x00\x0b\x80\x01"
        b"\x26\x00\x01k\x00\x01v\x26\x00\x01k\x00\x01w"
    )
    (arrival,) = PacketReader(mqtt5=True, max_message_bytes=99).feed(_publish("t", b"p", properties=properties), NOW)
    assert isinstance(arrival, Arrival)
    assert arrival.payload == b"p"
    assert arrival.properties == {
        "payload_is_text": True,
        "message_expiry_seconds": 60,
        "content_type": "text",
        "response_topic": "a/b",
        "correlation_data": b"\xff\x00",
        "subscription_identifiers": [128],
        "user_properties": [("k", "v"), ("k", "w")],
    }


@pytest.mark.parametrize(
    "data",
    [
        b"\x32\x03\x00\x09a",
        b"\x30\xff\xff\xff\xff\x01",
        _publish("", b"x"),
        _publish("t", b"x", properties=b"\x23\x00\x01"),
    ],
    ids=["topic longer than the packet", "length of five bytes", "no topic", "topic alias"],
)
def test_what_is_no_mqtt_is_refused(data: bytes) -> None:
    """Garbage ends the connection; it is never taken for a message."""
    with pytest.raises(Malformed):
        PacketReader(mqtt5=True, max_message_bytes=1 << 20).feed(data, NOW)


@given(st.permutations(range(8)), st.lists(st.integers(0, 5), min_size=8, max_size=8))
def test_acknowledgements_keep_the_order_of_arrival(order: list[int], sizes: list[int]) -> None:
    """Any order of completion gives every acknowledgement once, in order, as early as its predecessors allow."""
    queue = AckQueue()
    mids = iter(range(100))
    batches = [[(next(mids), 1) for _ in range(size)] for size in sizes]
    entries = [queue.add(batch) for batch in batches]
    out: list[tuple[int, int]] = []
    done: set[int] = set()
    for number in order:
        out += queue.complete(entries[number])
        done.add(number)
        mark = next((n for n in range(8) if n not in done), 8)
        assert out == [ack for batch in batches[:mark] for ack in batch]
    assert len(queue) == 0


def test_acknowledgements_on_the_wire() -> None:
    """PUBACK for QoS 1, PUBREC for QoS 2, PUBCOMP for a PUBREL."""
    assert ack_bytes([(1, 1), (0xABCD, 2)]) == b"\x40\x02\x00\x01\x50\x02\xab\xcd"
    assert pubcomp_bytes(b"\xab\xcd\x00") == b"\x70\x02\xab\xcd"


def test_addresses() -> None:
    """Defaults of the scheme, IPv6, percent-encoded user and password; printing shows no password."""
    assert parse_url("mqtt://h") == ("h", 1883, False, None, None)
    assert parse_url("mqtts://[::1]:99/") == ("::1", 99, True, None, None)
    url = parse_url("mqtts://u%40x:p%3A@h")
    assert url == ("h", 8883, True, "u@x", "p:")
    assert str(url) == "mqtts://h:8883"


@pytest.mark.parametrize("bad", ["", "a/#/b", "a#", "+a", "a\0", "$share/g/a", "x" * 70_000])
def test_filters_that_no_broker_takes(bad: str) -> None:
    """A filter is checked before anything connects."""
    with pytest.raises(ValueError, match="MQTT_TOPICS"):
        check_filter(bad)


@pytest.mark.parametrize("good", ["a", "+/+/#", "/a//b", "#", "a/+/c"])
def test_filters_that_brokers_take(good: str) -> None:
    """Whatever section 4.7 allows passes."""
    assert check_filter(good) == good
