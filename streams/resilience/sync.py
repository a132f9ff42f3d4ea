"""The helper functions for kafka-python and confluent-kafka clients, under the same names; neither is a dependency.

Guarantees: those of ``helpers``. A client is known by what it can do (confluent-kafka's has ``consume``), an exception
by the base classes of its library, so that none of them is imported before a client of it is created.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from streams.resilience import cluster
from streams.resilience.backoff import Backoff
from streams.resilience.cluster import ClusterInfo, KafkaHealth
from streams.resilience.consumer_options import KafkaUnavailable, brokers
from streams.resilience.helpers import COMMIT_SECONDS, PROBE_SECONDS, encoded
from streams.resilience.tuning import Client, get_optimized_consumer_config, get_optimized_producer_config

__all__ = [
    "check_kafka_health",
    "create_kafka_consumer",
    "create_kafka_producer",
    "get_kafka_cluster_info",
    "get_optimized_consumer_config",
    "get_optimized_producer_config",
    "is_consumer_healthy",
    "publish_message",
    "recreate_consumer_on_error",
    "safe_kafka_commit",
    "safe_kafka_poll",
    "validate_bootstrap_servers",
]

log = logging.getLogger(__name__)


def _is_confluent(client: Any) -> bool:
    return hasattr(client, "consume") or hasattr(client, "produce")


def _from_kafka(exc: BaseException) -> bool:
    """Tell whether ``exc`` is a failure of a client's library (or of its connection), not a wrong call."""
    if isinstance(exc, OSError | TimeoutError):
        return True
    names = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(exc).__mro__}
    return bool(names & {"kafka.KafkaError", "cimpl.KafkaException", "confluent_kafka.KafkaException"})


def safe_kafka_poll(consumer: Any, timeout_ms: int = 1000) -> dict[Any, list[Any]]:
    """Return ``{partition: [messages]}`` of what came within ``timeout_ms``; empty when the broker is away.

    The keys are the library's TopicPartition (kafka-python), or ``(topic, partition)`` (confluent-kafka). A closed
    consumer raises what its library raises (RuntimeError from confluent-kafka).
    """
    try:
        if not _is_confluent(consumer):
            return dict(consumer.poll(timeout_ms=timeout_ms))
        found: dict[Any, list[Any]] = {}
        for message in consumer.consume(500, timeout_ms / 1000):
            error = message.error()
            if error is not None:
                log.warning("Poll failed: %s; it may be tried again", error)
                continue
            found.setdefault((message.topic(), message.partition()), []).append(message)
    except Exception as exc:
        if not _from_kafka(exc) or getattr(consumer, "_closed", False):
            raise
        log.warning("Poll failed (%s: %s); it may be tried again", type(exc).__name__, exc)
        return {}
    return found


def safe_kafka_commit(consumer: Any, offsets: Any = None) -> bool:
    """Commit ``offsets``, or all that was read; True when the broker has them, False when the broker or group is away.

    ``offsets``: ``{TopicPartition: next offset}`` (kafka-python), a list of TopicPartition (confluent-kafka).
    """
    try:
        if _is_confluent(consumer):
            arguments = {"offsets": offsets} if offsets is not None else {}
            consumer.commit(asynchronous=False, **arguments)
        elif offsets is None:
            consumer.commit(timeout_ms=int(COMMIT_SECONDS * 1000))
        else:
            consumer.commit(_with_metadata(offsets), timeout_ms=int(COMMIT_SECONDS * 1000))
    except Exception as exc:
        # Nothing was read since the last commit: the broker has all there is.
        if "_NO_OFFSET" in str(exc):
            return True
        if not _from_kafka(exc):
            raise
        log.warning("Commit failed (%s: %s)", type(exc).__name__, exc)
        return False
    return True


def _with_metadata(offsets: Mapping[Any, Any]) -> dict[Any, Any]:
    structure = importlib.import_module("kafka.structs").OffsetAndMetadata
    fields = structure._fields
    return {
        tp: structure(*([offset, "", -1][: len(fields)])) if isinstance(offset, int) else offset
        for tp, offset in offsets.items()
    }


def is_consumer_healthy(consumer: Any) -> bool:
    """Tell whether ``consumer`` is open and gets metadata from a broker within 10 s. Never raises.

    Takes a kafka-python or confluent-kafka consumer, or a ``ResilientKafkaConsumer``.
    """
    if hasattr(consumer, "is_healthy"):
        return bool(consumer.is_healthy())
    try:
        if _is_confluent(consumer):
            return bool(consumer.list_topics(timeout=PROBE_SECONDS).brokers)
        if getattr(consumer, "_closed", False):
            return False
        answer: list[Any] = []
        # kafka-python's topics() has no time-out of its own.
        probe = threading.Thread(target=lambda: _ask(consumer, answer), daemon=True)
        probe.start()
        probe.join(PROBE_SECONDS)
        return bool(answer)
    except Exception as exc:
        log.debug("the consumer's metadata request failed: %r", exc)
        return False


def _ask(consumer: Any, answer: list[Any]) -> None:
    with contextlib.suppress(Exception):
        answer.append(consumer.topics())


def _library(client: Client) -> Any:
    name = {"kafka-python": "kafka", "confluent-kafka": "confluent_kafka"}.get(client)
    if name is None:
        raise ValueError(f"client={client!r}: give kafka-python or confluent-kafka")
    return importlib.import_module(name)


