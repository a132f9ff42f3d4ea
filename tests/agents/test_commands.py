"""The stages on the way down under ``test_context``: what is stored, what is told, what is published."""

from __future__ import annotations

import dataclasses
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agents import commands, mqtt_downlinks, normalizer
from agents.coap_downlinks import Pending
from agents.commanding.partition import House
from devices.commands.model import Limits
from devices.light_controller.schedule import build_frame
from devices.registry import Registry
from streams import topics
from streams.messages import (
    Command,
    CommandReport,
    CommandStatus,
    DeviceChange,
    DeviceState,
    DownlinkMessage,
    RawMessage,
    Reading,
    decoder,
    encode,
)
from streams.resilience.chunks import Chunk
from streams.resilience.failures import Rejected, Retryable
from tables.commands import STATES, CommandTables

VECTOR = json.loads((Path(__file__).parents[2] / "devices" / "fluxor" / "vectors.json").read_text())[0]
LIGHTS = Path(__file__).parents[2] / "devices" / "light_controller" / "vectors.json"
NOW = datetime.now(UTC)
SOON = NOW + timedelta(hours=1)
STATE = {
    "broker_id": "7",
    "command_topic": "broker_data/7/command",
    "hw_type": 0,
    "reg_typ": 4,
    "sen_typ": 2,
    "U_consigne": 5000,
    "U_hysteresys": 127,
    "T_consigne": 2000,
    "T_hysteresys": 127,
}


class Table(dict[bytes, bytes]):
    """A table in memory, as far as a partition looks at one."""

    @property
    def data(self) -> Table:
        """The store."""
        return self


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> commands.Desk:
    """A desk whose tables are in memory."""

    async def send(outgoing: Any) -> None:
        await commands.commands.app.capture(outgoing)

    house = House(
        registry=Registry.load(Path(__file__).parents[2] / "config"),
        limits=Limits(timeout_seconds=10),
        tables=CommandTables(commands.commands.app, Table(), Table(), Table()),
        expiry_seconds=3600,
        send=send,
        caught_up=lambda: True,
    )
    made = commands.Desk(house)
    monkeypatch.setattr(commands, "_desk", made)
    return made


def config(request_id: str = "r1", **fields: Any) -> Command:
    """Return a climate configuration."""
    fields = {"payload": {"T_consigne": 21.5}, "command_type": "config", **fields}
    return Command(request_id=request_id, device_id="2261001", **fields)


def told() -> list[str]:
    """Return what the stage commands told, in order: states, and the topics of all else."""
    status = decoder(CommandStatus)
    return [
        status.decode(value).state if topic == topics.command_status.name else topic
        for topic, _, value, _ in commands.commands.app.captured
        if value is not None
    ]


async def put(agent: Any, message: Any) -> None:
    """Put one message into an agent."""
    async with agent.test_context() as context:
        await context.put(message)


async def test_a_command_waits_for_its_device_and_finds_its_end(desk: commands.Desk) -> None:
    """Queued until the device is heard of; then it goes out, and the device's word ends it."""
    await put(commands.take_commands, config())
    assert told() == ["QUEUED"]
    state = DeviceState(device_id="2261001", profile="fluxor", state=STATE, timestamp=NOW)
    await put(commands.hear_devices, state)
    assert told() == ["QUEUED", topics.downlinks.name]
    sent = decoder(DownlinkMessage).decode(commands.commands.app.captured[-1][2] or b"")
    assert (sent.route, sent.attempt, sent.repeatable) == ("broker_data/7/command", 1, True)
    report = CommandReport(request_id="r1", device_id="2261001", kind="SENT", attempt=1)
    await put(commands.take_reports, report)
    await put(commands.take_reports, CommandReport(request_id="r1", kind="SUCCESSFUL", by_device=True))
    assert told() == ["QUEUED", topics.downlinks.name, "SENT", "DELIVERED", "SUCCESSFUL"]
    await put(commands.take_commands, config())
    assert told()[-1] == "SUCCESSFUL"
    assert desk.partitions[0].device_of == {}


@pytest.mark.usefixtures("desk")
async def test_what_nobody_can_do_fails(records: Any) -> None:
    """A payload that does not fit ends as FAILED with a pointer; what is no command is a dead letter."""
    values = [encode(config(payload={"T_consigne": "warm"})), b"{}", encode(config("", payload={}))]
    await put(commands.take_commands, Chunk(records(*values), decoder(Command).decode))
    assert told()[:2] == ["QUEUED", "FAILED"]
    status = decoder(CommandStatus).decode(commands.commands.app.captured[1][2] or b"")
    assert status.detail.startswith("/payload/T_consigne: ")
    assert [topic for topic, *_ in commands.commands.app.captured[2:]] == [topics.errors.name] * 2


async def test_what_was_not_told_is_told_again(desk: commands.Desk) -> None:
    """Kafka fails after the state was stored: the same is told, with the same time, and nothing twice started."""
    kept, good = desk.house.tables, desk.house

    async def fail(_outgoing: Any) -> None:
        raise Retryable("away")

    desk.house = dataclasses.replace(good, send=fail)
    with pytest.raises(Retryable):
        await put(commands.take_commands, config())
    assert kept.lives
    assert desk.partitions == {}
    desk.house = good
    await put(commands.take_commands, config())
    assert told() == ["QUEUED"]


