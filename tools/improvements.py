"""The quick check: are the values tuned, do the helpers work with this broker, does a consumer survive an error.

Guarantees: bounded; it writes only to a topic of its own, which it deletes; exit code 0, or 1 with what failed and what
to do. The broker is KAFKA_BOOTSTRAP_SERVERS, else that of a running `make stack`.
"""

import argparse
import asyncio
import contextlib
import functools
import logging
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from aiokafka.errors import KafkaError

from settings import environment
from streams.resilience import (
    AsyncResilientKafkaConsumer,
    check_kafka_health,
    create_kafka_consumer,
    create_kafka_producer,
    get_kafka_cluster_info,
    get_optimized_consumer_config,
    get_optimized_producer_config,
    is_consumer_healthy,
    publish_message,
    recreate_consumer_on_error,
    safe_kafka_commit,
    safe_kafka_poll,
    validate_bootstrap_servers,
)
from streams.resilience.bounds import within
from streams.resilience.cluster import open_admin
from tools.diagnostics.cluster import read_settings
from tools.diagnostics.latency import own_topic

BOUND_SECONDS = 60.0

#: What the tuned values are to be, in ms: session, heartbeat, request, poll interval.
TUNED = {
    "session_timeout_ms": 90_000,
    "heartbeat_interval_ms": 30_000,
    "request_timeout_ms": 120_000,
    "max_poll_interval_ms": 600_000,
}
#: What Kafka's clients have when nobody tunes them; the tuned buffers and fetches are larger.
PLAIN_BATCH_BYTES, PLAIN_PARTITION_FETCH_BYTES, PLAIN_SOCKET_BYTES = 16_384, 1_048_576, 32_768


class CheckFailed(Exception):
    """A check did not hold; the message says which and what to do."""


def expect(holds: object, message: str) -> None:
    """Raise CheckFailed with ``message`` where ``holds`` is false."""
    if not holds:
        raise CheckFailed(message)


def tuned_values() -> str:
    """Compare the tuned configuration with what it is meant to be, for all three clients."""
    consumer, producer = get_optimized_consumer_config("check"), get_optimized_producer_config()
    for name, wanted in TUNED.items():
        expect(
            consumer[name] == wanted, f"{name} is {consumer[name]}, wanted {wanted}: see streams/resilience/tuning.py"
        )
    expect(consumer["max_partition_fetch_bytes"] > PLAIN_PARTITION_FETCH_BYTES, "fetches are no larger than untuned")
    expect(producer["max_batch_size"] > PLAIN_BATCH_BYTES, "batches are no larger than untuned")
    expect(producer["compression_type"] == "lz4", f"compression is {producer['compression_type']}, wanted lz4")
    python = get_optimized_consumer_config("check", client="kafka-python")
    expect(python["reconnect_backoff_max_ms"] == 64_000, "reconnects are not up to 64 s apart")
    expect(python["receive_buffer_bytes"] > PLAIN_SOCKET_BYTES, "socket buffers are no larger than untuned")
    confluent = get_optimized_consumer_config("check", client="confluent-kafka")
    expect(confluent["session.timeout.ms"] == 90_000, "confluent-kafka's spelling lacks the session")
    return "90 s session, 30 s heartbeat, 120 s requests, 10 min polls, 64 s reconnects, lz4"


async def reachable(servers: list[str], connection: dict[str, Any]) -> str:
    """Find the brokers that answer."""
    up = await validate_bootstrap_servers(servers)
    advice = "start it (make stack), or set KAFKA_BOOTSTRAP_SERVERS; tools/kafka_diagnostics.py tells more"
    expect(up, f"no broker of {','.join(servers)} can be reached: {advice}")
    health = await check_kafka_health(servers, **connection)
    expect(health.healthy, f"{'; '.join(health.problems)}: {advice}")
    info = await get_kafka_cluster_info(servers, **connection)
    return f"{','.join(up)}: cluster {info.cluster_id}, {len(info.brokers)} broker(s), {len(info.topics)} topic(s)"


async def helpers(servers: list[str], connection: dict[str, Any], topic: str) -> str:
    """Publish, poll, commit, and create a consumer anew, with the helper functions."""
    group = f"check-{uuid.uuid4().hex}"
    create = functools.partial(create_kafka_consumer, topic, group_id=group, bootstrap_servers=servers, **connection)
    producer = await create_kafka_producer(servers, **connection)
    consumer = await create()
    try:
        await publish_message(producer, topic, {"n": 1}, key="device")
        found = await _poll(consumer)
        expect(found == [b'{"n":1}'], f"published one message and polled {found}")
        expect(await safe_kafka_commit(consumer), "the commit failed; the log says why")
        expect(await is_consumer_healthy(consumer), "a consumer that works is said to be unhealthy")
        await consumer.stop()
        expect(not await is_consumer_healthy(consumer), "a closed consumer is said to be healthy")
        consumer = await recreate_consumer_on_error(consumer, create, error=RuntimeError("forced"), max_retries=3)
        await publish_message(producer, topic, {"n": 2}, key="device")
        found = await _poll(consumer)
        expect(found == [b'{"n":2}'], f"after the commit and a new consumer, polled {found}")
    finally:
        await producer.stop()
        await consumer.stop()
    return "published, polled, committed, created anew, went on at the committed offset"


