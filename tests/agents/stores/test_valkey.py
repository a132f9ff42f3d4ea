"""The latest readings in Valkey."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime, timedelta, timezone
from typing import Any

import msgspec
import pytest
import redis.asyncio as redis

from agents.stores.valkey import LatestStore
from devices.model import Reading
from streams.resilience.failures import FailureClass, classify
from tests.conformance.sinks import EPOCH, reading

KEY = "device:device-1:category:measurements:readings"


@pytest.fixture
async def client(empty_redis_url: str) -> AsyncIterator[Any]:
    """A connection past the cache."""
    async with redis.Redis.from_url(empty_redis_url, decode_responses=True) as opened:
        yield opened


async def test_the_keys_are_those_of_the_contract(cache: LatestStore, client: Any) -> None:
    """One hash for a device and category, field = index, the sets beside it, and a time to live on each."""
    one, two = reading(1, 5), reading(1, 6, "2", metadata={"category": "status"})
    await cache.write([one, two])
    assert sorted(await client.keys("*")) == [
        "device:device-1:categories",
        KEY,
        "device:device-1:category:status:readings",
        "devices",
    ]
    assert await client.smembers("devices") == {"device-1"}
    assert await client.smembers("device:device-1:categories") == {"measurements", "status"}
    stored = await client.hgetall(KEY)
    assert list(stored) == ["1"]
    expected = {**msgspec.to_builtins(one), "category": "measurements"}
    assert msgspec.json.decode(stored["1"]) == expected
    for key in await client.keys("*"):
        assert 0 < await client.ttl(key) <= 600
    assert await cache.latest("device-1") == {
        "measurements": {"1": expected},
        "status": {"2": {**msgspec.to_builtins(two), "category": "status"}},
    }
    assert await cache.latest("unknown") == {}


async def test_without_a_category_it_is_measurements(cache: LatestStore, client: Any) -> None:
    """A profile that says nothing puts its readings under measurements, in the key and in the value."""
    await cache.write([reading(1, 5, metadata={})])
    assert msgspec.json.decode(await client.hget(KEY, "1"))["category"] == "measurements"


async def test_a_ttl_of_zero_keeps_keys(empty_redis_url: str, client: Any) -> None:
    """Nothing expires when the time to live is 0."""
    cache = LatestStore(empty_redis_url, ttl_seconds=0)
    await cache.start()
    await cache.write([reading(1, 5)])
    assert await client.ttl(KEY) == -1
    await cache.stop()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (timedelta(seconds=1), timedelta(seconds=2)),
        (timedelta(0), timedelta(microseconds=1)),
        (timedelta(microseconds=999_999), timedelta(seconds=1)),
        (timedelta(milliseconds=99), timedelta(milliseconds=100)),
        (timedelta(days=-20_000), timedelta(0)),
    ],
)
async def test_an_older_sample_never_replaces_a_newer_one(
    cache: LatestStore, client: Any, before: timedelta, after: timedelta
) -> None:
    """To the microsecond, with and without a fraction in the text, in either order, in one chunk or two."""
    old, new = reading(1, 0, timestamp=EPOCH + before), reading(1, 0, timestamp=EPOCH + after)
    for chunks in ([[old, new]], [[new, old]], [[old], [new]], [[new], [old]]):
        await client.flushdb()
        counts = [await cache.write(chunk) for chunk in chunks]
        stored = msgspec.json.decode((await client.hget(KEY, "1")).encode(), type=Reading)
        assert stored.timestamp == new.timestamp
        assert sum(count.older for count in counts) == (1 if chunks[0][0] is new else 0)


async def test_times_with_an_offset_are_compared_as_moments(cache: LatestStore, client: Any) -> None:
    """A sample stamped 12:30+02:00 is older than one stamped 11:00Z."""
    zone = timezone(timedelta(hours=2))
    new = reading(1, 0, timestamp=datetime(2024, 5, 1, 13, 0, tzinfo=zone))
    old = reading(1, 0, timestamp=datetime(2024, 5, 1, 12, 30, tzinfo=zone))
    await cache.write([new])
    assert (await cache.write([old])).older == 1
    assert msgspec.json.decode(await client.hget(KEY, "1"))["timestamp"] == "2024-05-01T11:00:00Z"


async def test_a_sample_of_the_same_time_is_a_correction(cache: LatestStore, client: Any) -> None:
    """The later word about one moment stays."""
    await cache.write([reading(1, 5)])
    assert (await cache.write([reading(1, 5, values=[99, "corrected"])])).written == 1
    assert msgspec.json.decode(await client.hget(KEY, "1"))["values"] == [99, "corrected"]


async def test_what_others_have_written_is_compared_too(cache: LatestStore, client: Any) -> None:
    """A value with its fields in another order is compared by its time; what is no reading at all gives way."""
    await client.hset(KEY, "1", '{"request_id": "x", "timestamp":"2024-05-01T00:00:30Z"}')
    assert (await cache.write([reading(1, 5)])).older == 1
    await client.hset(KEY, "1", "nonsense")
    assert (await cache.write([reading(1, 5)])).written == 1


async def test_every_write_is_published_once(cache: LatestStore, client: Any) -> None:
    """Each newer value goes to the device's channel, in order; older ones and redeliveries do not."""
    steps = [reading(1, second) for second in (1, 2, 3)]
    async with client.pubsub() as listener:
        await listener.subscribe("device:device-1")
        await listener.get_message(timeout=10)
        count = await cache.write(steps)
        assert (count.written, count.older, count.unchanged) == (3, 0, 0)
        count = await cache.write(steps)
        assert (count.written, count.older, count.unchanged) == (0, 2, 1)
        await cache.write([reading(1, 4), reading(2, 9)])
        heard = [await listener.get_message(timeout=10) for _ in range(4)]
        assert [msgspec.json.decode(message["data"])["request_id"] for message in heard] == [
            one.request_id for one in [*steps, reading(1, 4)]
        ]
        assert await listener.get_message(timeout=0.05) is None


