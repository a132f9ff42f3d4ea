"""``faust -A streams tap``, ``trace ID`` and ``accounts``: what goes through, what became of a message, does it add
up.
"""

from __future__ import annotations

import asyncio
import sys
import urllib.error
import urllib.request
from datetime import UTC, datetime
from typing import Any, TypeVar

import click
import msgspec
from aiokafka import AIOKafkaConsumer
from aiokafka.errors import KafkaError

import settings as configuration
from streams import desk, topics
from streams.resilience.deadletter import header

S = TypeVar("S", bound=msgspec.Struct)

#: What a stage reads; ``tap --stage`` shows its output as well.
STAGE_TOPICS = {
    "mqtt": (topics.raw_data,),
    "coap": (topics.raw_data,),
    "normalizer": (topics.raw_data, topics.validated_data),
    "ingestor": (topics.validated_data,),
    "caching": (topics.validated_data,),
    "alarms": (topics.validated_data, topics.alerts),
    "mailer": (topics.alerts,),
    "commands": (topics.commands, topics.command_status),
}
#: They share a topic; each is shown the messages of the protocol that it is named after.
CONNECTORS = frozenset({"mqtt", "coap"})
#: Whose values carry a request id; alert actions and the desk's decisions are found by the alert or letter they name.
TRACED = (
    topics.raw_data,
    topics.device_changes,
    topics.validated_data,
    topics.alerts,
    topics.commands,
    topics.coap_pending,
    topics.downlinks,
    topics.downlinks_begun,
    topics.command_reports,
    topics.command_feedback,
    topics.command_status,
    topics.errors,
)


class _Spoken(msgspec.Struct):
    protocol: str = ""


class _Named(msgspec.Struct):
    id: str = ""
    alert_id: str = ""


@click.command()
@click.option("--stage", type=click.Choice(sorted(STAGE_TOPICS)), help="What this stage reads and writes.")
@click.option("--device", help="Only this device.")
@click.option("--limit", type=int, help="End after so many.")
def tap(stage: str | None, device: str | None, limit: int | None) -> None:
    """Show live events, from now on, until Ctrl-C; joins no group and commits nothing."""
    chosen = STAGE_TOPICS[stage] if stage else (topics.raw_data, topics.validated_data, topics.alerts, topics.errors)
    protocol = stage if stage in CONNECTORS else None
    try:
        asyncio.run(_tap([topic.name for topic in chosen], device, protocol, limit))
    except KeyboardInterrupt:
        sys.exit(0)


async def _tap(names: list[str], device: str | None, protocol: str | None, limit: int | None) -> None:
    consumer = AIOKafkaConsumer(
        *names, **configuration.load().kafka_client_options(), enable_auto_commit=False, auto_offset_reset="latest"
    )
    await consumer.start()
    shown = 0
    try:
        async for record in consumer:
            key = (record.key or b"").decode("utf-8", "replace")
            if device is not None and key != device:
                continue
            if protocol is not None and _read(record.value, _Spoken()).protocol != protocol:
                continue
            value = (record.value or b"").decode("utf-8", "replace")
            click.echo(f"{record.topic}[{record.partition}]@{record.offset} {key} {value}")
            shown += 1
            if limit is not None and shown >= limit:
                return
    finally:
        await consumer.stop()


def _read(value: bytes | None, otherwise: S) -> S:
    """Return what the JSON ``value`` says of ``otherwise``'s fields, ``otherwise`` for what cannot be read."""
    try:
        return msgspec.json.decode(value or b"", type=type(otherwise))
    except (ValueError, RecursionError):
        return otherwise


@click.command()
@click.argument("request_id")
@click.option("--tail", default=200_000, show_default=True, help="Look at so many of the newest records per partition.")
def trace(request_id: str, tail: int) -> None:
    """Tell every hop of one request id: as it came, its readings, rows, alerts, commands, dead letters.

    Exits 1 when nothing is found, or a place cannot be asked.
    """
    found, silent = asyncio.run(_trace(request_id, tail))
    for line in found:
        click.echo(line)
    for place in silent:
        click.echo(place, err=True)
    if not found:
        click.echo(f"nothing is known of {request_id} in the newest {tail} records of each partition", err=True)
    sys.exit(0 if found and not silent else 1)


