"""From exception to class: the one table that decides what becomes of a message whose handler failed.

::

    HeadraceError
    ├── Retryable        infrastructure is away: the same events again, with backoff, for ever
    ├── Poison           this message can never succeed: dead letter at once, class ``poison``
    │   └── Rejected     understood and refused (no profile, nothing valid left): class ``rejected``
    │       └── SetAside what would handle it is out of service for a while; no sign of a wrong deployment
    └── Fatal            the program or its configuration is wrong: the worker ends, non-zero

Whatever is none of these is looked up by SQLSTATE or SMTP code, then by type, walking ``__cause__``. What nobody has
classified is ``UNCLASSIFIED``: a capped number of attempts, then a dead letter of class ``exhausted``. Types of
optional libraries are compared by their qualified name, so that this module imports none of them.
"""

from __future__ import annotations

import asyncio
import enum
import ssl
from typing import Final

import msgspec
from aiokafka import errors as kafka


class FailureClass(enum.Enum):
    """What becomes of a message whose handler raised."""

    RETRY = "retry"
    POISON = "poison"
    REJECTED = "rejected"
    FATAL = "fatal"
    UNCLASSIFIED = "unclassified"


class HeadraceError(Exception):
    """Root of the errors that Headrace raises on purpose."""


class Retryable(HeadraceError):
    """Infrastructure is away; the same work will succeed later."""


class Poison(HeadraceError):
    """This message can never be processed."""


class Rejected(Poison):
    """This message was understood and refused."""


class SetAside(Rejected):
    """What would handle this message is out of service for a while; the dead-letter guard does not count it."""


class Fatal(HeadraceError):
    """Going on would be wrong: the program or its configuration must be changed."""


# SQLSTATE classes (PostgreSQL manual, appendix A). 08 connection, 53 resources, 57 operator intervention (shutdown,
# starting up), 58 system error, 40 rollback (deadlock, serialization), 55 object not in state (locks), 25006 read-only
# transaction (a standby), XX internal errors.
_SQLSTATE_RETRY: Final = ("08", "53", "57", "58", "40", "55", "25", "XX")
# 22 data exception, 23 integrity: the row is bad. 54 program limit exceeded: a value that fits no index or row.
_SQLSTATE_POISON: Final = ("22", "23", "54")
# 28 authorization, 3D/3F no such database or schema, 42 syntax, missing table or privilege: somebody must act, and the
# data is good. Retried, because a grant or a migration cures it while the messages wait.
_SQLSTATE_OPERATOR: Final = ("28", "3D", "3F", "42", "0A")

_BY_TYPE: Final[tuple[tuple[type[BaseException], FailureClass], ...]] = (
    (Fatal, FailureClass.FATAL),
    (Rejected, FailureClass.REJECTED),
    (Poison, FailureClass.POISON),
    (Retryable, FailureClass.RETRY),
    (kafka.MessageSizeTooLargeError, FailureClass.POISON),
    (kafka.RecordTooLargeError, FailureClass.POISON),
    (kafka.RecordListTooLargeError, FailureClass.POISON),
    (kafka.UnsupportedVersionError, FailureClass.FATAL),
    (kafka.KafkaError, FailureClass.RETRY),
    (msgspec.ValidationError, FailureClass.POISON),
    (msgspec.DecodeError, FailureClass.POISON),
    (UnicodeError, FailureClass.POISON),
    (RecursionError, FailureClass.POISON),
    (asyncio.TimeoutError, FailureClass.RETRY),
    (TimeoutError, FailureClass.RETRY),
    (ConnectionError, FailureClass.RETRY),
    (ssl.SSLError, FailureClass.RETRY),
    (MemoryError, FailureClass.RETRY),
    (OSError, FailureClass.RETRY),
)

_BY_NAME: Final[dict[str, FailureClass]] = {
    "devices.model.DecodeError": FailureClass.POISON,
    "devices.model.CommandError": FailureClass.POISON,
    "asyncpg.exceptions._base.InterfaceError": FailureClass.RETRY,
    "asyncpg.exceptions._base.InternalClientError": FailureClass.RETRY,
    # what asyncpg raises for a value that no wire format of the column's type can hold
    "asyncpg.exceptions.DataError": FailureClass.POISON,
    "redis.exceptions.ConnectionError": FailureClass.RETRY,
    "redis.exceptions.TimeoutError": FailureClass.RETRY,
    "redis.exceptions.ReadOnlyError": FailureClass.RETRY,
    "redis.exceptions.BusyLoadingError": FailureClass.RETRY,
    "redis.exceptions.OutOfMemoryError": FailureClass.RETRY,
    "redis.exceptions.AuthenticationError": FailureClass.RETRY,
    "redis.exceptions.RedisError": FailureClass.RETRY,
    "aiomqtt.exceptions.MqttError": FailureClass.RETRY,
    "aiosmtplib.errors.SMTPServerDisconnected": FailureClass.RETRY,
    "aiosmtplib.errors.SMTPConnectError": FailureClass.RETRY,
    "aiosmtplib.errors.SMTPTimeoutError": FailureClass.RETRY,
    "aiohttp.client_exceptions.ClientConnectionError": FailureClass.RETRY,
}


def _by_name(exc: BaseException) -> FailureClass | None:
    for kind in type(exc).__mro__:
        found = _BY_NAME.get(f"{kind.__module__}.{kind.__qualname__}")
        if found is not None:
            return found
    return None


def _by_code(exc: BaseException) -> FailureClass | None:
    sqlstate = getattr(exc, "sqlstate", None)
    if isinstance(sqlstate, str) and len(sqlstate) == 5:
        if sqlstate.startswith(_SQLSTATE_POISON):
            return FailureClass.POISON
        if sqlstate.startswith(_SQLSTATE_RETRY + _SQLSTATE_OPERATOR):
            return FailureClass.RETRY
    code = getattr(exc, "code", None)
    if type(exc).__module__.startswith("aiosmtplib") and isinstance(code, int):
        return FailureClass.POISON if 500 <= code < 600 else FailureClass.RETRY
    return None


def is_local_store(exc: BaseException | None) -> bool:
    """Tell whether RocksDB says that its files cannot be written or read; it has no type of its own to say that with.

    After a full disk it refuses every write until it is opened anew, whatever room there is by then.
    """
    return type(exc) is Exception and str(exc).startswith(("IO error", "Corruption"))


def classify(exc: BaseException) -> FailureClass:
    """Return the class of ``exc``, looking at its causes where it has none of its own. Never raises."""
    seen: set[int] = set()
    current: BaseException | None = exc
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        # The code comes before the type: asyncpg's PostgresError says more by its SQLSTATE than by its class.
        found = _by_code(current) or _by_name(current)
        if found is None:
            found = next((cls for kind, cls in _BY_TYPE if isinstance(current, kind)), None)
        if found is None and is_local_store(current):
            found = FailureClass.FATAL
        if found is not None:
            return found
        current = current.__cause__
    return FailureClass.UNCLASSIFIED
