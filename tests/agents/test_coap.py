"""The CoAP stage's agent under ``test_context``: batches in, records out, answers after; and once with a real Kafka."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest
from aiocoap.message import Message
from aiocoap.numbers import codes

from agents import coap
from agents.edges.coap_arrivals import Arrival, Batch, Event, State
from agents.edges.coap_exchanges import Exchange, Peer
from agents.edges.coap_requests import Found, Refusal, diagnostic
from agents.registered import Registered
from devices.registry import Registry
from streams import topics
from streams.messages import Device, RawMessage, decoder
from streams.resilience.failures import Retryable

RAW = decoder(RawMessage)


def arrival(path: str, payload: bytes, device_id: str) -> Arrival:
    """Return a message as the server hands it over."""
    candidate = coap.registry().candidates("coap", path)[0]
    return Arrival(
        exchange=Exchange(Peer("127.0.0.1:9", lambda _data: None), b"\x00\x01", confirmable=True),
        request=Message(code=codes.POST, payload=payload),
        found=Found(path, "POST", candidate),
        device_id=device_id,
        payload=payload,
        metadata={"uri_path": path, "method": "POST", "source": "127.0.0.1:9"},
        arrived_at=datetime(2026, 1, 2, tzinfo=UTC),
        due=0.0,
    )


class Fate:
    """Notes how a batch ended."""

    def __init__(self) -> None:
        self.taken: bool | None = None
        self.arrivals: list[Arrival] = []

    def __call__(self, arrivals: list[Arrival], taken: bool) -> None:
        """Note the end."""
        self.arrivals, self.taken = arrivals, taken


async def test_a_batch_becomes_raw_messages_in_order() -> None:
    """Each is keyed by its device, text as it came, other bytes in hex; what nobody waits for is left out."""
    fate = Fate()
    gone = arrival("telemetry/d3", b"{}", "d3")
    gone.state = State.GONE
    batch = Batch([arrival("telemetry/d1", b'{"t": 1}', "d1"), gone, arrival("m", b"\xff\x00", "d2")], fate)
    async with coap.receive.test_context() as agent:
        await agent.put(batch)
    found = [(topic, key, RAW.decode(value)) for topic, key, value, _ in coap.coap.app.captured]
    assert [(topic, key) for topic, key, _ in found] == [(topics.raw_data.name, b"d1"), (topics.raw_data.name, b"d2")]
    first, second = (message for _, _, message in found)
    assert (first.payload, first.payload_hex, first.protocol) == ('{"t": 1}', None, "coap")
    assert (second.payload, second.payload_hex) == (None, "ff00")
    assert first.metadata == {"uri_path": "telemetry/d1", "method": "POST", "source": "127.0.0.1:9"}
    assert fate.taken is True
    assert len(fate.arrivals) == 2


async def test_a_batch_that_kafka_does_not_take_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that cannot be written is answered 5.03, never 2.04."""

    async def away(*_: Any) -> Any:
        raise Retryable("no broker")

    monkeypatch.setattr(coap.coap.app, "send_outgoing", away)
    fate = Fate()
    async with coap.receive.test_context() as agent:
        await agent.put(Batch([arrival("telemetry/d1", b"{}", "d1")], fate))
    assert fate.taken is False


@pytest.mark.parametrize("fails", [False, True])
async def test_the_answer_waits_for_the_acknowledgement(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is answered before Kafka's word; a failure of one future is a failure of the batch."""
    futures: list[asyncio.Future[Any]] = [asyncio.get_running_loop().create_future() for _ in range(2)]

    async def slow(*_: Any) -> Any:
        return futures

    monkeypatch.setattr(coap.coap.app, "send_outgoing", slow)
    fate = Fate()
    await coap.hand_over(Batch([arrival("telemetry/d1", b"{}", "d1")], fate))
    futures[0].set_result(None)
    await asyncio.sleep(0)
    assert fate.taken is None
    futures[1].set_exception(Retryable("gone")) if fails else futures[1].set_result(None)
    for _ in range(5):
        await asyncio.sleep(0)
    assert fate.taken is not fails


def test_the_accounts_add_up() -> None:
    """Whatever happens to messages, received is what became of them."""
    accounts = coap.coap.app.accounts
    before = accounts.as_dict()
    coap.count(Event.RECEIVED, 3)
    coap.count(Event.ACKNOWLEDGED, 2)
    coap.count(Event.RETURNED, 1)
    for reason in ("overload", "another_device", "unavailable", "repeated"):
        coap.count(reason, 1)
    assert accounts.balance() == 0
    assert accounts.received == before["received"] + 7  # type: ignore[operator]
    assert accounts.dropped["overload"] >= 1
    assert accounts.dropped["another_device"] >= 1


def test_nobody_is_unknown_before_the_topic_of_devices_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """UNKNOWN_DEVICES=reject: 5.03 with Max-Age until `iot_devices` has been read, for all that is not known yet."""
    registered = Registered(Registry.load(coap.coap.settings.config_path))
    monkeypatch.setattr(coap, "_registered", registered)
    registered.take("dev-9", Device(device_id="dev-9"))
    assert coap.known("dev-9")
    with pytest.raises(Refusal, match="come again") as caught:
        coap.known("dev-8")
    assert (caught.value.code, caught.value.max_age) == (codes.SERVICE_UNAVAILABLE, 30)
    assert diagnostic(caught.value).opt.max_age == 30
    monkeypatch.setattr(Registered, "complete", True)
    assert not coap.known("dev-8")
