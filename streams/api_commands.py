"""``/api/v1/commands``: what people and programs want of devices, and what became of it.

Guarantees: a command is validated against its driver's schema before anything is queued, a batch as a whole; 202 means
that Kafka has it. The same ``request_id`` again is answered the same and starts nothing; for another device or command
type it is answered 409, where the database knows it already. Each API key has a rate of its own.
"""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime
from typing import Any

import msgspec
from aiohttp import web

from agents.registered import Registered
from devices.commands.formatting import check
from devices.model import CommandError
from devices.registry import Registry
from streams import topics
from streams.api import Refusal, answer, body_of, endpoint, key_of, query_limit, store
from streams.core import SETTINGS, app
from streams.messages import TERMINAL_STATES, Command, encode
from streams.resilience.bounds import within

MAX_ID = 128
PROTOCOLS = ("mqtt", "coap")
STATES = ("QUEUED", "SENT", "DELIVERED", *sorted(TERMINAL_STATES))


class CommandRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The body of a command; what is left out: ``request_id`` is made, ``protocol`` is the device's."""

    device_id: str
    command_type: str
    payload: dict[str, Any] = msgspec.field(default_factory=dict)
    protocol: str | None = None
    metadata: dict[str, Any] = msgspec.field(default_factory=dict)
    priority: int | None = None
    expires_at: datetime | None = None
    request_id: str | None = None


class Batch(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The body of a batch."""

    commands: list[CommandRequest]


class Rate:
    """Commands per minute and key: a bucket of one minute's worth that fills evenly."""

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, key: str, count: int, now: float) -> float:
        """Take ``count`` commands of ``key`` at ``now`` (s); returns 0, or after how many seconds to come again."""
        level, at = self._buckets.get(key, (float(self.per_minute), now))
        level = min(float(self.per_minute), level + (now - at) * self.per_minute / 60.0)
        if count > level:
            self._buckets[key] = (level, now)
            return (count - level) * 60.0 / self.per_minute
        self._buckets[key] = (level - count, now)
        return 0.0


RATE = Rate(SETTINGS.command_rate_per_minute)
READY_SECONDS = 10.0


class Fleet:
    """The configured devices, the topic ``iot_devices`` over them; read from the first command on."""

    registered: Registered | None = None

    async def ready(self) -> Registry:
        """Return the registry once it is complete; raises TimeoutError while Kafka does not answer."""
        if self.registered is None:
            self.registered = Registered(Registry.load(SETTINGS.config_path))
            await self.registered.follow(app, SETTINGS)
        await within(self.registered.ready(), READY_SECONDS)
        return self.registered.registry


FLEET = Fleet()


def new_request_id() -> str:
    """Return a request id: 48 bits of milliseconds, so that ids sort by time, and 80 random bits, in hex."""
    return f"{time.time_ns() // 1_000_000:012x}{os.urandom(10).hex()}"


def printable(text: str) -> bool:
    """Tell whether ``text`` can be an id."""
    return 0 < len(text) <= MAX_ID and text.isprintable()


def command_of(wanted: CommandRequest, at: str, fleet: Registry, now: datetime) -> Command:
    """Return the command that ``wanted`` asks for; raises Refusal with a pointer below ``at``."""
    for name, value in (("device_id", wanted.device_id), ("request_id", wanted.request_id)):
        if value is not None and not printable(value):
            raise Refusal(f"{name}: 1 to {MAX_ID} printable characters are needed", f"{at}/{name}")
    if wanted.protocol is not None and wanted.protocol not in PROTOCOLS:
        raise Refusal(f"protocol {wanted.protocol!r}: one of {', '.join(PROTOCOLS)} is needed", f"{at}/protocol")
    expires_at = wanted.expires_at
    if expires_at is not None and (expires_at.tzinfo is None or expires_at <= now):
        problem = "is in the past" if expires_at.tzinfo is not None else "has no time zone (RFC 3339, as with a Z)"
        raise Refusal(f"expires_at {problem}", f"{at}/expires_at")
    protocol = wanted.protocol or protocol_of(wanted, fleet)
    try:
        check(
            fleet,
            wanted.device_id,
            wanted.command_type,
            wanted.payload,
            protocol=protocol,
            states={},
            unknown=SETTINGS.unknown_devices,
        )
    except CommandError as exc:
        raise Refusal(str(exc), f"{at}{exc.pointer}") from exc
    return Command(
        request_id=wanted.request_id or new_request_id(),
        device_id=wanted.device_id,
        command_type=wanted.command_type,
        payload=wanted.payload,
        protocol=protocol,
        metadata=wanted.metadata,
        priority=wanted.priority,
        expires_at=expires_at,
    )


