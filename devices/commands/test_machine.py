"""The life of commands: legal, ended once, and never said to be done without the device's word."""

from __future__ import annotations

from collections import defaultdict
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.commands import machine
from devices.commands.model import ON_THE_WAY, TERMINAL, Life, Limits, OpenCommand, Report, Step

START = datetime(2026, 1, 1, tzinfo=UTC)
LIMITS = Limits(timeout_seconds=10, attempts=3)


def at(seconds: float) -> datetime:
    """Return the moment so many seconds after the start."""
    return START + timedelta(seconds=seconds)


def new(request_id: str, *, expires: float = 100, **fields: Any) -> OpenCommand:
    """Return a command as the stage makes it."""
    fields = {"command_type": "config", "payload": {}, "protocol": "mqtt", "exclusive": True, "order": 0, **fields}
    return OpenCommand(request_id=request_id, expires_at=at(expires), **fields)


class House:
    """One device, with a connector that takes all that may go."""

    def __init__(self) -> None:
        self.life = Life()
        self.steps: list[Step] = []
        self.sent: list[tuple[str, int]] = []

    def add(self, command: OpenCommand, seconds: float = 0) -> None:
        """Take a command."""
        self.steps += machine.accept(self.life, command, at(seconds), LIMITS)
        self.dispatch()

    def dispatch(self) -> None:
        """Hand over what may go."""
        for command in machine.candidates(self.life):
            if machine.may_go(self.life, command):
                self.sent.append((command.request_id, machine.hand_over(command)))

    def word(self, request_id: str, kind: Any, seconds: float = 0, **fields: Any) -> None:
        """Take a report."""
        word = Report(request_id=request_id, kind=kind, **fields)
        self.steps += machine.report(self.life, word, at(seconds), LIMITS)
        self.dispatch()

    def tick(self, seconds: float) -> None:
        """Let time pass."""
        steps, again = machine.pass_time(self.life, at(seconds), LIMITS)
        self.steps += steps
        for command in again:
            self.sent.append((command.request_id, machine.hand_over(command)))
        self.dispatch()

    def states(self, request_id: str) -> list[str]:
        """Return what was told of a request."""
        return [step.state for step in self.steps if step.request_id == request_id]


def test_the_whole_life() -> None:
    """Queued, sent, delivered, and successful on the device's word."""
    house = House()
    house.add(new("a"))
    house.word("a", "SENT", 1, attempt=1)
    house.word("a", "DELIVERED", 1, attempt=1)
    house.word("a", "SUCCESSFUL", 2, by_device=True)
    assert house.states("a") == ["QUEUED", "SENT", "DELIVERED", "SUCCESSFUL"]
    assert house.life.open == []


def test_an_answer_that_overtakes_the_connector() -> None:
    """A device that answers before the connector tells: each state is passed all the same, later words are void."""
    house = House()
    house.add(new("a"))
    house.word("a", "FAILED", 1, by_device=True, detail="status 0")
    house.word("a", "SENT", 2, attempt=1)
    assert house.states("a") == ["QUEUED", "SENT", "DELIVERED", "FAILED"]


def test_a_connector_cannot_tell_success() -> None:
    """SUCCESSFUL counts only as the device's word."""
    house = House()
    house.add(new("a"))
    house.word("a", "SUCCESSFUL", 1)
    assert house.states("a") == ["QUEUED"]


def test_a_duplicate_request_starts_nothing() -> None:
    """The same request id again, open or ended, changes nothing."""
    house = House()
    house.add(new("a"))
    house.add(new("a"))
    house.word("a", "SUCCESSFUL", 1, by_device=True)
    house.add(new("a"))
    assert house.states("a").count("QUEUED") == 1
    assert house.sent == [("a", 1)]


def test_one_at_a_time_by_priority() -> None:
    """An exclusive device gets one command at a time, of the others the higher priority first, then the older."""
    house = House()
    for name, priority in (("a", 0), ("b", 0), ("c", 5)):
        house.add(new(name, priority=priority, command_type=name))
    assert house.sent == [("a", 1)]
    house.word("a", "SUCCESSFUL", 1, by_device=True)
    assert house.sent[1:] == [("c", 1)]
    house.word("c", "FAILED", 1, detail="no")
    assert house.sent[2:] == [("b", 1)]


def test_a_newer_configuration_supersedes_a_queued_one() -> None:
    """What is queued and superseded fails and is never sent; what has gone out goes on."""
    house = House()
    for name in ("a", "b", "c"):
        house.add(new(name, supersedes=True))
    assert house.states("a") == ["QUEUED"]
    assert house.states("b") == ["QUEUED", "FAILED"]
    house.word("a", "SUCCESSFUL", 1, by_device=True)
    assert house.sent == [("a", 1), ("c", 1)]


def test_what_waits_at_the_coap_connector_is_replaced() -> None:
    """Over CoAP a downlink that waits for the device's next request can still be superseded, and is withdrawn."""
    house = House()
    house.add(new("a", supersedes=True, protocol="coap", exclusive=False))
    house.add(new("b", supersedes=True, protocol="coap", exclusive=False))
    assert house.states("a") == ["QUEUED", "FAILED"]
    assert [step.request_id for step in house.steps if step.withdraw] == ["a"]
    assert house.sent == [("a", 1), ("b", 1)]


