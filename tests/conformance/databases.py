"""Empty databases in the servers of the session's stack."""

from __future__ import annotations

import asyncio
from typing import Any, Final

import asyncpg
import redis.asyncio as redis

from tools.stack import Stack

# Not the database that other tests use.
_REDIS_DATABASE: Final = 9
_DROP_ATTEMPTS: Final = 100


async def drop_database(connection: Any, name: str) -> None:
    """Drop a database with whoever is connected to it; autovacuum is waited for, as only a superuser may end it."""
    for attempt in range(_DROP_ATTEMPTS):
        try:
            await connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
        except asyncpg.InsufficientPrivilegeError:
            if attempt == _DROP_ATTEMPTS - 1:
                raise
            await asyncio.sleep(0.1)
        else:
            return


async def fresh_url(stack: Stack, part: str, name: str) -> str:
    """Return the URL of an empty database of ``part``, which is started if need be."""
    stack.start(part)
    if part == "valkey":
        url = stack.env["REDIS_URL"].rsplit("/", 1)[0] + f"/{_REDIS_DATABASE}"
        async with redis.Redis.from_url(url) as client:
            await client.flushdb()
        return url
    url = stack.env["DATABASE_URL"]
    connection = await asyncpg.connect(url)
    await drop_database(connection, name)
    await connection.execute(f'CREATE DATABASE "{name}" STRATEGY file_copy')
    await connection.close()
    return url.rsplit("/", 1)[0] + f"/{name}"
