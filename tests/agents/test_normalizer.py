"""The normalizer under ``test_context``."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from agents.normalizer import Normalizer, normalize
from devices.registry import Registry
from devices.timing import STRIKES, DriverTimes
from streams import metrics, topics
from streams.messages import Device, RawMessage, Reading, decoder, encode
from streams.resilience.chunks import Chunk, Out
from streams.resilience.deadletter import header
from streams.resilience.failures import Rejected, SetAside

VECTOR = json.loads((Path(__file__).parents[2] / "devices" / "fluxor" / "vectors.json").read_text())[0]
READINGS = decoder(Reading)
CONFIG = Path(__file__).parents[2] / "config"


def raw(
    payload: str | None, *, topic: str = "devices/d1/telemetry", request_id: str = "r1", **other: Any
) -> RawMessage:
    """Return a device message as the MQTT connector writes it."""
    return RawMessage(
        request_id=request_id,
        timestamp=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        device_id=topic.split("/")[-2],
        protocol="mqtt",
        payload=payload,
        metadata={"mqtt_topic": topic, "mqtt_qos": 1, "mqtt_retain": False},
        **other,
    )


def sent() -> list[tuple[str, str, Any]]:
    """Return topic, key and reading of what the agent sent to the validated topic, dead letters as they are."""
    return [
        (topic, (key or b"").decode(), READINGS.decode(value) if topic == topics.validated_data.name else value)
        for topic, key, value, _headers in normalize.app.captured
    ]


async def test_a_fluxor_frame_gives_its_readings() -> None:
    """A real frame, put in as one message, gives readings of every index, keyed by device."""
    message = raw(VECTOR["mqtt_payload_ascii_hex"], topic=f"broker_data/b1/{VECTOR['device_id']}/data")
    async with normalize.test_context() as agent:
        await agent.put(message)
    found = [entry for entry in sent() if entry[0] == topics.validated_data.name]
    assert {key for _, key, _ in found} == {VECTOR["device_id"]}
    assert {reading.index for _, _, reading in found} == set(VECTOR["indexes"])
    temperature = next(reading for _, _, reading in found if reading.index == "T")
    assert temperature.values == [value for _, _, value in VECTOR["channels"]["T"]]
    assert temperature.request_id == "r1"


async def test_bytes_are_decoded() -> None:
    """A record's bytes are taken as well as a message."""
    async with normalize.test_context() as agent:
        await agent.put(encode(raw('{"temperature": 21.5, "ts": 1700000000}')))
    ((_, _, reading),) = sent()
    assert reading.values == [21.5]
    assert reading.timestamp == datetime.fromtimestamp(1700000000, UTC)


async def test_one_bad_message_in_a_chunk(records: Any) -> None:
    """In a chunk, each bad message is one dead letter with its bytes unchanged, and its neighbours go on."""
    good = [encode(raw(f'{{"temperature": {n}, "ts": {1700000000 + n}}}', request_id=f"g{n}")) for n in range(3)]
    poison = encode(raw("{not json", request_id="bad"))
    async with normalize.test_context() as agent:
        await agent.put(Chunk(records(good[0], poison, good[1], b"\xff\xfe", good[2]), decoder(RawMessage).decode))
    found = normalize.app.captured
    readings = [READINGS.decode(value) for topic, _, value, _ in found if topic == topics.validated_data.name]
    letters = [entry for entry in found if entry[0] == topics.errors.name]
    assert [reading.values for reading in readings] == [[0], [1], [2]]
    assert [value for _, _, value, _ in letters] == [poison, b"\xff\xfe"]
    assert [header(headers or [], "dlq-class") for *_, headers in letters] == ["poison", "poison"]
    assert header(letters[0][3] or [], "dlq-request-id") == "bad"
    assert header(letters[0][3] or [], "dlq-stage") == "normalizer"


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        (raw("", topic="devices/d1/telemetry"), "poison"),
        (raw('{"temperature": NaN}'), "poison"),
        (raw("[" * 5000), "poison"),
        (raw("abc", topic=f"broker_data/b1/{VECTOR['device_id']}/data"), "poison"),
        (raw("{}", topic="nobody/knows/this"), "rejected"),
        (raw('{"temperature": 1, "ts": "2999-01-01T00:00:00Z"}'), "rejected"),
        (raw(None), "poison"),
        (raw(None, payload_hex="zz"), "poison"),
        (raw(None, payload_hex="fffe"), "poison"),
    ],
    ids=["empty", "nan", "deep", "short", "unmatched", "future", "nothing", "no hex", "not UTF-8"],
)
async def test_what_cannot_be_read(message: RawMessage, kind: str) -> None:
    """A message that cannot be read is one dead letter of the class that says why."""
    async with normalize.test_context() as agent:
        await agent.put(message)
    ((topic, _, value, headers),) = normalize.app.captured
    assert topic == topics.errors.name
    assert header(headers or [], "dlq-class") == kind
    assert value is not None


async def test_a_value_out_of_range_leaves_the_others() -> None:
    """A value that validation refuses goes, and what is left of the message goes on."""
    async with normalize.test_context() as agent:
        await agent.put(raw('{"good": 1, "huge": 1e999, "ts": 1700000000}'))
    found = sent()
    assert [topic for topic, _, _ in found] in ([topics.validated_data.name], [topics.errors.name])


async def test_a_device_that_claims_to_be_another_is_rejected_and_counted() -> None:
    """One dead letter of class rejected, one more of the reason in the metrics."""
    before = refused("another_device")
    message = raw(VECTOR["mqtt_payload_ascii_hex"], topic="broker_data/b1/4711/data")
    async with normalize.test_context() as agent:
        await agent.put(message)
    ((topic, _, _, headers),) = normalize.app.captured
    assert (topic, header(headers or [], "dlq-class")) == (topics.errors.name, "rejected")
    assert refused("another_device") == before + 1


def refused(reason: str) -> float:
    """Return how many messages were refused for that reason."""
    return metrics.REGISTRY.get_sample_value("headrace_refused_messages_total", {"reason": reason}) or 0.0


def test_unknown_devices_of_mqtt_are_rejected_those_of_coap_were_judged_before() -> None:
    """UNKNOWN_DEVICES=reject holds for MQTT here, and a registered device gets in."""
    here = Normalizer(Registry.load(CONFIG), reject_unknown=True)
    out = Out()
    with pytest.raises(Rejected, match="unknown_device"):
        here.to_readings(raw('{"t": 1}'), out)
    coap = raw('{"t": 1}')
    coap.protocol, coap.metadata = "coap", {"uri_path": "telemetry/d1"}
    here.to_readings(coap, out)
    here.registered.take("d1", Device(device_id="d1"))
    here.to_readings(raw('{"t": 1}'), out)
    assert len(out._sent) == 2


def test_a_slow_driver_is_set_aside_and_the_others_go_on() -> None:
    """Its messages become dead letters that the guard does not count; another driver's are read."""
    now = 0.0

    def wall() -> float:
        nonlocal now
        now += 1.0
        return now

    here = Normalizer(Registry.load(CONFIG), times=DriverTimes(0.5, 1000.0, wall=wall))
    out = Out()
    for _ in range(STRIKES):
        here.to_readings(raw('{"t": 1}'), out)
    with pytest.raises(SetAside, match="driver plain_json keeps taking longer"):
        here.to_readings(raw('{"t": 1}'), out)
    frame = raw(VECTOR["mqtt_payload_ascii_hex"], topic=f"broker_data/b1/{VECTOR['device_id']}/data")
    count = len(out._sent)
    here.to_readings(frame, out)
    assert len(out._sent) > count
