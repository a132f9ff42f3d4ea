"""The time of arrival is a part of a row's key where a device does not say when it sampled: no two may be alike."""

from datetime import UTC, datetime, timedelta

from agents.edges.mqtt_wire import Arrival, PacketReader

NOW = datetime(2026, 3, 1, tzinfo=UTC)


def publish(topic: str, payload: bytes) -> bytes:
    """Return a PUBLISH of MQTT 3.1.1, QoS 1."""
    body = len(topic).to_bytes(2, "big") + topic.encode() + b"\0\1" + payload
    return bytes([0x32, len(body)]) + body


def times(reader: PacketReader, count: int, now: datetime) -> list[datetime]:
    """Return the times of `count` messages that arrive in one read."""
    packets = reader.feed(publish("a/b", b"x") * count, now)
    return [packet.arrived_at for packet in packets if isinstance(packet, Arrival)]


def test_messages_of_one_read_have_times_of_their_own() -> None:
    """Messages arrive in order, each at a time of its own, also when reads follow each other within a microsecond."""
    reader = PacketReader(mqtt5=False, max_message_bytes=1000)
    found = times(reader, 50, NOW) + times(reader, 50, NOW + timedelta(microseconds=3)) + times(reader, 1, NOW)
    assert found[0] == NOW
    assert found == sorted(set(found))
    assert found[-1] - NOW < timedelta(milliseconds=1)


def test_clock_that_is_set_back_is_followed() -> None:
    """After a step of the clock the time of arrival is the clock's again."""
    reader = PacketReader(mqtt5=False, max_message_bytes=1000)
    times(reader, 1, NOW)
    assert times(reader, 1, NOW - timedelta(hours=1)) == [NOW - timedelta(hours=1)]
