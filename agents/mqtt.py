"""MQTT devices come in.

Consumes what the broker delivers (QoS 1), produces ``iot_raw_data`` (RawMessage), key: device id, in order of arrival.
Guarantee: PUBACK in order of arrival, and only after Kafka has acknowledged the record; while Kafka cannot, nothing is
acknowledged, and the broker keeps what does not fit the window of ``MQTT_INFLIGHT``. A message that no profile matches
goes to ``iot_raw_data`` all the same.
Retried: Kafka, for ever. Dead-lettered: a message above ``MAX_MESSAGE_BYTES`` (class ``rejected``: size, hash and
first KiB). Dropped: nothing; messages of QoS 0 beyond 10,000 in hand, which carry no promise.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

from mode import Service

from agents.edges.ids import new_request_id
from agents.edges.mqtt_client import Batch, MqttSource, SourceEvent, TlsFiles
from agents.edges.mqtt_wire import Arrival
from agents.edges.raw import fallback_device_id, raw_records, refusal
from devices.registry import Registry
from streams import metrics, topics
from streams.resilience.deadletter import Failure, headers_of
from streams.resilience.failures import Rejected, Retryable
from streams.resilience.producer import Outgoing
from streams.stage import Stage

mqtt = Stage("mqtt")
arrivals = mqtt.app.channel()


class RefusedArrival:
    """An oversize message as the record that its dead letter is of."""

    topic = "mqtt"
    partition = -1
    offset = -1
    headers: tuple[tuple[str, bytes], ...] = ()

    def __init__(self, arrival: Arrival, device_id: str) -> None:
        self.key = device_id.encode()
        self.value = arrival.payload
        self.timestamp = int(arrival.arrived_at.timestamp() * 1000)
        self.topic = arrival.topic


class Intake:
    """The stage's pure part: from a batch to records, over the devices that the profiles name."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.settings = mqtt.settings

    def device_id_of(self, topic: str) -> str | None:
        """Return the device that a topic names, or None."""
        return self.registry.device_id("mqtt", topic)

    def records(self, messages: list[Arrival]) -> list[Outgoing]:
        """Return the records of ``messages``, in order; an oversize message gives its dead letter."""
        fine = [message for message in messages if not message.oversize]
        name = topics.raw_data.name
        made: list[Outgoing] = [
            (name, record.key, record.value, None) for record in raw_records(fine, self.device_id_of, new_request_id)
        ]
        made += [self._letter(message) for message in messages if message.oversize]
        return made

    def _letter(self, arrival: Arrival) -> Outgoing:
        now = datetime.now(UTC)
        device_id = self.device_id_of(arrival.topic) or fallback_device_id(arrival.topic)
        record = RefusedArrival(arrival, device_id)
        error = Rejected(refusal(arrival, self.settings.max_message_bytes))
        failure = Failure("rejected", error, 1, now, now)
        mqtt.app.on_dead_letter(record, failure)
        headers = headers_of(record, failure, stage="mqtt", group=mqtt.app.conf.id)
        headers += [
            ("dlq-truncated", b"1"),
            ("dlq-size", str(arrival.size_bytes).encode()),
            ("dlq-sha256", (arrival.sha256 or "").encode()),
        ]
        return (topics.errors.name, record.key, record.value, headers)


_intake: Intake | None = None


@mqtt.prepare
def intake() -> Intake:
    """Return the intake over the configured registry, loaded when it is first needed."""
    global _intake
    if _intake is None:
        _intake = Intake(Registry.load(mqtt.settings.config_path))
    return _intake


async def hand_over(batch: Batch) -> None:
    """Give a batch's records to Kafka; the broker is told once all are acknowledged, or that it is to send them
    again.
    """
    try:
        futures = await mqtt.app.send_outgoing(mqtt.app.producer, intake().records(batch.messages))
    except Exception as exc:
        mqtt.app.log.warning(
            "%d MQTT messages not written to Kafka: %r; the broker sends them again", len(batch.messages), exc
        )
        batch.release()
        return
    if not futures:
        batch.acknowledge()
        return
    waiting = asyncio.gather(*futures)

    def settled(done: asyncio.Future[Any]) -> None:
        failure = asyncio.CancelledError() if done.cancelled() else done.exception()
        if failure is None:
            refused = sum(message.oversize for message in batch.messages)
            if refused:
                # the acknowledgement, which follows, counts every message of the batch as forwarded
                mqtt.app.accounts.dead_lettered["rejected"] += refused
                mqtt.app.accounts.forwarded -= refused
            batch.acknowledge()
        else:
            mqtt.app.log.warning(
                "%d MQTT messages not acknowledged by Kafka: %r; the broker sends them again",
                len(batch.messages),
                failure,
            )
            batch.release()

    waiting.add_done_callback(settled)


@mqtt.agent(arrivals, name="mqtt")
async def receive(stream: Any) -> None:
    """Write each batch to Kafka; the next one does not wait for the acknowledgement of the one before."""
    async for batch in stream:
        await hand_over(batch)


def count(event: SourceEvent, number: int) -> None:
    """Count what the connector tells."""
    accounts = mqtt.app.accounts
    if event is SourceEvent.RECEIVED:
        accounts.deliver(number)
    elif event is SourceEvent.ACKNOWLEDGED:
        accounts.settle(number, None, None)
        metrics.CONNECTOR_ACKS.labels("mqtt").inc(number)
    elif event is SourceEvent.DONE_QOS0:
        accounts.settle(number, None, None)
    elif event is SourceEvent.STALE:
        accounts.give_back(number)
    elif event is SourceEvent.DROPPED_QOS0:
        accounts.settle(number, None, {"overload": number})


def new_source() -> MqttSource:
    """Return the source that the settings describe."""
    settings = mqtt.settings
    filters = list(settings.mqtt_topics) or intake().registry.mqtt_filters()
    tls = None
    if settings.mqtt_tls_cafile or settings.mqtt_tls_certfile:
        tls = TlsFiles(settings.mqtt_tls_cafile, settings.mqtt_tls_certfile, settings.mqtt_tls_keyfile)
    return MqttSource(
        settings.mqtt_url,
        filters,
        client_id=settings.mqtt_client_id,
        share=settings.mqtt_share,
        inflight=settings.mqtt_inflight,
        session_expiry_seconds=int(settings.mqtt_session_expiry_seconds),
        tls=tls,
        max_message_bytes=settings.max_message_bytes,
        buffer_bytes=settings.in_flight_bytes,
        keepalive_seconds=int(settings.mqtt_keepalive_seconds),
        backoff=mqtt.app.resilience.infrastructure_backoff(),
        on_event=count,
    )


class Connector(Service):
    """The MQTT client's life: as long as the stage's."""

    source: MqttSource | None = None

    async def on_start(self) -> None:
        """Connect in the background; an absent broker is waited for."""
        self.source = Connector.source = new_source()
        self.add_future(self._run())

    async def _run(self) -> None:
        source = self.source
        if source is None:
            return
        await source.run(self._deliver)

    async def _deliver(self, batch: Batch) -> None:
        await arrivals.send(value=batch)

    async def on_stop(self) -> None:
        """Disconnect; what is not acknowledged stays with the broker."""
        if self.source is not None:
            await self.source.stop()


mqtt.service(Connector)


@mqtt.check("mqtt")
async def connected() -> None:
    """Raise while the broker does not serve this connector."""
    source = Connector.source
    if source is None:
        raise Retryable("not started yet")
    if not source.healthy():
        status = source.status()
        raise Retryable(f"{status.state.value}: {status.detail}")
