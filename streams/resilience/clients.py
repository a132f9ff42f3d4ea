"""What aiokafka's clients leave open: an end that is one, what errors say of offsets, brokers that have moved."""

from __future__ import annotations

import logging
from typing import Any

from aiokafka import TopicPartition
from aiokafka.client import ConnectionGroup
from aiokafka.conn import create_conn
from aiokafka.errors import NoOffsetForPartitionError, OffsetOutOfRangeError

from streams.resilience.bounds import end, within

log = logging.getLogger(__name__)

#: What a fetch raises, once for each partition concerned, where ``auto_offset_reset`` is ``none``.
NO_POSITION = (OffsetOutOfRangeError, NoOffsetForPartitionError)
#: So long without a connection to any broker, the bootstrap servers are asked where the brokers are.
MOVED_SECONDS = 10.0
CONNECT_SECONDS = 5.0
_TASKS = ("_coordination_task", "_heartbeat_task", "_commit_refresh_task")


def without_position(exc: BaseException) -> dict[TopicPartition, int | None]:
    """Return the partitions that one of ``NO_POSITION`` tells of: the offset that the log lacks, None without one."""
    told = exc.args[0]
    return dict(told) if isinstance(exc, OffsetOutOfRangeError) else {told: None}


async def close_consumer(consumer: Any, seconds: float) -> None:
    """Close ``consumer`` within ``seconds``, or end what its own ``stop`` leaves running when it is cut short.

    That is the metadata task, the fetches and the heartbeats: with a broker that is frozen, or a group that is joining.
    """
    try:
        await within(consumer.stop(), seconds)
    except Exception as exc:
        log.debug("the consumer of group %s was not closed in order: %r", consumer._group_id, exc)
    else:
        return
    coordinator, fetcher = consumer._coordinator, consumer._fetcher
    tasks = [getattr(coordinator, name, None) for name in _TASKS] + [getattr(fetcher, "_fetch_task", None)]
    await end(*[task for task in tasks if task is not None])
    for part in (fetcher, consumer._client):
        if part is not None:
            try:
                await within(part.close(), seconds)
            except Exception as exc:
                log.debug("a part of the consumer of group %s was not closed: %r", consumer._group_id, exc)


def is_connected(client: Any) -> bool:
    """Return whether ``client``, an ``AIOKafkaClient``, has a connection to any broker."""
    return any(connection.connected() for connection in client._conns.values())


async def ask_bootstrap(client: Any) -> None:
    """Let ``client`` learn of its bootstrap servers where the brokers are now.

    aiokafka asks only brokers that it knows, for ever: a cluster that came back at other addresses is never found. A
    connection to a bootstrap server, kept as it does at its start, is asked along with them, and closed thereafter.
    """
    options = {
        "client_id": client._client_id,
        "request_timeout_ms": client._request_timeout_ms,
        "ssl_context": client._ssl_context,
        "security_protocol": client._security_protocol,
        "max_idle_ms": client._connections_max_idle_ms,
        "sasl_mechanism": client._sasl_mechanism,
        "sasl_plain_username": client._sasl_plain_username,
        "sasl_plain_password": client._sasl_plain_password,
        "sasl_kerberos_service_name": client._sasl_kerberos_service_name,
        "sasl_kerberos_domain_name": client._sasl_kerberos_domain_name,
        "sasl_oauth_token_provider": client._sasl_oauth_token_provider,
    }
    for host, port, _ in client.hosts:
        try:
            connection = await within(create_conn(host, port, **options), CONNECT_SECONDS)
        except Exception as exc:
            log.debug("bootstrap server %s:%s does not answer: %r", host, port, exc)
            continue
        client._conns["bootstrap", ConnectionGroup.DEFAULT] = connection
        client.force_metadata_update()
        return


class Reach:
    """Watches one client after another, and asks the bootstrap servers for one that has lost all of its brokers."""

    def __init__(self) -> None:
        self._lost_at: float | None = None

    async def look(self, client: Any, now: float) -> None:
        """Look at ``client`` at the monotonic time ``now``; call it every few seconds."""
        if client is None or is_connected(client):
            self._lost_at = None
        elif self._lost_at is None:
            self._lost_at = now
        elif now - self._lost_at >= MOVED_SECONDS:
            self._lost_at = now
            await ask_bootstrap(client)
