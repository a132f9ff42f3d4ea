"""Which of several connectors with one client id works, and which stand by.

MQTT lets one connection hold a client id; the next one to come takes it over, and two clients that both reconnect take
it from each other for ever. So every connector keeps a second, short-lived session beside the one with the messages.
Over it it tells who it is, and hears who else is there:

- ``headrace/connectors/{client_id}/{instance}``, retained: one record a connector. The broker clears it (will message)
  when the connector's connection breaks, the connector clears it when it stops.
- ``headrace/connectors/{client_id}/ask``: somebody new asks; all answer by telling their record again. A record whose
  connector does not answer is one that an unclean end of the broker left behind; it is cleared.

The role belongs to the connector that has claimed it, else to the one that came first. Guarantees: a
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
from typing import Final
from urllib.parse import quote

import aiomqtt
import msgspec

from agents.edges.mqtt_connection import Connection
from agents.edges.mqtt_dialer import Dialer
from agents.edges.mqtt_errors import Refused, Unanswered
from agents.edges.mqtt_wire import CONNECTORS, Arrival
from streams.resilience.backoff import Backoff
from streams.resilience.failures import HeadraceError, Retryable

log = logging.getLogger(__name__)

_TURNED_AWAY_MOST: Final = 5


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

    ``working()`` tells whether we have the messages' session open. ``answer_seconds``: how long a record may stay
    unanswered before its connector counts as gone, and how long the broker may take to echo ours before it counts as
    one that offers no presence.
    """

    def __init__(
        self,
        dialer: Dialer,
        *,
        client_id: str,
        instance: str,
        backoff: Backoff,
        working: Callable[[], bool],
        answer_seconds: float = 2.0,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._dialer = dialer
        self._backoff = backoff
        self._working = working
        self._answer_seconds = answer_seconds
        self._base = f"{CONNECTORS}/{quote(client_id, safe='')}"
        self._client_id = client_id
        self._me = Member(instance, wall_clock(), host=socket.gethostname(), pid=os.getpid())
        self._members: dict[str, Member] = {}
        self._connection: Connection | None = None
        self._echoed = asyncio.Event()
        self._unanswered: set[str] = set()
        self._changed = asyncio.Event()
        self._settled = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._turned_away_times = 0
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
        """Tell whether the role is ours; while we have to find our way back to the broker it stays so."""
        return self.solo or (self._me.active and (not self._settled or self.holder is self._me))

    async def wait_change(self, seconds: float | None) -> None:
        """Wait until something has changed, or for ``seconds``."""
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()

    async def wait_yield(self) -> None:
        """Wait until the role is not ours."""
        while self.is_mine:
            await self.wait_change(None)

    # --- life ---------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep the session up until cancelled; leaves cleanly then."""
        try:
            while True:
                try:
                    await self._session()
                except Refused as exc:
                    self._fall_back(str(exc))
                except Unanswered as exc:
                    self._turned_away(str(exc))
                except (aiomqtt.MqttError, HeadraceError, OSError) as exc:
                    self._say(str(exc))
                await asyncio.sleep(self._backoff.next())
        finally:
            await self._leave()

    async def _leave(self) -> None:
        connection, self._connection = self.connection, None
        if connection is not None:
            with contextlib.suppress(aiomqtt.MqttError, HeadraceError, OSError, TimeoutError):
                async with asyncio.timeout(2.0):
                    await connection.send(self._topic(), b"", retain=True)
            await connection.close()

    async def _session(self) -> None:
        self._settled = False
        self._members.clear()
        self._unanswered.clear()
        self._echoed.clear()
        # the role outlives our absence only together with the work
        self._me.active = self._me.active and self._working()
        self._changed.set()
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
        except asyncio.CancelledError:
            raise  # _leave() says goodbye
        except BaseException:
            connection.abort()
            raise
        connection.abort()
        reason = f"connection to {self._dialer.url} lost: {reason}"
        self._say(reason) if self._settled or self.solo else self._turned_away(reason)

    async def _settle(self, connection: Connection) -> None:
        """Meet the others, and wait for an answer of everybody whose record is there."""
        if not connection.server.get("RetainAvailable", 1):
            self._fall_back("the broker offers no retained messages")
            return
        if await connection.subscribe_all([f"{self._base}/+"], qos=1):
            self._fall_back(f"the broker refused a subscription to {self._base}/+")
            return
        try:
            await self._tell()
            async with asyncio.timeout(self._answer_seconds):
                await self._echoed.wait()
        except (TimeoutError, HeadraceError) as exc:
            if connection.is_open:
                self._fall_back(f"what we publish below {self._base} does not come back to us ({exc})")
            return
        self.solo = False
        self._turned_away_times = 0
        self.last_error = ""
        if not self._settled:
            await self._ask(connection)
            self._settled = True
        self._claim()

    def _claim(self) -> None:
        """Take the role if it falls to us, or lay it down if somebody precedes us."""
        mine = self._settled and self.holder is self._me
        if self._settled and self._me.active is not mine:
            self._me.active = mine
            self._spawn(self._tell())
        self._changed.set()

    async def _ask(self, connection: Connection) -> None:
        self._unanswered = set(self._members)
        await connection.send(f"{self._base}/ask", self._me.instance.encode())
        loop = asyncio.get_running_loop()
        until = loop.time() + self._answer_seconds
        while self._unanswered and (left := until - loop.time()) > 0 and connection.is_open:
            await self.wait_change(left)
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
                # Alone as far as the broker knows. Deciding here and not in a task that runs later makes sure that
                # whoever comes next is answered by a connector that already has the role.
                self._settled = self._settled or not self._members
                if not arrival.payload and not arrival.retain:
                    # somebody took us for gone, or a will came late: we are here
                    self._spawn(self._tell())
            else:
                self._heard_of(name, arrival)
        self._claim()

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

    def _turned_away(self, error: str) -> None:
        """Count a connection that the broker ended without a word: some do so for want of rights."""
        self._turned_away_times += 1
        self._say(error)
        if self._turned_away_times >= _TURNED_AWAY_MOST:
            self._fall_back(error)

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