async def _poll(consumer: Any) -> list[bytes]:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        if records := await safe_kafka_poll(consumer):
            return [record.value for found in records.values() for record in found]
    return []


async def recreation(servers: list[str], connection: dict[str, Any], topic: str) -> str:
    """Close the client under a resilient consumer: it creates another one and goes on."""
    seen: list[int] = []

    async def handle(message: Any) -> bool:
        seen.append(message.value["n"])
        return True

    consumer = AsyncResilientKafkaConsumer(topic, f"check-{uuid.uuid4().hex}", servers, base_delay=0.1, **connection)
    task = asyncio.create_task(consumer.consume_messages(handle))
    producer = await create_kafka_producer(servers, **connection)
    try:
        await _until(lambda: consumer.is_healthy() and 2 in seen, "the consumer did not get to the messages")
        begun = time.monotonic()
        await consumer._session.consumer.stop()  # type: ignore[union-attr]
        await _until(lambda: consumer.recreations == 1 and consumer.is_healthy(), "no new consumer after the error")
        took = time.monotonic() - begun
        await publish_message(producer, topic, {"n": 3}, key="device")
        await _until(lambda: 3 in seen, "the new consumer got nothing")
    finally:
        await consumer.stop()
        await asyncio.gather(task, return_exceptions=True)
        await producer.stop()
    return f"recreated within {took:.1f} s after its client was closed, nothing lost"


async def _until(condition: Callable[[], bool], otherwise: str) -> None:
    until = time.monotonic() + 30
    while not condition():
        expect(time.monotonic() < until, f"{otherwise} within 30 s")
        await asyncio.sleep(0.02)


def surroundings(env: Mapping[str, str]) -> dict[str, str]:
    """Return the environment; where it names no broker, with what a running `make stack` wrote."""
    found = dict(env)
    if not found.get("KAFKA_BOOTSTRAP_SERVERS"):
        written = Path(found.get("HEADRACE_STATE") or ".headrace") / "stack.env"
        with contextlib.suppress(OSError):
            lines = [line.split("=", 1) for line in written.read_text().splitlines() if "=" in line]
            found |= {name: value.strip("'") for name, value in lines if name.startswith("KAFKA_")}
    return found


async def run(env: Mapping[str, str]) -> bool:
    """Make the checks, print a line each; return whether all hold."""
    settings, _ = read_settings(env)
    servers = list(settings.kafka_bootstrap_servers)
    connection = settings.kafka_client_options()
    connection.pop("bootstrap_servers")
    good = True

    async def check(name: str, work: Any) -> bool:
        try:
            told = await within(work, BOUND_SECONDS) if asyncio.iscoroutine(work) else work()
        except (CheckFailed, KafkaError, OSError, TimeoutError) as exc:
            print(f"FAILED  {name}: {exc if isinstance(exc, CheckFailed) else f'{type(exc).__name__}: {exc}'}")
            return False
        print(f"ok      {name}: {told}")
        return True

    good &= await check("tuned values", tuned_values)
    if not await check("broker", reachable(servers, connection)):
        return False
    admin = await open_admin(servers, 10, **connection)
    try:
        async with own_topic(admin) as topic:
            good &= await check("helpers", helpers(servers, connection, topic))
            good &= await check("recreation", recreation(servers, connection, topic))
    finally:
        await admin.close()
    return good


def main(arguments: list[str] | None = None) -> int:
    """Run; 0 when every check holds, else 1."""
    parser = argparse.ArgumentParser(prog="test_kafka_improvements.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--bootstrap-servers", metavar="S", help="host:port, a comma list; else KAFKA_BOOTSTRAP_SERVERS"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.CRITICAL)
    env = surroundings(environment())
    if options.bootstrap_servers:
        env["KAFKA_BOOTSTRAP_SERVERS"] = options.bootstrap_servers
    try:
        good = asyncio.run(run(env))
    except (KafkaError, OSError, TimeoutError, ValueError) as exc:
        print(f"FAILED  {type(exc).__name__}: {exc}")
        good = False
    print("all checks hold" if good else "a check failed")
    return 0 if good else 1
