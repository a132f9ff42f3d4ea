"""What came over one connection, on its way to Kafka and back as acknowledgements.

Guarantees: a batch is acknowledged once, in order of arrival among batches, and only on the connection on which it
came; what is in hand is counted in messages and bytes, and reading stops above the bounds (see ``mqtt_client``).
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections import deque
from collections.abc import Callable
from typing import Final

from agents.edges.mqtt_connection import Connection
from agents.edges.mqtt_wire import CONNECTORS, AckQueue, Arrival

log = logging.getLogger(__name__)

_QOS0_IN_HAND: Final = 10_000


class SourceEvent(enum.Enum):
    """What ``on_event`` is called with, beside a count.

    RECEIVED = ACKNOWLEDGED + DONE_QOS0 + STALE + DROPPED_QOS0 + what is in hand.
    """

    RECEIVED = "received"
    """Messages from the broker, redelivered ones included."""
    REDELIVERED = "redelivered"
    """Of these, what the broker had sent before (DUP)."""
    RETAINED = "retained"
    """Of these, what was stored at the broker before we subscribed."""
    OVERSIZE = "oversize"
    """Of these, what is above ``max_message_bytes``."""
    ACKNOWLEDGED = "acknowledged"
    """Messages of QoS 1 and 2 whose acknowledgement went out."""
    DONE_QOS0 = "done_qos0"
    """Messages of QoS 0 in batches that the caller acknowledged; the broker hears nothing of them."""
    STALE = "stale"
    """Messages of QoS 1 and 2 that were unacknowledged when their connection ended; the broker delivers them again."""
    DROPPED_QOS0 = "dropped_qos0"
    """Messages of QoS 0 beyond 10,000 in hand, given back, or not handed over when the connection ended."""
    CONNECTED = "connected"
    DISCONNECTED = "disconnected"
    CONNECT_FAILED = "connect_failed"
    TAKEN_OVER = "taken_over"
    """Another client connected with our client id."""
    SESSION_LOST = "session_lost"
    """The broker had kept no session where we had had one: what it held for us is gone."""


Count = Callable[[SourceEvent, int], None]


class Batch:
    """Messages that arrived together, in order.

    Call exactly one of :meth:`acknowledge` and :meth:`release`, from the event loop; later calls do nothing.
    """

    __slots__ = ("_arrivals", "_done", "_session", "_unacked", "messages", "size_bytes")

    def __init__(self, session: Session, arrivals: list[Arrival]) -> None:
        # a filter of one's own like +/+/+ brings connectors' records, too (amqtt sends them whatever the filter)
        self.messages = [arrival for arrival in arrivals if not arrival.topic.startswith(CONNECTORS)]
        self.size_bytes = sum(len(arrival.payload) for arrival in arrivals)
        self._session = session
        self._arrivals = len(arrivals)
        self._unacked = session.acks.add([(arrival.mid, arrival.qos) for arrival in arrivals if arrival.qos])
        self._done = False

    @property
    def stale(self) -> bool:
        """Tell whether the connection is gone, so that the broker delivers these messages again."""
        return not self._session.connection.is_open

    def acknowledge(self) -> None:
        """Tell that every message of this batch is in Kafka. The broker hears it once all earlier batches are, too."""
        if not self._done:
            self._done = True
            self._session.complete(self)

    def release(self) -> None:
        """Give the batch back: the connection is closed, and the broker delivers all that is unacknowledged again."""
        if not self._done:
            self._done = True
            self._session.give_back(self)


class Session:
    """One connection's worth of messages: what has come, what is handed over, what is acknowledged."""

    def __init__(self, *, inflight: int, buffer_bytes: int, count: Count) -> None:
        self.acks = AckQueue()
        self.connection: Connection
        self.waiting: deque[Arrival] = deque()
        self.arrived = asyncio.Event()
        self.in_hand = 0
        self.in_hand_bytes = 0
        self._qos0 = 0
        self.draining = False
        self.paused = False
        self._confirmed = False
        self._inflight = inflight
        self._buffer_bytes = buffer_bytes
        self._count = count

    def on_arrivals(self, arrivals: list[Arrival]) -> None:
        """Take what one read brought."""
        dropped = 0
        for arrival in arrivals:
            if not arrival.qos:
                if self._qos0 >= _QOS0_IN_HAND:
                    dropped += 1
                    continue
                self._qos0 += 1
            else:
                self.in_hand += 1
            self.in_hand_bytes += len(arrival.payload)
            self.waiting.append(arrival)
        self._count(SourceEvent.RECEIVED, len(arrivals))
        self._tell(SourceEvent.REDELIVERED, sum(arrival.dup for arrival in arrivals))
        self._tell(SourceEvent.RETAINED, sum(arrival.retain for arrival in arrivals))
        self._tell(SourceEvent.OVERSIZE, sum(arrival.oversize for arrival in arrivals))
        self._tell(SourceEvent.DROPPED_QOS0, dropped)
        self._pace()
        self.arrived.set()

    def take(self, most: int) -> Batch:
        """Make a batch of what waits, up to ``most`` messages."""
        if len(self.waiting) <= most:
            messages = list(self.waiting)
            self.waiting.clear()
        else:
            messages = [self.waiting.popleft() for _ in range(most)]
        return Batch(self, messages)

    def complete(self, batch: Batch) -> None:
        self._let_go(batch, SourceEvent.DONE_QOS0)
        if self.connection.is_open:
            due = self.acks.complete(batch._unacked)
            self.connection.acknowledge(due)
            self._tell(SourceEvent.ACKNOWLEDGED, len(due))
            self._pace()

    def give_back(self, batch: Batch) -> None:
        self._let_go(batch, SourceEvent.DROPPED_QOS0)
        if self.connection.is_open:
            log.warning("MQTT: a batch of %d messages was given back, reconnecting", len(batch.messages))
            self.connection.abort()

    def _let_go(self, batch: Batch, qos0_event: SourceEvent) -> None:
        acked = len(batch._unacked.acks)
        self.in_hand -= acked
        self._qos0 -= batch._arrivals - acked
        self._tell(qos0_event, batch._arrivals - acked)
        self.in_hand_bytes -= batch.size_bytes

    def _pace(self) -> None:
        # An MQTT 5 broker sends no more than the receive maximum, so that the count stops 3.1.1 only; but mosquitto
        # sends what was in flight when the last connection ended on top of it, before the SUBACK. Reading on until then
        # costs one more window at most; stopping would leave the SUBACK unread, and the connection with it.
        full = self.in_hand > self._inflight or self.in_hand_bytes > self._buffer_bytes
        full = self.draining or (full and (self._confirmed or not self.connection.mqtt5))
        if full != self.paused:
            self.paused = full
            if full:
                self.connection.pause()
            else:
                self.connection.resume()

    def confirm(self) -> None:
        """Note that the broker has answered the subscription: from now on reading may stop."""
        self._confirmed = True
        self._pace()

    def drain(self) -> None:
        """Stop reading for good and forget what nobody has been given; the broker has it."""
        self.draining = True
        self._forget_waiting()
        self._pace()

    def end(self) -> None:
        """Settle the accounts once the connection is gone."""
        self._forget_waiting()
        self._tell(SourceEvent.STALE, len(self.acks))

    def _forget_waiting(self) -> None:
        acked = sum(arrival.qos > 0 for arrival in self.waiting)
        self.in_hand -= acked
        self._qos0 -= len(self.waiting) - acked
        self.in_hand_bytes -= sum(len(arrival.payload) for arrival in self.waiting)
        self._tell(SourceEvent.STALE, acked)
        self._tell(SourceEvent.DROPPED_QOS0, len(self.waiting) - acked)
        self.waiting.clear()

    def _tell(self, event: SourceEvent, number: int) -> None:
        if number:
            self._count(event, number)
