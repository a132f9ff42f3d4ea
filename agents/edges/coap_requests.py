"""What a CoAP request is: which path, from which device, and why it is refused. Pure, but for the registry it asks.

Guarantee: a request that passes is a message of one device, which its security context does not contradict; every
refusal has a response code, a diagnostic text for the device's developer and the reason under which it is counted.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

import msgspec
from aiocoap.message import Message
from aiocoap.numbers import codes
from aiocoap.numbers.codes import Code

from agents.edges.coap_wire import Request
from devices.driver import Driver
from devices.model import AnotherDevice, DecodeError, Uplink
from devices.profiles import usable_device_id
from devices.registry import Candidate, Registry
from devices.timing import DriverAside, DriverTimes

WELL_KNOWN: Final = ".well-known/core"
LINK_FORMAT: Final = 40

# RFC 7252 section 12.3 and the registry of Content-Formats.
_TEXT: Final = frozenset({0, 50, 110})
_BINARY: Final = frozenset({60, 112})
OCTET_STREAM: Final = 42
# Uri-Host, Uri-Port, OSCORE, Uri-Path, Uri-Query, Accept, Block2, Block1. Not If-Match and If-None-Match: no resource
# here has a state that a condition could be about.
_UNDERSTOOD: Final = frozenset({3, 7, 9, 11, 15, 17, 23, 27})
_PROXY: Final = frozenset({35, 39})
_METHODS: Final = {codes.GET: "GET", codes.POST: "POST", codes.PUT: "PUT", codes.DELETE: "DELETE", codes.FETCH: "FETCH"}


class Refusal(Exception):
    """A request that is answered and not taken; ``reason`` is what it is counted under."""

    def __init__(
        self, code: int, message: str, reason: str, *, size1: int | None = None, max_age: int | None = None
    ) -> None:
        super().__init__(message)
        self.code = Code(code)
        self.reason = reason
        self.size1 = size1
        self.max_age = max_age


class Found(NamedTuple):
    """Where a request belongs: ``route`` without leading slash, and the first match of its payload."""

    route: str
    method: str
    candidate: Candidate


def code_of(dotted: str) -> Code:
    """Return the code that is written ``2.05``."""
    major, _, minor = dotted.partition(".")
    return Code(int(major) << 5 | int(minor))


def uplink_of(
    route: str, data: bytes, *, device_id: str = "", request_id: str = "", at: datetime | None = None
) -> Uplink:
    """Return what a driver sees of a request."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = None
    return Uplink(
        request_id=request_id,
        received_at=at or datetime.fromtimestamp(0, UTC),
        device_id=device_id,
        protocol="coap",
        route=route,
        text=text,
        data=data,
        metadata={"uri_path": route},
    )


class Routed(NamedTuple):
    """What the options of a request say; ``plain``: no blocks, nothing of RFC 7967, nothing encrypted."""

    path: str
    method: str
    candidates: tuple[Candidate, ...]
    content_format: int | None
    metadata: dict[str, Any]
    plain: bool


