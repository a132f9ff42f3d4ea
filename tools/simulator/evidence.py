"""What became of messages, read from where it is: the table `readings` and Kafka's topics.

Nothing here joins a consumer group, commits or writes. A topic that does not exist is an empty one.
"""

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Self

import aiokafka
import asyncpg
import msgspec
from aiokafka.structs import ConsumerRecord

from tools.simulator.message import SetPoints, digest

__all__ = [
    "DeadLetter",
    "Group",
    "Origin",
    "Places",
    "dead_letters",
    "origins",
    "raw_digests",
    "records",
    "stored_groups",
]

_GROUPS = """
SELECT device_id, time, count(*),
       max(value) FILTER (WHERE index = 'seq' AND label = 'seq'),
       max(value_text) FILTER (WHERE index = 'run' AND label = 'run'),
       max(value) FILTER (WHERE index = 'P' AND label = 'U_consigne'),
       max(value) FILTER (WHERE index = 'P' AND label = 'U_hysteresys'),
       max(value) FILTER (WHERE index = 'P' AND label = 'T_consigne'),
       max(value) FILTER (WHERE index = 'P' AND label = 'T_hysteresys')
FROM readings
WHERE device_id = ANY($1::text[]) AND time >= $2
GROUP BY device_id, time
"""


@dataclass(frozen=True, slots=True)
class Places:
    """Where to look. `kafka_options` go to aiokafka's consumer (security, for instance)."""

    database_url: str
    bootstrap_servers: str
    topic_prefix: str = ""
    kafka_options: Mapping[str, Any] | None = None

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Self:
        """Return the places that settings lead to, a stack's `env` for instance."""
        return cls(env["DATABASE_URL"], env["KAFKA_BOOTSTRAP_SERVERS"], env.get("TOPIC_PREFIX", ""))

    def topic(self, name: str) -> str:
        """Return the full name of a topic of the contract."""
        return f"{self.topic_prefix}{name}"


@dataclass(frozen=True, slots=True)
class Group:
    """The rows of one device and time, which are one sample; what of its identity they hold."""

    device_id: str
    time: datetime
    rows: int
    seq: int | None = None
    run: str | None = None
    points: SetPoints | None = None


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One record of `iot_errors`. `digest` is of the device's bytes where the record is one of a device message.

    `device_id`, `time` and `index` are those of the reading where it is one of a reading.
    """

    device_id: str
    digest: str | None
    stage: str
    kind: str
    exception: str
    message: str
    time: datetime | None = None
    index: str = ""


class Origin(msgspec.Struct, frozen=True):
    """Which device message a record of `iot_raw_data` or `iot_validated_data` is of, and the record's partition."""

    device_id: str
    request_id: str
    partition: int = -1


_origin = msgspec.json.Decoder(Origin)


async def stored_groups(
    database: asyncpg.Connection | asyncpg.Pool, devices: Sequence[str], since: datetime
) -> list[Group]:
    """Return what is stored of `devices` with a sample time from `since` on; empty where there is no table yet."""
    try:
        found = await database.fetch(_GROUPS, list(devices), since)
    except asyncpg.UndefinedTableError:
        return []
    return [
        Group(
            device_id=device_id,
            time=time,
            rows=rows,
            seq=None if seq is None else int(seq),
            run=run,
            points=None if None in points else SetPoints(*points),
        )
        for device_id, time, rows, seq, run, *points in found
    ]


@asynccontextmanager
async def open_consumer(places: Places) -> AsyncIterator[aiokafka.AIOKafkaConsumer]:
    consumer = aiokafka.AIOKafkaConsumer(
        bootstrap_servers=places.bootstrap_servers,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        fetch_max_wait_ms=100,
        max_partition_fetch_bytes=4 << 20,
        **(places.kafka_options or {}),
    )
    await consumer.start()
    try:
        yield consumer
    finally:
        await consumer.stop()


