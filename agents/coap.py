"""CoAP devices come in.

Consumes requests (CON and NON, plain, OSCORE or DTLS), produces ``iot_raw_data`` (RawMessage), key: device id, in order
of arrival per device. Guarantee: 2.xx only after Kafka has acknowledged the record, one record for a request however
often its datagram comes; while Kafka cannot, requests wait for ``COAP_ANSWER_SECONDS`` and get 5.03 with Max-Age.
Retried: Kafka, for as long as a request waits. Dead-lettered: nothing, what is refused is answered (4.xx) and counted.
Dropped: NON beyond ``COAP_MAX_PENDING`` (``overload``), what is refused, under the reason of the refusal.
"""

from __future__ import annotations

import asyncio
import gc
from typing import Any

from aiocoap.numbers.codes import SERVICE_UNAVAILABLE
from mode import Service

from agents.drivers import driver_times
from agents.edges.coap_arrivals import Arrival, Batch, Downlinks, Event
from agents.edges.coap_dtls import DtlsListener
from agents.edges.coap_requests import Judge, Refusal
from agents.edges.coap_security import Security, load_security
from agents.edges.coap_server import CoapServer
from agents.edges.ids import new_request_id
from agents.registered import Registered
from devices.registry import Registry
from streams import metrics, topics
from streams.messages import RawMessage, encode
from streams.resilience.failures import Retryable
from streams.resilience.producer import Outgoing
from streams.stage import Stage

coap = Stage("coap")
arrivals = coap.app.channel()


def raw_message(arrival: Arrival, request_id: str) -> RawMessage:
    """Return ``arrival`` as a RawMessage: valid UTF-8 as it came, all else in hexadecimal digits."""
    text: str | None = None
    hexadecimal: str | None = None
    try:
        text = arrival.payload.decode()
    except UnicodeDecodeError:
        hexadecimal = arrival.payload.hex()
    return RawMessage(
        request_id=request_id,
        timestamp=arrival.arrived_at,
        device_id=arrival.device_id,
        protocol="coap",
        payload=text,
        payload_hex=hexadecimal,
        metadata=arrival.metadata,
    )


def records(found: list[Arrival]) -> list[Outgoing]:
    """Return a record for each of ``found``, in order."""
    name = topics.raw_data.name
    return [(name, a.device_id.encode(), encode(raw_message(a, new_request_id())), None) for a in found]


_registry: Registry | None = None
_security: Security | None = None
_downlinks: Downlinks | None = None
_registered: Registered | None = None


@coap.prepare
def registry() -> Registry:
    """Return the configured registry, loaded when it is first needed."""
    global _registry
    if _registry is None:
        _registry = Registry.load(coap.settings.config_path)
    return _registry


@coap.prepare
def security() -> Security:
    """Return the keys that the settings name; raises KeysError for files that cannot be used."""
    global _security
    if _security is None:
        settings = coap.settings
        _security = load_security(
            settings.coap_oscore_keys, settings.coap_dtls_keys, settings.data_dir / "coap" / "oscore"
        )
    return _security


def use_downlinks(downlinks: Downlinks | None) -> None:
    """Have answers carry what waits for devices (None: nothing); holds for a server that runs already, too."""
    global _downlinks
    _downlinks = downlinks
    if Listener.server is not None:
        Listener.server.downlinks = downlinks


async def hand_over(batch: Batch) -> None:
    """Give a batch's records to Kafka; its devices are answered once all are acknowledged, or with 5.03."""
    wanted = batch.claim()
    if not wanted:
        batch.acknowledge()
        return
    try:
        futures = await coap.app.send_outgoing(coap.app.producer, records(wanted))
    except Exception as exc:
        coap.app.log.warning("%d CoAP messages not written to Kafka: %r; answered 5.03", len(wanted), exc)
        batch.refuse()
        return
    except asyncio.CancelledError:
        batch.refuse()
        raise
    if not futures:
        batch.acknowledge()
        return
    waiting = asyncio.gather(*futures)

    def settled(done: asyncio.Future[Any]) -> None:
        failure = asyncio.CancelledError() if done.cancelled() else done.exception()
        if failure is None:
            batch.acknowledge()
        else:
            coap.app.log.warning("%d CoAP messages not acknowledged by Kafka: %r; answered 5.03", len(wanted), failure)
            batch.refuse()

    waiting.add_done_callback(settled)


