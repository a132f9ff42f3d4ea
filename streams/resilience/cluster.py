"""What a cluster looks like from here: which brokers answer, who leads what."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from streams.resilience.bounds import within
from streams.resilience.consumer_options import brokers
from streams.resilience.tuning import check_keys

CONNECT_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Broker:
    """One broker as the cluster advertises it."""

    node_id: int
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class PartitionInfo:
    """One partition; ``leader`` is -1 where there is none."""

    partition: int
    leader: int
    replicas: tuple[int, ...]
    in_sync: tuple[int, ...]

    @property
    def under_replicated(self) -> bool:
        """Whether a replica lags behind or is away."""
        return len(self.in_sync) < len(self.replicas)


@dataclass(frozen=True, slots=True)
class ClusterInfo:
    """The cluster's picture of itself; ``controller`` is -1 where it is not known."""

    cluster_id: str
    controller: int
    brokers: tuple[Broker, ...]
    topics: dict[str, tuple[PartitionInfo, ...]] = field(default_factory=dict)

    def leaderless(self) -> list[tuple[str, int]]:
        """Return the partitions without a leader: they can be neither read nor written."""
        return [(topic, p.partition) for topic, found in self.topics.items() for p in found if p.leader < 0]

    def under_replicated(self) -> list[tuple[str, int]]:
        """Return the partitions with a replica that lags behind or is away."""
        return [(topic, p.partition) for topic, found in self.topics.items() for p in found if p.under_replicated]

    def as_dict(self) -> dict[str, Any]:
        """Return plain dicts and lists, for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class KafkaHealth:
    """Whether a cluster can be worked with; ``problems`` says why not, in words."""

    healthy: bool
    reachable: tuple[str, ...]
    unreachable: tuple[str, ...]
    brokers: int
    latency_seconds: float | None
    problems: tuple[str, ...]


async def connects(host: str, port: int, seconds: float = CONNECT_SECONDS) -> str:
    """Try a TCP connection; return what was wrong in words, empty when it came to be."""
    try:
        _, writer = await within(asyncio.open_connection(host.strip("[]"), port), seconds)
    except TimeoutError:
        return f"no answer within {seconds:g} s"
    except OSError as exc:
        return str(exc)
    writer.close()
    with contextlib.suppress(OSError, TimeoutError):
        await within(writer.wait_closed(), 1.0)
    return ""


async def reachable(servers: Sequence[str], seconds: float = CONNECT_SECONDS) -> dict[str, str]:
    """Return, for each of ``servers`` in order, what was wrong with a TCP connection; empty when nothing was."""
    split = [server.rpartition(":") for server in servers]
    problems = await asyncio.gather(*(connects(host, int(port), seconds) for host, _, port in split))
    return dict(zip(servers, problems, strict=True))


async def validate_bootstrap_servers(
    bootstrap_servers: str | Sequence[str], *, timeout: float = CONNECT_SECONDS
) -> list[str]:
    """Return those of ``bootstrap_servers`` that accept a TCP connection within ``timeout`` seconds, in order.

    Empty when none does. Raises ValueError for what is no ``host:port``.
    """
    return [server for server, wrong in (await reachable(brokers(bootstrap_servers), timeout)).items() if not wrong]


async def open_admin(servers: Iterable[str], seconds: float, **connection: Any) -> AIOKafkaAdminClient:
    """Return a started admin client; raises KafkaError, OSError or TimeoutError."""
    admin = AIOKafkaAdminClient(bootstrap_servers=list(servers), request_timeout_ms=int(seconds * 1000), **connection)
    try:
        await within(admin.start(), seconds)
    except BaseException:
        with contextlib.suppress(Exception):
            await within(admin.close(), 1.0)
        raise
    return admin


async def describe(admin: AIOKafkaAdminClient) -> ClusterInfo:
    """Return the cluster's picture of itself."""
    cluster = await admin.describe_cluster()
    topics = await admin.describe_topics()
    return ClusterInfo(
        cluster_id=str(cluster.get("cluster_id") or ""),
        controller=int(cluster.get("controller_id", -1)),
        brokers=tuple(Broker(b["node_id"], b["host"], b["port"]) for b in cluster["brokers"]),
        topics={
            topic["topic"]: tuple(
                PartitionInfo(p["partition"], p["leader"], tuple(p["replicas"]), tuple(p["isr"]))
                for p in sorted(topic["partitions"], key=lambda p: int(p["partition"]))
            )
            for topic in topics
        },
    )


async def get_kafka_cluster_info(
    bootstrap_servers: str | Sequence[str], *, timeout: float = 10.0, **connection: Any
) -> ClusterInfo:
    """Return brokers, topics, leaders and replicas.

    ``connection``: security_protocol, ssl_context, sasl_… as aiokafka's clients take them.

    Raises:
        ValueError, TypeError: an argument that cannot be.
        KafkaError, OSError, TimeoutError: no broker answers within ``timeout`` seconds.
    """
    check_keys("consumer", connection)
    admin = await open_admin(brokers(bootstrap_servers), timeout, **connection)
    try:
        return await within(describe(admin), timeout)
    finally:
        await admin.close()


async def check_kafka_health(
    bootstrap_servers: str | Sequence[str], *, timeout: float = 10.0, **connection: Any
) -> KafkaHealth:
    """Tell whether the cluster can be worked with; an absent one is an answer and no exception.

    Healthy: a broker answers with its metadata and every partition has a leader. Raises ValueError or TypeError for
    arguments that cannot be.
    """
    servers = brokers(bootstrap_servers)
    check_keys("consumer", connection)
    tried = await reachable(servers, min(timeout, CONNECT_SECONDS))
    up = tuple(server for server, wrong in tried.items() if not wrong)
    down = tuple(server for server, wrong in tried.items() if wrong)
    problems = [f"{server}: {tried[server]}" for server in down]
    begun = time.monotonic()
    try:
        info = await get_kafka_cluster_info(servers, timeout=timeout, **connection)
    except (KafkaError, OSError, TimeoutError) as exc:
        problems.append(f"no broker answers a metadata request: {type(exc).__name__}: {exc}")
        return KafkaHealth(False, up, down, 0, None, tuple(problems))
    latency = time.monotonic() - begun
    leaderless = info.leaderless()
    problems += [f"{topic}[{partition}] has no leader" for topic, partition in leaderless]
    return KafkaHealth(not leaderless, up, down, len(info.brokers), latency, tuple(problems))