async def assign_from(consumer: aiokafka.AIOKafkaConsumer, topic: str, since: datetime) -> dict[Any, int]:
    """Assign a topic's partitions, each at its first record from `since` on; return the end of those with records."""
    # aiokafka knows the partitions of subscribed topics only; topics() asks for all of them and keeps none.
    metadata = await consumer._client.fetch_all_metadata()
    numbers = metadata.partitions_for_topic(topic) or set()
    partitions = [aiokafka.TopicPartition(topic, number) for number in sorted(numbers)]
    consumer.assign(partitions)
    ends = await consumer.end_offsets(partitions)
    starts = await consumer.offsets_for_times({tp: int(since.timestamp() * 1000) for tp in partitions})
    left = {}
    for tp in partitions:
        start = starts[tp].offset if starts[tp] is not None else ends[tp]
        consumer.seek(tp, start)
        if start < ends[tp]:
            left[tp] = ends[tp]
    return left


async def records(places: Places, name: str, since: datetime) -> AsyncIterator[ConsumerRecord[bytes, bytes]]:
    """Yield what the topic `name` holds from `since` (Kafka's time) to its present end, in order per partition."""
    async with open_consumer(places) as consumer:
        ends = await assign_from(consumer, places.topic(name), since)
        left = set(ends)
        while left:
            for tp, batch in (await consumer.getmany(*left, timeout_ms=1000)).items():
                for record in batch:
                    if record.offset < ends[tp]:
                        yield record
            # A transaction's marker or a compacted record is an offset that nobody gets to see.
            left = {tp for tp in left if await consumer.position(tp) < ends[tp]}


def payload_of(raw: Mapping[str, Any]) -> bytes:
    """Return the device's bytes of a RawMessage."""
    if raw.get("payload") is not None:
        return str(raw["payload"]).encode()
    return bytes.fromhex(raw.get("payload_hex") or "")


def raw_digest(value: bytes | None) -> tuple[str, str] | None:
    """Return device and payload digest of a record of `iot_raw_data`, None where it is no RawMessage."""
    try:
        raw = json.loads(value or b"")
        return raw["device_id"], digest(payload_of(raw))
    except (ValueError, KeyError, TypeError):
        return None


async def raw_digests(places: Places, since: datetime) -> list[tuple[str, str, str]]:
    """Return device, payload digest and place (`topic[partition]@offset`) of every record of `iot_raw_data`."""
    return [
        (*known, f"{record.topic}[{record.partition}]@{record.offset}")
        async for record in records(places, "iot_raw_data", since)
        if (known := raw_digest(record.value)) is not None
    ]


async def origins(places: Places, name: str, since: datetime) -> list[Origin]:
    """Return the origin of every record that the topic `name` holds from `since` on, in order per partition.

    What has none, garbage in the topic itself, is left out.
    """
    found = []
    async for record in records(places, name, since):
        try:
            known = _origin.decode(record.value or b"")
        except (msgspec.MsgspecError, UnicodeDecodeError):
            continue
        found.append(Origin(known.device_id, known.request_id, record.partition))
    return found


def dead_letter(record: ConsumerRecord[bytes, bytes]) -> DeadLetter:
    """Return what a record of `iot_errors` says."""
    headers = {key: value.decode("utf-8", "replace") for key, value in record.headers}
    device_id = (record.key or b"").decode("utf-8", "replace")
    fingerprint: str | None = headers["dlq-sha256"][:16] if headers.get("dlq-sha256") else None
    moment: datetime | None = None
    index = ""
    try:
        value = json.loads(record.value or b"")
    except ValueError:
        value = None
    if isinstance(value, dict) and "values" in value and "index" in value:
        device_id, index = value["device_id"], value["index"]
        moment = datetime.fromisoformat(value["timestamp"])
    elif isinstance(value, dict) and ("payload" in value or "payload_hex" in value):
        device_id, fingerprint = value["device_id"], digest(payload_of(value))
    return DeadLetter(
        device_id=device_id,
        digest=fingerprint,
        stage=headers.get("dlq-stage", ""),
        kind=headers.get("dlq-class", ""),
        exception=headers.get("dlq-exception", ""),
        message=headers.get("dlq-message", ""),
        time=moment,
        index=index,
    )


async def dead_letters(places: Places, since: datetime) -> list[DeadLetter]:
    """Return the dead letters written from `since` on."""
    return [dead_letter(record) async for record in records(places, "iot_errors", since)]
