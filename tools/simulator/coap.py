"""CoAP requests as devices send them: confirmable, one at a time for each device, sent again until they are answered.

Guarantees: `on_ack` is called once for each message that was answered 2.xx, with the number of its transmissions, after
`on_answer` with what the answer holds; `on_refused` for one that was answered otherwise. After 5.03 a device waits for
Max-Age, at most `MAX_WAIT_SECONDS`, and sends its message again. All are called on the network's thread and must not
block.

A device has a socket of its own, as devices have; retransmission is RFC 7252's (2 s, doubled four times), and a device
whose request was never answered begins again with a new message id.
"""

import asyncio
import contextlib
import random
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from aiocoap.message import Message as Coap
from aiocoap.numbers import codes
from aiocoap.numbers.types import ACK, CON

from tools.simulator.message import Message

__all__ = ["Requester"]

ACK_TIMEOUT_SECONDS: Final = 2.0
MAX_RETRANSMIT: Final = 4
# Between the empty acknowledgement and the answer.
PATIENCE_SECONDS: Final = 60.0
MAX_WAIT_SECONDS: Final = 5.0
_EMPTY_ACK: Final = 0x60


class _Device(asyncio.DatagramProtocol):
    """One device: its socket, and the messages that it has still to send."""

    def __init__(self, owner: "Requester", seed: str) -> None:
        self._owner = owner
        self._rng = random.Random(seed)
        self._mid = self._rng.randrange(65_536)
        self._transport: Any = None
        self.queue: deque[tuple[Message, int]] = deque()
        self._current: tuple[Message, bytes, bytes] | None = None
        self._sends = self._tries = 0
        self._wait_seconds = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Keep the transport."""
        self._transport = transport

    def error_received(self, exc: Exception) -> None:
        """Go on: nobody listens there at the moment; the next transmission may find somebody."""

    def push(self, message: Message) -> None:
        """Send `message` once those before it are answered."""
        self.queue.append((message, 0))
        if self._current is None and self._timer is None:
            self._next()

    def close(self) -> None:
        """Send nothing more."""
        if self._timer is not None:
            self._timer.cancel()
        if self._transport is not None:
            self._transport.close()

    def _next(self) -> None:
        self._timer = None
        if not self.queue:
            return
        message, self._sends = self.queue.popleft()
        self._mid = (self._mid + 1) & 0xFFFF
        token = self._rng.randbytes(4)
        request = Coap(code=codes.POST, payload=message.payload, _mtype=CON, _mid=self._mid, _token=token)
        request.opt.uri_path = message.route.split("/")
        if message.payload[:1] in (b"{", b"["):
            request.opt.content_format = 50
        self._current = (message, token, request.encode())
        self._tries = 0
        self._wait_seconds = ACK_TIMEOUT_SECONDS * self._rng.uniform(1.0, 1.5)
        self._transmit()

    def _transmit(self) -> None:
        if self._current is None:
            return
        self._tries += 1
        self._sends += 1
        self._transport.sendto(self._current[2])
        self._timer = self._owner.loop.call_later(self._wait_seconds, self._overdue)
        self._wait_seconds *= 2

    def _overdue(self) -> None:
        if self._current is None:
            return
        if self._tries <= MAX_RETRANSMIT:
            self._transmit()
        else:
            self._again(0.0)

    def _again(self, wait_seconds: float) -> None:
        """Send the current message again under a new id, after a while."""
        if self._current is None:
            return
        self.queue.appendleft((self._current[0], self._sends))
        self._current = None
        self._timer = self._owner.loop.call_later(wait_seconds, self._next)

    def datagram_received(self, data: bytes, _addr: Any) -> None:
        """Take an answer, or an acknowledgement of the request."""
        try:
            answer = Coap.decode(data)
        except Exception:
            return
        if answer.mtype == CON:
            self._transport.sendto(struct.pack("!BBH", _EMPTY_ACK, 0, answer.mid))
        current = self._current
        if current is None:
            return
        message, token, _ = current
        if answer.code == codes.EMPTY:
            if answer.mtype == ACK and answer.mid == self._mid and self._timer is not None:
                self._timer.cancel()
                self._tries = MAX_RETRANSMIT + 1
                self._timer = self._owner.loop.call_later(PATIENCE_SECONDS, self._overdue)
            return
        if answer.token != token:
            return
        if self._timer is not None:
            self._timer.cancel()
        if answer.code == codes.SERVICE_UNAVAILABLE:
            self._owner.busy += 1
            self._again(min(MAX_WAIT_SECONDS, answer.opt.max_age or 1))
            return
        self._current = None
        self._owner.settle(message, self._sends, answer)
        self._next()


class Requester:
    """All devices of a fleet; `inflight` bounds what waits for its answer. Raises ValueError for a URL that is none."""

    def __init__(
        self,
        url: str,
        *,
        on_ack: Callable[[Message, int], None],
        on_refused: Callable[[Message, str], None],
        on_answer: Callable[[Message, bytes], None] = lambda _message, _payload: None,
        inflight: int = 500,
    ) -> None:
        scheme, _, rest = url.partition("://")
        host, _, port = rest.rstrip("/").rpartition(":")
        if scheme != "coap" or not host or not port.isdigit():
            raise ValueError(f"{url}: not a CoAP address; allowed is coap://HOST:PORT")
        self._address = (host.strip("[]"), int(port))
        self._on_ack, self._on_refused, self._on_answer = on_ack, on_refused, on_answer
        self._window = threading.Semaphore(inflight)
        self._devices: dict[str, asyncio.Future[_Device]] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="coap devices", daemon=True)
        self.loop = asyncio.new_event_loop()
        self.in_flight = 0
        self.busy = 0
        #: seconds from sending to 2.xx, of the last 100,000 messages
        self.latencies: deque[float] = deque(maxlen=100_000)
        self._begun: dict[tuple[str, int], float] = {}

    @property
    def is_connected(self) -> bool:
        """Whether something has gone wrong that would be known: over UDP, never."""
        return True

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def publish(self, message: Message) -> bool:
        """Send `message`; waits while the window is full. False when the requester was stopped meanwhile."""
        while not self._window.acquire(timeout=0.1):
            if self._stopped.is_set():
                return False
        if self._stopped.is_set():
            return False
        self.loop.call_soon_threadsafe(self._push, message)
        return True

    def drain(self, patience_seconds: float) -> int:
        """Wait until all is answered, at most so long; return how many are not."""
        deadline = time.monotonic() + patience_seconds
        time.sleep(0.05)
        while self.in_flight and time.monotonic() < deadline and not self._stopped.is_set():
            time.sleep(0.01)
        return self.in_flight

    def stop(self) -> None:
        """Send nothing more; what is in flight is nobody's."""
        self._stopped.set()
        if self._thread.is_alive():
            with contextlib.suppress(RuntimeError):
                self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(5)

    def settle(self, message: Message, sends: int, answer: Coap) -> None:
        """Note what became of a message."""
        self.in_flight -= 1
        self._window.release()
        begun = self._begun.pop((message.device_id, message.seq), None)
        if answer.code.is_successful():
            if begun is not None:
                self.latencies.append(time.monotonic() - begun)
            self._on_answer(message, bytes(answer.payload))
            self._on_ack(message, sends)
        else:
            self._on_refused(message, f"{answer.code}: {answer.payload.decode(errors='replace')}")

    def _push(self, message: Message) -> None:
        self.in_flight += 1
        self._begun[message.device_id, message.seq] = time.monotonic()
        found = self._devices.get(message.device_id)
        if found is None:
            found = self._devices[message.device_id] = self.loop.create_task(self._open(message.device_id))
        if found.done():
            found.result().push(message)
        else:
            found.add_done_callback(lambda opened: opened.result().push(message))

    async def _open(self, device_id: str) -> _Device:
        made = await self.loop.create_datagram_endpoint(lambda: _Device(self, device_id), remote_addr=self._address)
        return made[1]

    def _work(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
            for opened in self._devices.values():
                if opened.done() and not opened.cancelled():
                    opened.result().close()
        finally:
            self.loop.close()
