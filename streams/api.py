"""``/api/v1``: devices, readings, alerts, dead letters; what people and other programs ask and say.

Guarantees: it reads PostgreSQL and Kafka's dead letters, never a table of a stage; what is posted is in Kafka before
it is answered. ``X-API-Key`` is compared in constant time; without one of ``API_KEYS`` the answer is 401, and without
any set the server binds to loopback alone. A wrong request gets 400 with a JSON pointer to what is wrong, a store that
does not answer 503 with Retry-After.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec
from aiohttp import web
from faust.web import View

from agents.stores.postgresql import ReadingStore
from streams import desk, topics
from streams.core import SETTINGS, app
from streams.messages import AlertAction, encode
from streams.resilience.deadletter import describe

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

MAX_LIMIT = 10_000
BODY_BYTES = 1 << 20

_store: ReadingStore | None = None


class Refusal(Exception):
    """A request that cannot be carried out: ``pointer`` is the JSON pointer (or query parameter) to what is wrong."""

    def __init__(
        self, message: str, pointer: str = "", status: int = 400, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.pointer = pointer
        self.status = status
        self.headers = headers


async def store() -> ReadingStore:
    """Return the read side of the database, opened when it is first asked."""
    global _store
    if _store is None:
        _store = ReadingStore(
            SETTINGS.database_url,
            pool_size=2,
            application_name=f"{SETTINGS.app_id}-api",
            statement_timeout_seconds=SETTINGS.connect_timeout_seconds,
            connect_timeout_seconds=SETTINGS.connect_timeout_seconds,
        )
        await _store.start()
    return _store


def answer(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """Return ``body`` as JSON; times are RFC 3339 in UTC."""
    return web.Response(
        body=msgspec.json.encode(body), status=status, content_type="application/json", headers=headers or {}
    )


def key_of(request: web.Request) -> str | None:
    """Return the API key that ``request`` shows, where it is one of ours; "" where none is needed."""
    if not SETTINGS.api_keys:
        return ""
    shown = request.headers.get("X-API-Key", "").encode()
    # every key is compared, so that the time tells nothing
    found = [key for key in SETTINGS.api_keys if hmac.compare_digest(shown, key.encode())]
    return found[0] if found else None


def endpoint(path: str, **methods: Handler) -> None:
    """Serve ``path``; each keyword is an HTTP method with its handler."""

    async def view(_view: Any, request: web.Request, **_: Any) -> web.StreamResponse:
        handler = methods.get(request.method)
        if handler is None:
            allowed = ", ".join(sorted(methods))
            return answer({"error": f"{request.method} is not for {path}"}, 405, {"Allow": allowed})
        if key_of(request) is None:
            return answer({"error": "a valid X-API-Key is needed"}, 401)
        try:
            return await handler(request)
        except Refusal as exc:
            return answer({"error": str(exc), "pointer": exc.pointer}, exc.status, exc.headers)
        except Exception as exc:
            app.log.warning("%s %s failed: %r", request.method, request.path, exc)
            return answer({"error": f"{type(exc).__name__}: {describe(exc)}"}, 503, {"Retry-After": "5"})

    name = f"api_{path.strip('/').replace('/', '_').replace('{', '').replace('}', '')}"
    app.page(path)(type(name, (View,), dict.fromkeys(("get", "post", "put", "patch", "delete"), view)))


def query_time(request: web.Request, name: str) -> datetime | None:
    """Return the moment in query parameter ``name``; raises Refusal where it is none."""
    text = request.query.get(name)
    if text is None:
        return None
    try:
        return desk.ago(text, datetime.now(UTC))
    except ValueError:
        raise Refusal(f"{name}={text!r} is no time: RFC 3339, or 15m, 2h, 3d ago", name) from None


def query_number(request: web.Request, name: str, default: float | None, low: float, high: float) -> float | None:
    """Return the number in query parameter ``name``; raises Refusal outside of ``low … high``."""
    text = request.query.get(name)
    if text is None:
        return default
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not low <= number <= high:
        raise Refusal(f"{name}={text!r}: a number from {low:g} to {high:g} is needed", name)
    return number


def query_limit(request: web.Request, default: int = 100) -> int:
    """Return query parameter ``limit``."""
    return int(query_number(request, "limit", default, 1, MAX_LIMIT) or default)


def query_flag(request: web.Request, name: str) -> bool | None:
    """Return query parameter ``name`` as true or false; raises Refusal for other words."""
    text = request.query.get(name)
    if text is None:
        return None
    if text not in ("true", "false", "1", "0"):
        raise Refusal(f"{name}={text!r}: true or false is needed", name)
    return text in ("true", "1")


async def body_of(request: web.Request, type_: Any) -> Any:
    """Return the JSON body as ``type_``; raises Refusal with a pointer to what is wrong."""
    if (request.content_length or 0) > BODY_BYTES:
        raise Refusal(f"the body is above {BODY_BYTES} bytes", status=413)
    try:
        return msgspec.json.decode(await request.read() or b"{}", type=type_)
    except msgspec.ValidationError as exc:
        message, _, path = str(exc).partition(" - at `$")
        raise Refusal(message, path.rstrip("`").replace(".", "/").replace("[", "/").replace("]", "")) from exc
    except msgspec.DecodeError as exc:
        raise Refusal(f"the body is not JSON: {exc}") from exc


async def devices(request: web.Request) -> web.Response:
    """``GET /api/v1/devices?after=&limit=``: ids of devices that have readings."""
    limit = query_limit(request, 1000)
    found = await (await store()).devices(request.query.get("after", ""), limit)
    return answer({"devices": found, "next": found[-1] if len(found) == limit else None})


async def device(request: web.Request) -> web.Response:
    """``GET /api/v1/devices/{id}``: the latest value of each of its series."""
    device_id = request.match_info["device_id"]
    found = await (await store()).device(device_id)
    if found is None:
        raise Refusal(f"device {device_id!r} has no readings", status=404)
    return answer(found)


async def readings(request: web.Request) -> web.Response:
    """``GET /api/v1/devices/{id}/readings?index=&label=&since=&until=&limit=&bucket=&aggregate=``, newest first."""
    aggregate = request.query.get("aggregate", "avg")
    if aggregate not in ("avg", "min", "max", "sum", "count"):
        raise Refusal(f"aggregate={aggregate!r}: one of avg, min, max, sum, count is needed", "aggregate")
    found = await (await store()).readings(
        request.match_info["device_id"],
        index=request.query.get("index"),
        label=request.query.get("label"),
        since=query_time(request, "since"),
        until=query_time(request, "until"),
        limit=query_limit(request, 1000),
        bucket_seconds=query_number(request, "bucket", None, 0.001, 1e9),
        aggregate=aggregate,
    )
    return answer({"readings": found})


async def alerts(request: web.Request) -> web.Response:
    """``GET /api/v1/alerts?device_id=&alarm_id=&level=&resolved=&acknowledged=&since=&until=&limit=``."""
    found = await (await store()).alerts(
        device_id=request.query.get("device_id"),
        alarm_id=request.query.get("alarm_id"),
        level=request.query.get("level"),
        is_resolved=query_flag(request, "resolved"),
        is_acknowledged=query_flag(request, "acknowledged"),
        since=query_time(request, "since"),
        until=query_time(request, "until"),
        limit=query_limit(request),
    )
    return answer({"alerts": found})


async def alert(request: web.Request) -> web.Response:
    """``GET /api/v1/alerts/{id}``: one alert with its transitions, oldest first."""
    alert_id = request.match_info["alert_id"]
    found = await (await store()).alert(alert_id)
    if found is None:
        raise Refusal(f"alert {alert_id!r} is not known", status=404)
    return answer(found)


class Ack(msgspec.Struct, kw_only=True):
    """The body of an acknowledgement."""

    user: str
    comment: str = ""


def action_of(alert: Mapping[str, Any], ack: Ack, now: datetime) -> AlertAction:
    """Return the record of an acknowledgement; raises Refusal without a name, and 409 for an alert that is over."""
    if not ack.user.strip():
        raise Refusal("who acknowledges is needed", "/user")
    if alert["is_resolved"]:
        raise Refusal(f"alert {alert['id']!r} was resolved at {alert['end_date']}: nothing to acknowledge", status=409)
    return AlertAction(
        alert_id=str(alert["id"]),
        device_id=str(alert["device_id"]),
        action="ack",
        user=ack.user,
        comment=ack.comment,
        timestamp=now,
    )


async def acknowledge(request: web.Request) -> web.Response:
    """``POST /api/v1/alerts/{id}/ack`` with ``user`` and ``comment``: 202 once Kafka has it."""
    alert_id = request.match_info["alert_id"]
    ack: Ack = await body_of(request, Ack)
    alert = await (await store()).alert(alert_id)
    if alert is None:
        raise Refusal(f"alert {alert_id!r} is not known", status=404)
    action = action_of(alert, ack, datetime.now(UTC))
    await app.send_and_wait([(topics.alert_actions.name, action.device_id.encode(), encode(action), None)])
    return answer({"alert_id": alert_id, "state": "accepted"}, 202)


async def dead_letters(request: web.Request) -> web.Response:
    """``GET /api/v1/dead-letters?stage=&class=&device_id=&exception=&since=&limit=&tail=``, newest first."""
    wanted = desk.Filter(
        frozenset(filter(None, request.query.get("id", "").split(","))),
        request.query.get("stage"),
        request.query.get("class"),
        request.query.get("device_id"),
        request.query.get("exception"),
        query_time(request, "since"),
        query_time(request, "until"),
        bool(query_flag(request, "undecided")),
    )
    tail = query_number(request, "tail", 10_000, 1, 1e7)
    found = await desk.letters(SETTINGS, wanted, limit=query_limit(request), tail=int(tail or 0))
    return answer({"dead_letters": [letter.as_dict(whole=bool(wanted.ids)) for letter in found]})


async def release_guard(request: web.Request) -> web.Response:
    """``POST /api/v1/guard/{stage}/release``: let a stage of this worker go on that the dead-letter guard has
    stopped.
    """
    wanted = request.match_info["stage"]
    found = [one for one in app.apps() if one.resilience.stage == wanted]
    if not found:
        raise Refusal(f"stage {wanted!r} does not run in this worker", status=404)
    was = found[0].guard.tripped
    found[0].guard.release()
    if was is not None:
        found[0].on_guard()
    return answer({"stage": wanted, "was": was})


endpoint("/api/v1/guard/{stage}/release", POST=release_guard)
endpoint("/api/v1/devices", GET=devices)
endpoint("/api/v1/devices/{device_id}", GET=device)
endpoint("/api/v1/devices/{device_id}/readings", GET=readings)
endpoint("/api/v1/alerts", GET=alerts)
endpoint("/api/v1/alerts/{alert_id}", GET=alert)
endpoint("/api/v1/alerts/{alert_id}/ack", POST=acknowledge)
endpoint("/api/v1/dead-letters", GET=dead_letters)
