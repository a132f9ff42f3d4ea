"""The one table from exception to class."""

from __future__ import annotations

import ssl
from typing import Any

import asyncpg
import msgspec
import pytest
import redis.exceptions
from aiokafka import errors as kafka
from aiosmtplib.errors import SMTPResponseException, SMTPServerDisconnected
from faust.exceptions import ProducerSendError

from devices.model import DecodeError
from streams.resilience.failures import FailureClass, Fatal, Poison, Rejected, Retryable, classify

RETRY, POISON, REJECTED = FailureClass.RETRY, FailureClass.POISON, FailureClass.REJECTED
FATAL, UNCLASSIFIED = FailureClass.FATAL, FailureClass.UNCLASSIFIED


def caused(outer: Exception, inner: BaseException) -> Exception:
    """Return ``outer`` raised from ``inner``."""
    outer.__cause__ = inner
    return outer


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (Retryable("x"), RETRY),
        (Poison("x"), POISON),
        (Rejected("x"), REJECTED),
        (Fatal("x"), FATAL),
        (DecodeError("x"), POISON),
        # Kafka: away is away; what is too large stays too large
        (kafka.KafkaConnectionError(), RETRY),
        (kafka.NotLeaderForPartitionError(), RETRY),
        (kafka.RequestTimedOutError(), RETRY),
        (kafka.ProducerFenced(), RETRY),
        (kafka.UnknownTopicOrPartitionError(), RETRY),
        (kafka.MessageSizeTooLargeError(), POISON),
        (kafka.RecordListTooLargeError(), POISON),
        (kafka.UnsupportedVersionError(), FATAL),
        # RocksDB: a full disk is not the message's fault, and the store takes no write until it is opened anew
        (Exception("IO error: No space left on device: While appending to file: 000004.log"), FATAL),
        (caused(RuntimeError("x"), Exception("Corruption: block checksum mismatch")), FATAL),
        (Exception("IO is not the first word: IO error"), UNCLASSIFIED),
        (caused(ProducerSendError("wrapped"), kafka.RequestTimedOutError()), RETRY),
        (caused(ProducerSendError("wrapped"), kafka.MessageSizeTooLargeError()), POISON),
        # bytes
        (msgspec.ValidationError("x"), POISON),
        (msgspec.DecodeError("x"), POISON),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"), POISON),
        (RecursionError(), POISON),
        # the system
        (TimeoutError(), RETRY),
        (ConnectionRefusedError(), RETRY),
        (OSError(28, "no space"), RETRY),
        (ssl.SSLError(), RETRY),
        (MemoryError(), RETRY),
        # PostgreSQL, by SQLSTATE
        (asyncpg.exceptions.ConnectionDoesNotExistError("x"), RETRY),
        (asyncpg.exceptions.AdminShutdownError("x"), RETRY),
        (asyncpg.exceptions.CannotConnectNowError("x"), RETRY),
        (asyncpg.exceptions.TooManyConnectionsError("x"), RETRY),
        (asyncpg.exceptions.DeadlockDetectedError("x"), RETRY),
        (asyncpg.exceptions.SerializationError("x"), RETRY),
        (asyncpg.exceptions.DiskFullError("x"), RETRY),
        (asyncpg.exceptions.ReadOnlySQLTransactionError("x"), RETRY),
        (asyncpg.exceptions.UndefinedTableError("x"), RETRY),
        (asyncpg.exceptions.InvalidPasswordError("x"), RETRY),
        (asyncpg.exceptions.NumericValueOutOfRangeError("x"), POISON),
        (asyncpg.exceptions.UniqueViolationError("x"), POISON),
        (asyncpg.exceptions.CheckViolationError("x"), POISON),
        (asyncpg.exceptions.ProgramLimitExceededError("x"), POISON),
        (asyncpg.exceptions.InterfaceError("x"), RETRY),
        (asyncpg.exceptions.DataError("x"), POISON),
        # Redis
        (redis.exceptions.ConnectionError("x"), RETRY),
        (redis.exceptions.ReadOnlyError("x"), RETRY),
        (redis.exceptions.OutOfMemoryError("x"), RETRY),
        # SMTP: 4xx later, 5xx never
        (SMTPResponseException(451, "later"), RETRY),
        (SMTPResponseException(550, "never"), POISON),
        (SMTPServerDisconnected("x"), RETRY),
        # what nobody has classified
        (ValueError("x"), UNCLASSIFIED),
        (KeyError("x"), UNCLASSIFIED),
        (ZeroDivisionError(), UNCLASSIFIED),
        (caused(ValueError("x"), ConnectionResetError()), RETRY),
        (caused(ValueError("x"), KeyError("y")), UNCLASSIFIED),
    ],
    ids=lambda value: value.value if isinstance(value, FailureClass) else type(value).__name__,
)
def test_the_table(error: BaseException, expected: FailureClass) -> None:
    """Each kind of failure has its class."""
    assert classify(error) is expected


def test_a_circle_of_causes_ends() -> None:
    """Exceptions that cause each other are looked at once each."""
    one, two = ValueError("one"), ValueError("two")
    one.__cause__, two.__cause__ = two, one
    assert classify(one) is UNCLASSIFIED


def test_what_is_raised_while_another_was_handled_is_judged_by_itself() -> None:
    """Only a cause that was named counts, not the context that happens to be there."""

    def work() -> Any:
        try:
            raise ConnectionResetError
        except ConnectionResetError:
            raise KeyError("a bug in the handling") from None

    with pytest.raises(KeyError) as raised:
        work()
    assert classify(raised.value) is UNCLASSIFIED