def test_expiry() -> None:
    """A command that nobody sent expires; one that is on its way gets a little longer, for the connector to tell."""
    house = House()
    house.add(new("a", expires=5))
    house.add(new("b", expires=5))
    house.tick(6)
    assert house.states("b") == ["QUEUED", "EXPIRED"]
    assert house.states("a") == ["QUEUED"]
    house.tick(15)
    assert house.states("a") == ["QUEUED", "EXPIRED"]
    house.add(new("late", expires=5), 20)
    assert house.states("late") == ["QUEUED", "EXPIRED"]


@pytest.mark.parametrize(("repeatable", "attempts"), [(True, 3), (False, 1)])
def test_no_answer(repeatable: bool, attempts: int) -> None:
    """What is safe to repeat is sent again, marked as such, then ends in TIMEOUT; all else is sent once."""
    house = House()
    house.add(new("a", repeatable=repeatable))
    for attempt in range(1, attempts + 1):
        house.word("a", "SENT", attempt * 20, attempt=attempt)
        house.tick(attempt * 20 + 9)
        assert house.sent[-1] == ("a", attempt)
        house.tick(attempt * 20 + 10)
    assert [attempt for _, attempt in house.sent] == list(range(1, attempts + 1))
    assert house.states("a")[-1] == "TIMEOUT"
    marked = [step for step in house.steps if "twice" in step.detail]
    assert len(marked) == attempts - 1
    house.word("a", "SUCCESSFUL", 999, by_device=True)
    assert house.states("a")[-1] == "TIMEOUT"


def test_a_device_that_confirms_nothing_but_its_receipt() -> None:
    """Where the family has no feedback, the device's own acknowledgement is its word; a broker's is not."""
    house = House()
    house.add(new("a", protocol="coap", confirmed=False))
    house.word("a", "DELIVERED", 1, attempt=1, by_device=True)
    assert house.states("a") == ["QUEUED", "SENT", "DELIVERED", "SUCCESSFUL"]
    house.add(new("b", confirmed=False))
    house.word("b", "DELIVERED", 1, attempt=1)
    house.tick(12)
    assert house.states("b") == ["QUEUED", "SENT", "DELIVERED", "TIMEOUT"]


def test_memory_is_bounded() -> None:
    """Ended commands are forgotten by number and by age."""
    limits = Limits(keep_count=3, keep_seconds=100)
    life = Life()
    for number in range(5):
        machine.refuse(life, f"r{number}", "no", at(number), limits)
    assert [one.request_id for one in life.ended] == ["r2", "r3", "r4"]
    machine.refuse(life, "r9", "no", at(200), limits)
    assert [one.request_id for one in life.ended] == ["r9"]


IDS = st.sampled_from(["a", "b", "c", "d", "e"])
ACTIONS = st.one_of(
    st.tuples(
        st.just("add"),
        IDS,
        st.booleans(),
        st.booleans(),
        st.booleans(),
        st.integers(0, 2),
        st.integers(-5, 60),
        st.sampled_from(["mqtt", "coap"]),
    ),
    st.tuples(
        st.just("word"),
        IDS,
        st.sampled_from(["SENT", "DELIVERED", "SUCCESSFUL", "FAILED", "EXPIRED"]),
        st.integers(0, 3),
        st.booleans(),
    ),
    st.tuples(st.just("tick"), st.floats(0, 40)),
)


@given(st.lists(ACTIONS, max_size=60))
@settings(max_examples=300, deadline=None)
def test_whatever_happens(actions: list[Any]) -> None:
    """Any sequence: states pass forward, one end each, one under way at a time, success by word only."""
    house, now, said, repeatable = House(), 0.0, set(), {}
    for action in actions:
        if action[0] == "add":
            _, name, again, supersedes, confirmed, priority, expires, protocol = action
            if not machine.knows(house.life, name):
                repeatable[name] = again
            command = new(
                name,
                expires=now + expires,
                repeatable=again,
                supersedes=supersedes,
                confirmed=confirmed,
                priority=priority,
                protocol=protocol,
            )
            house.add(command, now)
        elif action[0] == "word":
            _, name, kind, attempt, by_device = action
            if by_device and kind in ("SUCCESSFUL", "DELIVERED"):
                said.add(name)
            house.word(name, kind, now, attempt=attempt, by_device=by_device)
        else:
            now += action[1]
            house.tick(now)
        assert sum(1 for command in house.life.open if command.attempts) <= 1
        wake = machine.wake_at(house.life, LIMITS)
        assert (wake is None) == (not house.life.open)
    for _ in range(50):
        now += 30
        house.tick(now)
    assert house.life.open == []
    told: dict[str, list[str]] = defaultdict(list)
    for step in house.steps:
        told[step.request_id].append(step.state)
    for name, states in told.items():
        times = [step.at for step in house.steps if step.request_id == name]
        assert times == sorted(set(times))
        assert sum(state in TERMINAL for state in states) == 1
        assert states[-1] in TERMINAL
        order = [ON_THE_WAY.index(state) for state in states[:-1]]
        assert order == sorted(order)
        assert set(order) == set(range(max(order) + 1))
        assert states[-1] != "SUCCESSFUL" or name in said
        attempts = [attempt for sent, attempt in house.sent if sent == name]
        assert attempts == list(range(1, len(attempts) + 1))
        assert len(attempts) <= (LIMITS.attempts if repeatable[name] else 1)
