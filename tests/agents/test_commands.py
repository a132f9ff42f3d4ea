"""The stage commands under ``test_context``: what is stored and what is told."""

from __future__ import annotations

import dataclasses
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from agents import commands, normalizer
from agents.commanding.partition import House
from devices.commands.model import Limits
from devices.light_controller.schedule import build_frame
from devices.registry import Registry
from streams import topics
from streams.messages import (
    Command,
    CommandReport,
    CommandStatus,
    Device,
    DeviceChange,
    DeviceState,
    DownlinkMessage,
    RawMessage,
    Reading,
    decoder,
    encode,
)
from streams.resilience.chunks import Chunk
from streams.resilience.failures import Retryable
from tables.commands import ROWS, STATES, CommandTables
from tests.agents.conftest import put

VECTOR = json.loads((Path(__file__).parents[2] / "devices" / "fluxor" / "vectors.json").read_text())[0]
LIGHTS = Path(__file__).parents[2] / "devices" / "light_controller" / "vectors.json"
NOW = datetime.now(UTC)
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


def configuration(request_id: str = "c1") -> Command:
    """Return a configuration of sensor 282c02."""
    return Command(
        request_id=request_id,
        device_id="282c02",
        command_type="config",
        payload={"transfer_limit": 5},
        protocol="coap",
    )


async def test_a_sensor_that_comes_back_with_another_hash_has_it(desk: commands.Desk) -> None:
    """The hash in a request after the answer that carried the configuration is the sensor's word; one before is not."""

    async def hear(value: int, seconds: float) -> None:
        at = NOW + timedelta(seconds=seconds)
        told_of = DeviceState(device_id="282c02", profile="efento", state={"hash": value}, timestamp=at)
        await put(commands.hear_devices, told_of)

    await hear(1, -10)
    await put(commands.take_commands, configuration())
    sent = CommandReport(request_id="c1", device_id="282c02", kind="SENT", attempt=1, timestamp=NOW)
    await put(commands.take_reports, sent)
    # the request in whose answer it went out came with a hash that was not known yet
    await hear(2, -0.1)
    assert told() == ["QUEUED", topics.coap_pending.name, "SENT"]
    await hear(2, 600)
    assert told()[-1] == "SENT"
    await hear(3, 1200)
    assert told()[-2:] == ["DELIVERED", "SUCCESSFUL"]
    assert commands.commands.app.captured[-1][:3] == (topics.coap_pending.name, b"c1", None)
    word = decoder(CommandStatus).decode(commands.commands.app.captured[-2][2] or b"")
    assert word.detail == "the device came back with another configuration hash: 2 before, 3 now"
    assert not ROWS.decode(desk.house.tables.lives[b"282c02"]).life.open


async def test_what_iot_devices_says_counts(desk: commands.Desk) -> None:
    """Who is not active gets nothing, also of what was queued before; with ``reject`` who is not known does neither."""
    house = desk.house
    take = desk.registered.take
    climate = DeviceState(device_id="2261001", profile="fluxor", state=STATE, timestamp=NOW)
    await put(commands.take_commands, config("waits"))
    take("2261001", Device(device_id="2261001", active=False))
    await put(commands.take_commands, config("refused"))
    await put(commands.hear_devices, climate)
    assert told() == ["QUEUED", "QUEUED", "FAILED", "FAILED"]
    desk.house = dataclasses.replace(house, unknown="reject")
    desk.partitions.clear()
    take("2261001", None)
    await put(commands.take_commands, config("nobody"))
    assert told()[4:] == ["QUEUED", "FAILED"]
    take("2261001", Device(device_id="2261001", profile="fluxor", config={"qos": 2}))
    await put(commands.take_commands, config("goes"))
    assert told()[6:] == ["QUEUED", topics.downlinks.name]
    assert decoder(DownlinkMessage).decode(commands.commands.app.captured[-1][2] or b"").qos == 2


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
