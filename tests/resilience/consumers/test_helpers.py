"""The helper functions against Apache Kafka, and those of `sync` with stand-ins that speak as its two libraries do."""

from __future__ import annotations

import asyncio
import functools
import random
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import ConsumerStoppedError, IllegalOperation

from streams.resilience import (
    KafkaUnavailable,
    check_kafka_health,
    create_kafka_consumer,
    create_kafka_producer,
    get_kafka_cluster_info,
    is_consumer_healthy,
    publish_message,
    recreate_consumer_on_error,
    safe_kafka_commit,
    safe_kafka_poll,
    sync,
    validate_bootstrap_servers,
)
from tests.resilience.consumers.conftest import QUICK
from tools.stack.ports import choose

FAST = {name: value for name, value in QUICK.items() if name.endswith("_ms")}


def nowhere() -> str:
    """Return an address where nobody listens."""
    return f"127.0.0.1:{choose(set(), random.Random())}"


async def test_the_round(broker: Any) -> None:
    """Create, publish, poll, commit, health, a new consumer after an error; several brokers are fallbacks."""
    topic, group = await broker.topic(), broker.group()
    servers = [nowhere(), broker.servers]
    create = functools.partial(create_kafka_consumer, topic, group_id=group, bootstrap_servers=servers, **FAST)
    producer = await create_kafka_producer(servers)
    sent = await publish_message(producer, topic, {"n": 1}, key="k", headers=[("h", b"1")])
    assert (sent.topic, sent.offset) == (topic, 0)
    consumer = await create()
    records: dict[Any, Any] = {}
    while not records:
        records = await safe_kafka_poll(consumer)
    ((tp, (record,)),) = records.items()
    assert (record.key, record.value, record.headers) == (b"k", b'{"n":1}', (("h", b"1"),))
    assert await safe_kafka_commit(consumer, {tp: 1})
    assert await broker.committed(group) == {(topic, 0): 1}
    assert await is_consumer_healthy(consumer)
    await consumer.stop()
    assert not await is_consumer_healthy(consumer)
    with pytest.raises(ConsumerStoppedError) as stopped:
        await safe_kafka_poll(consumer)
    consumer = await recreate_consumer_on_error(consumer, create, error=stopped.value)
    assert await is_consumer_healthy(consumer)
    assert await safe_kafka_poll(consumer, timeout_ms=100) == {}
    await consumer.stop()
    await producer.stop()


async def test_commit_that_cannot_be(broker: Any) -> None:
    """A commit of somebody else's partition is False; one without a group is an error."""
    topic = await broker.topic()
    consumer = await create_kafka_consumer(topic, group_id=broker.group(), bootstrap_servers=broker.servers, **FAST)
    assert not await safe_kafka_commit(consumer, {TopicPartition("other", 0): 1})
    await consumer.stop()
    alone = await create_kafka_consumer(topic, group_id=None, bootstrap_servers=broker.servers)  # type: ignore[arg-type]
    with pytest.raises(IllegalOperation):
        await safe_kafka_commit(alone)
    assert await is_consumer_healthy(alone)
    await alone.stop()


async def test_recreation_gives_up_when_told() -> None:
    """max_retries attempts, each told to the callback, then KafkaUnavailable; a wrong call passes at once."""
    told: list[BaseException] = []
    create = functools.partial(create_kafka_consumer, "t", group_id="g", bootstrap_servers=nowhere())
    with pytest.raises(KafkaUnavailable, match="2 attempt"):
        await recreate_consumer_on_error(
            None, create, max_retries=2, base_delay=0.01, on_error_callback=lambda exc, _: told.append(exc)
        )
    assert len(told) == 2
    with pytest.raises(TypeError, match="nonsense"):
        await recreate_consumer_on_error(None, functools.partial(create, nonsense=1))


async def test_cluster_and_servers(broker: Any) -> None:
    """Reachable servers come back in order; the cluster tells of itself; an absent one is an answer."""
    away = nowhere()
    assert await validate_bootstrap_servers([away, broker.servers]) == [broker.servers]
    assert await validate_bootstrap_servers(f"{broker.servers},{away}") == [broker.servers]
    assert sync.validate_bootstrap_servers([away]) == []
    with pytest.raises(ValueError, match="host:port"):
        await validate_bootstrap_servers("kafka://x:1")
    topic = await broker.topic(partitions=3)
    info = await get_kafka_cluster_info([away, broker.servers])
    assert len(info.topics[topic]) == 3
    assert info.leaderless() == info.under_replicated() == []
    assert f"127.0.0.1:{info.brokers[0].port}" == broker.servers
    assert await asyncio.to_thread(sync.get_kafka_cluster_info, broker.servers) is not None
    health = await check_kafka_health([away, broker.servers])
    assert (health.healthy, health.reachable, health.unreachable) == (True, (broker.servers,), (away,))
    absent = sync.check_kafka_health(away, timeout=3)
    assert not absent.healthy
    assert away in absent.problems[0]


