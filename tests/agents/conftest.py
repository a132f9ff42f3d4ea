"""Agents under ``test_context``: what they send is captured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from streams.stage import REGISTERED


@pytest.fixture(autouse=True)
def nothing_captured() -> Iterator[None]:
    """Every test begins with stages that have sent nothing."""
    for stage in REGISTERED.values():
        stage.app.captured.clear()
    yield
    for stage in REGISTERED.values():
        stage.app.captured.clear()
        stage.app.testing = False


class Record:
    """A record as aiokafka gives it, for chunks."""

    def __init__(self, value: bytes | None, key: str = "d1", offset: int = 0, topic: str = "t") -> None:
        self.topic, self.partition, self.offset, self.timestamp = topic, 0, offset, 1_700_000_000_000
        self.key, self.value, self.headers = key.encode(), value, ()


@pytest.fixture
def records() -> Any:
    """Make records with rising offsets of the given values."""
    return lambda *values, topic="t": [Record(value, offset=n, topic=topic) for n, value in enumerate(values)]


async def put(agent: Any, message: Any) -> None:
    """Put one message into an agent."""
    async with agent.test_context() as context:
        await context.put(message)
