"""Commands go out over MQTT; the part of the stage mqtt that has a group of its own.

Consumes the downlinks, publishes those of protocol ``mqtt`` through the connector's connection, tells the stage
commands what became of each (SENT, DELIVERED with the broker's PUBACK). Guarantee: nothing is sent after it expired;
what is not safe to repeat is written down in Kafka before it is published, and is published at most once, whatever
dies; all else is published again where it is not known to have gone. Retried: the MQTT broker and Kafka.
Dead-lettered: ``poison`` what is no downlink. Dropped: nothing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, Final, Literal, Protocol

from mode import Service

from agents.mqtt import Connector
from streams import topics
from streams.feed import Feed, Feeds
from streams.messages import CommandReport, DownlinkMessage, encode
from streams.resilience.chunks import Out
from streams.resilience.failures import Rejected, Retryable
from streams.resilience.producer import Outgoing
from streams.stage import Stage

downlinks = Stage("mqtt-downlinks", part_of="mqtt", chunks_in_flight=1)

#: Downlinks of this process whose outcome is remembered, in case their record comes again.
REMEMBERED: Final = 10_000
#: MQTT 5, 3.4.2.1: the broker took the message and nobody subscribes to its topic.
NO_MATCHING_SUBSCRIBERS: Final = 0x10


class Publisher(Protocol):
    """What sends: :class:`agents.edges.mqtt_client.MqttSource`."""

    def can_publish(self) -> bool:
        """Tell whether there is a connection."""
        ...

    async def publish(self, topic: str, payload: bytes, qos: int = 1, *, retain: bool = False) -> int:
        """Publish; return the broker's reason code."""
        ...


class Sender:
    """Publishes downlinks, and knows which have begun; ``write`` returns once Kafka has what it was given."""

    def __init__(self, write: Callable[[list[Outgoing]], Awaitable[None]]) -> None:
        self._write = write
        self.begun: dict[tuple[str, int], None] = {}
        self._done: dict[tuple[str, int], list[CommandReport]] = {}

    def note_begun(self, _key: str, message: DownlinkMessage | None) -> None:
        """Take a record of the downlinks that have begun, here or in another process."""
        if message is not None:
            self.begun[message.request_id, message.attempt] = None
            while len(self.begun) > REMEMBERED:
                del self.begun[next(iter(self.begun))]

    async def send(self, message: DownlinkMessage, source: Publisher | None, now: datetime) -> list[CommandReport]:
        """Publish ``message`` and return what became of it; raises Retryable while it cannot be published."""
        key = (message.request_id, message.attempt)
        done = self._done.get(key)
        if done is None:
            done = await self._send(message, source, now)
            self._done[key] = done
            if len(self._done) > REMEMBERED:
                del self._done[next(iter(self._done))]
        return done

    async def _send(self, message: DownlinkMessage, source: Publisher | None, now: datetime) -> list[CommandReport]:
        if now >= message.expires_at:
            return [report(message, "EXPIRED", f"expired at {message.expires_at.isoformat()}, before it could be sent")]
        if source is None or not source.can_publish():
            raise Retryable("MQTT: not connected, commands wait")
        if not message.repeatable:
            key = (message.request_id, message.attempt)
            if key in self.begun:
                return [report(message, "SENT", "it may not have gone out, and it is not safe to send it twice")]
            await self._write([(topics.downlinks_begun.name, message.device_id.encode(), encode(message), None)])
            self.note_begun("", message)
        try:
            reason = await source.publish(message.route, message.data, message.qos, retain=message.retain)
        except Rejected as exc:
            return [report(message, "FAILED", str(exc))]
        if message.qos == 0:
            return [report(message, "SENT", "QoS 0: the broker acknowledges nothing")]
        if reason == NO_MATCHING_SUBSCRIBERS:
            return [report(message, "SENT", f"nobody subscribes to {message.route} at the broker just now")]
        return [report(message, "SENT", ""), report(message, "DELIVERED", "the broker has it")]


def report(
    message: DownlinkMessage, kind: Literal["SENT", "DELIVERED", "FAILED", "EXPIRED"], detail: str
) -> CommandReport:
    """Return what the connector says of ``message``."""
    return CommandReport(
        request_id=message.request_id,
        device_id=message.device_id,
        kind=kind,
        attempt=message.attempt,
        detail=detail,
        timestamp=datetime.now(UTC),
    )


sender = Sender(downlinks.app.send_and_wait)
BEGUN = Feeds(downlinks.app)


@downlinks.agent(topics.downlinks, chunks=True, name="mqtt-downlinks")
async def send_down(stream: Any) -> None:
    """Publish what goes out over MQTT, in order per device."""
    await BEGUN.ready()

    async def send(message: DownlinkMessage, out: Out) -> None:
        if message.protocol == "mqtt":
            for word in await sender.send(message, Connector.source, datetime.now(UTC)):
                out.send(topics.command_reports, word, message.device_id)

    async for chunk in stream:
        await chunk.each(send)


class Follower(Service):
    """Follows what has begun, here and in other processes."""

    async def on_start(self) -> None:
        """Read the topic from its beginning."""
        feed = Feed(downlinks.settings, topics.downlinks_begun, sender.note_begun, beacon=self.beacon)
        await self.add_runtime_dependency(feed)
        BEGUN.all = [feed]


downlinks.service(Follower)