def schedule_message(operation: Any, task_id: int = 0, alarm: int = 0) -> RawMessage:
    """Return a schedule message of light controller 7 as a connector writes it."""
    return RawMessage(
        request_id=f"m-{operation}-{task_id}",
        timestamp=NOW,
        device_id="7",
        protocol="mqtt",
        payload=build_frame(7, 1_750_000_000, operation, task_id=task_id, alarm=alarm).decode(),
        metadata={"mqtt_topic": "broker_data/1/7/scheduler_data"},
    )


async def changes(*messages: RawMessage) -> list[bytes]:
    """Return what the normalizer tells of them to the stage commands."""
    normalizer.normalizer.app.captured.clear()
    for message in messages:
        await put(normalizer.normalize, message)
    found = normalizer.normalizer.app.captured
    return [value or b"" for topic, _, value, _ in found if topic == topics.device_changes.name]


def shown() -> list[dict[str, Any]]:
    """Return the schedules that were told as readings, in order."""
    captured = commands.commands.app.captured
    readings = [decoder(Reading).decode(v or b"") for topic, _, v, _ in captured if topic == topics.validated_data.name]
    assert all((r.index, r.device_id, r.timestamp) == ("SCHEDULE_STATE", "7", NOW) for r in readings)
    return [dict(zip(reading.labels, reading.values, strict=True)) for reading in readings]


async def test_schedule_messages_add_up_in_the_table(desk: commands.Desk, records: Any) -> None:
    """Each message gives the schedule after it as a reading; the last one is stored; a stretch again is the same."""
    alarm = json.loads(LIGHTS.read_text())["commands"]["config_task_3"]["sync_alarm"]
    told_of = await changes(
        schedule_message("create", 3, alarm),
        schedule_message("read_all", alarm=2 << 25),
        schedule_message("read_task", 4, alarm),
        schedule_message("delete", 3),
    )
    for stretch in (told_of, told_of[1:]):
        chunk = Chunk(records(*stretch, b"{no"), decoder(DeviceChange).decode)
        await put(commands.add_up, chunk)
    found = shown()
    assert [(s["known"], s["task_count"], s["complete"]) for s in found[:4]] == [
        (1, None, False),
        (1, 2, False),
        (2, 2, True),
        (1, None, False),
    ]
    assert found[-1] == found[3]
    assert json.loads(found[-1]["tasks"])["4"]["time_beg"] == 540
    stored = STATES.decode(desk.house.tables.merged[b"7"])
    assert set(stored["light_controller"]["tasks"]) == {"4"}
    letters = [topic for topic, *_ in commands.commands.app.captured if topic == topics.errors.name]
    assert len(letters) == 2


async def test_no_schedule_is_stored_that_kafka_has_not(
    desk: commands.Desk, records: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The changelog cannot be written: nothing is in the table, and the message, delivered again, counts once."""
    chunk = Chunk(records(*await changes(schedule_message("create", 3))), decoder(DeviceChange).decode)
    with monkeypatch.context() as patch:

        async def fail(*_: Any) -> None:
            raise Retryable("away")

        patch.setattr("tables.rows.publish", fail)
        with pytest.raises(Retryable):
            await put(commands.add_up, chunk.copy())
    assert desk.house.tables.merged == {}
    await put(commands.add_up, chunk.copy())
    assert [s["known"] for s in shown()] == [1, 1]


async def test_a_device_word_goes_to_every_partition() -> None:
    """A feedback names no device: it is handed on to the reports."""
    await put(commands.take_feedback, CommandReport(request_id="r1", kind="SUCCESSFUL", by_device=True))
    ((topic, key, _, _),) = commands.commands.app.captured
    assert (topic, key) == (topics.command_reports.name, None)


async def test_the_normalizer_tells_feedback_and_state() -> None:
    """A feedback goes to the stage commands under its request id; a device's state when it is new."""
    feedback = RawMessage(
        request_id="m1",
        timestamp=NOW,
        device_id="7",
        protocol="mqtt",
        payload='{"uid": "r-1-7", "status": 1}',
        metadata={"mqtt_topic": "broker_data/7/feedback"},
    )
    await put(normalizer.normalize, feedback)
    ((topic, key, value, _),) = normalizer.normalizer.app.captured
    assert (topic, key) == (topics.command_feedback.name, b"r-1")
    word = decoder(CommandReport).decode(value or b"")
    assert (word.kind, word.by_device) == ("SUCCESSFUL", True)
    normalizer.normalizer.app.captured.clear()
    frame = RawMessage(
        request_id="m2",
        timestamp=NOW,
        device_id=VECTOR["device_id"],
        protocol="mqtt",
        payload=VECTOR["mqtt_payload_ascii_hex"],
        metadata={"mqtt_topic": f"broker_data/7/{VECTOR['device_id']}/data"},
    )
    for _ in range(2):
        await put(normalizer.normalize, frame)
    states = [value for topic, _, value, _ in normalizer.normalizer.app.captured if topic == topics.device_state.name]
    assert len(states) == 1
    assert decoder(DeviceState).decode(states[0] or b"").state["command_topic"] == "broker_data/7/command"


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
