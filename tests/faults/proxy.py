"""A TCP proxy that does to connections what networks do: delay, reset, black hole, refusal.

    with Proxy(host, port) as proxy:
        proxy.port                      # connect here
        proxy.reset(after_bytes=5000)   # each connection ends with RST once it has sent that much to the server
        proxy.hole()                    # connections stay, and nothing passes any more
        proxy.refuse()                  # the present ones end, new ones end at once
        proxy.clear()                   # all is well again, for new connections; those in the hole are reset

It runs on a thread of its own; the methods may be called from any other.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any, Self

_RESET_AT_CLOSE = struct.pack("ii", 1, 0)
_PIECE = 65536


class Proxy:
    """Between a client and ``host:port``; counts `connections` that it accepted and `resets`."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)
        self._writers: set[asyncio.StreamWriter] = set()
        self._open = asyncio.Event()
        self._limit: int | None = None
        self._refusing = False
        self.delay_seconds = 0.0
        self.connections = 0
        self.resets = 0
        self.port = 0

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def lead_to(self, host: str, port: int) -> None:
        """Lead new connections somewhere else."""
        self._call(lambda: setattr(self, "_target", (host, port)))

    def reset(self, after_bytes: int) -> None:
        """From now on end each connection with RST once a client has sent ``after_bytes``, in the midst of them."""
        self._call(lambda: setattr(self, "_limit", after_bytes))

    def hole(self) -> None:
        """Let nothing pass any more; nobody is told."""
        self._call(self._open.clear)

    def refuse(self) -> None:
        """End what there is, and end what comes at once."""
        self._call(self._refuse)

    def clear(self) -> None:
        """Let everything pass; connections that were in the hole are reset."""
        self._call(self._clear)

    def _call(self, action: Callable[[], Any]) -> None:
        done = threading.Event()

        def run() -> None:
            action()
            done.set()

        self._loop.call_soon_threadsafe(run)
        assert done.wait(10)

    def _refuse(self) -> None:
        self._refusing = True
        self._abort_all()

    def _clear(self) -> None:
        if not self._open.is_set():
            self._abort_all()
        self._limit = None
        self._refusing = False
        self._open.set()

    def _abort_all(self) -> None:
        for writer in list(self._writers):
            _abort(writer)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._open.set()
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        server.close()
        self._abort_all()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if self._refusing:
            _abort(writer)
            return
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target)
        except OSError:
            _abort(writer)
            return
        both = {writer, far_writer}
        self._writers |= both
        try:
            # the first side that ends takes the other one with it
            sides = [
                asyncio.ensure_future(self._pass(reader, far_writer, counted=True)),
                asyncio.ensure_future(self._pass(far_reader, writer, counted=False)),
            ]
            _done, pending = await asyncio.wait(sides, return_when=asyncio.FIRST_COMPLETED)
            for task in pending:
                task.cancel()
        finally:
            self._writers -= both
            for one in both:
                one.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, counted: bool) -> None:
        sent = 0
        with contextlib.suppress(OSError):
            while piece := await reader.read(_PIECE):
                await self._open.wait()
                if self.delay_seconds:
                    await asyncio.sleep(self.delay_seconds)
                if counted and self._limit is not None and sent + len(piece) > self._limit:
                    writer.write(piece[: max(0, self._limit - sent)])
                    await writer.drain()
                    self.resets += 1
                    self._abort_all()
                    return
                sent += len(piece)
                writer.write(piece)
                await writer.drain()


def _abort(writer: asyncio.StreamWriter) -> None:
    """End a connection with RST."""
    found = writer.get_extra_info("socket")
    if found is not None:
        with contextlib.suppress(OSError):
            found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_CLOSE)
    writer.transport.abort()
