"""Two hundred CoAP devices at the price of a few: requests made from parts, answers read by position.

A device sends its next confirmable request once the last one is answered, not before it is due, and sends it again as
RFC 7252 says (2 s, doubled). What a device of the simulator does with aiocoap's messages costs ten times as much, on
the same cores as what is measured.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from dataclasses import dataclass, field

RETRANSMIT_SECONDS = 2.0
_POST = 2
_EMPTY = 0
_CHANGED = 0x44
_UNAVAILABLE = 0xA3
_JSON = b"\x11\x32"  # Content-Format (12, one behind Uri-Path): 50


class Device:
    """One device."""

    __slots__ = ("again_at", "due", "open", "path", "request", "sequence", "sock", "wait_seconds")

    def __init__(self, name: str, address: tuple[str, int]) -> None:
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.setblocking(False)
        self.sock.connect(address)
        parts = (b"telemetry", name.encode())
        self.path = b"".join(bytes(((0xB0 if n == 0 else 0) | len(part),)) + part for n, part in enumerate(parts))
        self.sequence = 0
        self.request = b""
        self.open = False
        self.due = self.again_at = self.wait_seconds = 0.0

    def send(self, now: float) -> None:
        """Send the next request."""
        self.sequence += 1
        head = struct.pack("!BBHI", 0x44, _POST, self.sequence & 0xFFFF, self.sequence)
        payload = b'{"seq":%d,"t":21.5,"ts":%d}' % (self.sequence, time.time_ns() // 1_000_000)
        self.request = head + self.path + _JSON + b"\xff" + payload
        self.open = True
        self.wait_seconds = RETRANSMIT_SECONDS
        self.again_at = now + self.wait_seconds
        self.sock.send(self.request)

    def again(self, now: float) -> None:
        """Send it again."""
        self.wait_seconds *= 2
        self.again_at = now + self.wait_seconds
        self.sock.send(self.request)


@dataclass
class Result:
    """What a run gave; latencies in seconds, from when a message was due."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    repeated: int = 0
    unavailable: int = 0
    refused: int = 0
    unanswered: int = 0

    def percentile(self, share: float) -> float:
        """Return a latency in ms."""
        found = sorted(self.latencies)
        return found[min(len(found) - 1, int(len(found) * share))] * 1000 if found else float("nan")


class Fleet:
    """All devices, in one thread."""

    def __init__(self, count: int, address: tuple[str, int]) -> None:
        self.devices = [Device(f"d{n}", address) for n in range(count)]
        self._poll = select.epoll()
        self._by_file = {device.sock.fileno(): device for device in self.devices}
        for number in self._by_file:
            self._poll.register(number, select.EPOLLIN)

    def close(self) -> None:
        """Close all sockets."""
        self._poll.close()
        for device in self.devices:
            device.sock.close()

    def run(self, messages: int, rate: float, patience_seconds: float = 60.0) -> Result:
        """Send ``messages``, at ``rate`` a second (0: each device as fast as it is answered), and take the answers."""
        result = Result()
        begun = time.monotonic()
        period = len(self.devices) / rate if rate else 0.0
        left = messages
        for number, device in enumerate(self.devices):
            device.due = begun + number / rate if rate else begun
        waiting = set(self.devices)
        next_look = begun
        deadline = float("inf")
        while len(result.latencies) + result.refused < messages and time.monotonic() < deadline:
            now = time.monotonic()
            if now >= next_look:
                next_look = now + 0.002
                for device in [device for device in waiting if device.due <= now]:
                    waiting.discard(device)
                    if left:
                        left -= 1
                        device.send(now)
                        deadline = now + patience_seconds
                for device in self.devices:
                    if device.open and device.again_at <= now:
                        result.repeated += 1
                        device.again(now)
            for number, _ in self._poll.poll(0.002):
                device = self._by_file[number]
                try:
                    answer = device.sock.recv(2048)
                except OSError:
                    continue
                self._answer(device, answer, result)
                if not device.open:
                    device.due = max(device.due + period, begun) if rate else time.monotonic()
                    if left and device.due <= time.monotonic():
                        left -= 1
                        device.send(time.monotonic())
                        deadline = time.monotonic() + patience_seconds
                    else:
                        waiting.add(device)
        result.seconds = time.monotonic() - begun
        result.unanswered = sum(device.open for device in self.devices)
        return result

    def _answer(self, device: Device, answer: bytes, result: Result) -> None:
        kind, code = answer[0] >> 4 & 3, answer[1]
        if kind == 0:
            device.sock.send(b"\x60\0" + answer[2:4])
        if code == _EMPTY:
            device.again_at = float("inf")
            return
        if not device.open or answer[4:8] != device.request[4:8]:
            return
        now = time.monotonic()
        if code == _CHANGED:
            device.open = False
            result.latencies.append(now - device.due)
        elif code == _UNAVAILABLE:
            result.unavailable += 1
            device.sequence -= 1
            device.send(now)
        else:
            device.open = False
            result.refused += 1