async def _trace(request_id: str, tail: int) -> tuple[list[str], list[str]]:
    """Return what is known of a request, and which places could not be asked."""
    import asyncpg

    settings = configuration.load()
    found: list[str] = []
    silent: list[str] = []
    try:
        found += await _records(settings, request_id, tail)
    except (OSError, KafkaError) as exc:
        silent.append(f"Kafka cannot be asked: {exc}")
    try:
        found += await _rows(settings, request_id)
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as exc:
        silent.append(f"the database cannot be asked: {type(exc).__name__}: {exc}")
    return found, silent


async def _records(settings: configuration.Settings, request_id: str, tail: int) -> list[str]:
    lines: list[tuple[int, str]] = []
    needle = msgspec.json.encode(request_id)
    alerts: set[str] = set()
    letters: set[str] = set()

    def tell(topic: topics.Declaration, record: Any, extra: str = "") -> None:
        key, value = ((part or b"").decode("utf-8", "replace") for part in (record.key, record.value))
        text = f"{topic.base_name}[{record.partition}]@{record.offset} {key}{extra} {value:.300}"
        lines.append((record.timestamp, desk.line(text)))

    for topic in TRACED:
        async for record in desk.read_whole(settings, topic.name, tail=tail):
            told = header(record.headers, "dlq-request-id") == request_id
            if needle not in (record.value or b"") and not told:
                continue
            tell(topic, record, f" {header(record.headers, 'dlq-message') or ''}" if told else "")
            if topic is topics.alerts:
                alerts.add(_read(record.value, _Named()).id)
            elif topic is topics.errors:
                letters.add(f"{record.partition}:{record.offset}")
    if alerts:
        async for record in desk.read_whole(settings, topics.alert_actions.name, tail=tail):
            if _read(record.value, _Named()).alert_id in alerts:
                tell(topics.alert_actions, record)
    if letters:
        async for record in desk.read_whole(settings, topics.desk.name, tail=tail):
            if (record.key or b"").decode("utf-8", "replace") in letters:
                tell(topics.desk, record)
    lines.sort(key=lambda line: line[0])
    return [f"{_moment(stamp)}  {line}" for stamp, line in lines]


def _moment(milliseconds: int) -> str:
    return f"{datetime.fromtimestamp(milliseconds / 1000, UTC):%Y-%m-%d %H:%M:%S.%f}"[:-3] + "Z"


async def _rows(settings: configuration.Settings, request_id: str) -> list[str]:
    import asyncpg

    connection = await asyncpg.connect(settings.database_url, timeout=settings.connect_timeout_seconds)
    try:
        rows = await connection.fetch(
            'select device_id, "index", label, time, value, value_text from readings where request_id = $1 limit 200',
            request_id,
        )
    finally:
        await connection.close()
    return [
        desk.line(
            f"readings: {row['device_id']} {row['index']}/{row['label']} at {row['time'].isoformat()} = "
            f"{row['value'] if row['value'] is not None else row['value_text']}"
        )
        for row in rows
    ]


@click.command()
@click.option("--url", multiple=True, help="A worker's address, several times for several (default: WEB_BIND).")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def accounts(url: tuple[str, ...], as_json: bool) -> None:
    """Print the accounting identity of every stage; exits 1 where it does not add up."""
    bases = list(url) or [f"http://{configuration.load().web_bind}"]
    found: list[dict[str, Any]] = []
    for base in bases:
        try:
            with urllib.request.urlopen(f"{base.rstrip('/')}/accounts", timeout=10) as answer:  # noqa: S310
                found += msgspec.json.decode(answer.read())
        except (urllib.error.URLError, OSError) as exc:
            click.echo(f"{base} cannot be asked: {exc}", err=True)
            sys.exit(1)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(found)).decode())
    else:
        for stage in found:
            dead, dropped = stage["dead_lettered"], stage["dropped"]
            click.echo(
                f"{stage['stage']:<11} received {stage['received']} = forwarded {stage['forwarded']}"
                f" + dead-lettered {sum(dead.values())}{_detail(dead)}"
                f" + dropped {sum(dropped.values())}{_detail(dropped)}"
                f" + returned {stage['returned']} + in flight {stage['in_flight']}"
                f"{'' if stage['balance'] == 0 else '   DOES NOT ADD UP: ' + str(stage['balance'])}"
            )
    sys.exit(0 if all(stage["balance"] == 0 for stage in found) else 1)


def _detail(counts: dict[str, int]) -> str:
    return " (" + ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) + ")" if counts else ""
