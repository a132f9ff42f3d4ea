"""Fixtures of every room's tests.

`stack` has all the real servers, started once a session at first use and removed at its end; the single fixtures
(`kafka`, `database_url`, ...) start only what they name. A test that stops or kills a part starts it again before it
ends.
"""

import signal
from collections.abc import Iterator

import pytest

from tools.stack import Stack
from tools.stack.kafka import Kafka

Kafka.brief = True


@pytest.fixture(scope="session", autouse=True)
def hangup() -> None:
    """Let the workers of the tests hear HUP, also under nohup: what is ignored stays so in children, a handler does
    not."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)


@pytest.fixture(scope="session")
def stack_session() -> Iterator[Stack]:
    """The session's stack with nothing started yet: `stack_session.start("kafka")` starts a part if it does not run."""
    stack = Stack.temporary()
    try:
        stack.acquire()
        yield stack
    finally:
        stack.stop(discard=True)


@pytest.fixture(scope="session")
def stack(stack_session: Stack) -> Stack:
    """The stack with every part answering."""
    stack_session.start()
    return stack_session


@pytest.fixture(scope="session")
def stack_env(stack: Stack) -> dict[str, str]:
    """The settings that lead to the whole stack."""
    return stack.env


@pytest.fixture(scope="session")
def kafka(stack_session: Stack) -> str:
    """KAFKA_BOOTSTRAP_SERVERS of a running broker."""
    stack_session.start("kafka")
    return stack_session.env["KAFKA_BOOTSTRAP_SERVERS"]


@pytest.fixture(scope="session")
def database_url(stack_session: Stack) -> str:
    """DATABASE_URL of a running PostgreSQL; the role may create databases of its own."""
    stack_session.start("postgresql")
    return stack_session.env["DATABASE_URL"]


@pytest.fixture(scope="session")
def redis_url(stack_session: Stack) -> str:
    """REDIS_URL of a running Valkey, database 0."""
    stack_session.start("valkey")
    return stack_session.env["REDIS_URL"]


@pytest.fixture(scope="session")
def mqtt_url(stack_session: Stack) -> str:
    """MQTT_URL of a running broker."""
    stack_session.start("mqtt")
    return stack_session.env["MQTT_URL"]


@pytest.fixture(scope="session")
def smtp_url(stack_session: Stack) -> str:
    """SMTP_URL of a running inbox."""
    stack_session.start("smtp")
    return stack_session.env["SMTP_URL"]


@pytest.fixture(scope="session")
def inbox_url(stack_session: Stack) -> str:
    """INBOX_URL of a running inbox; `/messages.json` lists its mails."""
    stack_session.start("smtp")
    return stack_session.env["INBOX_URL"]
