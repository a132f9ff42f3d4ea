"""Connectors on the way down: what is published or put into an answer, and what is said of it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from agents import mqtt_downlinks
from agents.coap_downlinks import Pending
from streams import topics
from streams.messages import DownlinkMessage
from streams.resilience.failures import Rejected, Retryable
from tests.agents.conftest import put

NOW = datetime.now(UTC)
SOON = NOW + timedelta(hours=1)


class Broker:
    """A connection that notes what is published."""

    def __init__(self, reason: int | Exception = 0, connected: bool = True) -> None:
        self.reason = reason
        self.connected = connected
        self.published: list[str] = []

    def can_publish(self) -> bool:
        """Tell what the test wants."""
        return self.connected

    async def publish(self, topic: str, _payload: bytes, _qos: int = 1, *, retain: bool = False) -> int:
        """Note it."""
        assert not retain
        self.published.append(topic)
        if isinstance(self.reason, Exception):
            raise self.reason
        return self.reason


def downlink(request_id: str = "r1", **fields: Any) -> DownlinkMessage:
    """Return a downlink."""
    fields = {"attempt": 1, "expires_at": SOON, "route": "t", "payload": "{}", "repeatable": True, **fields}
    return DownlinkMessage(request_id=request_id, device_id="d1", protocol="mqtt", **fields)


@pytest.fixture
def sender() -> mqtt_downlinks.Sender:
    """A sender of its own."""
    return mqtt_downlinks.Sender(mqtt_downlinks.downlinks.app.capture)


async def kinds(sender: mqtt_downlinks.Sender, message: DownlinkMessage, broker: Any) -> list[str]:
    """Send; return the kinds of the reports."""
    return [word.kind for word in await sender.send(message, broker, datetime.now(UTC))]


async def test_what_is_published_is_said(sender: mqtt_downlinks.Sender) -> None:
    """PUBACK is DELIVERED, nobody there is SENT alone, a refusal FAILED, too late EXPIRED and not published."""
    assert await kinds(sender, downlink("a"), Broker()) == ["SENT", "DELIVERED"]
    assert await kinds(sender, downlink("b"), Broker(0x10)) == ["SENT"]
    assert await kinds(sender, downlink("c"), Broker(Rejected("no"))) == ["FAILED"]
    late = Broker()
    assert await kinds(sender, downlink("d", expires_at=NOW - timedelta(seconds=1)), late) == ["EXPIRED"]
    assert late.published == []
    assert await kinds(sender, downlink("e", qos=0), Broker()) == ["SENT"]


async def test_a_record_that_comes_again(sender: mqtt_downlinks.Sender) -> None:
    """The same attempt is published once by a process, and its reports are told again."""
    broker = Broker()
    for _ in range(2):
        assert await kinds(sender, downlink(), broker) == ["SENT", "DELIVERED"]
    assert broker.published == ["t"]
    await kinds(sender, downlink(attempt=2), broker)
    assert broker.published == ["t", "t"]


async def test_what_is_not_safe_to_repeat_goes_out_once(sender: mqtt_downlinks.Sender) -> None:
    """It is written down before it is published; lost on the way, or begun elsewhere, it is not sent again."""
    message = downlink("reboot", repeatable=False)
    with pytest.raises(Retryable):
        await kinds(sender, message, Broker(connected=False))
    lost = Broker(Retryable("connection lost"))
    with pytest.raises(Retryable):
        await kinds(sender, message, lost)
    assert [topic for topic, *_ in mqtt_downlinks.downlinks.app.captured] == [topics.downlinks_begun.name]
    again = Broker()
    assert await kinds(sender, message, again) == ["SENT"]
    assert (lost.published, again.published) == (["t"], [])
    elsewhere = downlink("other", repeatable=False)
    sender.note_begun("d1", elsewhere)
    assert await kinds(sender, elsewhere, again) == ["SENT"]
    assert again.published == []


async def test_the_agent_leaves_other_protocols_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A downlink of another protocol is nobody's here."""
    monkeypatch.setattr(mqtt_downlinks.Connector, "source", Broker())
    await put(mqtt_downlinks.send_down, downlink("x1"))
    await put(mqtt_downlinks.send_down, msgspec.structs.replace(downlink("x2"), protocol="coap"))
    assert [topic for topic, *_ in mqtt_downlinks.downlinks.app.captured] == [topics.command_reports.name] * 2


def test_what_waits_for_a_coap_device() -> None:
    """It is in every answer until the device has acknowledged one, said once each, and gone with its tombstone."""
    pending = Pending()
    message = downlink()
    pending.take("r1", message)
    for _ in range(2):
        found = pending.pending_for("d1")
        assert found is not None
        assert found[0] == b"{}"
        pending.sent(found[1])
    assert pending.pending_for("d2") is None
    pending.delivered(message)
    pending.delivered(message)
    assert pending.pending_for("d1") is None
    words = [pending.reports.get_nowait() for _ in range(pending.reports.qsize())]
    assert [(word.kind, word.by_device) for word in words] == [("SENT", False), ("DELIVERED", True)]
    again = downlink(attempt=2)
    pending.take("r1", again)
    assert pending.pending_for("d1") == (b"{}", again)
    pending.take("r1", None)
    pending.take("r1", None)
    assert pending.pending_for("d1") is None


def test_what_has_expired_is_not_given_to_a_coap_device() -> None:
    """A device that comes too late gets nothing, and the command is said to have expired."""
    pending = Pending()
    pending.take("r1", downlink(expires_at=NOW - timedelta(seconds=1)))
    assert pending.pending_for("d1") is None
    assert pending.reports.get_nowait().kind == "EXPIRED"
