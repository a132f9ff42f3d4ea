"""Which event a stream gets next when some of them have to come again.

Guarantees: what is held back of a partition comes in order, before all that came in behind it, while the other
partitions go on; an event that is tried *alone*, because nobody knows which of several made the body raise, is the only
one in the body's hand until it is finished.

Usable without Faust: partitions and events are opaque; ``order(event)`` is the place of an event in its partition. Not
thread-safe.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

TP = TypeVar("TP")
E = TypeVar("E")


class Turn(enum.Enum):
    """What a stream may do next, where no event comes again just now."""

    READ = "read"
    #: nothing may be given before something that the body has in hand is finished
    WAIT = "wait"


class Lane(Generic[E]):
    """The events of one partition that are held back, in order; none is given before ``due`` (monotonic seconds)."""

    __slots__ = ("due", "events")

    def __init__(self) -> None:
        self.events: deque[E] = deque()
        self.due = 0.0


class Redelivery(Generic[TP, E]):
    """The events of one stream that come again.

    ``on_hold(tp)`` and ``on_release(tp)`` are called when the first event of a partition is held back and when the last
    one has been given.
    """

    def __init__(
        self,
        order: Callable[[E], int],
        on_hold: Callable[[TP], None] = lambda _tp: None,
        on_release: Callable[[TP], None] = lambda _tp: None,
    ) -> None:
        self._order = order
        self._on_hold = on_hold
        self._on_release = on_release
        self.lanes: dict[TP, Lane[E]] = {}
        self._singles: set[E] = set()
        #: the event that is being tried alone
        self.alone: E | None = None

    def __bool__(self) -> bool:
        return bool(self.lanes) or self.alone is not None

    def __len__(self) -> int:
        return sum(len(lane.events) for lane in self.lanes.values())

    def hold(self, tp: TP, events: Iterable[E], *, due: float = 0.0, alone: bool = False) -> None:
        """Hold back ``events`` of ``tp`` until ``due``, in their place among those that are held already."""
        lane = self.lanes.get(tp)
        if lane is None:
            lane = self.lanes[tp] = Lane()
            self._on_hold(tp)
        events = list(events)
        lane.events = deque(sorted([*events, *lane.events], key=self._order))
        lane.due = max(lane.due, due)
        if alone:
            self._singles.update(events)

    def behind(self, tp: TP, event: E) -> bool:
        """Hold back ``event``, which came in, behind those of its partition; False where none is held back."""
        lane = self.lanes.get(tp)
        if lane is None:
            return False
        lane.events.append(event)
        return True

    def next(self, now: float, in_hand: int) -> E | Turn:
        """Return the event to give now, or what the stream may do; ``in_hand``: events not finished by the body."""
        if self.alone is not None:
            return Turn.WAIT
        for tp, lane in list(self.lanes.items()):
            if lane.due > now:
                continue
            if lane.events[0] in self._singles:
                if in_hand:
                    return Turn.WAIT
                self.alone = lane.events[0]
                self._singles.discard(self.alone)
            event = lane.events.popleft()
            if not lane.events:
                del self.lanes[tp]
                self._on_release(tp)
            return event
        return Turn.READ

    def due(self) -> float | None:
        """Return when the next event may be given, or None where none is held back."""
        return min((lane.due for lane in self.lanes.values()), default=None)

    def finished(self, event: E) -> None:
        """Note that the body has finished ``event``, or given it up."""
        if self.alone is event:
            self.alone = None

    def forget(self, tps: Iterable[TP] | None = None) -> None:
        """Drop what is held back of ``tps`` (None: of all): it comes anew where its partition is."""
        for tp in list(self.lanes if tps is None else tps):
            lane: Any = self.lanes.pop(tp, None)
            if lane is not None:
                self._singles.difference_update(lane.events)
                self._on_release(tp)
