"""A stage of ours on Apache Kafka: dead letters, revocation under a slow handler, a broker that goes and comes back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiokafka
import pytest
from aiokafka import TopicPartition
from faust.types import TP

from streams.resilience.application import App
from streams.resilience.chunks import Out
from streams.resilience.deadletter import header
from streams.resilience.failures import Poison
from streams.resilience.options import ResilienceOptions
from tests.resilience.conftest import Log, _admin
from tests.resilience.harness import numbered
from tests.resilience.test_deadletter import CONTRACT
from tools.stack import Stack

pytestmark = pytest.mark.stack


def stage(servers: str, group: str, folder: Path, letters: str, **options: Any) -> App:
    """Return the app of a stage."""
    return App(
        group,
        resilience=ResilienceOptions(
            stage="try",
            dead_letter_topic=letters,
            consumer={"fetch_max_wait_ms": 50},
            producer={"enable_idempotence": True},
            retry_base_seconds=0.1,
            retry_cap_seconds=1.0,
            attempt_base_seconds=0.01,
            commit_timeout_seconds=10.0,
            **{"drain_seconds": 3.0, **options},
        ),
        broker=f"kafka://{servers}",
        datadir=str(folder),
        store="memory://",
        env_prefix="TRY_",
        topic_disable_leader=True,
        table_standby_replicas=0,
        key_serializer="raw",
        value_serializer="raw",
        broker_session_timeout=3.0,
        broker_heartbeat_interval=0.5,
        broker_rebalance_timeout=8,
        broker_request_timeout=20,
        broker_commit_interval=0.1,
        producer_request_timeout=15,
        producer_acks=-1,
        web_enabled=False,
    )


@contextlib.asynccontextmanager
async def running(app: App) -> AsyncIterator[App]:
    """Run an app inside of this process."""
    app.finalize()
    await app.start()
    try:
        yield app
    finally:
        await app.stop()


async def test_one_poison_message_among_a_thousand(log: Log, tmp_path: Path) -> None:
    """999 are forwarded, in order; the bad one is one letter with its bytes and every header of the contract."""
    source, target, letters = await log.topic("in"), await log.topic("out"), await log.topic("errors")
    app = stage(log.servers, f"{log.prefix}poison", tmp_path, letters)

    def handler(value: bytes, out: Out) -> None:
        if value == b"v500":
            raise Poison("the 501st")
        out.send(target, value, "k")

    @app.agent(app.chunk_topic(source, bytes))
    async def work(stream: Any) -> None:
        async for chunk in stream:
            await chunk.each(handler)

    await log.write(source, *numbered(1000))
    async with running(app):
        await log.until_committed(app.conf.id, source, 1000)
    forwarded = [record.value for record in await log.read(target, 999)]
    (letter,) = await log.read(letters, 1)
    assert forwarded == [value for value in numbered(1000) if value != b"v500"]
    assert (letter.key, letter.value) == (b"k", b"v500")
    headers = {name: header(letter.headers, name) for name in CONTRACT}
    assert None not in headers.values()
    assert (headers["dlq-topic"], headers["dlq-offset"], headers["dlq-class"]) == (source, "500", "poison")
    assert (headers["dlq-group"], headers["dlq-stage"]) == (app.conf.id, "try")
    assert (app.accounts.forwarded, app.accounts.dead_lettered) == (999, {"poison": 1})
    assert app.accounts.balance() == 0


async def test_the_end_of_a_log_that_ends_with_a_marker(log: Log, tmp_path: Path) -> None:
    """Records written in transactions: the group commits past the markers too, also one that has only those to read."""
    source, letters = await log.topic("in"), await log.topic("errors")
    group = f"{log.prefix}markers"
    got: list[bytes] = []

    def fresh(name: str) -> App:
        app = stage(log.servers, group, tmp_path / name, letters)

        @app.agent(app.chunk_topic(source, bytes))
        async def work(stream: Any) -> None:
            async for chunk in stream:
                got.extend(record.value for record in chunk.records)

        return app

    async with aiokafka.AIOKafkaProducer(
        bootstrap_servers=log.servers, transactional_id=f"{log.prefix}writer"
    ) as producer:
        for value in (b"a", b"b"):
            async with producer.transaction():
                await producer.send_and_wait(source, value, partition=0)
        async with running(fresh("one")) as app:
            await log.until_committed(group, source, 4)
            assert app.typed_consumer is not None
            await log.until(lambda: app.typed_consumer and app.typed_consumer.lags() == {TP(source, 0): 0}, "no lag")
        # what a worker before us has committed ends right before a marker
        async with producer.transaction():
            await producer.send_and_wait(source, b"c", partition=0)
        async with aiokafka.AIOKafkaConsumer(
            bootstrap_servers=log.servers, group_id=group, enable_auto_commit=False
        ) as other:
            other.assign([TopicPartition(source, 0)])
            await other.commit({TopicPartition(source, 0): 5})
        async with running(fresh("two")):
            await log.until_committed(group, source, 6)
    assert got == [b"a", b"b"]


async def test_a_record_too_large_for_the_dead_letters_is_cut(log: Log, tmp_path: Path) -> None:
    """The broker refuses the letter: first bytes, size, hash and a pointer are written; small letters stay whole."""
    source = await log.topic("in")
    letters = await log.topic("errors", **{"max.message.bytes": "5000"})
    app = stage(log.servers, f"{log.prefix}large", tmp_path, letters)

    @app.agent(app.chunk_topic(source, bytes))
    async def work(stream: Any) -> None:
        async for chunk in stream:
            await chunk.each(_refuse)

    await log.write(source, b"small", b"x" * 6000, b"tiny")
    async with running(app):
        await log.until_committed(app.conf.id, source, 3)
    found = {header(record.headers, "dlq-offset"): record for record in await log.read(letters, 3)}
    assert (found["0"].value, found["2"].value) == (b"small", b"tiny")
    assert found["1"].value == b"x" * 1024
    assert header(found["1"].headers, "dlq-size") == "6000"
    assert header(found["0"].headers, "dlq-truncated") is None
    assert header(found["1"].headers, "dlq-message") == "never"
    assert app.accounts.dead_lettered == {"poison": 3}


def _refuse(value: bytes, out: Out) -> None:  # noqa: ARG001
    raise Poison("never")


async def test_a_revocation_in_the_middle_of_a_slow_handler(log: Log, tmp_path: Path) -> None:
    """A second worker joins while the first one's handler hangs: bounded, the mark is committed, nothing is lost.

    What the first had done it has committed; what hangs there is handled by whoever gets the partition.
    """
    source, letters = await log.topic("in", partitions=2), await log.topic("errors")
    group = f"{log.prefix}revoke"
    hang = asyncio.Event()
    done: dict[str, list[tuple[int, bytes]]] = {"one": [], "two": []}

    def worker(name: str) -> App:
        app = stage(log.servers, group, tmp_path / name, letters, drain_seconds=0.5)

        @app.agent(app.topic(source, value_type=bytes, value_serializer="raw", key_serializer="raw"))
        async def work(stream: Any) -> None:
            async for event in stream.events():
                if name == "one" and event.value == b"v3":
                    await hang.wait()
                done[name].append((event.message.partition, event.value))

        return app

    for partition in (0, 1):
        await log.write(source, *numbered(6), partition=partition)
    one, two = worker("one"), worker("two")
    async with running(one):
        await log.until(lambda: len(done["one"]) >= 3 and one.consumer.busy, "the first hangs")
        before = list(done["one"])
        async with running(two):
            await log.until(lambda: done["two"], "the second has taken over")
            committed = await log.committed(group)
            for partition in (0, 1):
                first = sum(1 for number, _ in before if number == partition)
                assert committed.get((source, partition), 0) >= first
            hang.set()
            for partition in (0, 1):
                await log.until_committed(group, source, 6, partition)
            for app in (one, two):
                await log.until(lambda app=app: app.accounts.in_flight == 0, "nothing is in flight")
                assert app.accounts.balance() == 0
    handled = done["one"] + done["two"]
    assert set(handled) == {(partition, value) for partition in (0, 1) for value in numbered(6)}
    assert one.accounts.returned > 0
    for partition in (0, 1):
        taken = [value for number, value in done["two"] if number == partition]
        assert taken == sorted(taken), "order is kept where the partition went"


async def test_a_broker_that_is_killed_in_the_middle_costs_nothing(own_stack: Stack, tmp_path: Path) -> None:
    """Killed while messages go through and started again: the app lives, every message is forwarded, in order."""
    broker = own_stack.part("kafka")
    log = Log(own_stack.env["KAFKA_BOOTSTRAP_SERVERS"])
    log.admin = await _admin(log.servers)
    source, target, letters = await log.topic("in"), await log.topic("out"), await log.topic("errors")
    await log.admin.close()
    app = stage(log.servers, f"{log.prefix}outage", tmp_path, letters, chunk_records=20)
    seen = 0

    async def handler(value: bytes, out: Out) -> None:
        nonlocal seen
        seen += 1
        await asyncio.sleep(0.002)
        out.send(target, value, "k")

    @app.agent(app.chunk_topic(source, bytes))
    async def work(stream: Any) -> None:
        async for chunk in stream:
            await chunk.each(handler)

    await log.write(source, *numbered(600))
    async with running(app):
        await log.until(lambda: app.accounts.forwarded >= 100, "it is under way")
        await asyncio.to_thread(broker.kill)
        assert app.accounts.forwarded < 600
        await asyncio.sleep(1.0)
        await asyncio.to_thread(broker.start)
        await log.until(lambda: app.accounts.forwarded >= 600 and app.accounts.in_flight == 0, "all are forwarded")
        assert not app.crashed
        log.admin = await _admin(log.servers)
        await log.until_committed(app.conf.id, source, 600)
        assert app.accounts.balance() == 0
        assert app.consumer.ledgers[TP(source, 0)].mark == 600
    forwarded = [record.value for record in await log.read(target, 600)]
    await log.admin.close()
    assert set(forwarded) == set(numbered(600)), "nothing is lost"
    assert list(dict.fromkeys(forwarded)) == list(numbered(600)), "first occurrences are in the order of the log"


async def test_an_app_started_without_a_broker_waits_for_it(own_stack: Stack, tmp_path: Path) -> None:
    """Consumer and producer connect when the broker is there; an app that is stopped before that stops."""
    broker = own_stack.part("kafka")
    log = Log(own_stack.env["KAFKA_BOOTSTRAP_SERVERS"])
    log.admin = await _admin(log.servers)
    source, letters = await log.topic("in"), await log.topic("errors")
    await log.admin.close()
    await log.write(source, *numbered(3))
    await asyncio.to_thread(broker.kill)

    def make(name: str, seen: Callable[[bytes], None]) -> App:
        app = stage(log.servers, f"{log.prefix}{name}", tmp_path / name, letters)

        @app.agent(app.topic(source, value_type=bytes, value_serializer="raw", key_serializer="raw"))
        async def work(stream: Any) -> None:
            async for value in stream:
                seen(value)

        app.finalize()
        return app

    values: list[bytes] = []
    waiting, given_up = make("waits", values.append), make("gives-up", values.append)
    starts = [asyncio.ensure_future(app.start()) for app in (waiting, given_up)]
    try:
        await log.until(lambda: waiting.producer.last_failure and given_up.producer.last_failure, "both have tried")
        await given_up.stop()
        await asyncio.to_thread(broker.start)
        await log.until(lambda: values == list(numbered(3)), "it works")
        assert not waiting.crashed
    finally:
        await waiting.stop()
        for start in starts:
            start.cancel()
        await asyncio.gather(*starts, return_exceptions=True)


async def test_an_output_that_the_broker_refuses_is_one_letter(log: Log, tmp_path: Path) -> None:
    """Too large for its topic: the message is a letter; its neighbours, and what comes later, are written."""
    source, letters = await log.topic("in"), await log.topic("errors")
    target = await log.topic("out", **{"max.message.bytes": "5000"})
    app = stage(log.servers, f"{log.prefix}refused", tmp_path, letters)

    @app.agent(app.chunk_topic(source, bytes))
    async def work(stream: Any) -> None:
        async for chunk in stream:
            await chunk.each(lambda value, out: out.send(target, value * (4000 if value == b"v2" else 1), "k"))

    await log.write(source, *numbered(5))
    async with running(app):
        await log.until_committed(app.conf.id, source, 5)
        await log.write(source, b"v5")
        await log.until_committed(app.conf.id, source, 6)
    (letter,) = await log.read(letters, 1)
    forwarded = [record.value for record in await log.read(target, 5)]
    assert letter.value == b"v2"
    assert forwarded == [b"v0", b"v1", b"v3", b"v4", b"v5"]
    assert app.accounts.recreations == 0
    assert app.accounts.balance() == 0


async def test_a_consumer_made_anew_in_the_middle_costs_nothing(log: Log, tmp_path: Path) -> None:
    """The remedy of the health check while chunks are under way: every message is forwarded, in order."""
    source, target, letters = await log.topic("in"), await log.topic("out"), await log.topic("errors")
    app = stage(log.servers, f"{log.prefix}anew", tmp_path, letters, chunk_records=10)

    async def handler(value: bytes, out: Out) -> None:
        await asyncio.sleep(0.001)
        out.send(target, value, "k")

    @app.agent(app.chunk_topic(source, bytes))
    async def work(stream: Any) -> None:
        async for chunk in stream:
            await chunk.each(handler)

    await log.write(source, *numbered(500))
    async with running(app):
        await log.until(lambda: app.accounts.forwarded >= 50, "it is under way")
        await app.consumer.recreate("a test wants it")
        await app.producer.recreate("a test wants it, but it works")
        await log.until_committed(app.conf.id, source, 500)
        assert app.accounts.recreations == 1
        assert app.accounts.balance() == 0
    forwarded = [record.value for record in await log.read(target, 500)]
    assert list(dict.fromkeys(forwarded)) == list(numbered(500))


async def test_members_that_come_and_go_lose_nothing(log: Log, tmp_path: Path) -> None:
    """A second worker joins and leaves three times while messages flow, some failing at first: each is forwarded."""
    source = await log.topic("in", partitions=4)
    target, letters = await log.topic("out"), await log.topic("errors")
    group = f"{log.prefix}storm"
    failed: set[bytes] = set()

    async def handler(value: bytes, out: Out) -> None:
        await asyncio.sleep(0.001)
        if int(value[1:]) % 97 == 0 and value not in failed:
            failed.add(value)
            raise ConnectionResetError
        out.send(target, value, "k")

    def worker(name: str) -> App:
        app = stage(log.servers, group, tmp_path / name, letters, chunk_records=25)

        @app.agent(app.chunk_topic(source, bytes))
        async def work(stream: Any) -> None:
            async for chunk in stream:
                await chunk.each(handler)

        return app

    values = list(numbered(1200))
    apps = [worker("stays")]
    async with running(apps[0]):
        for turn in range(3):
            for partition in range(4):
                await log.write(source, *values[turn * 400 + partition : turn * 400 + 400 : 4], partition=partition)
            apps.append(worker(f"guest{turn}"))
            async with running(apps[-1]):
                await log.until(lambda: apps[-1].assigned, "the guest has partitions")
        for partition in range(4):
            await log.until_committed(group, source, 300, partition)
        assert all(app.accounts.balance() == 0 for app in apps)
    forwarded = [record.value for record in await log.read(target, 1200)]
    assert set(forwarded) == set(values)
    for partition in range(4):
        of_one = [value for value in dict.fromkeys(forwarded) if int(value[1:]) % 4 == partition]
        assert of_one == [value for value in values if int(value[1:]) % 4 == partition]
