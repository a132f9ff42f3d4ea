"""An empty database for each test, and an open store over it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import asyncpg
import pytest

from agents.stores.postgresql import ReadingStore
from agents.stores.valkey import LatestStore
from tests.conformance.databases import fresh_url
from tools.stack import Stack


@pytest.fixture
async def empty_database_url(stack_session: Stack) -> str:
    """DATABASE_URL of a database without any table."""
    return await fresh_url(stack_session, "postgresql", "stores")


@pytest.fixture
async def store(empty_database_url: str) -> AsyncIterator[ReadingStore]:
    """A store over an empty database, started, not yet connected."""
    opened = ReadingStore(empty_database_url, pool_size=2)
    await opened.start()
    yield opened
    await opened.stop()


@pytest.fixture
async def connection(store: ReadingStore, empty_database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection past the store, to a database that has the schema."""
    await store.ping()
    opened = await asyncpg.connect(empty_database_url)
    yield opened
    await opened.close()


@pytest.fixture
async def empty_redis_url(stack_session: Stack) -> str:
    """REDIS_URL of a database without any key."""
    return await fresh_url(stack_session, "valkey", "stores")


@pytest.fixture
async def cache(empty_redis_url: str) -> AsyncIterator[LatestStore]:
    """A cache over an empty database."""
    opened = LatestStore(empty_redis_url, ttl_seconds=600)
    await opened.start()
    yield opened
    await opened.stop()