class KafkaError(Exception):
    """Stands for kafka-python's."""


KafkaError.__module__ = "kafka.errors"


class KafkaException(Exception):
    """Stands for confluent-kafka's, which lives in its extension module."""


KafkaException.__module__ = "cimpl"


class Python:
    """A consumer as kafka-python's."""

    def __init__(self, exc: BaseException | None = None) -> None:
        self.exc = exc
        self.closed = False

    def poll(self, timeout_ms: int) -> dict[str, list[int]]:
        """Poll."""
        if self.exc:
            raise self.exc
        return {"tp": [timeout_ms]}

    def commit(self, *_offsets: Any, timeout_ms: int) -> None:
        """Commit."""
        assert timeout_ms
        if self.exc:
            raise self.exc

    def topics(self) -> set[str]:
        """Ask for metadata."""
        if self.exc:
            raise self.exc
        return {"t"}

    def close(self) -> None:
        """Close."""
        self.closed = True


class Confluent:
    """A consumer and producer as confluent-kafka's."""

    def __init__(self, exc: BaseException | None = None) -> None:
        self.exc = exc
        self.delivery: Any = None

    def consume(self, _count: int, _timeout: float) -> list[Any]:
        """Consume."""
        if self.exc:
            raise self.exc
        good = SimpleNamespace(error=lambda: None, topic=lambda: "t", partition=lambda: 0)
        return [good, SimpleNamespace(error=lambda: "broker down")]

    def commit(self, **arguments: Any) -> None:
        """Commit."""
        assert not arguments["asynchronous"]
        if self.exc:
            raise self.exc

    def list_topics(self, timeout: float) -> Any:
        """Ask for metadata."""
        assert timeout
        if self.exc:
            raise self.exc
        return SimpleNamespace(brokers={1: "b"})

    def produce(self, topic: str, **message: Any) -> None:
        """Produce."""
        self.delivery = (message["on_delivery"], (topic, message["value"], message["key"]))

    def poll(self, _timeout: float) -> None:
        """Call back."""
        callback, message = self.delivery
        callback(None, message)


@pytest.mark.parametrize(("kind", "failure"), [(Python, KafkaError("away")), (Confluent, KafkaException("away"))])
def test_sync_clients(kind: Any, failure: Exception) -> None:
    """What comes is returned, what passes by itself is an empty answer or False, a wrong call is raised."""
    good, away, wrong = kind(), kind(failure), kind(ZeroDivisionError())
    assert len(sync.safe_kafka_poll(good, 500)) == 1
    assert sync.safe_kafka_poll(away) == {}
    assert sync.safe_kafka_commit(good)
    assert not sync.safe_kafka_commit(away)
    assert sync.is_consumer_healthy(good)
    assert not sync.is_consumer_healthy(away)
    for call in (sync.safe_kafka_poll, sync.safe_kafka_commit):
        with pytest.raises(ZeroDivisionError):
            call(wrong)


def test_sync_recreation_and_publishing() -> None:
    """A new client is made with backoff after its library's errors; a message is published and acknowledged."""
    made: list[int] = []
    slept: list[float] = []

    def create() -> Python:
        made.append(1)
        if len(made) < 3:
            raise KafkaError("away")
        return Python()

    old = Python()
    new = sync.recreate_consumer_on_error(old, create, sleep=slept.append)
    assert old.closed
    assert new is not old
    assert len(slept) == 2
    made.clear()
    with pytest.raises(KafkaUnavailable):
        sync.recreate_consumer_on_error(None, create, max_retries=2, sleep=slept.append)
    assert sync.publish_message(Confluent(), "t", {"n": 1}, key="k") == ("t", b'{"n":1}', b"k")


def test_sync_clients_are_no_dependency() -> None:
    """Creating a client that is not installed is an ImportError that names it; an unknown one a ValueError."""
    with pytest.raises(ValueError, match="aiokafka"):
        sync.create_kafka_consumer("t", group_id="g", bootstrap_servers="h:1", client="aiokafka")
