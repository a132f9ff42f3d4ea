"""The counting of ``bench.losses`` and ``bench.outage``."""

from __future__ import annotations

import pytest

from bench.child import BenchError
from bench.ledger import Tally, tally
from bench.outage import Moment, slope, summary


def keys(device: str, *numbers: int) -> list[tuple[str, int]]:
    """Return keys of one device."""
    return [(device, number) for number in numbers]


def test_what_is_in_neither_topic_is_lost() -> None:
    """Each acknowledged message is delivered, a dead letter or lost, once; the device is part of its name."""
    acknowledged = keys("a", 0, 1, 2, 3) + keys("b", 0)
    found = tally(acknowledged, keys("a", 0, 1), keys("a", 2))
    assert found == Tally(acknowledged=5, delivered=2, dead_lettered=1, lost=2, copies=0)


def test_copies_are_counted_in_both_topics_and_hide_no_loss() -> None:
    """A message that came three times has two copies; one that is delivered and a dead letter is delivered."""
    found = tally(keys("a", 0, 1, 2), keys("a", 0, 0, 0, 1), keys("a", 1))
    assert found == Tally(acknowledged=3, delivered=2, dead_lettered=0, lost=1, copies=3)


def test_what_was_never_acknowledged_counts_as_nothing() -> None:
    """Its acknowledgement was under way when the broker went; nobody was told that it is safe."""
    found = tally(keys("a", 0), keys("a", 0, 1, 1), [])
    assert found == Tally(acknowledged=1, delivered=1, dead_lettered=0, lost=0, copies=0)


def test_the_summary_of_an_outage() -> None:
    """Start is the median before it, what comes after its end is left out, the slope is per minute."""
    moments = [Moment(float(at), 100.0 + (at / 60 if at > 0 else 0.0)) for at in range(-20, 130)]
    found = summary(moments, 120.0)
    assert (found["start_mib"], found["max_mib"], found["end_mib"]) == (100.0, 102.0, 101.9)
    assert found["slope_mib_per_minute"] == pytest.approx(1.0)
    assert slope(moments[:1]) == 0.0


def test_no_summary_without_samples() -> None:
    """An outage that nobody has watched is an error, not a flat line."""
    with pytest.raises(BenchError):
        summary([Moment(5.0, 1.0)], 10.0)
