"""What the CoAP server and its owner hand each other: arrivals, batches of them, and the owner's hooks."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

from aiocoap.message import Message

from agents.edges.coap_exchanges import Exchange
from agents.edges.coap_requests import Found


class Event(enum.Enum):
    """What the server tells its owner to count, in messages."""

    RECEIVED = "received"
    ACKNOWLEDGED = "acknowledged"
    RETURNED = "returned"


#: ``(event, number)``, or ``(reason, number)`` for messages that are received and at once refused, answered or dropped.
Counting = Callable[[Event | str, int], None]


class Downlinks(Protocol):
    """What waits for devices. All are called on the event loop and must not block."""

    def pending_for(self, device_id: str) -> tuple[bytes, Any] | None:
        """Return payload and token of what goes into the answer to the device's request, None where nothing does."""

    def sent(self, token: Any) -> None:
        """Take note that an answer carries that payload."""

    def delivered(self, token: Any) -> None:
        """Take note that the device has acknowledged the answer with that payload."""


class Shield(Protocol):
    """Security of single messages (OSCORE)."""

    def open(self, message: Message) -> tuple[Message, str, Callable[[Message], Message]]:
        """Return the plain request, its device, and what protects the answer; raises Refusal or Answered."""


class Answered(Exception):
    """A message whose answer is made already: ``message`` goes out as it is, counted under ``reason``."""

    def __init__(self, message: Message, reason: str) -> None:
        super().__init__(reason)
        self.message = message
        self.reason = reason


class State(enum.Enum):
    """An arrival's life: nobody has it yet, it is on its way to Kafka, its fate is known."""

    WAITING = 1
    CLAIMED = 2
    TAKEN = 3
    GONE = 4


@dataclass(slots=True, eq=False)
class Arrival:
    """A device's message that is to become a record; ``due`` is when its device's patience ends (monotonic)."""

    exchange: Exchange
    request: Message
    found: Found
    device_id: str
    payload: bytes
    metadata: dict[str, Any]
    arrived_at: datetime
    due: float
    state: State = field(default=State.WAITING)

    @property
    def open(self) -> bool:
        """Whether its fate is not known yet."""
        return self.state in (State.WAITING, State.CLAIMED)

    @property
    def same(self) -> tuple[str, str, bytes]:
        """What is equal in a message that its device sends again."""
        return self.device_id, self.found.route, self.payload


class Batch:
    """Arrivals on their way to Kafka. Every batch must end in :meth:`acknowledge` or :meth:`refuse`."""

    def __init__(self, arrivals: list[Arrival], finish: Callable[[list[Arrival], bool], None]) -> None:
        self._arrivals = arrivals
        self._finish = finish

    def claim(self) -> list[Arrival]:
        """Return the arrivals that still wait for an answer, in order: those become records."""
        self._arrivals = [arrival for arrival in self._arrivals if arrival.state is State.WAITING]
        for arrival in self._arrivals:
            arrival.state = State.CLAIMED
        return self._arrivals

    def acknowledge(self) -> None:
        """Have the arrivals answered: Kafka has them."""
        self._finish(self._arrivals, True)

    def refuse(self) -> None:
        """Have the arrivals answered with 5.03: Kafka did not take them."""
        self._finish(self._arrivals, False)
