"""Empty databases in the servers of the session's stack."""

from __future__ import annotations

import asyncpg
import redis.asyncio as redis

from tools.stack import Stack

# Not the database that other tests use.
_REDIS_DATABASE = 9


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
    await connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
    await connection.execute(f'CREATE DATABASE "{name}" STRATEGY file_copy')
    await connection.close()
    return url.rsplit("/", 1)[0] + f"/{name}"
