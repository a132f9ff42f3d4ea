"""Is a service there? One probe for each that the settings name, bounded in time, with a message that says what to do.

Guarantees: a probe never raises and never takes longer than its bound; it writes nothing, joins no consumer group, and
uses an MQTT client id of its own, so that a live connector keeps its session; no result holds a secret.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from settings import MASK, Endpoint, Settings, endpoint, masked, tls_context

BOUND_SECONDS: Final = 10.0


class Probe(NamedTuple):
    """What a try at one service showed; ``problem`` is None where it answered, ``detail`` says what did."""

    service: str
    variable: str
    address: str
    seconds: float
    detail: str = ""
    problem: str | None = None
    advice: str = ""


class Unusable(Exception):
    """The service answered, and cannot be used as the settings say."""


def _words(exc: BaseException, bound_seconds: float) -> str:
    """Say in one line why a try failed."""
    if isinstance(exc, TimeoutError):
        return f"no answer within {bound_seconds:g} s"
    if isinstance(exc, socket.gaierror):
        return "the host's name is unknown"
    codes = set(re.findall(r"\[Errno (-?\d+)\]", str(exc)))
    if isinstance(exc, ConnectionRefusedError) or codes == {str(errno.ECONNREFUSED)}:
        return "connection refused, nothing listens there"
    text = " ".join(str(exc).split()) or type(exc).__name__
    cause = exc.__cause__ or exc.__context__
    if isinstance(cause, OSError) and str(cause) not in text:
        text += f" ({_words(cause, bound_seconds)})"
    return text


async def _open(host: str, port: int) -> None:
    """Connect and close, where there is a host (not with a Unix socket); the plainest errors come from here."""
    if not host:
        return
    _, writer = await asyncio.open_connection(host, port)
    writer.close()


async def kafka_server(settings: Settings, server: str) -> str:
    """Ask one bootstrap server for the cluster, then reach for every address that the cluster advertises."""
    from aiokafka.conn import create_conn
    from aiokafka.protocol.metadata import MetadataRequest

    host, _, port = server.rpartition(":")
    await _open(host.strip("[]"), int(port))
    options = settings.kafka_client_options()
    del options["bootstrap_servers"]
    connection = await create_conn(
        host.strip("[]"),
        int(port),
        client_id=f"{settings.app_id}-check",
        request_timeout_ms=int(BOUND_SECONDS * 1000),
        **options,
    )
    try:
        metadata: Any = await connection.send(MetadataRequest([]))
    finally:
        connection.close()
    nodes = [(str(node[1]), int(node[2])) for node in metadata.brokers]
    for node_host, node_port in nodes:
        try:
            await _open(node_host, node_port)
        except OSError as exc:
            raise Unusable(
                f"the broker answers and advertises {node_host}:{node_port}, which cannot be reached from here "
                f"({_words(exc, BOUND_SECONDS)}); correct advertised.listeners of the broker"
            ) from exc
    return f"{len(nodes)} broker(s)"


async def database(settings: Settings) -> str:
    """Log in and ask for the version."""
    import asyncpg

    connection = await asyncpg.connect(settings.database_url, timeout=BOUND_SECONDS)
    try:
        version = str(await connection.fetchval("SHOW server_version"))
        if await connection.fetchval("SHOW transaction_read_only") == "on":
            raise Unusable("the database takes no writes (a standby?)")
    finally:
        await connection.close(timeout=BOUND_SECONDS)
    return f"PostgreSQL {version}"


async def redis(settings: Settings) -> str:
    """Log in and ask for the version."""
    from redis.asyncio import Redis

    target = endpoint(settings.redis_url)
    await _open(target.host, target.port)
    client = Redis.from_url(settings.redis_url, socket_connect_timeout=BOUND_SECONDS, socket_timeout=BOUND_SECONDS)
    try:
        about: Any = await client.info("server")
    finally:
        await client.aclose()
    if "valkey_version" in about:
        return f"Valkey {about['valkey_version']}"
    return f"Redis {about.get('redis_version', '')}".strip()


async def mqtt(settings: Settings) -> str:
    """Log in with a client id of our own and a clean session, and leave."""
    import aiomqtt

    target = endpoint(settings.mqtt_url)
    await _open(target.host, target.port)
    tls = None
    if target.scheme == "mqtts":
        tls = tls_context(settings.mqtt_tls_cafile, settings.mqtt_tls_certfile, settings.mqtt_tls_keyfile)
    client = aiomqtt.Client(
        target.host,
        target.port,
        username=target.username,
        password=target.password,
        identifier=f"{settings.app_id}-check-{os.getpid()}",
        # 3.1.1 is what every broker speaks.
        protocol=aiomqtt.ProtocolVersion.V311,
        clean_session=True,
        tls_context=tls,
        timeout=BOUND_SECONDS,
    )
    async with client:
        return "logged in"


async def smtp(settings: Settings) -> str:
    """Say EHLO, log in where the URL has a user, and QUIT."""
    import aiosmtplib

    target = endpoint(settings.smtp_url)
    await _open(target.host, target.port)
    client = aiosmtplib.SMTP(
        hostname=target.host,
        port=target.port,
        username=target.username,
        password=target.password,
        use_tls=target.scheme == "smtps",
        start_tls=target.scheme == "smtp+starttls",
        tls_context=None if target.scheme == "smtp" else tls_context(settings.smtp_tls_cafile, None, None),
        timeout=BOUND_SECONDS,
    )
    async with client:
        await client.ehlo()
    return "logged in" if target.username else "greeted"


def _secrets(*urls: str) -> list[str]:
    """Return every password in ``urls``, as it is written and as it is sent."""
    found = []
    for url in urls:
        parts = urlsplit(url)
        found += [parts.password or "", unquote(parts.password or ""), *parse_qs(parts.query).get("password", [])]
    return [secret for secret in found if secret]


def _shown(target: Endpoint, url: str) -> str:
    return masked(url) if not target.host else f"{target.scheme}://{target.host}:{target.port}{target.path}"


def _advice(variable: str) -> str:
    return f"a server that answers and lets us in; `make stack` starts one, {variable} names yours"


def plan(settings: Settings) -> list[tuple[str, str, str, Callable[[], Awaitable[str]], str]]:
    """Return (service, variable, address, probe, advice) of every service that the stages of this worker need."""
    wanted: list[tuple[str, str, str, Callable[[], Awaitable[str]], str]] = [
        (
            "Kafka",
            "KAFKA_BOOTSTRAP_SERVERS",
            server,
            partial(kafka_server, settings, server),
            _advice("KAFKA_BOOTSTRAP_SERVERS"),
        )
        for server in settings.kafka_bootstrap_servers
    ]
    urls: list[tuple[str, str, str, Callable[[Settings], Awaitable[str]]]] = [
        ("database", "DATABASE_URL", settings.database_url, database),
        ("Redis", "REDIS_URL", settings.redis_url, redis),
    ]
    if {"mqtt", "commands"} & set(settings.stages):
        urls.append(("MQTT broker", "MQTT_URL", settings.mqtt_url, mqtt))
    if "mailer" in settings.stages:
        urls.append(("mail server", "SMTP_URL", settings.smtp_url, smtp))
    for service, variable, url, probe in urls:
        wanted.append((service, variable, _shown(endpoint(url), url), partial(probe, settings), _advice(variable)))
    return wanted


async def probe_all(settings: Settings, bound_seconds: float = BOUND_SECONDS) -> list[Probe]:
    """Try all services at once; takes no longer than ``bound_seconds`` and never raises."""
    secrets = _secrets(settings.database_url, settings.redis_url, settings.mqtt_url, settings.smtp_url)
    secrets += [settings.kafka_sasl_password] if settings.kafka_sasl_password else []

    async def one(service: str, variable: str, address: str, probe: Callable[[], Awaitable[str]], advice: str) -> Probe:
        began = time.monotonic()
        try:
            async with asyncio.timeout(bound_seconds):
                detail = await probe()
        except (Exception, asyncio.CancelledError) as exc:
            if isinstance(exc, asyncio.CancelledError) and (task := asyncio.current_task()) and task.cancelling():
                raise
            text = _words(exc, bound_seconds)
            for secret in secrets:
                text = text.replace(secret, MASK)
            kind = " (TLS)" if isinstance(exc, ssl.SSLError) else ""
            return Probe(service, variable, address, time.monotonic() - began, problem=text + kind, advice=advice)
        return Probe(service, variable, address, time.monotonic() - began, detail)

    return list(await asyncio.gather(*(one(*wanted) for wanted in plan(settings))))
