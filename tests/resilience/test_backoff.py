"""Delays of 1, 2, 4 … 64 s with jitter, and when they start over."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from streams.resilience.backoff import Backoff


def test_the_ceiling_doubles_to_its_cap() -> None:
    """1, 2, 4, 8, 16, 32, 64, and 64 from then on."""
    backoff = Backoff(rng=random.Random(1))
    ceilings = []
    for _ in range(9):
        ceilings.append(backoff.ceiling())
        backoff.next()
    assert ceilings == [1, 2, 4, 8, 16, 32, 64, 64, 64]


@given(
    st.integers(0, 200),
    st.floats(0.001, 60),
    st.floats(0.001, 3600),
    st.integers(),
)
def test_every_delay_is_between_its_floor_and_its_ceiling(attempt: int, base: float, cap: float, seed: int) -> None:
    """At least half of the base, at most the ceiling; however many attempts there were."""
    backoff = Backoff(base, cap, rng=random.Random(seed), attempt=attempt)
    ceiling = backoff.ceiling()
    delay = backoff.next()
    assert min(base, cap) / 2 <= delay <= ceiling <= cap


def test_jitter_is_seeded() -> None:
    """The same seed gives the same delays, another seed others."""
    one, two, other = (Backoff(rng=random.Random(seed)) for seed in (1, 1, 2))
    delays = [[backoff.next() for _ in range(8)] for backoff in (one, two, other)]
    assert delays[0] == delays[1] != delays[2]


def test_only_a_stretch_of_health_starts_over() -> None:
    """Success right after a failure leaves the delay where it is; health_seconds of it bring it back to the base."""
    now = [0.0]
    backoff = Backoff(health_seconds=30, rng=random.Random(1), clock=lambda: now[0])
    for _ in range(4):
        backoff.next()
    now[0] = 29.9
    backoff.healthy()
    assert backoff.ceiling() == 16
    now[0] = 30.0
    backoff.healthy()
    assert backoff.ceiling() == 1


def test_health_of_what_never_failed_changes_nothing() -> None:
    """healthy() may be called at every success."""
    backoff = Backoff()
    backoff.healthy()
    assert backoff.attempt == 0


def test_reset_starts_over_at_once() -> None:
    """For a retry whose own object has succeeded."""
    backoff = Backoff(rng=random.Random(1))
    backoff.next()
    backoff.next()
    backoff.reset()
    assert backoff.ceiling() == 1
