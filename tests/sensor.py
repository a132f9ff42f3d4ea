"""An Efento sensor on its own UDP socket, that acknowledges the answers to its requests or does not."""

from __future__ import annotations

import secrets
import socket
import struct
import time
from typing import Any

from aiocoap.message import Message
from aiocoap.numbers import codes
from aiocoap.numbers.types import CON

from devices.efento.messages import CONFIG, MEASUREMENTS

TRIES = 20
WAIT_SECONDS = 3.0


class Sensor:
    """A sensor with one channel; ``hash`` is that of its configuration, ``got`` every configuration that came."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self.serial = secrets.token_bytes(6)
        self.hash = 7
        self.got: list[Any] = []
        self._mid = secrets.randbelow(1 << 16)
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.connect((host, int(port)))

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    @property
    def device_id(self) -> str:
        """The serial number in hexadecimal."""
        return self.serial.hex()

    def limits(self) -> list[int]:
        """Return the transfer limit of each configuration that came with one."""
        return [found.transfer_limit for found in self.got if found.transfer_limit]

    def ask(self, *, acknowledge: bool = True) -> Any:
        """Send measurements, confirmable, until they are taken; returns the configuration in the answer.

        An answer that wants an acknowledgement gets it only with ``acknowledge``.
        """
        self._mid = (self._mid + 1) & 0xFFFF
        token = secrets.token_bytes(4)
        request = Message(code=codes.POST, payload=self._measured(), _mtype=CON, _mid=self._mid, _token=token)
        request.opt.uri_path = ("m",)
        data = request.encode()
        for _ in range(TRIES):
            try:
                self._socket.send(data)
                answer = self._answer(token)
            except OSError:
                # nobody serves the port at the moment
                time.sleep(0.2)
                continue
            if answer is None:
                continue
            if not answer.code.is_successful():
                time.sleep(0.2)
                continue
            if answer.mtype == CON and acknowledge:
                self._socket.send(struct.pack("!BBH", 0x60, 0, answer.mid))
            found: Any = CONFIG()
            found.ParseFromString(bytes(answer.payload))
            self.got.append(found)
            return found
        raise AssertionError(f"no 2.xx for {TRIES} transmissions")

    def _answer(self, token: bytes) -> Message | None:
        until = time.monotonic() + WAIT_SECONDS
        while (left := until - time.monotonic()) > 0:
            self._socket.settimeout(left)
            try:
                answer = Message.decode(self._socket.recv(65_536))
            except TimeoutError:
                return None
            if answer.token == token and answer.code is not codes.EMPTY:
                return answer
        return None

    def _measured(self) -> bytes:
        measured: Any = MEASUREMENTS()
        measured.serial_num, measured.battery_status, measured.measurement_period_base = self.serial, True, 60
        measured.hash = self.hash
        channel = measured.channels.add()
        channel.type, channel.timestamp, channel.start_point = 1, int(time.time()) - 600, 215
        channel.sample_offsets.extend([0, 1])
        return bytes(measured.SerializeToString())
