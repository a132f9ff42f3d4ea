"""The MQTT connector: device messages in, acknowledged only when told; commands out.

Guarantees:

- A message of QoS 1 or 2 is acknowledged to the broker after :meth:`Batch.acknowledge`, in order of arrival across
  batches [MQTT-4.6.0-2], and only on the connection on which it came. Whatever was not acknowledged when a connection
  ends comes again on the next one (``dup``), because the session is persistent. QoS 0 carries no promise.
- While nobody acknowledges, the broker sends no more than ``inflight`` messages (MQTT 5, receive maximum). Over MQTT
  3.1.1, and when payloads in hand exceed ``buffer_bytes``, the source stops reading. What is in hand is bounded by
  these and one read.
- Subscriptions ask for QoS 1: what a device publishes at QoS 2 is delivered at QoS 1 (3.8.4) and stored at least once.
- The connection is kept up for ever, with backoff; a second connector with the same client id stands by
  (``mqtt_presence``).

The caller may change what constructor arguments change; a change of ``client_id`` starts a new session, the old one
keeps collecting at the broker until it expires.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import aiomqtt

from agents.edges.mqtt_batches import Batch, Count, Session, SourceEvent
from agents.edges.mqtt_connection import Connection
from agents.edges.mqtt_dialer import Dialer, TlsFiles
from agents.edges.mqtt_errors import ConnectError
from agents.edges.mqtt_presence import Presence
from agents.edges.mqtt_wire import Arrival, check_filter, check_share
from streams.resilience.backoff import Backoff
from streams.resilience.bounds import end
from streams.resilience.failures import Retryable

__all__ = ["Arrival", "Batch", "MqttSource", "SourceEvent", "SourceState", "SourceStatus", "TlsFiles"]

log = logging.getLogger(__name__)


class SourceState(enum.Enum):
    """What the source is doing."""

    STOPPED = "stopped"
    CONNECTING = "connecting"
    STANDBY = "standby"
    ACTIVE = "active"


@dataclass(frozen=True, slots=True)
class SourceStatus:
    """A look at the source, for readiness and for people."""

    state: SourceState
    detail: str
    protocol: str
    unacknowledged: int
    in_hand_bytes: int
    paused: bool
    refused_filters: tuple[str, ...]
    holder: str


Deliver = Callable[[Batch], Awaitable[None]]

#: A goodbye to the broker is not cut short before this, nor waited for beyond the other.
_GOODBYE_SECONDS = 5.0
_END_SECONDS = 20.0


class MqttSource:
    """Receive from ``topics`` of the broker at ``url`` for ever.

    ``share``: group of a shared subscription; every connector of the group needs a ``client_id`` of its own.
    ``inflight``: the most unacknowledged messages, 1 to 65,535. ``batch_messages``: the most in one batch; a quarter of
    ``inflight`` by default, so that several are on their way at once. ``session_expiry_seconds``: how long an MQTT 5
    broker collects for us while we are away. ``on_event(event, count)`` is for counters; it must not raise.
    ``timeout_seconds``: how long the broker may take to answer. ``standby_seconds``: how long to leave the session to a
    client that took it and is no connector. ``answer_seconds`` is :class:`Presence`'s. Raises ValueError for what
    cannot be right, before anything connects.
    """

    def __init__(
        self,
        url: str,
        topics: Sequence[str],
        *,
        client_id: str,
        share: str = "",
        inflight: int = 500,
        session_expiry_seconds: float = 7 * 86400,
        tls: TlsFiles | None = None,
        max_message_bytes: int = 1 << 20,
        buffer_bytes: int = 32 << 20,
        batch_messages: int | None = None,
        keepalive_seconds: float = 30,
        timeout_seconds: float = 10.0,
        standby_seconds: float = 60.0,
        answer_seconds: float = 2.0,
        backoff: Backoff | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        wall_clock: Callable[[], float] = time.time,
        new_instance: Callable[[], str] = lambda: secrets.token_hex(4),
        on_event: Count = lambda event, count: None,  # noqa: ARG005
    ) -> None:
        if not topics:
            raise ValueError("MQTT_TOPICS: no topic filter; name at least one")
        if not client_id:
            raise ValueError("MQTT_CLIENT_ID is empty; a session that outlives a restart needs a stable id")
        if not 1 <= inflight <= 65535:
            raise ValueError(f"inflight={inflight}: an MQTT window holds 1 to 65535 messages")
        prefix = f"$share/{check_share(share)}/" if share else ""
        self._filters = [prefix + check_filter(topic) for topic in dict.fromkeys(topics)]
        self._client_id = client_id
        self._inflight = inflight
        self._session_expiry_seconds = int(session_expiry_seconds)
        self._buffer_bytes = buffer_bytes
        self._batch_messages = batch_messages or max(1, inflight // 4)
        self._backoff = backoff or Backoff()
        self._count = on_event
        self._dialer = Dialer(
            url,
            tls=tls,
            keepalive_seconds=max(1, int(keepalive_seconds)),
            timeout_seconds=timeout_seconds,
            max_message_bytes=max_message_bytes,
            clock=clock,
        )
        self._presence = Presence(
            self._dialer,
            client_id=client_id,
            instance=new_instance(),
            backoff=Backoff(self._backoff.base_seconds, self._backoff.cap_seconds, rng=self._backoff.rng),
            working=lambda: self._session is not None and self._session.connection.is_open,
            answer_seconds=answer_seconds,
            wall_clock=wall_clock,
        )
        self._session: Session | None = None
        self._state = SourceState.STOPPED
        self._detail = "not started"
        self._refused: tuple[str, ...] = ()
        self._subscribed = False
        self._standby_seconds = standby_seconds
        self._lost_alone = 0
        self._stopping = asyncio.Event()

    # --- a look from outside ------------------------------------------------------------------------------------------

    def healthy(self) -> bool:
        """Tell whether messages flow, or would if another connector did not see to them."""
        return self._state is SourceState.STANDBY or (self._state is SourceState.ACTIVE and not self._refused)

    def status(self) -> SourceStatus:
        """Return what the source is doing and how much it holds."""
        session = self._session
        return SourceStatus(
            state=self._state,
            detail=self._detail,
            protocol="5" if self._dialer.mqtt5 else "3.1.1",
            unacknowledged=len(session.acks) + len(session.waiting) if session else 0,
            in_hand_bytes=session.in_hand_bytes if session else 0,
            paused=session.paused if session else False,
            refused_filters=self._refused,
            holder=self._presence.holder.instance,
        )

    def can_publish(self) -> bool:
        """Tell whether there is a connection to publish on just now."""
        connection = self._presence.connection or (self._session.connection if self._session is not None else None)
        return connection is not None and connection.is_open

    async def publish(self, topic: str, payload: bytes, qos: int = 1, *, retain: bool = False) -> int:
        """Publish a downlink; return once the broker has acknowledged it (QoS 0: once it is written).

        Works in a connector that stands by, too. Returns the broker's reason code: 0, or 0x10 where nobody subscribes
        (MQTT 5). Raises ``failures.Rejected`` for what no retry cures, ``failures.Retryable`` for the rest; a retry can
        make a duplicate.
        """
        connection = self._presence.connection
        if connection is None and self._session is not None:
            connection = self._session.connection
        if connection is None:
            raise Retryable(f"MQTT: not connected to {self._dialer.url}, cannot publish on {topic!r}")
        return await connection.send(topic, payload, qos=qos, retain=retain)

    # --- life ---------------------------------------------------------------------------------------------------------

    async def run(self, deliver: Deliver) -> None:
        """Receive until :meth:`stop` or cancellation, handing every batch to ``deliver``. A source runs once.

        ``deliver`` may wait; messages pile up meanwhile, within the bounds. If it raises, the connection is closed, so
        that the broker delivers again; an error that is none of a connection ends this method.
        """
        presence = asyncio.create_task(self._presence.run(), name="mqtt-presence")
        work = asyncio.create_task(self._work(deliver), name="mqtt-source")
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait((presence, work, stopping), return_when=asyncio.FIRST_COMPLETED)
            for task in (presence, work):
                if task.done():
                    task.result()
        finally:
            self._set(SourceState.STOPPED, "stopped")
            # The messages' session first: whoever stands by takes the role as soon as our record is gone.
            stopping.cancel()
            for task in (work, presence):
                await end(task, seconds=_END_SECONDS, again_seconds=_GOODBYE_SECONDS)

    async def stop(self, drain_seconds: float = 5.0) -> None:
        """Stop receiving and end :meth:`run`.

        Waits up to ``drain_seconds`` for what is handed over to be acknowledged; the broker keeps the rest.
        """
        session = self._session
        if session is not None:
            session.drain()
            until = asyncio.get_running_loop().time() + drain_seconds
            while len(session.acks) and session.connection.is_open and asyncio.get_running_loop().time() < until:
                await asyncio.sleep(0.01)
        self._stopping.set()

    async def _work(self, deliver: Deliver) -> None:
        while True:
            if not self._presence.is_mine:
                await self._stand_by()
            opened = asyncio.get_running_loop().time()
            try:
                await self._serve(deliver)
            except (aiomqtt.MqttError, OSError) as exc:
                self._count(SourceEvent.CONNECT_FAILED, 1)
                self._fail(str(exc))
                await asyncio.sleep(self._backoff.next())
            else:
                if self._presence.is_mine:
                    await self._after_loss(asyncio.get_running_loop().time() - opened)

    async def _stand_by(self) -> None:
        presence = self._presence
        while not presence.is_mine:
            if presence.connection is None:
                self._set(SourceState.CONNECTING, presence.last_error)
            elif (holder := presence.holder).instance:
                self._set(SourceState.STANDBY, f"connector {holder.instance} on {holder.host} (pid {holder.pid}) works")
            await presence.wait_change(1.0)

    async def _after_loss(self, lived_seconds: float) -> None:
        """Wait before connecting again; long where somebody else has taken our client id.

        Some brokers say so (reason 0x8E). mosquitto 2.0 just closes, so that a connection which is soon lost while our
        other one to the same broker lives on, twice in a row, counts as taken over, too.
        """
        told = self._session is not None and self._session.connection.taken_over
        beside = self._presence.connection
        await asyncio.sleep(self._backoff.next())
        alone = beside is not None and self._presence.connection is beside and lived_seconds < self._standby_seconds
        self._lost_alone = self._lost_alone + 1 if alone else 0
        if not told and self._lost_alone < 2:
            return
        # A client that is no connector of ours, or a connector that cannot see our records.
        self._lost_alone = 0
        self._count(SourceEvent.TAKEN_OVER, 1)
        self._fail(
            f"another client connects with client id {self._client_id!r}; standing by for {self._standby_seconds:g} s. "
            "Give each its own MQTT_CLIENT_ID"
        )
        self._state = SourceState.STANDBY
        await asyncio.sleep(self._standby_seconds)

    async def _serve(self, deliver: Deliver) -> None:
        """Hold one connection until it is lost or the role is."""
        self._set(SourceState.CONNECTING, f"connecting to {self._dialer.url}")
        session = Session(inflight=self._inflight, buffer_bytes=self._buffer_bytes, count=self._count)
        connection = await self._open(session)
        # What the session kept comes before the SUBACK, so that handing over must not wait for it.
        handing = asyncio.create_task(self._hand_over(session, deliver))
        tasks: list[asyncio.Task[object]] = [handing]
        try:
            await self._subscribe(connection)
            session.confirm()
            self._set(SourceState.ACTIVE, f"receiving from {self._dialer.url}")
            lost = asyncio.create_task(connection.wait_lost())
            yielded = asyncio.create_task(self._presence.wait_yield())
            tasks += [lost, yielded]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if handing.done():
                handing.result()
            if yielded.done():
                log.info("MQTT: connector %s has %r now", self._presence.holder.instance, self._client_id)
            elif lost.done():
                self._fail(f"connection to {self._dialer.url} lost: {lost.result()}")
        finally:
            self._count(SourceEvent.DISCONNECTED, 1)
            await end(*tasks)
            await connection.close()
            session.end()

    async def _open(self, session: Session) -> Connection:
        # Messages may arrive with the CONNACK, before this coroutine goes on: they wait until it does.
        early: list[list[Arrival]] = []
        session.connection = connection = await self._dialer.open(
            self._client_id,
            on_arrivals=lambda arrivals: (
                session.on_arrivals(arrivals) if self._session is session else early.append(arrivals)
            ),
            persistent=True,
            session_expiry_seconds=self._session_expiry_seconds,
            receive_maximum=self._inflight,
        )
        self._session = session
        for arrivals in early:
            session.on_arrivals(arrivals)
        self._count(SourceEvent.CONNECTED, 1)
        self._backoff.healthy()
        if not connection.session_present and self._subscribed:
            self._count(SourceEvent.SESSION_LOST, 1)
            log.warning(
                "MQTT: broker %s has lost session %r with what it held for us", self._dialer.url, self._client_id
            )
        return connection

    async def _subscribe(self, connection: Connection) -> None:
        # Over 3.1.1 every subscription brings the retained messages again; the session still has ours.
        if connection.session_present and self._subscribed and not connection.mqtt5:
            return
        refused = await connection.subscribe_all(self._filters, qos=1)
        if refused != list(self._refused):
            log.error("MQTT: broker %s refuses the filters %s (MQTT_TOPICS, rights?)", self._dialer.url, refused)
        self._refused = tuple(refused)
        if len(refused) == len(self._filters):
            raise ConnectError(f"broker {self._dialer.url} refused every filter: {refused}")
        self._subscribed = True

    async def _hand_over(self, session: Session, deliver: Deliver) -> None:
        while True:
            await session.arrived.wait()
            session.arrived.clear()
            while session.waiting:
                batch = session.take(self._batch_messages)
                if batch.messages:
                    await deliver(batch)
                else:
                    batch.acknowledge()
            self._backoff.healthy()

    def _set(self, state: SourceState, detail: str) -> None:
        if state is not self._state and state in {SourceState.ACTIVE, SourceState.STANDBY}:
            log.info("MQTT: %s", detail)
        self._state, self._detail = state, detail

    def _fail(self, error: str) -> None:
        if error != self._detail:
            log.warning("MQTT: %s", error)
        self._state, self._detail = SourceState.CONNECTING, error
