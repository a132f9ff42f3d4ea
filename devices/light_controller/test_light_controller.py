"""The light controller driver: frames both ways, schedules that add up, commands as the vectors have them."""

import json
from binascii import hexlify
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices import testing
from devices.light_controller import schedule
from devices.light_controller.driver import LightControllerDriver
from devices.light_controller.schedule import Task, build_frame, describe, merge, pack_alarm, parse, unpack_alarm
from devices.model import CommandError, DecodeError
from devices.testing import readme_shows, shipped_profile, table, uplink

VECTORS = json.loads(Path(__file__).with_name("vectors.json").read_text())
DRIVER = LightControllerDriver()
STATE = {"broker_id": "b-7", "command_topic": "broker_data/b-7/command"}
TASK = Task(task_id=3, time_beg=540, duration=60, day=2, channel=1, active=True, run_once=False)

tasks = st.builds(
    Task,
    task_id=st.integers(0, 15),
    time_beg=st.integers(0, 2047),
    duration=st.integers(0, 2047),
    day=st.integers(0, 7),
    channel=st.integers(0, 1),
    active=st.booleans(),
    run_once=st.booleans(),
)


def decode(payload: Any, device_id: Any = "2121004") -> Any:
    message = uplink(payload, f"broker_data/b-7/{device_id}/scheduler_data", device_id=device_id)
    return DRIVER.decode(message, shipped_profile("light_controller"))


def command(kind: Any, payload: Any) -> Any:
    sent = DRIVER.encode(kind, payload, request_id="r-1", device_id="2121004", state=STATE, now=testing.NOW)
    return sent, msgspec.json.decode(sent.data)


@pytest.mark.parametrize("vector", VECTORS["frames"])
@pytest.mark.parametrize("twice", [False, True], ids=["hex", "hex of hex"])
def test_vector(vector: Any, twice: Any) -> None:
    """A captured frame reads as it says, as hexadecimal and as hexadecimal of hexadecimal."""
    payload = hexlify(vector["hex"].encode()) if twice else vector["hex"].encode()
    message = parse(payload)
    assert message.device_id == vector["id"]
    assert message.epoch == vector["epoch"]
    assert message.header == vector["sync_header"]
    assert message.alarm == vector["sync_alarm"]
    assert message.operation == vector["operation"]
    assert message.task_count == vector["task_count"]
    (reading,) = decode(payload, str(vector["id"]))
    assert reading.timestamp == datetime.fromtimestamp(vector["epoch"], UTC)
    assert table([reading]) == {"SCHEDULE": {"operation": "read_all", "task_count": 7}}
    assert reading.metadata["category"] == "schedule"


def test_commands_are_those_of_the_vectors() -> None:
    """The words of a task's configuration and of read all are the captured ones."""
    vector = VECTORS["commands"]["config_task_3"]
    sent, message = command("light_config_task", vector["in"])
    assert (message["sync_header"], message["sync_alarm"]) == (vector["sync_header"], vector["sync_alarm"])
    assert (message["id_capteur"], message["uid"]) == (2121004, "r-1-b-7")
    assert message["epoch"] == int(testing.NOW.timestamp())
    assert (sent.route, sent.qos, sent.retain) == ("broker_data/b-7/command", 1, False)
    _, message = command("light_read_all", {})
    assert [message["sync_header"], message["sync_alarm"]] == VECTORS["commands"]["read_all"]


@pytest.mark.parametrize(
    ("kind", "payload", "header"),
    [
        ("light_read_single", {"task_id": 5}, 0x05),
        ("light_delete_task", {"task_id": 5}, 0xC5),
        ("light_delete_all", {}, 0xE0),
    ],
)
def test_other_commands(kind: Any, payload: Any, header: Any) -> None:
    """Reading and deleting set their bits of (set, all, clear) and name the task."""
    _, message = command(kind, payload)
    assert (message["sync_header"], message["sync_alarm"]) == (header, 0)


@pytest.mark.parametrize("bits", range(8))
def test_every_combination_of_set_all_clear(bits: Any) -> None:
    """Five combinations are operations; the other three mean nothing and are poison."""
    header = bits << 5 | 3
    payload = schedule.FRAME.pack(2121004, 1_750_000_000, header, pack_alarm(TASK)).hex()
    wanted = {0b000: "read_task", 0b001: "read_all", 0b100: "create", 0b110: "delete", 0b111: "delete_all"}.get(bits)
    if wanted is None:
        with pytest.raises(DecodeError, match="no operation"):
            decode(payload)
        return
    (reading,) = decode(payload)
    assert reading.values[0] == wanted
    assert reading.index == ("SCHEDULE" if "all" in wanted else "TASK_3")
    assert len(reading.values) == {"read_task": 7, "create": 7, "read_all": 2, "delete": 1, "delete_all": 1}[wanted]


