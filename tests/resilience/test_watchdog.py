"""The watch over the event loop, with a clock and an end that are doubles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from streams.resilience.watchdog import AT_HAND, EXIT_CODE, Culprits, Watchdog


class Time:
    """A clock that the test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now

    def pass_by(self, seconds: float, dog: Watchdog) -> bool:
        """Let time pass as it does while the process runs: the watch looks twice a second."""
        for _ in range(int(seconds * 2)):
            self.now += 0.5
            if dog.look():
                return True
        return False


class Record:
    """A record."""

    topic, partition, offset = "t", 3, 17


def watchdog(folder: Path, clock: Time, ended: list[int]) -> Watchdog:
    """Return a watch that notes the end instead of bringing it about."""
    end: Any = ended.append
    return Watchdog(20.0, Culprits(folder / "culprits.json"), clock=clock, end=end)


def test_a_loop_that_turns_is_left_alone(tmp_path: Path) -> None:
    """As long as the loop beats, nothing happens."""
    clock, ended = Time(), list[int]()
    dog = watchdog(tmp_path, clock, ended)
    for _ in range(10):
        assert not clock.pass_by(10, dog)
        dog.beat()
    assert ended == []


def test_a_blocked_loop_ends_the_worker_and_blames_the_record(tmp_path: Path) -> None:
    """After the limit the worker ends; the record at hand is condemned once it has done so twice."""
    clock, ended = Time(), list[int]()
    AT_HAND.record = Record
    try:
        assert watchdog_blocked(tmp_path, clock, ended)
        assert Culprits(tmp_path / "culprits.json").condemned() == frozenset()
        assert watchdog_blocked(tmp_path, clock, ended)
    finally:
        AT_HAND.record = None
    assert ended == [EXIT_CODE, EXIT_CODE]
    assert Culprits(tmp_path / "culprits.json").condemned() == {"t:3:17"}


def watchdog_blocked(folder: Path, clock: Time, ended: list[int]) -> bool:
    """Let a new worker's loop be blocked for longer than the limit."""
    return clock.pass_by(30, watchdog(folder, clock, ended))


def test_a_process_that_was_stopped_is_not_blocked(tmp_path: Path) -> None:
    """When the watch itself stood still, the loop is given its time anew."""
    clock, ended = Time(), list[int]()
    dog = watchdog(tmp_path, clock, ended)
    clock.now += 3600
    assert not dog.look()
    assert not clock.pass_by(15, dog)
    assert ended == []


def test_a_file_that_cannot_be_read_is_no_obstacle(tmp_path: Path) -> None:
    """A broken file costs the memory of culprits, not the worker."""
    (tmp_path / "culprits.json").write_text("{")
    assert Culprits(tmp_path / "culprits.json").condemned() == frozenset()
