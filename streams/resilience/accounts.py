"""The accounts of a stage: *received = forwarded + dead-lettered + dropped + returned + in flight*.

Guarantee: the identity holds at any moment between two steps of the event loop, in whole messages. *Forwarded* are
those whose handler succeeded and whose outputs are acknowledged; *returned* are those that were in flight when their
partition was revoked: somebody receives them again. What is dropped has a reason, and it says whether it was meant.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

#: Why a message may be dropped, and whether somebody meant that.
INTENDED_DROPS = frozenset(
    {"rejected_value", "not_persisted", "no_readings", "older_sample", "feedback", "muted", "late"}
)


@dataclass(slots=True)
class Accounts:
    """Counts of one stage since its process began, in messages."""

    stage: str
    received: int = 0
    forwarded: int = 0
    returned: int = 0
    in_flight: int = 0
    dead_lettered: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    retries: int = 0
    recreations: int = 0
    #: commits that the broker has taken
    commits: int = 0
    #: committed offsets that the log no longer had
    offset_resets: int = 0

    def deliver(self, count: int) -> None:
        """Count ``count`` messages as received and in flight."""
        self.received += count
        self.in_flight += count

    def settle(self, count: int, dead: dict[str, int] | None, dropped: dict[str, int] | None) -> None:
        """Count ``count`` messages as complete; those not among ``dead`` and ``dropped`` were forwarded."""
        self.in_flight -= count
        others = 0
        if dead:
            self.dead_lettered.update(dead)
            others += sum(dead.values())
        if dropped:
            self.dropped.update(dropped)
            others += sum(dropped.values())
        self.forwarded += count - others

    def give_back(self, count: int) -> None:
        """Count ``count`` messages in flight as returned to Kafka."""
        self.in_flight -= count
        self.returned += count

    def balance(self) -> int:
        """Return received minus all that became of it; anything but 0 is a defect."""
        return (
            self.received
            - self.forwarded
            - self.dead_lettered.total()
            - self.dropped.total()
            - self.returned
            - self.in_flight
        )

    def as_dict(self) -> dict[str, object]:
        """Return the counts with the balance, as ``accounts`` prints them."""
        return {
            "stage": self.stage,
            "received": self.received,
            "forwarded": self.forwarded,
            "dead_lettered": dict(self.dead_lettered),
            "dropped": dict(self.dropped),
            "returned": self.returned,
            "in_flight": self.in_flight,
            "retries": self.retries,
            "recreations": self.recreations,
            "commits": self.commits,
            "offset_resets": self.offset_resets,
            "balance": self.balance(),
        }
