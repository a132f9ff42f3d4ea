"""A mosquitto, and a CoAP client, for every test that asks for one."""

from collections.abc import AsyncIterator
from pathlib import Path

import aiocoap
import pytest_asyncio

from tests.agents.edges.broker import Mosquitto


@pytest_asyncio.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Mosquitto]:
    """A running mosquitto with persistence and without limits."""
    mosquitto = Mosquitto(tmp_path)
    await mosquitto.start()
    yield mosquitto
    mosquitto.end()


@pytest_asyncio.fixture
async def client() -> AsyncIterator[aiocoap.Context]:
    """A client of aiocoap's."""
    context = await aiocoap.Context.create_client_context()
    yield context
    await context.shutdown()
