"""The dead-letter desk: look at what is in ``iot_errors``, send it back to where it came from, or close the matter.

Guarantees: a dead letter stays in ``iot_errors`` as it is; what was decided about it is a record of the compacted topic
``{APP_ID}-dlq-desk``, keyed ``partition:offset``. A replay writes the original key and value to the original topic and
its decision in one Kafka transaction, so that it happens once, however often it is asked for or interrupted; a second
desk at work at the same time is fenced off. A truncated letter is replayed from the record that it points to, for as
long as Kafka keeps that; without it the letter is refused, not half replayed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from settings import Settings
from streams import topics
from streams.resilience.bounds import within
from streams.resilience.deadletter import header

#: Headers that a replayed record carries beside its own.
REPLAYED_FROM = "dlq-replayed-from"


class Decision(msgspec.Struct, kw_only=True):
    """What was done about a dead letter."""

    action: str
    at: datetime
    reason: str = ""


@dataclass(slots=True)
class Letter:
    """One dead letter."""

    partition: int
    offset: int
    written: datetime
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes]]
    decision: Decision | None = None

    @property
    def id(self) -> str:
        """``partition:offset``, by which the desk names it."""
        return f"{self.partition}:{self.offset}"

    def told(self, name: str) -> str:
        """Return the text of header ``dlq-{name}``, empty where it is missing."""
        return header(self.headers, f"dlq-{name}") or ""

    @property
    def device(self) -> str:
        """The key as text: the device."""
        return (self.key or b"").decode("utf-8", "replace")

    def as_dict(self, *, whole: bool = False) -> dict[str, Any]:
        """Return what lists and the HTTP API show; ``whole`` adds headers and value."""
        shown: dict[str, Any] = {
            "id": self.id,
            "written": self.written,
            "device_id": self.device,
            "decision": self.decision.action if self.decision else None,
            "size": len(self.value or b""),
        }
        names = ("stage", "class", "topic", "partition", "offset", "exception", "message", "attempts", "request-id")
        shown |= {name.replace("-", "_"): self.told(name) for name in names}
        # The letter's own place is its id; these two say where the message was.
        shown["source"] = f"{shown.pop('topic')}[{shown.pop('partition')}]@{shown.pop('offset')}"
        if whole:
            shown["headers"] = {name: value.decode("utf-8", "replace") for name, value in self.headers}
            value = self.value or b""
            try:
                shown["value"] = value.decode()
            except UnicodeDecodeError:
                shown["value_hex"] = value.hex()
        return shown


@dataclass(frozen=True, slots=True)
class Filter:
    """Which letters are meant; None and empty mean all. ``since`` compares with when the letter was written."""

    ids: frozenset[str] = frozenset()
    stage: str | None = None
    kind: str | None = None
    device: str | None = None
    exception: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    undecided: bool = False

    def admits(self, letter: Letter) -> bool:
        """Tell whether ``letter`` is meant."""
        return (
            (not self.ids or letter.id in self.ids)
            and (self.stage is None or letter.told("stage") == self.stage)
            and (self.kind is None or letter.told("class") == self.kind)
            and (self.device is None or letter.device == self.device)
            and (
                self.exception is None
                or self.exception.lower() in f"{letter.told('exception')} {letter.told('message')}".lower()
            )
            and (self.since is None or letter.written >= self.since)
            and (self.until is None or letter.written < self.until)
            and not (self.undecided and letter.decision is not None)
        )


async def read_whole(settings: Settings, topic: str, *, tail: int | None = None) -> AsyncIterator[Any]:
    """Yield every record of ``topic`` up to its present end, committed ones only; ``tail``: the last ones per
    partition.
    """
    consumer = AIOKafkaConsumer(
        **settings.kafka_client_options(), enable_auto_commit=False, isolation_level="read_committed"
    )
    try:
        await consumer.start()
        partitions = sorted(TopicPartition(topic, number) for number in (await _partitions(consumer, topic)) or ())
        if not partitions:
            return
        consumer.assign(partitions)
        first = await consumer.beginning_offsets(partitions)
        ends = await consumer.end_offsets(partitions)
        for partition in partitions:
            start = first[partition] if tail is None else max(first[partition], ends[partition] - tail)
            consumer.seek(partition, start)
        left = {partition for partition in partitions if ends[partition] > first[partition]}
        while left:
            batches = await consumer.getmany(*left, timeout_ms=100)
            for records in batches.values():
                for record in records:
                    if record.offset < ends[TopicPartition(topic, record.partition)]:
                        yield record
            for partition in list(left):
                # transaction markers at the end are offsets without records
                if await consumer.position(partition) >= ends[partition]:
                    left.discard(partition)
    finally:
        await consumer.stop()


async def _partitions(consumer: AIOKafkaConsumer, topic: str) -> set[int]:
    found = consumer.partitions_for_topic(topic)
    if found is None:
        await consumer._client.set_topics([topic])
        await consumer._client.force_metadata_update()
        found = consumer.partitions_for_topic(topic)
    return set(found or ())


async def decisions(settings: Settings) -> dict[str, Decision]:
    """Return what was decided, by the letter's id."""
    found: dict[str, Decision] = {}
    decode = msgspec.json.Decoder(Decision).decode
    async for record in read_whole(settings, topics.desk.name):
        if record.key is not None and record.value is not None:
            found[record.key.decode()] = decode(record.value)
    return found