async def test_a_write_renews_the_time_to_live(cache: LatestStore, client: Any) -> None:
    """Also a value that was there already shows that the device lives; an old one does not."""
    await cache.write([reading(1, 5)])
    await client.expire(KEY, 10)
    await cache.write([reading(1, 4)])
    assert await client.ttl(KEY) <= 10
    await cache.write([reading(1, 5)])
    assert await client.ttl(KEY) > 10


@pytest.mark.parametrize("key", [KEY, "device:device-1:categories"])
async def test_a_key_of_another_type_costs_only_its_device(cache: LatestStore, client: Any, key: str) -> None:
    """The readings that somebody else's key stands in the way of are handed back as poison; all others are written."""
    await client.set(key, "mine")
    chunk = [reading(device, second) for second in range(3) for device in range(3)]
    count = await cache.write(chunk)
    assert [entry.row.device_id for entry in count.bad] == ["device-1"] * 3
    assert {classify(entry.exception) for entry in count.bad} == {FailureClass.POISON}
    assert key in str(count.bad[0].exception)
    assert count.written == 6


async def test_a_chunk_of_many_scripts_is_one_call(cache: LatestStore, client: Any) -> None:
    """More readings than one script takes are all written."""
    chunk = [reading(device, second) for second in range(4) for device in range(300)]
    assert (await cache.write(chunk)).written == 1200
    assert await client.scard("devices") == 300


async def test_forgotten_scripts_are_no_error(cache: LatestStore, client: Any) -> None:
    """A server that has lost its scripts takes the next chunk as it comes."""
    await cache.write([reading(1, 5)])
    await client.script_flush()
    assert (await cache.write([reading(1, 6)])).written == 1


async def test_a_full_server_is_retried(cache: LatestStore, client: Any) -> None:
    """Out of memory is nobody's message; the same chunk is written once there is room."""
    chunk = [reading(1, 5), reading(2, 5)]
    limit = (await client.config_get("maxmemory"))["maxmemory"]
    try:
        await client.config_set("maxmemory", 1)
        with pytest.raises(redis.RedisError) as caught:
            await cache.write(chunk)
        assert classify(caught.value) is FailureClass.RETRY
    finally:
        await client.config_set("maxmemory", limit)
    assert (await cache.write(chunk)).written == 2


async def test_a_read_only_server_is_retried(cache: LatestStore, client: Any) -> None:
    """A replica that takes no writes is an error of the infrastructure."""
    await client.execute_command("REPLICAOF", "127.0.0.1", "1")
    try:
        with pytest.raises(redis.RedisError) as caught:
            await cache.write([reading(1, 5)])
        assert classify(caught.value) is FailureClass.RETRY
    finally:
        await client.execute_command("REPLICAOF", "NO", "ONE")
    assert (await cache.write([reading(1, 5)])).written == 1


async def test_more_callers_than_connections_wait_for_their_turn(empty_redis_url: str) -> None:
    """A limit on connections slows callers down and fails none."""
    cache = LatestStore(empty_redis_url, ttl_seconds=60, max_connections=2)
    await cache.start()
    counts = await asyncio.gather(*(cache.write([reading(device, 1)]) for device in range(40)))
    assert sum(count.written for count in counts) == 40
    await cache.stop()
