"""received = forwarded + dead-lettered + dropped + returned + in flight, whatever happens."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from streams.resilience.accounts import INTENDED_DROPS, Accounts


@st.composite
def fates(draw: st.DrawFn) -> tuple[int, dict[str, int], dict[str, int]]:
    """Draw what becomes of one delivery: its count, and how many of it are dead letters and drops, by name."""
    dead = draw(st.dictionaries(st.sampled_from(["poison", "exhausted", "rejected"]), st.integers(1, 5), max_size=3))
    dropped = draw(st.dictionaries(st.sampled_from(sorted(INTENDED_DROPS)), st.integers(1, 5), max_size=3))
    return sum(dead.values()) + sum(dropped.values()) + draw(st.integers(0, 20)), dead, dropped


@given(st.lists(fates(), max_size=30), st.data())
def test_the_identity_holds_after_every_step(
    deliveries: list[tuple[int, dict[str, int], dict[str, int]]], data: st.DataObject
) -> None:
    """For any sequence of deliver, settle and give back, in any order: the balance is 0 and no count is negative."""
    accounts = Accounts("stage")
    waiting, open_ = list(deliveries), []
    while waiting or open_:
        if waiting and (not open_ or data.draw(st.booleans())):
            entry = waiting.pop()
            accounts.deliver(entry[0])
            open_.append(entry)
        else:
            count, dead, dropped = open_.pop(data.draw(st.integers(0, len(open_) - 1)))
            if data.draw(st.booleans()):
                accounts.settle(count, dead or None, dropped or None)
            else:
                accounts.give_back(count)
        assert accounts.balance() == 0
        assert min(accounts.received, accounts.forwarded, accounts.returned, accounts.in_flight) >= 0
    assert accounts.in_flight == 0
    assert accounts.received == sum(count for count, _, _ in deliveries)


def test_the_counts_are_shown_with_their_balance() -> None:
    """What ``accounts`` prints has every term of the identity, by class and by reason."""
    accounts = Accounts("normalizer")
    accounts.deliver(10)
    accounts.settle(7, {"poison": 2}, {"feedback": 1})
    accounts.give_back(1)
    assert accounts.as_dict() == {
        "stage": "normalizer",
        "received": 10,
        "forwarded": 4,
        "dead_lettered": {"poison": 2},
        "dropped": {"feedback": 1},
        "returned": 1,
        "in_flight": 2,
        "retries": 0,
        "recreations": 0,
        "commits": 0,
        "offset_resets": 0,
        "balance": 0,
    }
