"""Helper functions for aiokafka clients that a service holds itself; ``sync`` has the same names for other clients.

Guarantees: each call is bounded in time; what passes by itself (the failure class *retry*) is an answer and no
exception, what does not is raised.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import aiokafka
import msgspec
from aiokafka import TopicPartition
from aiokafka.errors import ConsumerStoppedError, IllegalOperation, KafkaError

from streams.resilience.backoff import Backoff
from streams.resilience.bounds import within
from streams.resilience.cluster import (
    ClusterInfo,
    KafkaHealth,
    check_kafka_health,
    get_kafka_cluster_info,
    validate_bootstrap_servers,
)
from streams.resilience.consumer_options import ErrorCallback, KafkaUnavailable, brokers
from streams.resilience.failures import FailureClass, classify
from streams.resilience.judgement import is_reachable
from streams.resilience.tuning import get_optimized_consumer_config, get_optimized_producer_config

__all__ = [
    "ClusterInfo",
    "KafkaHealth",
    "check_kafka_health",
    "create_kafka_consumer",
    "create_kafka_producer",
    "get_kafka_cluster_info",
    "is_consumer_healthy",
    "publish_message",
    "recreate_consumer_on_error",
    "safe_kafka_commit",
    "safe_kafka_poll",
    "validate_bootstrap_servers",
]

log = logging.getLogger(__name__)

COMMIT_SECONDS = 20.0
PROBE_SECONDS = 10.0
CLOSE_SECONDS = 5.0
START_SECONDS = 60.0


def passes_by_itself(exc: BaseException) -> bool:
    """Tell whether the same call may succeed later on the same client."""
    return classify(exc) is FailureClass.RETRY and not isinstance(exc, ConsumerStoppedError | IllegalOperation)


async def safe_kafka_poll(
    consumer: aiokafka.AIOKafkaConsumer, timeout_ms: int = 1000
) -> dict[TopicPartition, list[Any]]:
    """Return what ``consumer.getmany`` brings within ``timeout_ms``; empty when nothing came or the broker is away.

    Raises ConsumerStoppedError for a closed consumer (``recreate_consumer_on_error`` helps), and what is no passing
    failure.
    """
    try:
        records: dict[TopicPartition, list[Any]] = await consumer.getmany(timeout_ms=timeout_ms)
    except Exception as exc:
        if not passes_by_itself(exc):
            raise
        log.warning("Poll failed (%s: %s); it may be tried again", type(exc).__name__, exc)
        return {}
    return records


async def safe_kafka_commit(
    consumer: aiokafka.AIOKafkaConsumer, offsets: Mapping[TopicPartition, int] | None = None
) -> bool:
    """Commit ``offsets`` (the next ones to read), or all that was read; True when the broker has them.

    False within 20 s when the broker is away or the group has moved on: what was not committed is received again.
    Raises what is no passing failure, such as IllegalOperation for a consumer without a group.
    """
    try:
        await within(consumer.commit(dict(offsets) if offsets is not None else None), COMMIT_SECONDS)
    except Exception as exc:
        if not passes_by_itself(exc):
            raise
        log.warning("Commit failed (%s: %s)", type(exc).__name__, exc)
        return False
    return True


async def is_consumer_healthy(consumer: Any) -> bool:
    """Tell whether ``consumer`` is open, in its group, and gets an answer from a broker within 10 s. Never raises.

    Takes an aiokafka consumer, or an ``AsyncResilientKafkaConsumer``.
    """
    if hasattr(consumer, "is_healthy"):
        return bool(consumer.is_healthy())
    if getattr(consumer, "_closed", True) or getattr(consumer, "_fetcher", None) is None or not is_reachable(consumer):
        return False
    coordinator = getattr(consumer, "_coordinator", None)
    in_group = consumer._group_id is None or getattr(coordinator, "generation", -1) >= 0
    if not in_group and consumer.subscription():
        return False
    try:
        await within(consumer.topics(), PROBE_SECONDS)
    except Exception as exc:
        log.debug("the consumer's metadata request failed: %r", exc)
        return False
    return True


async def create_kafka_consumer(
    *topics: str, group_id: str, bootstrap_servers: str | Sequence[str], **overrides: Any
) -> aiokafka.AIOKafkaConsumer:
    """Return a started aiokafka consumer with the tuned configuration.

    Raises ValueError or TypeError for arguments that cannot be; KafkaError, OSError or TimeoutError (60 s) when no
    broker can be reached.
    """
    config = get_optimized_consumer_config(group_id, **overrides)
    consumer = aiokafka.AIOKafkaConsumer(*topics, **{**config, "bootstrap_servers": brokers(bootstrap_servers)})
    return await _started(consumer)


async def create_kafka_producer(bootstrap_servers: str | Sequence[str], **overrides: Any) -> aiokafka.AIOKafkaProducer:
    """Return a started aiokafka producer with the tuned configuration; raises as ``create_kafka_consumer`` does."""
    config = get_optimized_producer_config(**overrides)
    return await _started(aiokafka.AIOKafkaProducer(**{**config, "bootstrap_servers": brokers(bootstrap_servers)}))


async def _started(client: Any) -> Any:
    try:
        await within(client.start(), START_SECONDS)
    except BaseException:
        with contextlib.suppress(Exception):
            await within(client.stop(), CLOSE_SECONDS)
        raise
    return client


def encoded(value: Any) -> bytes | None:
    """Return ``value`` as it is written: bytes and None as they are, text in UTF-8, anything else as JSON."""
    if value is None or isinstance(value, bytes):
        return value
    return value.encode() if isinstance(value, str) else msgspec.json.encode(value)


async def publish_message(
    producer: aiokafka.AIOKafkaProducer,
    topic: str,
    value: Any,
    key: str | bytes | None = None,
    headers: Sequence[tuple[str, bytes]] | None = None,
) -> Any:
    """Send one message and return its RecordMetadata once Kafka has acknowledged it.

    ``value``: bytes and None as they are, text in UTF-8, anything else as JSON. aiokafka retries within its request
    timeout; then KafkaError is raised and the message may or may not have arrived.
    """
    return await producer.send_and_wait(topic, encoded(value), encoded(key), headers=list(headers or ()))


async def recreate_consumer_on_error(
    consumer: aiokafka.AIOKafkaConsumer | None,
    create: Callable[[], Awaitable[aiokafka.AIOKafkaConsumer]],
    *,
    error: BaseException | None = None,
    max_retries: int | None = None,
    base_delay: float = 1.0,
    max_delay: float = 64.0,
    on_error_callback: ErrorCallback | None = None,
) -> aiokafka.AIOKafkaConsumer:
    """Close ``consumer`` within a bound and return the one that ``create()`` makes, however long that takes.

    ``create``: a coroutine function that returns a started consumer, such as a partial of ``create_kafka_consumer``.
    Tried again with backoff from ``base_delay`` to ``max_delay`` seconds. Positions go back to the committed offsets.

    Raises:
        KafkaUnavailable: ``max_retries`` attempts have failed.
        Exception: what ``create`` raises that is no passing failure.
    """
    if error is not None:
        log.warning("Recreating a consumer after %s: %s", type(error).__name__, error)
    if consumer is not None:
        with contextlib.suppress(Exception):
            await within(consumer.stop(), CLOSE_SECONDS)
    backoff = Backoff(base_delay, max_delay)
    attempt = 0
    while True:
        attempt += 1
        try:
            made = await create()
        except (KafkaError, OSError, TimeoutError) as exc:
            if on_error_callback is not None:
                told = on_error_callback(exc, None)
                if inspect.isawaitable(told):
                    await told
            if not passes_by_itself(exc):
                raise
            if max_retries is not None and attempt >= max_retries:
                raise KafkaUnavailable(
                    f"no consumer could be created in {attempt} attempt(s) (max_retries={max_retries}): {exc}"
                ) from exc
            delay = backoff.next()
            log.warning("Attempt %d to create a consumer failed (%s); the next in %.1f s", attempt, exc, delay)
            await asyncio.sleep(delay)
        else:
            log.info("Successfully recreated consumer after error (attempt %d)", attempt)
            return made