def test_a_task_is_a_reading() -> None:
    """The task that a message carries is read with its fields."""
    (reading,) = decode(build_frame(2121004, 1_750_000_000, "create", task_id=3, alarm=pack_alarm(TASK)))
    fields = {"time_beg": 540, "duration": 60, "day": 2, "channel": 1, "active": True, "run_once": False}
    assert table([reading])["TASK_3"] == {"operation": "create", **fields}
    assert reading.metadata["units"][1:3] == ["min", "min"]
    assert reading.timestamp == datetime.fromtimestamp(1_750_000_000, UTC)
    assert merge(None, reading.metadata["schedule"])["tasks"] == {"3": fields}


def test_clock_that_was_never_set() -> None:
    """An epoch of 0 is no time: the reading has that of its arrival."""
    assert decode(build_frame(2121004, 0, "read_all"))[0].timestamp == testing.NOW


@pytest.mark.parametrize(
    "payload", ["", "00" * 12, "00" * 14, "zz" * 13, "00" * 26, "0" * 25, b"\xff" * 26, b"\xff" * 52]
)
def test_what_is_no_message_is_poison(payload: Any) -> None:
    """Wrong length, no digits, digits of no digits: DecodeError."""
    with pytest.raises(DecodeError):
        decode(payload, "0")


def test_message_of_another_device_is_poison() -> None:
    """A message whose id is not its topic's device is refused."""
    with pytest.raises(DecodeError, match="of device 1"):
        decode(build_frame(1, 0, "read_all"), "2")


@given(tasks)
def test_task_words_round_trip(task: Any) -> None:
    """Every task is the task of its word."""
    assert unpack_alarm(pack_alarm(task)) == task


@given(st.integers(0, 2**32 - 1))
def test_every_word_is_a_task(word: Any) -> None:
    """Every word packs to itself."""
    assert pack_alarm(unpack_alarm(word)) == word


def test_merge() -> None:
    """Messages add up to the schedule: create and read put, delete takes, delete all and a count of 0 empty."""

    def message(operation: Any, task_id: Any = 0, **fields: Any) -> Any:
        return describe(parse(build_frame(1, 50, operation, task_id=task_id, **fields)))

    state = merge(None, message("read_all", alarm=2 << 25))
    assert state == {"tasks": {}, "task_count": 2, "epoch": 50}
    state = merge(state, message("read_task", 3, alarm=pack_alarm(TASK)))
    assert state["task_count"] == 2
    created = merge(state, message("create", 4, alarm=pack_alarm(TASK)))
    assert set(state["tasks"]) == {"3"}
    assert set(created["tasks"]) == {"3", "4"}
    assert created["task_count"] is None
    assert created["tasks"]["4"]["time_beg"] == 540
    assert merge(created, message("create", 4, alarm=pack_alarm(TASK))) == created
    deleted = merge(created, message("delete", 3))
    assert set(deleted["tasks"]) == {"4"}
    assert merge(deleted, message("delete", 3)) == deleted
    assert merge(created, message("delete_all")) == {"tasks": {}, "task_count": 0, "epoch": 50}
    assert merge(created, message("read_all")) == {"tasks": {}, "task_count": 0, "epoch": 50}


operations = st.lists(st.tuples(st.sampled_from(list(schedule.HEADERS)), st.integers(0, 15), tasks), max_size=30)


def model(steps: Any) -> dict[str, Any]:
    """Return the tasks after ``steps``, from the last word on each: what the controller itself must have."""
    since = max((n for n, (op, _, _) in enumerate(steps) if op == "delete_all"), default=-1)
    last = {task_id: (op, task) for op, task_id, task in steps[since + 1 :] if op in ("create", "read_task", "delete")}
    return {
        str(task_id): {name: getattr(task, name) for name in schedule.TASK_FIELDS}
        for task_id, (op, task) in last.items()
        if op != "delete"
    }


