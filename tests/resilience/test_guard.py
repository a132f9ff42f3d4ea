"""The dead-letter guard, as the pure thing that it is, and in a stage."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

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
    allowed = [guard.allows(fleet[number % 20], "bad") for number in range(1100)]
    assert allowed.index(False) == 999
    assert not any(allowed[999:])
    assert guard.tripped is not None
    assert "from 20 of 20 devices" in guard.tripped


def test_one_noisy_device_trips_nothing() -> None:
    """A single device, however many dead letters it makes, stops nobody."""
    guard = Guard(messages=1000, devices=10)
    for _ in range(50_000):
        assert guard.allows(b"noisy", "bad")
        guard.passed([b"good"])
    assert guard.tripped is None


def test_few_devices_among_many_trip_nothing() -> None:
    """Ten loud bad devices of a fleet of a hundred stop nobody."""
    guard = Guard(messages=1000, devices=10)
    fleet = keys(100)
    for number in range(20_000):
        assert guard.allows(fleet[number % 10], "bad")
        if number % 10 == 0:
            guard.passed(fleet[10:])
    assert guard.tripped is None


def test_a_minority_trips_nothing() -> None:
    """As long as most messages are good, dead letters go out."""
    guard = Guard(messages=1000, devices=10)
    fleet = keys(50)
    for number in range(10_000):
        assert guard.allows(fleet[number % 50], "bad")
        guard.passed([fleet[number % 50]] * 2)
    assert guard.tripped is None


def test_a_probe_that_succeeds_ends_the_stop() -> None:
    """One message handled after the stop lets the stage go on; so does an operator."""
    guard = Guard(messages=100, devices=10)
    fleet = keys(10)
    for number in range(100):
        guard.allows(fleet[number % 10], "bad")
    assert guard.tripped is not None
    assert guard.passed([b"d1"])
    assert guard.tripped is None
    assert guard.allows(b"d1", "bad")
    for number in range(100):
        guard.allows(fleet[number % 10], "bad")
    assert guard.tripped is not None
    guard.release()
    assert guard.allows(b"d1", "bad")


def test_switched_off_it_allows_everything() -> None:
    """DLQ_GUARD=false lets every dead letter out."""
    guard = Guard(messages=10, devices=1, enabled=False)
    assert all(guard.allows(key, "bad") for key in keys(100))


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
