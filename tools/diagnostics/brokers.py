"""Can the brokers be reached: name, TCP, TLS, SASL, API versions, and the addresses that they advertise.

Guarantee: bounded; every broker is asked at the same time, so an unreachable one is reported within 10 s.
"""

import asyncio
import contextlib
import socket
import ssl
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from aiokafka.client import AIOKafkaClient

from streams.resilience.bounds import within
from streams.resilience.cluster import Broker, connects
from tools.diagnostics.findings import Finding, Level

STEP_SECONDS = 3.0


@dataclass(slots=True)
class Contact:
    """How far a bootstrap server was reached: seconds of each step that succeeded, and what stopped the next."""

    server: str
    steps: dict[str, float] = field(default_factory=dict)
    stopped_at: str = ""
    reason: str = ""
    advertised: list[Broker] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)


_ADVICE = {
    "dns": "Use a name that this machine resolves, or an address: KAFKA_BOOTSTRAP_SERVERS, --bootstrap-servers.",
    "tcp": "Is the broker running, is it this port (listeners in server.properties), does a firewall stand between?",
    "tls": "Does this listener speak TLS, is its certificate signed by KAFKA_SSL_CAFILE and made for this name?",
    "kafka": "Is this Kafka's port, and do KAFKA_SECURITY_PROTOCOL and KAFKA_SASL_* fit its listener?",
}


async def contact(server: str, connection: dict[str, Any]) -> Contact:
    """Go as far as one can with ``server``; never raises."""
    found = Contact(server)
    host, _, port = server.rpartition(":")
    host = host.strip("[]")
    loop = asyncio.get_running_loop()

    async def step(name: str, work: Any) -> bool:
        begun = time.monotonic()
        try:
            problem = await within(work, STEP_SECONDS)
        except TimeoutError:
            problem = f"no answer within {STEP_SECONDS:g} s"
        except Exception as exc:
            problem = f"{type(exc).__name__}: {exc}"
        if problem:
            found.stopped_at, found.reason = name, problem
            return False
        found.steps[name] = round(time.monotonic() - begun, 4)
        return True

    async def resolve() -> str:
        await loop.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
        return ""

    async def handshake() -> str:
        context: ssl.SSLContext = connection["ssl_context"]
        _, writer = await asyncio.open_connection(host, int(port), ssl=context, server_hostname=host)
        writer.close()
        return ""

    async def speak() -> str:
        client = AIOKafkaClient(bootstrap_servers=[server], request_timeout_ms=int(STEP_SECONDS * 1000), **connection)
        try:
            await client.bootstrap()
            found.advertised = [Broker(b.nodeId, b.host, b.port) for b in client.cluster.brokers()]
        finally:
            with contextlib.suppress(Exception):
                await within(client.close(), 0.5)
        return ""

    if not await step("dns", resolve()) or not await step("tcp", connects(host, int(port), STEP_SECONDS)):
        return found
    if "SSL" in connection.get("security_protocol", "") and not await step("tls", handshake()):
        return found
    # SASL and API versions are part of the first connection that a client makes.
    await step("kafka", speak())
    return found


async def check(servers: list[str], connection: dict[str, Any]) -> tuple[list[Finding], list[Contact]]:
    """Ask every bootstrap server, then the addresses that they advertise."""
    contacts = list(await asyncio.gather(*(contact(server, connection) for server in servers)))
    findings = []
    reached = [found for found in contacts if not found.stopped_at]
    for found in contacts:
        if found.stopped_at:
            level = Level.WARNING if reached else Level.ERROR
            what = f"bootstrap server {found.server} cannot be used ({found.stopped_at}): {found.reason}"
            findings.append(Finding(level, "brokers", what, _ADVICE[found.stopped_at]))
    advertised = sorted({broker for found in reached for broker in found.advertised}, key=lambda b: b.node_id)
    problems = await asyncio.gather(*(connects(b.host, b.port, STEP_SECONDS) for b in advertised))
    for broker, problem in zip(advertised, problems, strict=True):
        if problem:
            findings.append(
                Finding(
                    Level.ERROR,
                    "advertised addresses",
                    f"broker {broker.node_id} advertises {broker.host}:{broker.port}, which cannot be reached from "
                    f"here: {problem}",
                    "Clients connect to the advertised address, whatever the bootstrap server was. Set "
                    "advertised.listeners of that broker to a name and port that this machine reaches (in containers: "
                    "the host's name and the published port, on a listener of its own); if the broker is down, start "
                    "it.",
                )
            )
    return findings, contacts