@coap.agent(arrivals, name="coap")
async def receive(stream: Any) -> None:
    """Write each batch to Kafka; the next one does not wait for the acknowledgement of the one before."""
    async for batch in stream:
        await hand_over(batch)


def count(event: Event | str, number: int) -> None:
    """Count what the server tells."""
    accounts = coap.app.accounts
    if event is Event.RECEIVED:
        accounts.deliver(number)
    elif event is Event.ACKNOWLEDGED:
        accounts.settle(number, None, None)
        metrics.CONNECTOR_ACKS.labels("coap").inc(number)
    elif event is Event.RETURNED:
        accounts.give_back(number)
    elif event in ("unavailable", "repeated"):
        # The device has its message still, or has sent again what is a record already.
        accounts.deliver(number)
        accounts.give_back(number)
    else:
        accounts.deliver(number)
        accounts.settle(number, None, {str(event): number})


@coap.prepare
def registered() -> Registered:
    """Return who is registered, made when it is first needed."""
    global _registered
    if _registered is None:
        _registered = Registered(registry())
    return _registered


def known(device_id: str) -> bool:
    """Tell whether somebody has configured a device, and as active; raises Refusal (5.03) while that is not known."""
    if registered().known(device_id):
        return True
    if not registered().complete:
        text = "the registered devices have not been read yet; come again"
        raise Refusal(SERVICE_UNAVAILABLE, text, "unavailable", max_age=int(coap.settings.coap_max_age_seconds))
    return False


def new_server() -> CoapServer:
    """Return the server that the settings describe."""
    settings = coap.settings
    judge = Judge(
        registry(),
        max_message_bytes=settings.max_message_bytes,
        known=known if settings.unknown_devices == "reject" else None,
        secured=security().devices,
        times=driver_times(settings),
    )
    return CoapServer(
        settings.coap_bind.host,
        settings.coap_bind.port,
        judge,
        deliver=deliver,
        count=count,
        answer_seconds=settings.coap_answer_seconds,
        max_age_seconds=settings.coap_max_age_seconds,
        max_pending=settings.coap_max_pending,
        max_pending_bytes=settings.in_flight_bytes,
        shield=security().shield,
        downlinks=_downlinks,
    )


async def deliver(batch: Batch) -> None:
    """Give a batch to the agent."""
    await arrivals.send(value=batch)


class Listener(Service):
    """The CoAP server's life: as long as the stage's."""

    server: CoapServer | None = None
    dtls: DtlsListener | None = None

    async def on_start(self) -> None:
        """Bind and serve; raises OSError, with the setting's name, where the address cannot be had."""
        settings = coap.settings
        if settings.unknown_devices == "reject":
            await registered().follow(self, settings)
        server = new_server()
        try:
            await server.start()
        except OSError as exc:
            raise OSError(f"COAP_BIND={settings.coap_bind}: {exc.strerror or exc}; choose another address") from exc
        Listener.server = server
        # What a worker has loaded by now stays; without this each full collection looks at all of it, for 0.1 s, while
        # devices wait.
        gc.collect()
        gc.freeze()
        bind = settings.coap_dtls_bind
        self.dtls = security().listener(bind.host, bind.port, server.received)
        if self.dtls is not None:
            try:
                await self.dtls.start()
            except OSError as exc:
                raise OSError(f"COAP_DTLS_BIND={bind}: {exc.strerror or exc}; choose another address") from exc
        coap.app.log.info(
            "CoAP on %s%s; messages of unknown devices: %s (UNKNOWN_DEVICES); devices with a key: %d",
            settings.coap_bind,
            "" if self.dtls is None else f", coaps on {bind}",
            settings.unknown_devices,
            len(security().devices),
        )

    async def on_stop(self) -> None:
        """Answer what waits, and close."""
        server, Listener.server = Listener.server, None
        if server is not None:
            await server.stop(coap.settings.drain_seconds)
        if self.dtls is not None:
            self.dtls.stop()


coap.service(Listener)


@coap.check("coap")
async def serving() -> None:
    """Raise while no request is taken."""
    server = Listener.server
    if server is None or not server.serving:
        raise Retryable(f"COAP_BIND={coap.settings.coap_bind} is not served")
    metrics.CONNECTOR_IN_FLIGHT.labels("coap").set(server.pending)