class Judge:
    """Decides over requests. ``known(device_id)`` is None where devices that nobody configured are welcome.

    ``secured`` holds the devices that have a key: what comes in their name without it is refused.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        max_message_bytes: int,
        known: Callable[[str], bool] | None = None,
        secured: frozenset[str] = frozenset(),
        times: DriverTimes | None = None,
    ) -> None:
        self.registry = registry
        self.max_message_bytes = max_message_bytes
        self._known = known
        self._secured = secured
        self.times = times or DriverTimes(float("inf"), 0)

    def links(self) -> bytes:
        """Return the resources in CoRE link format (RFC 6690); of a path with variable parts the constant ones."""
        links = []
        for path, methods in sorted(self.registry.coap_paths().items()):
            fixed = path.split("{", 1)[0].split("+", 1)[0].split("#", 1)[0]
            links.append(f'</{fixed}>;rt="headrace";title="{" ".join(methods)} /{path}"')
        return ",".join(links).encode()

    def route(self, message: Message) -> tuple[str, str, tuple[Candidate, ...]]:
        """Return path, method and what matches both; raises Refusal (4.02, 4.04, 4.05, 5.05)."""
        for option in message.opt.option_list():
            number = int(option.number)
            if number & 1 and number not in _UNDERSTOOD:
                if number in _PROXY:
                    raise Refusal(codes.PROXYING_NOT_SUPPORTED, "this server is no proxy", "bad_request")
                raise Refusal(codes.BAD_OPTION, f"critical option {number} is not understood", "bad_request")
        path = "/".join(message.opt.uri_path)
        method = _METHODS.get(message.code, str(message.code))
        if path == WELL_KNOWN:
            if method != "GET":
                raise Refusal(codes.METHOD_NOT_ALLOWED, f"{method} /{path}: allowed is GET", "bad_request")
            return path, method, ()
        candidates = self.registry.candidates("coap", path)
        if not candidates:
            raise Refusal(codes.NOT_FOUND, f"no resource /{path:.80}; /{WELL_KNOWN} lists them", "not_found")
        allowed = tuple(candidate for candidate in candidates if method in candidate.match.methods)
        if not allowed:
            methods = " ".join(dict.fromkeys(m for candidate in candidates for m in candidate.match.methods))
            raise Refusal(codes.METHOD_NOT_ALLOWED, f"{method} /{path:.80}: allowed is {methods}", "bad_request")
        return path, method, allowed

    def routed(self, message: Message) -> Routed:
        """Return what a request's options say, once for all requests that share them; raises what :meth:`route`
        raises."""
        head = message.head if isinstance(message, Request) else None
        if head is not None and head.memo is not None:
            known: Routed = head.memo
            return known
        path, method, candidates = self.route(message)
        opt = message.opt
        plain = opt.block1 is None and opt.block2 is None and opt.no_response is None and opt.oscore is None
        metadata = {"uri_path": path, "method": method, **options_of(message)}
        found = Routed(path, method, candidates, opt.content_format, metadata, plain)
        if head is not None:
            head.memo = found
        return found

    def size(self, length: int) -> None:
        """Raise Refusal (4.13) for a body that is too large."""
        limit = self.max_message_bytes
        if length > limit:
            text = f"{length} bytes; MAX_MESSAGE_BYTES={limit}"
            raise Refusal(codes.REQUEST_ENTITY_TOO_LARGE, text, "too_large", size1=limit)

    def find(
        self, path: str, method: str, candidates: tuple[Candidate, ...], data: bytes, content_format: int | None
    ) -> Found:
        """Return the match of a whole request; raises Refusal (4.00, 4.15)."""
        # Of profiles that would read it, the first that allows the device that the path names.
        found = None
        for candidate in candidates:
            match = candidate.match
            if match.payload is None or match.payload.accepts(data):
                if candidate.device_id is None or match.allows(candidate.device_id):
                    found = candidate
                    break
                found = found or candidate
        if found is None:
            raise Refusal(codes.BAD_REQUEST, f"no profile reads these {len(data)} bytes on /{path:.80}", "bad_request")
        driver = self.registry.driver(found.profile)
        if content_format is not None and content_format != OCTET_STREAM and data:
            accepted = _TEXT if driver.text else _TEXT | _BINARY
            if content_format not in accepted:
                names = ", ".join(map(str, sorted(accepted | {OCTET_STREAM})))
                text = f"Content-Format {content_format}: /{path:.80} takes {names} or none"
                raise Refusal(codes.UNSUPPORTED_CONTENT_FORMAT, text, "bad_request")
        return Found(path, method, found)

    def device_id(self, found: Found, data: bytes, identity: str | None) -> str:
        """Return the device that a message is from; raises Refusal (4.00, 4.01, 4.03)."""
        route, candidate = found.route, found.candidate
        if not data:
            raise Refusal(codes.BAD_REQUEST, "the request has no payload", "bad_request")
        driver = self.registry.driver(candidate.profile)
        device_id = candidate.device_id
        if device_id is None:
            device_id = self._named(driver, route, data)
        elif not _is_json(data):
            # JSON is judged later, by the normalizer; what is none has to be something that the driver reads.
            try:
                uplink = uplink_of(route, data, device_id=device_id)
                self.times.call(driver.name, driver.decode, uplink, candidate.profile)
            except DriverAside as exc:
                raise _aside(exc) from exc
            except AnotherDevice as exc:
                raise Refusal(codes.FORBIDDEN, f"{exc}"[:200], "another_device") from exc
            except DecodeError as exc:
                raise Refusal(codes.BAD_REQUEST, f"{exc}"[:200], "bad_request") from exc
        if not candidate.match.allows(device_id):
            text = f"profile {candidate.profile.name} does not allow device {device_id:.80}"
            raise Refusal(codes.FORBIDDEN, text, "device_not_allowed")
        if identity is not None and identity != device_id:
            text = f"the message is of device {device_id:.80}, the key is {identity:.80}'s"
            raise Refusal(codes.FORBIDDEN, text, "another_device")
        if identity is None and device_id in self._secured:
            text = f"device {device_id:.80} has a key and did not use it"
            raise Refusal(codes.UNAUTHORIZED, text, "not_secured")
        if self._known is not None and not self._known(device_id):
            text = f"device {device_id:.80} is not known here (UNKNOWN_DEVICES=reject)"
            raise Refusal(codes.FORBIDDEN, text, "unknown_device")
        return device_id

    def _named(self, driver: Driver, route: str, data: bytes) -> str:
        try:
            found = self.times.call(driver.name, driver.device_id, uplink_of(route, data))
        except DriverAside as exc:
            raise _aside(exc) from exc
        except DecodeError as exc:
            raise Refusal(codes.BAD_REQUEST, f"{exc}"[:200], "bad_request") from exc
        if found is None or not usable_device_id(found):
            raise Refusal(codes.BAD_REQUEST, f"neither /{route:.80} nor the payload names a device", "bad_request")
        return found


def _aside(exc: DriverAside) -> Refusal:
    return Refusal(codes.SERVICE_UNAVAILABLE, f"{exc}"[:200], "unavailable", max_age=max(1, round(exc.seconds)))


def _is_json(data: bytes) -> bool:
    try:
        msgspec.json.decode(data, type=msgspec.Raw)
    except (msgspec.MsgspecError, RecursionError):
        return False
    return True


def diagnostic(refusal: Refusal) -> Message:
    """Return the answer that tells of a refusal (RFC 7252 section 5.5.2)."""
    message = Message(code=refusal.code, payload=str(refusal).encode())
    if refusal.size1 is not None:
        message.opt.size1 = refusal.size1
    if refusal.max_age is not None:
        message.opt.max_age = refusal.max_age
    return message


def options_of(message: Message) -> dict[str, Any]:
    """Return what else of a request belongs into a RawMessage's metadata."""
    found: dict[str, Any] = {}
    if message.opt.uri_query:
        found["uri_query"] = "&".join(message.opt.uri_query)
    if message.opt.content_format is not None:
        found["content_format"] = int(message.opt.content_format)
    return found
