# ruff: noqa: ARG002 -- the signatures of callbacks are paho's
"""One connection to an MQTT broker: aiomqtt over the receive path of ``mqtt_paho``.

Guarantees: nothing is acknowledged but through :meth:`Connection.acknowledge`; what arrives between CONNACK and SUBACK
is delivered like all else; reading can stop without losing the keep-alive; a connection that could not be opened is
closed, never left behind holding the session (aiomqtt leaves the socket open when CONNACK does not come in time).
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import ssl
import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import aiomqtt
import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from agents.edges.mqtt_errors import ConnectError, Refused, Unanswered, UnsupportedProtocol
from agents.edges.mqtt_paho import Arrivals, PahoClient
from agents.edges.mqtt_wire import BrokerUrl, PacketReader, ack_bytes
from streams.resilience.failures import Rejected, Retryable

# Reason codes of MQTT 5 (2.4)
NO_MATCHING_SUBSCRIBERS: Final = 0x10
_UNSUPPORTED_PROTOCOL: Final = 0x84
# identifier, credentials, authorization, banned, authentication method, no retained messages (a will), no such QoS
_REFUSED: Final = frozenset({0x85, 0x86, 0x87, 0x8A, 0x8C, 0x9A, 0x9B})
SESSION_TAKEN_OVER: Final = 0x8E
# what trying again with the same publication cannot cure: not authorized, topic name, packet too large, payload format
_PUBLISH_REJECTED: Final = frozenset({0x87, 0x90, 0x95, 0x99})


class Connection(aiomqtt.Client):
    """One connection, used once.

    ``persistent``: keep the session at the broker (``session_expiry_seconds``; for ever over MQTT 3.1.1) and go on with
    it. ``receive_maximum``: the most messages of QoS 1 and 2 that an MQTT 5 broker sends without an acknowledgement.
    ``on_arrivals`` is called in the event loop with what one read brought and must neither block nor raise.
    """

    _client: PahoClient

    def __init__(
        self,
        url: BrokerUrl,
        *,
        client_id: str,
        mqtt5: bool,
        on_arrivals: Arrivals,
        max_message_bytes: int,
        persistent: bool,
        session_expiry_seconds: int = 0,
        receive_maximum: int = 65535,
        keepalive_seconds: int = 30,
        timeout_seconds: float = 10.0,
        will: aiomqtt.Will | None = None,
        tls_context: ssl.SSLContext | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        properties = None
        if mqtt5:
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            properties.ReceiveMaximum = receive_maximum
            if persistent:
                properties.SessionExpiryInterval = session_expiry_seconds
        common: dict[str, Any] = {
            "protocol": aiomqtt.ProtocolVersion.V5 if mqtt5 else aiomqtt.ProtocolVersion.V311,
            "clean_session": None if mqtt5 else not persistent,
        }
        super().__init__(
            url.host,
            url.port,
            identifier=client_id,
            keepalive=keepalive_seconds,
            timeout=timeout_seconds,
            clean_start=not persistent if mqtt5 else paho.MQTT_CLEAN_START_FIRST_ONLY,
            properties=properties,
            # acknowledgements are small writes; Nagle's algorithm would hold them back for 40 ms
            socket_options=[(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)],
            **common,
        )
        self.mqtt5 = mqtt5
        self.session_present = False
        self.server: dict[str, Any] = {}  # what the broker granted in its CONNACK (MQTT 5), by property name
        self.taken_over = False
        self._thread = threading.get_ident()
        self._abandoned = False
        self._paused = False
        self._socket_fd = -1
        self._pong = asyncio.Event()
        self._answers: dict[int, asyncio.Future[int]] = {}
        self._client = self._make_paho(client_id, common, url, will, tls_context)
        self._client.reader = PacketReader(mqtt5=mqtt5, max_message_bytes=max_message_bytes)
        self._client.on_arrivals, self._client.on_pong, self._client.clock = on_arrivals, self._pong.set, clock

    def _make_paho(
        self,
        client_id: str,
        common: dict[str, Any],
        url: BrokerUrl,
        will: aiomqtt.Will | None,
        tls_context: ssl.SSLContext | None,
    ) -> PahoClient:
        """Put our own paho client in the place of the one that aiomqtt made, set up as aiomqtt sets it up."""
        client = PahoClient(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            protocol=common["protocol"].value,
            clean_session=common["clean_session"],
            reconnect_on_failure=False,
            manual_ack=True,
        )
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_subscribe = self._on_subscribe
        client.on_publish = self._on_publish
        client.on_socket_open = self._on_socket_open
        client.on_socket_close = self._on_socket_close
        client.on_socket_register_write = self._on_socket_register_write
        client.on_socket_unregister_write = self._on_socket_unregister_write
        if url.username is not None:
            client.username_pw_set(url.username, url.password)
        if tls_context is not None:
            client.tls_set_context(tls_context)
        if will is not None:
            client.will_set(will.topic, will.payload, will.qos, will.retain, will.properties)
        return client

    async def open(self) -> None:
        """Connect and wait for CONNACK.

        Raises :class:`ConnectError` or one of its kind (``mqtt_errors``).
        """
        try:
            await self.__aenter__()
            # asyncio.wait_for of Python 3.11, which aiomqtt uses, can swallow a cancellation
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise asyncio.CancelledError
        except aiomqtt.MqttCodeError as exc:
            self._drop()
            code = exc.rc.value if isinstance(exc.rc, ReasonCode) else -1
            message = f"broker {self._hostname}:{self._port} refused the connection: {exc}"
            if code == _UNSUPPORTED_PROTOCOL:
                raise UnsupportedProtocol(message) from None
            if code in _REFUSED:
                raise Refused(message) from None
            raise ConnectError(message) from None
        except (aiomqtt.MqttError, OSError, ValueError) as exc:
            connected = self._socket_fd >= 0
            self._drop()
            if isinstance(exc, ConnectError):
                raise
            if connected:
                message = f"broker {self._hostname}:{self._port} did not answer within {self.timeout:g} s"
                raise Unanswered(message, silent=True) from None
            raise ConnectError(f"broker {self._hostname}:{self._port} cannot be reached: {exc}") from None
        except BaseException:
            self._drop()
            raise

    async def close(self) -> None:
        """Send what is queued and DISCONNECT, then close; the session stays. Never raises but CancelledError.

        A ping after the last acknowledgement makes sure that the broker has read them all: one that is still busy with
        them drops the rest when the next connection takes the session over.
        """
        try:
            if self.is_open:
                self._client.on_arrivals = lambda _: None  # unacknowledged, so that they come again
                self.resume()
                self._pong.clear()
                self._client.ping()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(2.0):
                        await self._pong.wait()
            if self.is_open:
                self._client.disconnect()
                await asyncio.wait((self._disconnected,), timeout=2.0)
        finally:
            self._drop()

    def abort(self) -> None:
        """Close the socket at once; the broker sends the will and keeps what is unacknowledged."""
        self._drop()

    def _drop(self) -> None:
        self._abandoned = True
        if self._misc_task is not None:
            self._misc_task.cancel()
        self._client.drop()
        if not self._disconnected.done():
            self._disconnected.set_result(None)
        for future in (self._connected, self._disconnected):
            if future.done() and not future.cancelled():
                future.exception()  # seen; asyncio need not report it
        self._fail_answers()

    def _fail_answers(self) -> None:
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(Retryable("MQTT: connection closed before the broker acknowledged"))

    @property
    def is_open(self) -> bool:
        """Tell whether the broker has accepted us and has not gone since."""
        return (
            self._connected.done()
            and not self._connected.cancelled()
            and self._connected.exception() is None
            and not self._disconnected.done()
        )

    async def wait_lost(self) -> str:
        """Wait until the connection is gone and return why."""
        await asyncio.wait((self._disconnected,))
        exc = self._disconnected.exception() if not self._disconnected.cancelled() else None
        return str(exc) if exc is not None else "closed"

    async def subscribe_all(self, filters: Sequence[str], *, qos: int) -> list[str]:
        """Subscribe to ``filters`` and return those that the broker refused.

        Over MQTT 5 retained messages come only for a subscription that is new to the session (retain handling 1).
        """
        topics: Any
        if self.mqtt5:
            topics = [(item, SubscribeOptions(qos=qos, retainHandling=1)) for item in filters]
        else:
            topics = [(item, qos) for item in filters]
        # No timeout: SUBACK can stand behind a backlog that nobody reads while Kafka is away. aiomqtt would not notice
        # that the connection is lost meanwhile.
        subscribing = asyncio.ensure_future(self.subscribe(topics, timeout=math.inf))
        try:
            await asyncio.wait((subscribing, self._disconnected), return_when=asyncio.FIRST_COMPLETED)
            if not subscribing.done():
                raise ConnectError("the connection was lost before the broker confirmed the subscription")
            codes: Any = subscribing.result()
        finally:
            subscribing.cancel()
        return [
            item
            for item, code in zip(filters, codes, strict=True)
            if (code if isinstance(code, int) else code.value) >= 0x80
        ]

    def acknowledge(self, acks: Sequence[tuple[int, int]]) -> None:
        """Acknowledge ``(mid, qos)`` in this order; nothing happens once the connection is gone."""
        if acks and self.is_open:
            self._client.queue_acks(ack_bytes(acks))

    async def send(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> int:
        """Publish and wait for the broker's acknowledgement; return its reason code (0, or NO_MATCHING_SUBSCRIBERS).

        Raises Rejected for what no retry cures, Retryable for the rest.
        """
        if not self.is_open:
            raise Retryable(f"MQTT: no connection to {self._hostname}:{self._port} to publish on {topic!r}")
        try:
            info = self._client.publish(topic, payload, qos, retain)
        except ValueError as exc:
            raise Rejected(f"MQTT: cannot publish {len(payload)} bytes on {topic!r}: {exc}") from None
        if info.rc not in {paho.MQTT_ERR_SUCCESS, paho.MQTT_ERR_QUEUE_SIZE}:
            raise Retryable(f"MQTT: cannot publish on {topic!r}: {paho.error_string(info.rc)}")
        if info.is_published():
            return 0
        answer = self._answers[info.mid] = self._loop.create_future()
        try:
            async with asyncio.timeout(self.timeout):
                code = await answer
        except TimeoutError:
            raise Retryable(f"MQTT: no acknowledgement of {topic!r} within {self.timeout:g} s") from None
        finally:
            del self._answers[info.mid]
        if code in _PUBLISH_REJECTED:
            raise Rejected(f"MQTT: the broker refused the message on {topic!r} with reason {code:#04x}")
        if code >= 0x80:
            raise Retryable(f"MQTT: the broker did not take the message on {topic!r}, reason {code:#04x}")
        return int(code)

    def pause(self) -> None:
        """Stop reading. Pings go on, so that the broker does not take us for dead."""
        if not self._paused:
            self._paused = True
            if self._socket_fd >= 0:
                self._loop.remove_reader(self._socket_fd)

    def resume(self) -> None:
        """Read again."""
        if self._paused:
            self._paused = False
            if self._socket_fd >= 0:
                self._loop.add_reader(self._socket_fd, self._readable)
                self._loop.call_soon(self._readable)  # TLS may hold bytes that no selector sees

    def _readable(self) -> None:
        if self._abandoned or self._paused:
            return
        try:
            self._client.loop_read()
            sock = self._client.socket()
            if sock is not None and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                # uvloop calls the reader once for a socket with an error, then never again; this read may have ended at
                # data that came before the error
                self._client.lose()
            elif isinstance(sock, ssl.SSLSocket) and sock.pending():
                self._loop.call_soon(self._readable)
        except Exception as exc:
            self._fail(exc)

    def _fail(self, exc: Exception) -> None:
        error = ConnectError(f"MQTT connection failed: {exc!r}")
        for future in (self._connected, self._disconnected):
            if not future.done():
                future.set_exception(error)
                break
        self._client.drop()
        self._fail_answers()

    def _on_connect(self, client: Any, userdata: Any, flags: Any, reason_code: Any, properties: Any = None) -> None:
        self.session_present = flags.session_present
        if properties is not None:
            self.server = properties.json()
        if self._connected.done():
            return
        super()._on_connect(client, userdata, flags, reason_code, properties)

    def _on_disconnect(self, client: Any, userdata: Any, flags: Any, reason_code: Any, properties: Any = None) -> None:
        self.taken_over = getattr(reason_code, "value", 0) == SESSION_TAKEN_OVER
        if not self._connected.done():
            # aiomqtt would wait for its timeout here
            where = f"broker {self._hostname}:{self._port}"
            self._connected.set_exception(
                Unanswered(f"{where} closed the connection in place of a CONNACK ({reason_code})", silent=False)
            )
            return
        super()._on_disconnect(client, userdata, flags, reason_code, properties)
        self._fail_answers()

    def _on_publish(self, client: Any, userdata: Any, mid: int, reason_code: Any, properties: Any = None) -> None:
        answer = self._answers.get(mid)
        if answer is not None and not answer.done():
            answer.set_result(getattr(reason_code, "value", 0))

    def _on_socket_open(self, client: Any, userdata: Any, sock: Any) -> None:
        # paho calls this from the thread in which it connects
        self._loop.call_soon_threadsafe(self._opened, sock)

    def _opened(self, sock: Any) -> None:
        if self._abandoned:
            self._client.drop()
            sock.close()
            return
        self._socket_fd = sock.fileno()
        if self._socket_fd >= 0:
            self._loop.add_reader(self._socket_fd, self._readable)
            self._misc_task = self._loop.create_task(self._misc_loop())

    def _on_socket_close(self, client: Any, userdata: Any, sock: Any) -> None:
        if self._socket_fd >= 0:
            self._loop.remove_reader(self._socket_fd)
            self._loop.remove_writer(self._socket_fd)
            self._socket_fd = -1
        if self._misc_task is not None:
            self._misc_task.cancel()

    def _on_socket_register_write(self, client: Any, userdata: Any, sock: Any) -> None:
        if threading.get_ident() == self._thread:
            self._register_writer(sock)
        else:
            self._loop.call_soon_threadsafe(self._register_writer, sock)

    def _register_writer(self, sock: Any) -> None:
        if not self._abandoned and sock.fileno() >= 0:
            try:
                self._loop.add_writer(sock.fileno(), self._writable)
            except RuntimeError as exc:  # uvloop has given the socket up; the caller is in the midst of something
                self._loop.call_soon(self._fail, exc)

    def _on_socket_unregister_write(self, client: Any, userdata: Any, sock: Any) -> None:
        if sock.fileno() >= 0:
            self._loop.remove_writer(sock.fileno())

    def _writable(self) -> None:
        try:
            self._client.loop_write()
        except Exception as exc:
            self._fail(exc)

    async def _misc_loop(self) -> None:
        """Keep alive. While reading is stopped no answer can be seen, so none is waited for."""
        last_ping = self._loop.time()
        try:
            while True:
                if not self._paused:
                    if self._client.loop_misc() != paho.MQTT_ERR_SUCCESS:
                        return
                elif self._loop.time() - last_ping >= self._client.keepalive / 3:
                    last_ping = self._loop.time()
                    self._client.ping()
                await asyncio.sleep(1)
        except Exception as exc:
            self._fail(exc)