@given(operations)
def test_a_schedule_is_the_last_word_on_each_task(steps: Any) -> None:
    """Whatever is created, read, deleted in whatever order: each task is as last said, none but these is there."""
    state: Any = None
    for op, task_id, task in steps:
        alarm = pack_alarm(task) if op != "read_all" else 15 << 25
        before = json.dumps(state)
        after = merge(state, describe(parse(build_frame(1, 7, op, task_id=task_id, alarm=alarm))))
        assert json.dumps(state) == before
        state = after
    assert (state or {"tasks": {}})["tasks"] == model(steps)


@pytest.mark.parametrize("bits", range(8))
@pytest.mark.parametrize("twice", [False, True], ids=["hex", "hex of hex"])
def test_every_combination_changes_the_schedule_as_it_says(bits: Any, twice: Any) -> None:
    """What each (set, all, clear) does to a schedule of tasks 3 and 4, written either way; three are no message."""
    three = {"time_beg": 540, "duration": 60, "day": 2, "channel": 1, "active": True, "run_once": False}
    other = {**three, "time_beg": 1}
    before = {"tasks": {"3": other, "4": other}, "task_count": 2, "epoch": 1}
    vector = VECTORS["commands"]["config_task_3"]
    frame = schedule.FRAME.pack(2121004, 50, bits << 5 | 3, vector["sync_alarm"]).hex().encode()
    message = uplink(hexlify(frame) if twice else frame, "broker_data/b-7/2121004/scheduler_data", device_id="2121004")
    wanted = {
        0b000: ({"3": three, "4": other}, 2),
        0b001: ({"3": other, "4": other}, 3),
        0b100: ({"3": three, "4": other}, None),
        0b110: ({"4": other}, None),
        0b111: ({}, 0),
    }.get(bits)
    if wanted is None:
        with pytest.raises(DecodeError, match="no operation"):
            DRIVER.change_of(message)
        return
    after = DRIVER.merge(before, DRIVER.change_of(message))
    assert (after["tasks"], after["task_count"], after["epoch"]) == (*wanted, 50)
    index, values = DRIVER.summary(after)
    assert (index, values["known"], values["task_count"]) == ("SCHEDULE_STATE", len(wanted[0]), wanted[1])
    assert json.loads(str(values["tasks"])) == wanted[0]
    assert values["complete"] is (len(wanted[0]) == wanted[1])


@given(operations, st.integers(0, 30))
def test_merging_a_stretch_again_changes_nothing(steps: Any, start: Any) -> None:
    """A stretch of messages that is delivered again, in order, ends in the same schedule; JSON holds it."""
    messages = [
        describe(parse(build_frame(1, n, op, task_id=i, alarm=pack_alarm(t)))) for n, (op, i, t) in enumerate(steps)
    ]
    state: Any = None
    for message in messages:
        state = merge(state, message)
    again = state
    for message in messages[start:]:
        again = merge(again, message)
    if state is not None:
        assert again["tasks"] == state["tasks"]
        if start < len(messages):
            assert again == state
        assert json.loads(json.dumps(state)) == state
        assert len(state["tasks"]) <= 16


@pytest.mark.parametrize(
    ("kind", "payload", "pointer"),
    [
        (
            "light_config_task",
            {"task_id": 16, "time_beg": 0, "duration": 1, "day": 0, "channel": 0},
            "/payload/task_id",
        ),
        ("light_config_task", {"task_id": 1}, "/payload"),
        ("light_read_single", {}, "/payload"),
        ("light_delete_all", {"task_id": 1}, "/payload"),
        ("config", {}, "/command_type"),
    ],
)
def test_wrong_command_is_pointed_at(kind: Any, payload: Any, pointer: Any) -> None:
    """What a command has wrong is named by a JSON pointer."""
    with pytest.raises(CommandError) as caught:
        command(kind, payload)
    assert caught.value.pointer == pointer


def test_feedback_reaches_this_family_too() -> None:
    """The broker's feedback is matched by the id before the last dash."""
    message = uplink('{"uid": "r-1-b", "status": 0}', "broker_data/b/feedback", device_id="b")
    feedback = DRIVER.feedback(message)
    assert feedback is not None
    assert (feedback.request_id, feedback.success) == ("r-1", False)
    assert DRIVER.state_of(message) == {}
    assert DRIVER.change_of(message) == {}


def test_readme_shows_the_profile() -> None:
    """The sample configuration in the README is the file."""
    assert readme_shows("light_controller", "light_controller")
