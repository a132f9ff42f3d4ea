"""What comes again, and when."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from streams.resilience.redelivery import Redelivery, Turn


def new(held: list[str] | None = None) -> Redelivery[str, int]:
    """Return one whose events are their own places; ``held`` has the partitions held back."""
    held = held if held is not None else []
    return Redelivery(lambda event: event, held.append, held.remove)


def test_nothing_held_back_means_read_on() -> None:
    """Empty is false, and says so."""
    lanes = new()
    assert not lanes
    assert lanes.next(0.0, 3) is Turn.READ
    assert lanes.due() is None


def test_held_back_events_come_in_order_before_those_behind() -> None:
    """What failed goes to the front, what came in goes to the end; the partition is held until the last is given."""
    held: list[str] = []
    lanes = new(held)
    lanes.hold("p0", [4, 5], due=10.0)
    assert lanes.behind("p0", 6)
    assert not lanes.behind("p1", 1)
    lanes.hold("p0", [2, 3], due=5.0)
    assert held == ["p0"]
    assert lanes.next(9.9, 0) is Turn.READ
    assert lanes.due() == 10.0
    assert [lanes.next(10.0, 0) for _ in range(5)] == [2, 3, 4, 5, 6]
    assert held == []
    assert not lanes


def test_other_partitions_are_not_held_up() -> None:
    """One that is due goes before one that is not, whichever was held first."""
    lanes = new()
    lanes.hold("p0", [1], due=100.0)
    lanes.hold("p1", [2])
    assert lanes.next(0.0, 0) == 2
    assert lanes.next(0.0, 0) is Turn.READ


def test_an_event_tried_alone_is_the_only_one_in_hand() -> None:
    """It waits until the body has nothing else, and nothing is given or read before it is finished."""
    lanes = new()
    lanes.hold("p0", [1, 2], alone=True)
    lanes.hold("p1", [7])
    assert lanes.next(0.0, in_hand=2) is Turn.WAIT
    assert lanes.next(0.0, in_hand=0) == 1
    assert lanes.alone == 1
    assert lanes.next(0.0, in_hand=1) is Turn.WAIT
    lanes.finished(7)
    assert lanes.next(0.0, in_hand=1) is Turn.WAIT
    lanes.finished(1)
    assert lanes.next(0.0, in_hand=0) == 2
    lanes.finished(2)
    assert lanes.next(0.0, in_hand=0) == 7
    assert lanes.next(0.0, in_hand=1) is Turn.READ


def test_forgetting_a_partition_lets_the_others_be() -> None:
    """A revoked partition is released with all that it held back; the rest stays."""
    held: list[str] = []
    lanes = new(held)
    lanes.hold("p0", [1, 2], alone=True)
    lanes.hold("p1", [3])
    lanes.forget(["p0", "unknown"])
    assert held == ["p1"]
    assert len(lanes) == 1
    assert lanes.next(0.0, 0) == 3
    lanes.hold("p0", [1])
    assert lanes.next(0.0, in_hand=5) == 1


@given(st.lists(st.tuples(st.sampled_from(["p0", "p1"]), st.integers(0, 50), st.booleans()), max_size=40))
def test_every_event_comes_once_and_in_order(holds: list[tuple[str, int, bool]]) -> None:
    """Whatever is held back, alone or not, comes exactly once, and each partition's in their order."""
    held: list[str] = []
    lanes: Redelivery[str, tuple[int, int]] = Redelivery(lambda event: event[0], held.append, held.remove)
    expected: dict[str, list[tuple[int, int]]] = {}
    for number, (tp, place, alone) in enumerate(holds):
        event = (place, number)
        lanes.hold(tp, [event], alone=alone)
        expected.setdefault(tp, []).append(event)
    partition = {event: tp for tp, events in expected.items() for event in events}
    given_: dict[str, list[int]] = {}
    while lanes:
        event = lanes.next(0.0, 0)
        assert not isinstance(event, Turn)
        given_.setdefault(partition.pop(event), []).append(event[0])
        lanes.finished(event)
    assert not partition
    assert not held
    assert given_ == {tp: sorted(place for place, _ in events) for tp, events in expected.items()}
