"""The stack that the fault suite may break: its own, not the session's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import settings
from tools.stack import Stack


@pytest.fixture(scope="module")
def breakable() -> Iterator[Stack]:
    """A stack of the module's own: its servers are killed, paused and started again."""
    stack = Stack.temporary()
    try:
        stack.start()
        yield stack
    finally:
        for name in ("kafka", "postgresql", "valkey", "mqtt"):
            stack.part(name).resume()
        stack.stop(discard=True)


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