def create_kafka_consumer(
    *topics: str,
    group_id: str,
    bootstrap_servers: str | Sequence[str],
    client: Client = "kafka-python",
    **overrides: Any,
) -> Any:
    """Return a subscribed consumer of ``client`` with the tuned configuration.

    Raises ImportError when the client is not installed, ValueError for arguments that cannot be, the library's error
    when no broker can be reached (confluent-kafka connects in the background and raises none).
    """
    library = _library(client)
    config = get_optimized_consumer_config(group_id, client=client, **overrides)
    servers = brokers(bootstrap_servers)
    if client == "kafka-python":
        return library.KafkaConsumer(*topics, **{**config, "bootstrap_servers": servers})
    consumer = library.Consumer({**config, "bootstrap.servers": ",".join(servers)})
    consumer.subscribe(list(topics))
    return consumer


def create_kafka_producer(
    bootstrap_servers: str | Sequence[str], *, client: Client = "kafka-python", **overrides: Any
) -> Any:
    """Return a producer of ``client`` with the tuned configuration; raises as ``create_kafka_consumer`` does."""
    library = _library(client)
    config = get_optimized_producer_config(client=client, **overrides)
    servers = brokers(bootstrap_servers)
    if client == "kafka-python":
        return library.KafkaProducer(**{**config, "bootstrap_servers": servers})
    return library.Producer({**config, "bootstrap.servers": ",".join(servers)})


def publish_message(
    producer: Any,
    topic: str,
    value: Any,
    key: str | bytes | None = None,
    headers: Sequence[tuple[str, bytes]] | None = None,
    *,
    timeout: float = 120.0,
) -> Any:
    """Send one message and return once Kafka has acknowledged it: the library's metadata or delivered message.

    ``value``: bytes and None as they are, text in UTF-8, anything else as JSON. Raises the library's error, or
    TimeoutError after ``timeout`` seconds; the message may then arrive still.
    """
    if not _is_confluent(producer):
        return producer.send(topic, encoded(value), encoded(key), headers=list(headers or ())).get(timeout=timeout)
    delivered: list[tuple[Any, Any]] = []
    producer.produce(
        topic,
        value=encoded(value),
        key=encoded(key),
        headers=list(headers or ()),
        on_delivery=lambda error, message: delivered.append((error, message)),
    )
    until = time.monotonic() + timeout
    while not delivered and time.monotonic() < until:
        producer.poll(0.05)
    if not delivered:
        raise TimeoutError(f"topic {topic}: no acknowledgement within {timeout:g} s")
    error, message = delivered[0]
    if error is not None:
        raise importlib.import_module("confluent_kafka").KafkaException(error)
    return message


def recreate_consumer_on_error(
    consumer: Any,
    create: Callable[[], Any],
    *,
    error: BaseException | None = None,
    max_retries: int | None = None,
    base_delay: float = 1.0,
    max_delay: float = 64.0,
    on_error_callback: Callable[[BaseException, Any], None] | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> Any:
    """Close ``consumer`` and return the one that ``create()`` makes, however long that takes; blocks.

    Raises KafkaUnavailable when ``max_retries`` attempts have failed, and what ``create`` raises that is no failure of
    its library or connection.
    """
    if error is not None:
        log.warning("Recreating a consumer after %s: %s", type(error).__name__, error)
    if consumer is not None:
        with contextlib.suppress(Exception):
            consumer.close()
    backoff = Backoff(base_delay, max_delay)
    attempt = 0
    while True:
        attempt += 1
        try:
            made = create()
        except Exception as exc:
            if on_error_callback is not None:
                on_error_callback(exc, None)
            if not _from_kafka(exc):
                raise
            if max_retries is not None and attempt >= max_retries:
                raise KafkaUnavailable(
                    f"no consumer could be created in {attempt} attempt(s) (max_retries={max_retries}): {exc}"
                ) from exc
            delay = backoff.next()
            log.warning("Attempt %d to create a consumer failed (%s); the next in %.1f s", attempt, exc, delay)
            sleep(delay)
        else:
            log.info("Successfully recreated consumer after error (attempt %d)", attempt)
            return made


def validate_bootstrap_servers(bootstrap_servers: str | Sequence[str], *, timeout: float = 5.0) -> list[str]:
    """Return those that accept a TCP connection, in order; raises ValueError for what is no ``host:port``."""
    return _run(cluster.validate_bootstrap_servers(bootstrap_servers, timeout=timeout))  # type: ignore[no-any-return]


def check_kafka_health(
    bootstrap_servers: str | Sequence[str], *, timeout: float = 10.0, **connection: Any
) -> KafkaHealth:
    """Tell whether the cluster can be worked with; an absent one is an answer and no exception."""
    return _run(cluster.check_kafka_health(bootstrap_servers, timeout=timeout, **connection))  # type: ignore[no-any-return]


def get_kafka_cluster_info(
    bootstrap_servers: str | Sequence[str], *, timeout: float = 10.0, **connection: Any
) -> ClusterInfo:
    """Return brokers, topics, leaders and replicas; raises KafkaError, OSError or TimeoutError when none answers."""
    return _run(cluster.get_kafka_cluster_info(bootstrap_servers, timeout=timeout, **connection))  # type: ignore[no-any-return]


def _run(coroutine: Any) -> Any:
    """Run ``coroutine`` to its end, in a thread of its own: the caller's may have a loop already."""
    result: list[Any] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            result.append(asyncio.run(coroutine))
        except BaseException as exc:
            failure.append(exc)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]
