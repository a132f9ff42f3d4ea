"""Which of several connectors with one client id works, and which stand by.

MQTT lets one connection hold a client id; the next one to come takes it over, and two clients that both reconnect take
it from each other for ever. So every connector keeps a second, short-lived session beside the one with the messages.
Over it it tells who it is, and hears who else is there:

- ``headrace/connectors/{client_id}/{instance}``, retained: one record a connector. The broker clears it (will message)
  when the connector's connection breaks, the connector clears it when it stops.
- ``headrace/connectors/{client_id}/ask``: somebody new asks; all answer by telling their record again. A record whose
  connector does not answer is one that an unclean end of the broker left behind; it is cleared.

The role belongs to the connector that has the messages' session open, else to the one that came first. Guarantees: a
connector that comes later never takes over from one that lives; when the holder ends, the next takes the role within a
round trip (within 1.5 keep-alives where its machine died without closing its connections); two that both believe to
hold it, after a split network, settle it by who came first. Correctness never rests on this, only peace does: the
broker allows one connection to the session in any case, and acknowledgements belong to a connection.

A broker that does not let us use these topics (rights, no retained messages) means no stand-by: the connector says so
and works as if alone. The same session carries downlinks, so that they do not wait behind readings or a stop of
reading.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable
from urllib.parse import quote

import aiomqtt
import msgspec

from agents.edges.mqtt_connection import Connection, Refused
from agents.edges.mqtt_dialer import Dialer
from agents.edges.mqtt_wire import Arrival
from streams.resilience.backoff import Backoff
from streams.resilience.failures import HeadraceError, Retryable

log = logging.getLogger(__name__)

ROOT = "headrace/connectors"


class Member(msgspec.Struct):
    """One connector as it tells of itself. ``since``: when it came, in seconds since the epoch."""

    instance: str
    since: float
    active: bool = False
    host: str = ""
    pid: int = 0

    def rank(self) -> tuple[bool, float, str]:
        """Order by precedence: who works, then who came first."""
        return (not self.active, self.since, self.instance)


class Presence:
    """The second session of a connector: who holds the role, and downlinks.

    ``answer_seconds``: how long a record may stay unanswered before its connector counts as gone, and how long the
    broker may take to echo ours before it counts as one that offers no presence.
    """

    def __init__(
        self,
        dialer: Dialer,
        *,
        client_id: str,
        instance: str,
        backoff: Backoff,
        answer_seconds: float = 2.0,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._dialer = dialer
        self._backoff = backoff
        self._answer_seconds = answer_seconds
        self._base = f"{ROOT}/{quote(client_id, safe='')}"
        self._client_id = client_id
        self._me = Member(instance, wall_clock(), host=socket.gethostname(), pid=os.getpid())
        self._members: dict[str, Member] = {}
        self._connection: Connection | None = None
        self._echoed = asyncio.Event()
        self._unanswered: set[str] = set()
        self._changed = asyncio.Event()
        self._settled = False
        self._tasks: set[asyncio.Task[None]] = set()
        self.solo = False
        """True where the broker offers no presence; the connector works as if alone."""
        self.last_error = "not connected yet"

    # --- what the source asks -----------------------------------------------------------------------------------------

    @property
    def connection(self) -> Connection | None:
        """The open session for downlinks, or None."""
        return self._connection if self._connection is not None and self._connection.is_open else None

    @property
    def holder(self) -> Member:
        """Who has the role as far as we know."""
        return min([*self._members.values(), self._me], key=Member.rank)

    @property
    def is_mine(self) -> bool:
        """Tell whether the role is ours."""
        return self.solo or (self._settled and self.holder is self._me)

    async def wait_mine(self, *, mine: bool) -> None:
        """Wait until the role is ours, or no longer is."""
        while self.is_mine is not mine:
            self._changed.clear()
            await self._changed.wait()

    def set_active(self, active: bool) -> None:
        """Tell the others whether we have the messages' session open."""
        if self._me.active is not active:
            self._me.active = active
            self._spawn(self._tell())
        self._changed.set()

    # --- life ---------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep the session up until cancelled; leaves cleanly then."""
        try:
            while True:
                try:
                    await self._session()
                except Refused as exc:
                    self._fall_back(str(exc))
                except (aiomqtt.MqttError, HeadraceError, OSError) as exc:
                    self._say(str(exc))
                await asyncio.sleep(self._backoff.next())
        finally:
            await self._leave()

    async def _leave(self) -> None:
        connection, self._connection = self.connection, None
        if connection is not None:
            with contextlib.suppress(aiomqtt.MqttError, HeadraceError, OSError, TimeoutError):
                await asyncio.wait_for(connection.send(self._topic(), b"", retain=True), 2.0)
            await connection.close()

    async def _session(self) -> None:
        self._members.clear()
        self._unanswered.clear()
        self._echoed.clear()
        connection = await self._dialer.open(
            # not the client id of the messages' session, and not the same twice: this session keeps nothing
            f"{self._client_id}-{self._me.instance}",
            on_arrivals=self._heard,
            persistent=False,
            will=aiomqtt.Will(self._topic(), b"", qos=1, retain=True),
        )
        self._connection = connection
        try:
            await self._settle(connection)
            self._backoff.healthy()
            reason = await connection.wait_lost()
            self._say(f"connection to {self._dialer.url} lost: {reason}")
        finally:
            connection.abort()

    async def _settle(self, connection: Connection) -> None:
        """Meet the others, and wait for an answer of everybody whose record is there."""
        if await connection.subscribe_all([f"{self._base}/+"], qos=1):
            self._fall_back(f"the broker refused a subscription to {self._base}/+")
            return
        try:
            await self._tell()
            await asyncio.wait_for(self._echoed.wait(), self._answer_seconds)
        except (TimeoutError, HeadraceError) as exc:
            if connection.is_open:
                self._fall_back(f"what we publish below {self._base} does not come back to us ({exc})")
            return
        self.solo = False
        if self._members:
            await self._ask(connection)
        self.last_error = ""
        self._settled = True
        self._changed.set()
        if not self.is_mine:
            holder = self.holder
            log.info("MQTT: connector %s on %s (pid %d) has %r; standing by", *self._names(holder), self._client_id)

    @staticmethod
    def _names(member: Member) -> tuple[str, str, int]:
        return member.instance, member.host, member.pid

    async def _ask(self, connection: Connection) -> None:
        self._unanswered = set(self._members)
        await connection.send(f"{self._base}/ask", self._me.instance.encode())
        loop = asyncio.get_running_loop()
        until = loop.time() + self._answer_seconds
        while self._unanswered and (left := until - loop.time()) > 0 and connection.is_open:
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left)
        for instance in list(self._unanswered):
            log.info("MQTT: clearing the record of connector %s, which does not answer", instance)
            self._members.pop(instance, None)
            await connection.send(f"{self._base}/{instance}", b"", retain=True)
        self._unanswered.clear()

    # --- what comes in ------------------------------------------------------------------------------------------------

    def _heard(self, arrivals: list[Arrival]) -> None:
        if self._connection is not None:
            self._connection.acknowledge([(arrival.mid, arrival.qos) for arrival in arrivals if arrival.qos])
        for arrival in arrivals:
            name = arrival.topic.rpartition("/")[2]
            if name == "ask":
                if arrival.payload.decode("utf-8", "replace") != self._me.instance:
                    self._spawn(self._tell())
            elif name == self._me.instance:
                self._echoed.set()
                if not arrival.payload and not arrival.retain:
                    # somebody took us for gone, or a will came late: we are here
                    self._spawn(self._tell())
            else:
                self._heard_of(name, arrival)
        self._changed.set()

    def _heard_of(self, name: str, arrival: Arrival) -> None:
        if not arrival.retain:
            self._unanswered.discard(name)
        if not arrival.payload:
            self._members.pop(name, None)
            return
        try:
            self._members[name] = msgspec.json.decode(arrival.payload, type=Member)
        except msgspec.MsgspecError as exc:
            log.warning("MQTT: %s holds what is no connector's record, ignored: %s", arrival.topic, exc)

    # --- helpers ------------------------------------------------------------------------------------------------------

    def _topic(self) -> str:
        return f"{self._base}/{self._me.instance}"

    async def _tell(self) -> None:
        if (connection := self.connection) is not None:
            await connection.send(self._topic(), msgspec.json.encode(self._me), retain=True)

    def _spawn(self, work: object) -> None:
        async def quietly() -> None:
            # the next session tells all anew
            with contextlib.suppress(Retryable, aiomqtt.MqttError, OSError):
                await work  # type: ignore[misc]

        task = asyncio.get_running_loop().create_task(quietly())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _fall_back(self, why: str) -> None:
        if not self.solo:
            log.warning("MQTT: no stand-by for client id %r: %s. Going on as if alone.", self._client_id, why)
        self.solo = True
        self.last_error = why
        self._changed.set()

    def _say(self, error: str) -> None:
        if error != self.last_error:
            log.warning("MQTT: %s; trying again", error)
        self.last_error = error
