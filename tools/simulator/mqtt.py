"""MQTT publishing as devices do it: QoS 1, many in flight, through broker restarts.

Guarantees: `on_ack` is called once for each message whose PUBACK said that the broker has taken it *and* somebody
subscribes to it; `on_refused` for one that it has not taken. What is in flight when a connection ends is sent again, in
order, on the next one. Both are called on the network's thread and must not block.

MQTT 5, and 3.1.1 where the broker has no 5 (which cannot tell that nobody subscribes).
"""

import threading
import time
from collections.abc import Callable
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from agents.edges.mqtt_wire import BrokerUrl, parse_url
from tools.simulator.message import Message

__all__ = ["Publisher", "new_client"]

_NO_SUBSCRIBERS = 0x10
_RECONNECT_SECONDS = (0.2, 2.0)


def new_client(url: BrokerUrl, client_id: str, version: MQTTProtocolVersion) -> paho.Client:
    """Return a client with what `url` says of user and TLS, not connected yet."""
    client = paho.Client(CallbackAPIVersion.VERSION2, client_id=client_id, protocol=version)
    if url.username is not None:
        client.username_pw_set(url.username, url.password)
    if url.tls:
        client.tls_set()
    client.reconnect_delay_set(*_RECONNECT_SECONDS)  # type: ignore[arg-type]  # paho adds and compares them only
    return client


class Publisher:
    """One connection that all devices of a fleet share; `inflight` bounds what waits for its PUBACK.

    Raises ValueError for a URL that is none.
    """

    def __init__(
        self,
        url: str,
        *,
        on_ack: Callable[[Message, int], None],
        on_refused: Callable[[Message, str], None],
        inflight: int = 500,
        client_id: str = "",
    ) -> None:
        self._url = parse_url(url)
        self._on_ack, self._on_refused = on_ack, on_refused
        self._inflight = inflight
        self._client_id = client_id
        self._client: paho.Client | None = None
        self._lock = threading.Lock()
        self._window = threading.Semaphore(inflight)
        self._waiting: dict[int, tuple[Message, list[int]]] = {}
        self._early: dict[int, Any] = {}
        self._connected = threading.Event()
        self._stopped = threading.Event()
        self.connections = 0

    @property
    def in_flight(self) -> int:
        """How many messages wait for their PUBACK."""
        return len(self._waiting)

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection at the moment."""
        return self._connected.is_set()

    def start(self, patience_seconds: float = 30.0) -> None:
        """Connect; ConnectionError when no broker has answered by then."""
        deadline = time.monotonic() + patience_seconds
        while time.monotonic() < deadline:
            for version in (MQTTProtocolVersion.MQTTv5, MQTTProtocolVersion.MQTTv311):
                self._client = self._new_client(version)
                self._client.connect_async(self._url.host, self._url.port, keepalive=30)
                self._client.loop_start()
                if self._connected.wait(min(5.0, max(0.1, deadline - time.monotonic()))):
                    return
                self._client.loop_stop()
        raise ConnectionError(
            f"no MQTT broker answers at {self._url} within {patience_seconds:.0f} s; look at MQTT_URL"
        )

    def publish(self, message: Message) -> bool:
        """Send `message`; waits while the window is full. False when the publisher was stopped meanwhile."""
        client = self._client
        if client is None:
            raise RuntimeError("start() comes first")
        while not self._window.acquire(timeout=0.1):
            if self._stopped.is_set():
                return False
        if self._stopped.is_set():
            return False
        mid = client.publish(message.route, message.payload, qos=1).mid
        # The PUBACK may be here already. paho holds locks of its own while it calls back, so ours is not held across
        # publish().
        with self._lock:
            early = self._early.pop(mid, None)
            if early is None:
                self._waiting[mid] = (message, [1])
        if early is not None:
            self._settle(message, 1, early)
        return True

    def drain(self, patience_seconds: float) -> int:
        """Wait until all is acknowledged, at most so long; return how many are not."""
        deadline = time.monotonic() + patience_seconds
        while self._waiting and time.monotonic() < deadline and not self._stopped.is_set():
            time.sleep(0.01)
        return len(self._waiting)

    def stop(self) -> None:
        """Disconnect; what is in flight is nobody's."""
        self._stopped.set()
        if self._client is not None:
            self._client.disconnect()
            self._client.loop_stop()

    def _new_client(self, version: MQTTProtocolVersion) -> paho.Client:
        client = new_client(self._url, self._client_id, version)
        client.max_inflight_messages_set(self._inflight)
        client.on_connect = self._opened
        client.on_disconnect = self._closed
        client.on_publish = self._acknowledged
        return client

    def _opened(self, client: paho.Client, _data: Any, _flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            return
        limit = getattr(properties, "ReceiveMaximum", None)
        if limit is not None:
            client.max_inflight_messages_set(min(limit, self._inflight))
        self.connections += 1
        if self.connections > 1:
            with self._lock:
                for _, sends in self._waiting.values():
                    sends[0] += 1
        self._connected.set()

    def _closed(self, *_: Any) -> None:
        self._connected.clear()

    def _acknowledged(self, _client: paho.Client, _data: Any, mid: int, reason: Any, _properties: Any) -> None:
        with self._lock:
            found = self._waiting.pop(mid, None)
            if found is None:
                self._early[mid] = reason
                return
        message, sends = found
        self._settle(message, sends[0], reason)

    def _settle(self, message: Message, sends: int, reason: Any) -> None:
        self._window.release()
        if reason.is_failure:
            self._on_refused(message, str(reason))
        elif reason.value == _NO_SUBSCRIBERS:
            self._on_refused(message, "nobody subscribes to its topic")
        else:
            self._on_ack(message, sends)
