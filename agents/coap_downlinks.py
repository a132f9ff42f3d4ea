"""Commands go out over CoAP: in the answer to the device's next request, confirmable, and said to be delivered when the
device has acknowledged that answer.

Follows what waits for devices (a compacted topic, read whole by every connector, so that a device may ask any of
them), tells the stage commands SENT and DELIVERED.
Guarantee: what waits is in Kafka until the command has its end, so that no restart loses it; it goes into answers until
the device has acknowledged one, or it has expired.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any, Literal

from mode import Service

from agents.coap import coap, use_downlinks
from streams import topics
from streams.feed import Feed
from streams.messages import CommandReport, DownlinkMessage, encode

Kind = Literal["SENT", "DELIVERED", "EXPIRED"]


class Pending:
    """What waits for devices, by device and request; the server's :class:`agents.edges.coap_arrivals.Downlinks`."""

    def __init__(self) -> None:
        self._devices: dict[str, dict[str, DownlinkMessage]] = {}
        self._device_of: dict[str, str] = {}
        self._told: dict[str, tuple[int, set[str]]] = {}
        self.reports: asyncio.Queue[CommandReport] = asyncio.Queue()

    def take(self, request_id: str, message: DownlinkMessage | None) -> None:
        """Take a record of the topic: a downlink that waits, or a tombstone for one that does not any more."""
        if message is None:
            self._drop(request_id)
            return
        self._devices.setdefault(message.device_id, {})[request_id] = message
        self._device_of[request_id] = message.device_id

    def _drop(self, request_id: str) -> None:
        device_id = self._device_of.pop(request_id, None)
        self._told.pop(request_id, None)
        if device_id is not None:
            waiting = self._devices[device_id]
            waiting.pop(request_id, None)
            if not waiting:
                del self._devices[device_id]

    def pending_for(self, device_id: str) -> tuple[bytes, Any] | None:
        """Return payload and token of what waits for a device, None where nothing does."""
        now = datetime.now(UTC)
        for message in self._devices.get(device_id, {}).values():
            if "DELIVERED" in self._said(message):
                continue
            if now < message.expires_at:
                return message.data, message
            self._tell(message, "EXPIRED", "the device made no request before it expired")
        return None

    def sent(self, token: Any) -> None:
        """Take note that an answer carries the downlink."""
        self._tell(token, "SENT", "in the answer to a request of the device")

    def delivered(self, token: Any) -> None:
        """Take note that the device has acknowledged that answer."""
        self._tell(token, "DELIVERED", "the device has acknowledged the answer that carried it")

    def _said(self, message: DownlinkMessage) -> set[str]:
        attempt, said = self._told.get(message.request_id, (0, set()))
        return said if attempt == message.attempt else set()

    def _tell(self, message: DownlinkMessage, kind: Kind, detail: str) -> None:
        said = self._said(message)
        if kind in said or message.request_id not in self._device_of:
            return
        self._told[message.request_id] = (message.attempt, {*said, kind})
        self.reports.put_nowait(
            CommandReport(
                request_id=message.request_id,
                device_id=message.device_id,
                kind=kind,
                attempt=message.attempt,
                by_device=kind == "DELIVERED",
                detail=detail,
                timestamp=datetime.now(UTC),
            )
        )


pending = Pending()


class Waiting(Service):
    """Follows what waits, and tells what became of it."""

    async def on_start(self) -> None:
        """Read the topic from its beginning."""
        await self.add_runtime_dependency(Feed(coap.settings, topics.coap_pending, pending.take, beacon=self.beacon))
        use_downlinks(pending)

    async def on_stop(self) -> None:
        """Answer without commands from now on."""
        use_downlinks(None)

    @Service.task
    async def _report(self) -> None:
        while not self.should_stop:
            words = [await pending.reports.get()]
            while not pending.reports.empty():
                words.append(pending.reports.get_nowait())
            name = topics.command_reports.name
            while not self.should_stop:
                try:
                    await coap.app.send_and_wait(
                        [(name, (word.device_id or "").encode(), encode(word), None) for word in words]
                    )
                except Exception as exc:
                    self.log.warning("%d reports on commands not written to Kafka: %r; again", len(words), exc)
                    await self.sleep(1.0)
                else:
                    break


coap.service(Waiting)