def protocol_of(wanted: CommandRequest, fleet: Registry) -> str:
    """Return the protocol of the device's configured profile, else that of the first profile that knows the command."""
    entry = fleet.device(wanted.device_id)
    own = fleet.profile(entry.profile) if entry is not None and entry.profile else None
    for profile in (own,) if own is not None else fleet.profiles:
        if own is not None or wanted.command_type in fleet.driver(profile).commands:
            return next((match.protocol for match in profile.match), "mqtt")
    return "mqtt"


async def queue(request: web.Request, wanted: list[tuple[str, CommandRequest]]) -> list[Command]:
    """Validate all of ``wanted`` (pointer and request), then put them into Kafka; returns them."""
    if len(wanted) > SETTINGS.command_batch_max:
        raise Refusal(f"{len(wanted)} commands; COMMAND_BATCH_MAX={SETTINGS.command_batch_max}", "/commands", 413)
    now = datetime.now(UTC)
    fleet = await FLEET.ready()
    found = [command_of(one, at, fleet, now) for at, one in wanted]
    wait = RATE.take(key_of(request) or "", len(found), time.monotonic())
    if wait:
        raise Refusal(
            f"more than {SETTINGS.command_rate_per_minute} commands a minute (COMMAND_RATE_PER_MINUTE)",
            status=429,
            headers={"Retry-After": str(int(wait) + 1)},
        )
    fresh = [
        one for one, (at, asked) in zip(found, wanted, strict=True) if not (asked.request_id and await known(one, at))
    ]
    records: list[Any] = [(topics.commands.name, one.device_id.encode(), encode(one), None) for one in fresh]
    await app.send_and_wait(records)
    return found


async def known(command: Command, at: str) -> bool:
    """Tell whether the database has ``command`` already; raises Refusal where its id is that of another one.

    A database that does not answer changes nothing: the stage commands knows the ids that a device had, too.
    """
    try:
        found = await (await store()).command(command.request_id)
    except Exception as exc:
        app.log.info("Cannot look request %s up: %r", command.request_id, exc)
        return False
    if found is None:
        return False
    if (found["device_id"], found["command_type"] or command.command_type) != (command.device_id, command.command_type):
        raise Refusal(f"request_id {command.request_id!r} is that of another command", f"{at}/request_id", status=409)
    return True


async def post_command(request: web.Request) -> web.Response:
    """``POST /api/v1/commands``: 202 with ``request_id`` once Kafka has it."""
    (made,) = await queue(request, [("", await body_of(request, CommandRequest))])
    return answer({"request_id": made.request_id, "device_id": made.device_id, "state": "QUEUED"}, 202)


async def post_batch(request: web.Request) -> web.Response:
    """``POST /api/v1/commands/batch`` with ``commands``: all of them or, where one is wrong, none."""
    batch: Batch = await body_of(request, Batch)
    if not batch.commands:
        raise Refusal("no command", "/commands")
    wanted = [(f"/commands/{number}", one) for number, one in enumerate(batch.commands)]
    made = await queue(request, wanted)
    return answer({"request_ids": [one.request_id for one in made], "state": "QUEUED"}, 202)


async def get_command(request: web.Request) -> web.Response:
    """``GET /api/v1/commands/{request_id}``: the command, its state, and the steps that led there."""
    request_id = request.match_info["request_id"]
    found = await (await store()).command(request_id)
    if found is None:
        raise Refusal(f"command {request_id!r} is not known", status=404)
    return answer(found)


async def get_commands(request: web.Request) -> web.Response:
    """``GET /api/v1/commands?device_id=&state=&limit=``, the latest first."""
    state = request.query.get("state")
    if state is not None and state not in STATES:
        raise Refusal(f"state={state!r}: one of {', '.join(STATES)} is needed", "state")
    found = await (await store()).commands(
        device_id=request.query.get("device_id"), state=state, limit=query_limit(request)
    )
    return answer({"commands": found})


endpoint("/api/v1/commands", GET=get_commands, POST=post_command)
endpoint("/api/v1/commands/batch", POST=post_batch)
endpoint("/api/v1/commands/{request_id}", GET=get_command)