async def letters(settings: Settings, wanted: Filter, *, limit: int = 100, tail: int | None = None) -> list[Letter]:
    """Return the newest ``limit`` letters that ``wanted`` admits, newest first."""
    decided = await decisions(settings)
    found: list[Letter] = []
    async for record in read_whole(settings, topics.errors.name, tail=tail):
        letter = Letter(
            record.partition,
            record.offset,
            datetime.fromtimestamp(record.timestamp / 1000, UTC),
            record.key,
            record.value,
            list(record.headers),
        )
        letter.decision = decided.get(letter.id)
        if wanted.admits(letter):
            found.append(letter)
    found.sort(key=lambda letter: (letter.written, letter.partition, letter.offset), reverse=True)
    return found[:limit]


@dataclass(slots=True)
class Outcome:
    """What a replay or discard did."""

    done: int = 0
    refused: list[str] = field(default_factory=list)


async def decide(
    settings: Settings,
    chosen: Iterable[Letter],
    action: str,
    *,
    reason: str = "",
    rate_per_second: float | None = None,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> Outcome:
    """Replay or discard (``action``) letters; what was decided before, or cannot be, is refused with a word."""
    outcome = Outcome()
    producer = AIOKafkaProducer(
        **settings.kafka_client_options(),
        transactional_id=f"{settings.app_id}-dlq-desk",
        max_request_size=settings.max_record_bytes,
    )
    await producer.start()
    try:
        # Read behind the fence: an older desk can decide nothing any more.
        decided = await decisions(settings)
        for letter in chosen:
            record, why_not = await _judge(settings, letter, decided.get(letter.id), action)
            if why_not:
                outcome.refused.append(why_not)
                continue
            async with producer.transaction():
                if record is not None:
                    await producer.send_and_wait(
                        letter.told("topic"),
                        record[1],
                        key=record[0],
                        headers=[
                            *((name, value) for name, value in letter.headers if not name.startswith("dlq-")),
                            (REPLAYED_FROM, letter.id.encode()),
                        ],
                    )
                decision = Decision(action=action, at=clock(), reason=reason)
                await producer.send_and_wait(topics.desk.name, msgspec.json.encode(decision), key=letter.id.encode())
            outcome.done += 1
            if rate_per_second:
                await asyncio.sleep(1.0 / rate_per_second)
    finally:
        await producer.stop()
    return outcome


async def foresee(settings: Settings, chosen: Iterable[Letter], action: str) -> Outcome:
    """Return what :func:`decide` would do; nothing is written."""
    outcome = Outcome()
    decided = await decisions(settings)
    for letter in chosen:
        _, why_not = await _judge(settings, letter, decided.get(letter.id), action)
        if why_not:
            outcome.refused.append(why_not)
        else:
            outcome.done += 1
    return outcome


async def _judge(settings: Settings, letter: Letter, before: Decision | None, action: str) -> tuple[Any, str]:
    """Return what goes back to its topic (None for a discard), and why nothing is done, empty where something is."""
    if before is not None:
        return None, f"{letter.id}: {before.action} at {before.at:%Y-%m-%d %H:%M:%S}Z already"
    if action != "replayed":
        return None, ""
    record, why_not = await _original(settings, letter)
    return record, "" if record is not None else f"{letter.id}: {why_not}"


async def _original(settings: Settings, letter: Letter) -> tuple[tuple[bytes | None, bytes | None] | None, str]:
    source = letter.told("topic")
    if topics.by_name(source) is None:
        return None, f"it was refused at the edge ({source}) and never in a topic; the device must send it again"
    if not letter.told("truncated"):
        return (letter.key, letter.value), ""
    partition = TopicPartition(source, int(letter.told("partition")))
    consumer = AIOKafkaConsumer(**settings.kafka_client_options(), enable_auto_commit=False)
    await consumer.start()
    try:
        consumer.assign([partition])
        first = (await consumer.beginning_offsets([partition]))[partition]
        wanted = int(letter.told("offset"))
        if wanted < first:
            return None, f"its value was truncated, and {source}[{partition.partition}]@{wanted} is no longer kept"
        consumer.seek(partition, wanted)
        record = await within(consumer.getone(partition), 30)
        if record.offset != wanted:
            return None, f"its value was truncated, and {source}[{partition.partition}]@{wanted} is gone"
        return (record.key, record.value), ""
    finally:
        await consumer.stop()


def line(text: str) -> str:
    """Return ``text`` on one line: what a database or a device says may have several."""
    return " ".join(text.splitlines())


def ago(text: str, now: datetime) -> datetime:
    """Return the moment that ``text`` names: RFC 3339, or ``90s``, ``15m``, ``2h``, ``3d`` before ``now``.

    Raises ValueError for anything else.
    """
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    if text[-1:] in units and text[:-1].replace(".", "", 1).isdigit():
        return now - timedelta(seconds=float(text[:-1]) * units[text[-1]])
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
