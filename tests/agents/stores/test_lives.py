"""The lives of alerts and commands."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import msgspec
import pytest

from agents.stores.postgresql import ReadingStore
from streams.messages import Alert, AlertAction, Command, CommandState, CommandStatus
from streams.resilience.failures import FailureClass, classify

NOON = datetime(2024, 5, 1, 12, tzinfo=UTC)


def at(second: int) -> datetime:
    """Return the moment ``second`` seconds after noon."""
    return NOON + timedelta(seconds=second)


def alert(second: int, *, resolved: bool = False, **changed: Any) -> Alert:
    """Return a transition of the alert ``a`` at ``second``."""
    fields: dict[str, Any] = {
        "id": "a",
        "alarm_id": "rule",
        "name": "Too hot",
        "message": f"at {second}",
        "level": "CRITICAL",
        "alarm_type": "Measure",
        "device_id": "d",
        "sensor_name": "1",
        "field_name": "temperature",
        "error_value": 91.5,
        "threshold": 90,
        "math_operator": ">",
        "start_date": NOON,
        "end_date": at(second) if resolved else None,
        "is_resolved": resolved,
        "recipients": "a@example.org,b@example.org",
        "request_id": "r",
        "timestamp": at(second),
        "metadata": {"n": second},
    }
    return Alert(**(fields | changed))


def ack(second: int, user: str = "ann") -> AlertAction:
    """Return an acknowledgement of the alert ``a``."""
    return AlertAction(alert_id="a", device_id="d", action="ack", user=user, comment="seen", timestamp=at(second))


def command(**changed: Any) -> Command:
    """Return the command ``c``."""
    fields: dict[str, Any] = {"request_id": "c", "device_id": "d", "command_type": "set", "payload": {"on": True}}
    return Command(**(fields | changed))


def status(state: CommandState, second: int, detail: str = "") -> CommandStatus:
    """Return a step in the life of the command ``c``."""
    return CommandStatus(request_id="c", device_id="d", state=state, detail=detail, timestamp=at(second))


async def test_an_alert_is_stored_with_all_it_says(store: ReadingStore) -> None:
    """Every field comes back; value and threshold as text."""
    assert await store.write_alerts([alert(1)]) == []
    stored = await store.alert("a")
    assert stored is not None
    assert (stored["error_value"], stored["threshold"], stored["metadata"]) == ("91.5", "90", {"n": 1})
    assert (stored["start_date"], stored["end_date"], stored["is_resolved"]) == (NOON, None, False)
    assert (stored["level"], stored["message"], stored["updated_at"]) == ("CRITICAL", "at 1", at(1))
    assert [(event["kind"], event["time"]) for event in stored["transitions"]] == [("OPEN", at(1))]
    assert await store.alert("unknown") is None


@pytest.mark.parametrize("together", [True, False])
async def test_an_alerts_end_does_not_depend_on_order(store: ReadingStore, together: bool) -> None:
    """Opened, opened again, acknowledged, resolved: in any order, in one chunk or many, twice over, the end is one."""
    for n, order in enumerate(itertools.permutations(range(4))):
        steps: list[Alert | AlertAction] = [
            alert(1, id=f"a{n}"),
            alert(2, id=f"a{n}", message="worse"),
            msgspec.structs.replace(ack(3), alert_id=f"a{n}"),
            alert(4, id=f"a{n}", resolved=True),
        ]
        chosen = [steps[position] for position in order] * 2
        for chunk in [chosen] if together else [[step] for step in chosen]:
            await store.write_alerts([step for step in chunk if isinstance(step, Alert)])
            await store.write_alert_actions([step for step in chunk if isinstance(step, AlertAction)])
        stored = await store.alert(f"a{n}")
        assert stored is not None
        assert (stored["is_resolved"], stored["end_date"], stored["updated_at"]) == (True, at(4), at(4))
        assert (stored["acknowledged_at"], stored["acknowledged_by"]) == (at(3), "ann")
        kinds = [(event["kind"], event["time"]) for event in stored["transitions"]]
        assert kinds == [("OPEN", at(1)), ("OPEN", at(2)), ("ACKNOWLEDGED", at(3)), ("RESOLVED", at(4))]


async def test_a_resolved_alert_is_not_opened_by_a_late_message(store: ReadingStore) -> None:
    """Even a message with a later time does not take back an end."""
    await store.write_alerts([alert(4, resolved=True), alert(9)])
    stored = await store.alert("a")
    assert stored is not None and stored["is_resolved"] is True


async def test_the_first_acknowledgement_stays(store: ReadingStore) -> None:
    """Who saw it first is kept, in whatever order the words arrive."""
    await store.write_alerts([alert(1)])
    await store.write_alert_actions([ack(5, "bob")])
    await store.write_alert_actions([ack(3, "ann"), ack(7, "cem")])
    stored = await store.alert("a")
    assert stored is not None and stored["acknowledged_by"] == "ann"


async def test_an_acknowledgement_alone_is_no_alert(store: ReadingStore) -> None:
    """A word about an alert that is not there yet is kept, and not listed as an alert."""
    await store.write_alert_actions([ack(3)])
    assert await store.alerts() == []


async def test_one_bad_alert_is_the_only_one_refused(store: ReadingStore) -> None:
    """A text that PostgreSQL cannot hold, in a column or in the JSON of an event, takes no other alert with it."""
    bad = [alert(1, id="b1", message="a\x00b"), alert(1, id="b2", metadata={"x": "\x00"})]
    good = [alert(1, id=f"g{n}") for n in range(20)]
    refused = await store.write_alerts([*good[:7], bad[0], *good[7:], bad[1]])
    assert [entry.row.id for entry in refused] == ["b1", "b2"]
    assert {row["id"] for row in await store.alerts()} == {one.id for one in good}


async def test_alerts_are_found_by_what_they_are(store: ReadingStore) -> None:
    """Filters can be combined; the latest comes first; the limit holds."""
    await store.write_alerts(
        [
            alert(1, id="one", start_date=at(1)),
            alert(2, id="two", start_date=at(2), device_id="e", level="INFO"),
            alert(3, id="three", start_date=at(3), resolved=True),
        ]
    )
    await store.write_alert_actions(
        [AlertAction(alert_id="one", device_id="d", action="ack", user="ann", timestamp=at(5))]
    )

    async def ids(**filters: Any) -> list[str]:
        return [row["id"] for row in await store.alerts(**filters)]

    assert await ids() == ["three", "two", "one"]
    assert await ids(is_resolved=False) == ["two", "one"]
    assert await ids(is_resolved=True, device_id="d") == ["three"]
    assert await ids(is_acknowledged=True) == ["one"]
    assert await ids(is_acknowledged=False, level="INFO") == ["two"]
    assert await ids(alarm_id="rule", since=at(2), until=at(3)) == ["two"]
    assert await ids(limit=1) == ["three"]


async def test_a_commands_end_does_not_depend_on_order(store: ReadingStore) -> None:
    """The command and its steps, in any order, each twice, end in the furthest state with all that the command says."""
    for n, order in enumerate(itertools.permutations(range(4))):
        steps = [
            command(priority=3, expires_at=at(60)),
            status("QUEUED", 1),
            status("SENT", 2),
            status("SUCCESSFUL", 3, "ok"),
        ]
        for position in [*order, *order]:
            step = msgspec.structs.replace(steps[position], request_id=f"c{n}")
            if isinstance(step, Command):
                assert await store.write_commands([step]) == []
            else:
                assert await store.write_command_statuses([step]) == []
        stored = await store.command(f"c{n}")
        assert stored is not None
        assert (stored["state"], stored["detail"], stored["updated_at"]) == ("SUCCESSFUL", "ok", at(3))
        assert (stored["command_type"], stored["payload"], stored["protocol"]) == ("set", {"on": True}, "mqtt")
        assert (stored["priority"], stored["expires_at"], stored["metadata"]) == (3, at(60), {})
        assert [event["state"] for event in stored["transitions"]] == ["QUEUED", "SENT", "SUCCESSFUL"]


@pytest.mark.parametrize("end", ["SUCCESSFUL", "FAILED", "EXPIRED", "TIMEOUT"])
async def test_an_end_stays(store: ReadingStore, end: CommandState) -> None:
    """After a terminal state no other comes, not even another terminal one; the events have them all."""
    other: CommandState = "FAILED" if end != "FAILED" else "SUCCESSFUL"
    await store.write_command_statuses([status("SENT", 1), status(end, 2)])
    await store.write_command_statuses([status("DELIVERED", 3), status(other, 4), status(end, 5, "again")])
    stored = await store.command("c")
    assert stored is not None
    assert (stored["state"], stored["updated_at"], stored["detail"]) == (end, at(2), "")
    assert len(stored["transitions"]) == 5


async def test_a_step_repeated_later_brings_its_detail(store: ReadingStore) -> None:
    """A second attempt to send shows; an older one does not come back."""
    steps = [status("SENT", 2, "first attempt"), status("SENT", 5, "second attempt")]
    for request_id, order in (("c1", steps), ("c2", steps[::-1])):
        for step in order:
            await store.write_command_statuses([msgspec.structs.replace(step, request_id=request_id)])
        stored = await store.command(request_id)
        assert stored is not None and stored["detail"] == "second attempt"


async def test_a_command_that_nobody_has_touched_is_queued(store: ReadingStore) -> None:
    """A command alone has the state QUEUED; the first of two with one id stays."""
    await store.write_commands([command(), command(request_id="d")])
    await store.write_commands([command(command_type="other")])
    stored = await store.command("c")
    assert stored is not None
    assert (stored["state"], stored["command_type"], stored["transitions"]) == ("QUEUED", "set", [])
    assert await store.command("unknown") is None


async def test_one_bad_command_is_the_only_one_refused(store: ReadingStore, connection: asyncpg.Connection) -> None:
    """A number beyond its column and a text with NUL are handed back; the others are stored."""
    commands = [command(request_id=f"c{n}") for n in range(9)]
    commands[2].priority = 10**30
    commands[6].payload = {"text": "\x00"}
    refused = await store.write_commands(commands)
    assert [entry.row.request_id for entry in refused] == ["c2", "c6"]
    assert {classify(entry.exception) for entry in refused} == {FailureClass.POISON}
    assert await connection.fetchval("SELECT count(*) FROM commands") == 7
    assert {row["request_id"] for row in await store.commands(device_id="d", state="QUEUED")} == {
        f"c{n}" for n in (0, 1, 3, 4, 5, 7, 8)
    }
