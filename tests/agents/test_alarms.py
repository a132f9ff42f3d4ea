"""The alarms stage under ``test_context``, with a table that is a mapping."""

from __future__ import annotations

import shutil
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agents import alarms
from agents.watch.knowledge import Knowledge
from devices.alarms.model import Alert
from streams import topics
from streams.messages import AlarmRule, AlertAction, Device, Reading, decoder, encode
from streams.resilience.chunks import Chunk
from streams.resilience.deadletter import header
from streams.resilience.failures import Retryable
from streams.ticks import Reach, Tick

READINGS, TICKS, ACTIONS = decoder(Reading).decode, decoder(Tick).decode, decoder(AlertAction).decode
START = datetime.now(UTC) - timedelta(minutes=10)
HOT = AlarmRule(
    id="hot", profile="p", index="T", math_operator=">", threshold=40, clear_threshold=35, recipients=["a@example.org"]
)


def reading(value: object, second: int = 0, *, device: str = "d1", **fields: Any) -> Reading:
    """Return a reading of one value, ``second`` seconds after the start."""
    return Reading(
        request_id=f"r{second}",
        timestamp=START + timedelta(seconds=second),
        device_id=device,
        index="T",
        values=[value],  # type: ignore[list-item]
        labels=["t"],
        display_names=["t"],
        metadata={"units": ["°C"], "profile": "p", **fields},
    )


class Hall:
    """A stage with rules of its own; :meth:`restart` is a crash: only the table stays."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.table: dict[str, bytes] = {}
        self._patch = monkeypatch
        self._folder = folder
        self._rules: list[AlarmRule] = []
        monkeypatch.setattr(alarms, "LocalStates", lambda _table, _number: self.table)
        monkeypatch.setattr(alarms, "partition_of", lambda _device: 0)
        self.restart(HOT)

    def restart(self, *rules: AlarmRule) -> Knowledge:
        """Start over with these rules, or those of before."""
        self._rules = list(rules) or self._rules
        (self._folder / "alarms.yaml").write_text("alarms: []\n")
        (self._folder / "devices.yaml").write_text("devices: []\n")
        shutil.copytree(
            Path(__file__).parents[2] / "config" / "profiles", self._folder / "profiles", dirs_exist_ok=True
        )
        knowledge = Knowledge(self._folder)
        for rule in self._rules:
            knowledge.take_rule(rule.id, rule)
        self._patch.setattr(alarms, "_alarms", alarms.Alarms(knowledge))
        return knowledge

    @property
    def told(self) -> list[tuple[str, str]]:
        """Rule and transition of each alert that was sent."""
        return [(alert.alarm_id, alert.metadata["transition"]) for alert in self.alerts]

    @property
    def alerts(self) -> list[Alert]:
        """Every alert that was sent."""
        return [
            decoder(Alert).decode(value or b"")
            for topic, _, value, _ in alarms.alarms.app.captured
            if topic == topics.alerts.name
        ]


@pytest.fixture
def hall(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hall:
    """A stage with the rule HOT."""
    return Hall(monkeypatch, tmp_path)


def chunk(records: Any, *messages: Any, decode: Any = READINGS) -> Chunk:
    """Return a chunk of messages, or of bytes that are none."""
    return Chunk(records(*(m if isinstance(m, bytes) else encode(m) for m in messages)), decode)


async def test_an_alarm_opens_and_resolves_once(hall: Hall, records: Any) -> None:
    """Above the threshold it opens, within the hysteresis nothing happens, below it resolves; twice is once."""
    values = [reading(value, second) for second, value in enumerate([20, 41, 42, 38, 41, 34, 33])]
    async with alarms.evaluate.test_context() as agent:
        await agent.put(chunk(records, *values[:4]))
        await agent.put(chunk(records, *values))
        hall.restart()
        await agent.put(chunk(records, *values))
    assert hall.told == [("hot", "opened"), ("hot", "resolved")]
    first, last = hall.alerts
    assert first.id == last.id
    assert (last.is_resolved, first.recipients) == (True, "a@example.org")


async def test_poison_in_the_middle_leaves_the_others(hall: Hall, records: Any) -> None:
    """What is no reading is one dead letter each; those around it count."""
    uneven = reading(99, 2)
    uneven.labels.append("u")
    async with alarms.evaluate.test_context() as agent:
        await agent.put(chunk(records, reading(41, 1), b"{no", uneven, reading(30, 3)))
    assert hall.told == [("hot", "opened"), ("hot", "resolved")]
    letters = [entry for entry in alarms.alarms.app.captured if entry[0] == topics.errors.name]
    assert [header(headers or [], "dlq-class") for *_, headers in letters] == ["poison", "poison"]


async def test_nothing_is_stored_before_kafka_has_the_alert(
    hall: Hall, records: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kafka fails when the alert is sent: no state is kept, and the reading, delivered again, makes the same alert."""
    send = alarms.alarms.app.send_and_wait
    seen: list[bytes | None] = []

    async def fail(outgoing: Any) -> None:
        seen.extend(value for topic, _, value, _ in outgoing if topic == topics.alerts.name)
        raise Retryable("away")

    monkeypatch.setattr(alarms.alarms.app, "send_and_wait", fail)
    async with alarms.evaluate.test_context() as agent:
        with pytest.raises(Retryable):
            await agent.put(chunk(records, reading(41, 1)))
    assert hall.table == {}
    monkeypatch.setattr(alarms.alarms.app, "send_and_wait", send)
    async with alarms.evaluate.test_context() as agent:
        await agent.put(chunk(records, reading(41, 1)))
    assert [encode(alert) for alert in hall.alerts] == seen
    assert hall.table


