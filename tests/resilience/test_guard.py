"""The dead-letter guard, as the pure thing that it is, and in a stage."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from faust.types import TP

from streams.resilience.failures import Poison, Rejected, SetAside
from streams.resilience.guard import Guard
from streams.resilience.settling import Settling
from tests.resilience.harness import Rig, numbered


def keys(count: int) -> list[bytes]:
    """Return the ids of some devices."""
    return [f"d{number}".encode() for number in range(count)]


def test_most_of_many_devices_trips_it() -> None:
    """When most messages of most devices would be dead letters, the next one is held, and so are those after it."""
    guard = Guard(messages=1000, devices=10)
    fleet = keys(20)
    allowed = [guard.allows(fleet[number % 20], "bad", number) for number in range(1100)]
    assert allowed.index(False) == 999
    assert not any(allowed[999:])
    assert guard.tripped is not None
    assert "from 20 of 20 devices" in guard.tripped


def test_one_noisy_device_trips_nothing() -> None:
    """A single device, however many dead letters it makes, stops nobody."""
    guard = Guard(messages=1000, devices=10)
    for _ in range(50_000):
        assert guard.allows(b"noisy", "bad", 0)
        guard.passed([b"good"], [-1])
    assert guard.tripped is None


def test_few_devices_among_many_trip_nothing() -> None:
    """Ten loud bad devices of a fleet of a hundred stop nobody."""
    guard = Guard(messages=1000, devices=10)
    fleet = keys(100)
    for number in range(20_000):
        assert guard.allows(fleet[number % 10], "bad", number)
        if number % 10 == 0:
            guard.passed(fleet[10:], [-1])
    assert guard.tripped is None


def test_a_minority_trips_nothing() -> None:
    """As long as most messages are good, dead letters go out."""
    guard = Guard(messages=1000, devices=10)
    fleet = keys(50)
    for number in range(10_000):
        assert guard.allows(fleet[number % 50], "bad", number)
        guard.passed([fleet[number % 50]] * 2, [-1])
    assert guard.tripped is None


def test_a_probe_that_succeeds_ends_the_stop() -> None:
    """One of the held messages, handled, lets the stage go on, no other does; so does an operator."""
    guard = Guard(messages=100, devices=10)
    fleet = keys(10)
    for number in range(100):
        guard.allows(fleet[number % 10], "bad", number)
    assert guard.tripped is not None
    assert not guard.allows(b"d3", "bad", 103)
    assert not guard.passed([b"d1"], [1, 98, 104])
    assert guard.tripped is not None
    assert guard.passed([b"d3"], [103])
    assert guard.tripped is None
    assert guard.allows(b"d1", "bad", 0)
    for number in range(100):
        guard.allows(fleet[number % 10], "bad", number)
    assert guard.tripped is not None
    guard.release()
    assert guard.allows(b"d1", "bad", 0)


def test_a_stop_ends_with_its_last_probe() -> None:
    """When all that is held is somebody else's now, nothing could end the stop: it ends, and a new window begins."""
    guard = Guard(messages=100, devices=10)
    fleet = keys(10)
    for number in range(101):
        guard.allows(fleet[number % 10], "bad", (number % 2, number))
    assert guard.held == {(1, 99), (0, 100)}
    assert not guard.forget(lambda message: message[0] == 1)
    assert guard.tripped is not None
    assert guard.forget(lambda message: message[0] == 0)
    assert guard.tripped is None
    assert not guard.forget(lambda _: True)


def test_switched_off_it_allows_everything() -> None:
    """DLQ_GUARD=false lets every dead letter out."""
    guard = Guard(messages=10, devices=1, enabled=False)
    assert all(guard.allows(key, "bad", key) for key in keys(100))


class Bench(Settling):
    """Judges failures of chunks; what becomes of them is not looked at."""

    def __init__(self) -> None:
        self.app: Any = SimpleNamespace(guard=Guard(messages=100, devices=10), on_guard=lambda: None)
        self._attempts = {}

    def _letter(self, record: Any, exc: BaseException, kind: str, *_: Any) -> Any:
        return record.key, kind, str(exc)


def test_what_is_set_aside_is_no_sign_of_a_wrong_deployment() -> None:
    """SetAside makes dead letters of class rejected for as long as it lasts, and trips nothing; Rejected does."""
    delivery: Any = SimpleNamespace(tp=("t", 0), note_dead=lambda *_: None)
    for error, stopped in ((SetAside("driver_aside"), False), (Rejected("no_profile"), True)):
        bench = Bench()
        made = [
            bench.judge(SimpleNamespace(key=b"d%d" % (number % 20), offset=number), error, delivery)
            for number in range(200)
        ]
        assert made[0] == (b"d0", "rejected", str(error))
        assert (bench.app.guard.tripped is not None) is stopped
        assert (None in made) is stopped


async def test_a_stopped_stage_is_probed_at_its_own_pace() -> None:
    """However long the backoff has become, a message that was held is tried again within ``guard_probe_seconds``."""
    good = False
    options = {"guard_messages": 10, "guard_devices": 1, "guard_probe_seconds": 0.01}
    async with Rig(retry_base_seconds=3600, retry_cap_seconds=3600, **options) as rig:

        @rig.app.agent(rig.topic("in"))
        async def work(stream: Any) -> None:
            nonlocal good
            async for _ in stream:
                if not good:
                    raise Poison("not of this world")

        await rig.begin("in")
        await rig.feed("in", 0, *numbered(30))
        await rig.until(lambda: rig.app.guard.tripped is not None)
        good = True
        await rig.until(lambda: rig.mark("in") == 30)
        assert rig.app.guard.tripped is None


async def test_a_storm_of_most_messages_stays_stopped() -> None:
    """Two thirds of what every device sends is bad: the stage stops at the window's end, good ones do not free it."""
    options = {"guard_messages": 60, "guard_devices": 10, "guard_probe_seconds": 0.01}
    async with Rig(retry_base_seconds=0.01, retry_cap_seconds=0.01, **options) as rig:

        async def one(message: Any, _: Any) -> None:
            if message % 3:
                raise Poison("not of this world")

        @rig.app.agent(rig.chunk_topic("in", int))
        async def work(stream: Any) -> None:
            async for chunk in stream:
                await chunk.each(one)

        await rig.begin("in")
        for partition in range(2):
            records = [
                record
                for number in range(300)
                for record in rig.records("in", partition, b"%d" % number, key=b"d%d" % (number % 20))
            ]
            await rig.deliver({TP("in", partition): records})
        await rig.until(lambda: rig.app.guard.tripped is not None and len(rig.app.guard.held) == 2)
        for _ in range(20):
            await asyncio.sleep(0.01)
            assert rig.app.guard.tripped is not None
        assert len(rig.letters()) < 60
        rig.app.guard.release()
        await rig.until(lambda: rig.app.guard.tripped is not None and len(rig.app.guard.held) == 2)
        assert 40 < len(rig.letters()) < 120
