"""``faust -A streams tap``, ``trace ID`` and ``accounts``: what goes through, what became of a message, does it add
up.
"""

from __future__ import annotations

import asyncio
import sys
import urllib.error
import urllib.request
from typing import Any

import click
import msgspec
from aiokafka import AIOKafkaConsumer

import settings as configuration
from streams import desk, topics

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


@click.command()
@click.option("--stage", type=click.Choice(sorted(STAGE_TOPICS)), help="What this stage reads and writes.")
@click.option("--device", help="Only this device.")
@click.option("--limit", type=int, help="End after so many.")
def tap(stage: str | None, device: str | None, limit: int | None) -> None:
    """Show live events, from now on, until Ctrl-C; joins no group and commits nothing."""
    chosen = STAGE_TOPICS[stage] if stage else (topics.raw_data, topics.validated_data, topics.alerts, topics.errors)
    try:
        asyncio.run(_tap([topic.name for topic in chosen], device, limit))
    except KeyboardInterrupt:
        sys.exit(0)


async def _tap(names: list[str], device: str | None, limit: int | None) -> None:
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
            value = (record.value or b"").decode("utf-8", "replace")
            click.echo(f"{record.topic}[{record.partition}]@{record.offset} {key} {value}")
            shown += 1
            if limit is not None and shown >= limit:
                return
    finally:
        await consumer.stop()


@click.command()
@click.argument("request_id")
@click.option("--tail", default=200_000, show_default=True, help="Look at so many of the newest records per partition.")
def trace(request_id: str, tail: int) -> None:
    """Tell every hop of one request id: as it came, its readings, rows, alerts, commands, dead letters."""
    found = asyncio.run(_trace(request_id, tail))
    for line in found:
        click.echo(line)
    if not found:
        click.echo(f"nothing is known of {request_id} in the newest {tail} records of each partition", err=True)
        sys.exit(1)


async def _trace(request_id: str, tail: int) -> list[str]:
    settings = configuration.load()
    lines: list[tuple[int, str]] = []
    needle = f'"{request_id}"'.encode()
    for topic in (
        topics.raw_data,
        topics.validated_data,
        topics.alerts,
        topics.commands,
        topics.command_status,
        topics.errors,
    ):
        async for record in desk.read_whole(settings, topic.name, tail=tail):
            told = dict(record.headers).get("dlq-request-id", b"").decode()
            if needle not in (record.value or b"") and told != request_id:
                continue
            key = (record.key or b"").decode("utf-8", "replace")
            extra = f" {dict(record.headers).get('dlq-message', b'').decode()}" if told else ""
            value = (record.value or b"").decode("utf-8", "replace")
            lines.append(
                (record.timestamp, f"{topic.base_name}[{record.partition}]@{record.offset} {key}{extra} {value:.300}")
            )
    lines.sort(key=lambda line: line[0])
    told_lines = [f"{_moment(stamp)}  {line}" for stamp, line in lines]
    return told_lines + await _rows(settings, request_id)


def _moment(milliseconds: int) -> str:
    from datetime import UTC, datetime

    return f"{datetime.fromtimestamp(milliseconds / 1000, UTC):%Y-%m-%d %H:%M:%S.%f}"[:-3] + "Z"


async def _rows(settings: configuration.Settings, request_id: str) -> list[str]:
    import asyncpg

    try:
        connection = await asyncpg.connect(settings.database_url, timeout=settings.connect_timeout_seconds)
    except (OSError, TimeoutError, asyncpg.PostgresError) as exc:
        return [f"the database cannot be asked: {exc}"]
    try:
        rows = await connection.fetch(
            'select device_id, "index", label, time, value, value_text from readings where request_id = $1 limit 200',
            request_id,
        )
    except asyncpg.PostgresError as exc:
        return [f"the database cannot be asked: {exc}"]
    finally:
        await connection.close()
    return [
        f"readings: {row['device_id']} {row['index']}/{row['label']} at {row['time'].isoformat()} = "
        f"{row['value'] if row['value'] is not None else row['value_text']}"
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