async def test_an_acknowledgement(hall: Hall, records: Any) -> None:
    """An acknowledgement of an open alarm is told; of an unknown one, or a second one, nothing is."""
    async with alarms.evaluate.test_context() as agent:
        await agent.put(chunk(records, reading(41, 1)))
    (opened,) = hall.alerts
    ack = AlertAction(
        alert_id=opened.id, device_id="d1", action="ack", user="ann", comment="seen", timestamp=datetime.now(UTC)
    )
    other = AlertAction(alert_id="x", device_id="d1", action="ack", user="ann", timestamp=datetime.now(UTC))
    hall.restart()
    async with alarms.take_actions.test_context() as agent:
        await agent.put(chunk(records, other, ack, ack, decode=ACTIONS))
    assert hall.told == [("hot", "opened"), ("hot", "acknowledged")]
    assert hall.alerts[1].metadata["user"] == "ann"


async def test_a_silence_is_told_only_once_all_readings_have_counted(
    hall: Hall, records: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A registered device that is never heard alarms, but not while readings of its partition wait."""
    silent = AlarmRule(id="silent", device_id="d9", index="T", label="t", no_data_seconds=60)
    knowledge = hall.restart(silent)
    knowledge.take_device("d9", Device(device_id="d9", profile="p", name="", tags=[]))
    clock = [time.time()]
    monkeypatch.setattr(alarms.time, "time", lambda: clock[0])
    reach = [Reach(0, 5)]
    monkeypatch.setattr(alarms, "reach", lambda *_: reach[0])

    async with alarms.pass_time.test_context() as agent:

        async def tick(seconds: float) -> None:
            clock[0] += seconds
            await agent.put(chunk(records, Tick(datetime.now(UTC), 0), decode=TICKS))

        for _ in range(30):
            await tick(5)
        assert hall.told == []
        reach[0] = Reach(5, 9)
        await tick(5)
        await tick(5)
        # The moment that was waited for was that of the first tick, before the silence was one.
        assert hall.told == []
        reach[0] = Reach(9, 12)
        await tick(5)
        assert hall.told == [("silent", "opened")]


async def test_what_depends_is_muted_by_an_alarm_of_another_worker(hall: Hall, records: Any) -> None:
    """A gateway that is down, as another worker says, mutes what depends on it; its return is noticed."""
    rule = AlarmRule(
        id="hot",
        profile="p",
        index="T",
        threshold=40,
        depends_on=[{"alarm": "down", "device_id": "gw"}],  # type: ignore[list-item]
    )
    rule = decoder(AlarmRule).decode(encode(rule))
    knowledge = hall.restart(rule)
    async with alarms.evaluate.test_context() as agent:
        await agent.put(chunk(records, reading(41, 1)))
    opened = hall.alerts[0]
    down = decoder(Alert).decode(encode(opened))
    down.id, down.alarm_id, down.device_id = "g1", "down", "gw"
    knowledge.take_open("g1", down)
    async with alarms.evaluate.test_context() as agent:
        await agent.put(chunk(records, reading(41, 2, device="d2")))
    assert [(alert.device_id, alert.metadata["notify"]) for alert in hall.alerts][:1] == [("d1", True)]
    assert not any(alert.device_id == "d2" and alert.metadata["notify"] for alert in hall.alerts)
    knowledge.take_open("g1", None)
    assert knowledge.open == {}


async def test_a_rule_that_is_taken_away_closes_its_alarm(hall: Hall, records: Any) -> None:
    """A tombstone of a rule resolves what it left open, and its states go."""
    async with alarms.evaluate.test_context() as agent:
        await agent.put(chunk(records, reading(41, 1)))
        assert alarms._alarms is not None
        alarms._alarms.knowledge.take_rule("hot", None)
        await agent.put(chunk(records, reading(42, 2)))
    assert hall.told == [("hot", "opened"), ("hot", "resolved")]
    assert hall.alerts[1].metadata["reason"] == "rule_removed"
    assert hall.table == {}


async def test_an_edited_rule_counts_from_the_next_reading_on(hall: Hall, records: Any) -> None:
    """Another text keeps the open alarm and is what its closing says; another threshold resolves it and says why."""
    async with alarms.evaluate.test_context() as agent:
        await agent.put(chunk(records, reading(41, 1)))
        assert alarms._alarms is not None
        knowledge = alarms._alarms.knowledge
        knowledge.take_rule("hot", msgspec.structs.replace(HOT, level="CRITICAL", recipients=["b@example.org"]))
        await agent.put(chunk(records, reading(42, 2)))
        assert hall.told == [("hot", "opened")]
        knowledge.take_rule("hot", msgspec.structs.replace(HOT, threshold=50, clear_threshold=None))
        await agent.put(chunk(records, reading(43, 3)))
        await agent.put(chunk(records, reading(51, 4)))
    assert hall.told == [("hot", "opened"), ("hot", "resolved"), ("hot", "opened")]
    _, closed, again = hall.alerts
    assert closed.metadata["reason"] == "rule_changed"
    assert (again.threshold, again.error_value) == (50, 51)
    assert again.id != closed.id


async def test_the_hosts_clock_is_set_back(hall: Hall, records: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A silence starts over its wait, once, and is then told; the readings of the right time count again."""
    silent = AlarmRule(id="silent", profile="p", index="T", label="t", no_data_seconds=60)
    hall.restart(silent, HOT)
    right = time.time()
    clock = [right + 86_400]
    monkeypatch.setattr(alarms.time, "time", lambda: clock[0])
    monkeypatch.setattr(alarms, "reach", lambda *_: Reach(9, 9))
    device = Device(device_id="d1", profile="p", name="", tags=[])
    assert alarms._alarms is not None
    alarms._alarms.knowledge.take_device("d1", device)

    async def tick(seconds: float) -> None:
        clock[0] += seconds
        async with alarms.pass_time.test_context() as agent:
            await agent.put(chunk(records, Tick(datetime.now(UTC), 0), decode=TICKS))

    async with alarms.evaluate.test_context() as agent:
        # A day ahead, and so is the host: believed.
        await agent.put(chunk(records, reading(20, 86_400 + 600)))
    for _ in range(3):
        await tick(5)
    clock[0] = right
    for _ in range(12):
        await tick(5)
    assert hall.told == []
    for _ in range(4):
        await tick(5)
    assert hall.told == [("silent", "opened")]
    async with alarms.evaluate.test_context() as agent:
        await agent.put(chunk(records, reading(41, 601)))
    assert hall.told[1:] == [("hot", "opened"), ("silent", "resolved")]


def test_a_rule_that_contradicts_itself_is_refused(hall: Hall) -> None:
    """A rule from the topic that is no rule, or another's, raises, and the one before stays."""
    knowledge = hall.restart(HOT)
    with pytest.raises(ValueError, match="id"):
        knowledge.take_rule("other", HOT)
    with pytest.raises(ValueError):
        knowledge.take_rule("bad", AlarmRule(id="bad", math_operator=">"))
    assert [rule.id for rule in knowledge.rules()] == ["hot"]


def test_what_is_open_is_said_with_each_transition() -> None:
    """An opening is kept on the compacted topic until its closing takes it back."""
    opened = decoder(Alert).decode(
        encode(
            Alert(
                id="a1",
                alarm_id="hot",
                name="",
                message="",
                level="INFO",
                alarm_type="Measure",
                device_id="d1",
                sensor_name="",
                field_name="",
                error_value=1,
                threshold=1,
                math_operator=">",
                start_date=START,
                end_date=None,
                is_resolved=False,
                recipients="",
                request_id="",
                timestamp=START,
                metadata={"transition": "opened"},
            )
        )
    )
    closed = decoder(Alert).decode(encode(opened))
    closed.is_resolved, closed.metadata = True, {"transition": "resolved"}
    sent = alarms.outgoing([opened, closed])
    assert [topic for topic, *_ in sent] == [topics.alerts.name, alarms.open_alarms.name] * 2
    assert sent[1][1:3] == (b"a1", encode(opened))
    assert sent[3][1:3] == (b"a1", None)
