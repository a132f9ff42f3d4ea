"""RawMessages from what a broker delivered, by the contract."""

from datetime import UTC, datetime
from itertools import count

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.edges.mqtt_wire import Arrival
from agents.edges.raw import fallback_device_id, raw_message, raw_records, refusal
from streams.messages import RawMessage

NOW = datetime(2025, 1, 1, 12, 0, 0, 250000, tzinfo=UTC)


def _arrival(payload: bytes = b"{}", topic: str = "devices/d1/telemetry", **more: object) -> Arrival:
    values = {"qos": 1, "retain": False, "dup": False, "mid": 7, "size_bytes": len(payload)} | more
    return Arrival(topic=topic, payload=payload, arrived_at=NOW, **values)


def test_a_raw_message_by_the_contract() -> None:
    """Text stays as it came; topic, QoS and retain flag stand in the metadata."""
    message = raw_message(_arrival(b'{"t": 1}\0', retain=True), lambda topic: topic.split("/")[1], lambda: "r1")
    assert msgspec.to_builtins(message) == {
        "request_id": "r1",
        "timestamp": "2025-01-01T12:00:00.250000Z",
        "device_id": "d1",
        "protocol": "mqtt",
        "payload": '{"t": 1}\0',
        "payload_hex": None,
        "device_type": None,
        "action": None,
        "metadata": {"mqtt_topic": "devices/d1/telemetry", "mqtt_qos": 1, "mqtt_retain": True},
    }


@pytest.mark.parametrize(
    "payload", [b"\xff\xfe", b"\xed\xa0\x80", b"\xc0\xaf"], ids=["binary", "surrogate", "overlong"]
)
def test_what_is_not_utf8_is_hexadecimal(payload: bytes) -> None:
    """Bytes that no JSON string can hold unchanged stand in payload_hex."""
    message = raw_message(_arrival(payload), lambda _: "d", lambda: "r")
    assert message.payload is None
    assert message.payload_hex == payload.hex()


@pytest.mark.parametrize(
    ("topic", "device_id"),
    [("a/b/c", "c"), ("a/b/", "b"), ("a", "a"), ("/", "/"), ("devices/d/telemetry", "telemetry")],
)
def test_there_is_always_a_device_id(topic: str, device_id: str) -> None:
    """A topic that no profile knows still gives a key."""
    assert fallback_device_id(topic) == device_id
    for unknown in (None, ""):
        assert raw_message(_arrival(topic=topic), lambda _, u=unknown: u, lambda: "r").device_id == device_id


@given(st.lists(st.tuples(st.text(min_size=1), st.binary()), max_size=20))
def test_records_in_bulk_are_the_same_messages(pairs: list[tuple[str, bytes]]) -> None:
    """One record a message, in order, keyed by device id; every payload survives the way through JSON unchanged."""
    arrivals = [_arrival(payload, topic.encode("utf-8", "ignore").decode() or "t") for topic, payload in pairs]
    ids = count()
    records = raw_records(arrivals, lambda _: None, lambda: str(next(ids)))
    assert len(records) == len(arrivals)
    for number, (record, arrival) in enumerate(zip(records, arrivals, strict=True)):
        message = msgspec.json.decode(record.value, type=RawMessage)
        assert message == raw_message(arrival, lambda _: None, lambda n=number: str(n))
        assert record.key.decode() == message.device_id
        kept = message.payload.encode() if message.payload is not None else bytes.fromhex(message.payload_hex or "")
        assert kept == arrival.payload


def test_a_refusal_tells_size_hash_and_what_is_kept() -> None:
    """The dead letter of an oversize message says what it was."""
    text = refusal(_arrival(b"x" * 1024, size_bytes=5000, sha256="abc"), 4096)
    assert "5000 bytes" in text
    assert "MAX_MESSAGE_BYTES=4096" in text
    assert "sha256 abc" in text
    assert "first 1024 bytes" in text
