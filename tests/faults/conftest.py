"""The stack that the fault suite may break: its own, not the session's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import settings
from tools.stack import Stack

_SERVERS = ("kafka", "postgresql", "valkey", "mqtt")


@pytest.fixture(scope="session")
def _own_stack() -> Iterator[Stack]:
    stack = Stack.temporary()
    try:
        stack.start()
        yield stack
    finally:
        stack.stop(discard=True)


@pytest.fixture
def breakable(_own_stack: Stack) -> Iterator[Stack]:
    """A stack of the suite's own: a test kills, pauses and starts its servers, and the next one finds all running."""
    _own_stack.start(*_SERVERS)
    yield _own_stack
    for name in _SERVERS:
        _own_stack.part(name).resume()


@pytest.fixture
def short() -> bool:
    """Whether the short form is wanted (``FAULTS=short``)."""
    return settings.environment().get("FAULTS") == "short"


@pytest.fixture
def seed() -> int:
    """The seed of the fault plan (``FAULTS_SEED``); printed, so that a failure can be repeated."""
    chosen = int(settings.environment().get("FAULTS_SEED") or 20261123)
    print(f"fault plan: FAULTS_SEED={chosen}")
    return chosen
