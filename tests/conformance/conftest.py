"""A sink of each kind, on a database of its own in the session's servers."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.conformance.databases import fresh_url
from tests.conformance.sinks import SINKS, Sink
from tools.stack import Stack


@pytest.fixture(params=SINKS)
async def sink(request: pytest.FixtureRequest, stack_session: Stack) -> AsyncIterator[Sink]:
    """A sink over an empty database, open; its server is put right again afterwards."""
    kind = SINKS[request.param]
    opened = kind(await fresh_url(stack_session, kind.part, "conformance"))
    await opened.open()
    yield opened
    stack_session.part(kind.part).resume()
    await opened.close()
    stack_session.start(kind.part)
