"""The tuned values for services that speak to Kafka themselves, in the spelling of the client that they use.

Guarantees: the numbers are those of the broker profile ``resilient`` of the settings, kept here because
``streams.resilience`` reads no settings (a test compares the two); a configuration has exactly keys that the named
client takes. The trade-off is the profile's: 90 s without a heartbeat are outlived, and a worker that died without
leaving keeps its partitions for as long.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Final, Literal, get_args

Client = Literal["aiokafka", "kafka-python", "confluent-kafka"]

SESSION_TIMEOUT_SECONDS: Final = 90.0
HEARTBEAT_INTERVAL_SECONDS: Final = 30.0
REBALANCE_TIMEOUT_SECONDS: Final = 90.0
REQUEST_TIMEOUT_SECONDS: Final = 120.0
MAX_POLL_INTERVAL_SECONDS: Final = 600.0
RECONNECT_BACKOFF_MAX_SECONDS: Final = 64.0
METADATA_MAX_AGE_SECONDS: Final = 60.0
#: What all three clients have; the profile of the settings may choose what aiokafka alone is best at.
COMPRESSION: Final = "lz4"
LINGER_SECONDS: Final = 0.005
MAX_BATCH_BYTES: Final = 1024 * 1024
FETCH_MAX_WAIT_SECONDS: Final = 0.1
FETCH_MAX_BYTES: Final = 16 * 1024 * 1024
FETCH_PARTITION_MAX_BYTES: Final = 2 * 1024 * 1024

RECONNECT_BACKOFF_SECONDS: Final = 1.0
#: Bytes of a socket's buffers, for clients that let one choose (aiokafka leaves them to the kernel's own tuning).
SOCKET_BUFFER_BYTES: Final = 1024 * 1024


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


_COMMON_CONSUMER: Final[dict[str, Any]] = {
    "enable_auto_commit": False,
    "auto_offset_reset": "earliest",
    "session_timeout_ms": _ms(SESSION_TIMEOUT_SECONDS),
    "heartbeat_interval_ms": _ms(HEARTBEAT_INTERVAL_SECONDS),
    "max_poll_interval_ms": _ms(MAX_POLL_INTERVAL_SECONDS),
    "metadata_max_age_ms": _ms(METADATA_MAX_AGE_SECONDS),
    "fetch_max_bytes": FETCH_MAX_BYTES,
    "max_partition_fetch_bytes": FETCH_PARTITION_MAX_BYTES,
}
_RECONNECT: Final = {
    "reconnect_backoff_ms": _ms(RECONNECT_BACKOFF_SECONDS),
    "reconnect_backoff_max_ms": _ms(RECONNECT_BACKOFF_MAX_SECONDS),
}
_CONSUMER: Final[dict[str, dict[str, Any]]] = {
    "aiokafka": {
        **_COMMON_CONSUMER,
        "request_timeout_ms": _ms(REQUEST_TIMEOUT_SECONDS),
        "rebalance_timeout_ms": _ms(REBALANCE_TIMEOUT_SECONDS),
        "fetch_max_wait_ms": _ms(FETCH_MAX_WAIT_SECONDS),
    },
    "kafka-python": {
        **_COMMON_CONSUMER,
        **_RECONNECT,
        "request_timeout_ms": _ms(REQUEST_TIMEOUT_SECONDS),
        "fetch_max_wait_ms": _ms(FETCH_MAX_WAIT_SECONDS),
        "receive_buffer_bytes": SOCKET_BUFFER_BYTES,
        "send_buffer_bytes": SOCKET_BUFFER_BYTES,
    },
    # librdkafka has request.timeout.ms for producers alone; what bounds a consumer's request is socket.timeout.ms.
    "confluent-kafka": {
        **_COMMON_CONSUMER,
        **_RECONNECT,
        "socket_timeout_ms": _ms(REQUEST_TIMEOUT_SECONDS),
        "fetch_wait_max_ms": _ms(FETCH_MAX_WAIT_SECONDS),
        "socket_receive_buffer_bytes": SOCKET_BUFFER_BYTES,
        "socket_send_buffer_bytes": SOCKET_BUFFER_BYTES,
    },
}
_COMMON_PRODUCER: Final[dict[str, Any]] = {
    "acks": "all",
    "enable_idempotence": True,
    "compression_type": COMPRESSION,
    "linger_ms": _ms(LINGER_SECONDS),
    "request_timeout_ms": _ms(REQUEST_TIMEOUT_SECONDS),
    "metadata_max_age_ms": _ms(METADATA_MAX_AGE_SECONDS),
}
_PRODUCER: Final[dict[str, dict[str, Any]]] = {
    # 2 MiB and the batch: a batch of one large message must fit a request.
    "aiokafka": {**_COMMON_PRODUCER, "max_batch_size": MAX_BATCH_BYTES, "max_request_size": 2 * 1024 * 1024},
    "kafka-python": {
        **_COMMON_PRODUCER,
        **_RECONNECT,
        "batch_size": MAX_BATCH_BYTES,
        # The whole of a delivery with its retries; the client wants it above request + linger.
        "delivery_timeout_ms": 2 * _ms(REQUEST_TIMEOUT_SECONDS),
        "receive_buffer_bytes": SOCKET_BUFFER_BYTES,
        "send_buffer_bytes": SOCKET_BUFFER_BYTES,
    },
    "confluent-kafka": {
        **_COMMON_PRODUCER,
        **_RECONNECT,
        "batch_size": MAX_BATCH_BYTES,
        "delivery_timeout_ms": 2 * _ms(REQUEST_TIMEOUT_SECONDS),
        "socket_receive_buffer_bytes": SOCKET_BUFFER_BYTES,
        "socket_send_buffer_bytes": SOCKET_BUFFER_BYTES,
    },
}


def get_optimized_consumer_config(group_id: str, *, client: Client = "aiokafka", **overrides: Any) -> dict[str, Any]:
    """Return the tuned configuration of a consumer of ``group_id`` for ``client``.

    90 s session, 30 s heartbeat, 120 s requests, 10 min between polls, reconnects up to 64 s apart, fetches of up to
    16 MiB (2 MiB a partition); offsets are committed by hand. ``overrides`` win; for confluent-kafka
    ``session_timeout_ms`` and ``**{"session.timeout.ms": …}`` are the same.

    Raises:
        ValueError: ``client`` is none of the three.
        TypeError: an override that aiokafka's consumer does not take.
    """
    return _config("consumer", _CONSUMER, client, {"group_id": group_id}, overrides)


def get_optimized_producer_config(*, client: Client = "aiokafka", **overrides: Any) -> dict[str, Any]:
    """Return the tuned configuration of a producer for ``client``.

    Acknowledged by all in-sync replicas, idempotent, lz4, batches of 1 MiB, 120 s requests. ``overrides`` win.

    lz4 comes with aiokafka and confluent-kafka here; kafka-python wants the package ``lz4`` beside it.

    Raises:
        ValueError: ``client`` is none of the three.
        TypeError: an override that aiokafka's producer does not take.
    """
    return _config("producer", _PRODUCER, client, {}, overrides)


def _config(
    role: str, table: Mapping[str, Mapping[str, Any]], client: str, first: Mapping[str, Any], overrides: dict[str, Any]
) -> dict[str, Any]:
    if client not in table:
        raise ValueError(f"client={client!r} is not known; it is one of {', '.join(get_args(Client))}")
    if client == "aiokafka":
        check_keys(role, overrides)
    values = {**first, **table[client]}
    if client == "confluent-kafka":
        values = {name.replace("_", "."): value for name, value in values.items()}
        overrides = {name.replace("_", "."): value for name, value in overrides.items()}
    return {**values, **overrides}


def check_keys(role: str, values: Mapping[str, Any]) -> None:
    """Raise TypeError for a key that aiokafka's consumer or producer (``role``) does not take."""
    import aiokafka

    kind = aiokafka.AIOKafkaConsumer if role == "consumer" else aiokafka.AIOKafkaProducer
    known = set(inspect.signature(kind).parameters) - {"topics", "loop"}
    unknown = sorted(set(values) - known)
    if unknown:
        raise TypeError(f"aiokafka's {role} takes no {', '.join(unknown)}; it takes {', '.join(sorted(known))}")
