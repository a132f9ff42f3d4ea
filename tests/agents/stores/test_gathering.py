"""Writes of several callers as one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime

import pytest

from agents.stores.base import BadRow, Row
from agents.stores.gathering import GatheredWrites
from streams.resilience.failures import Poison


def rows(*devices: str) -> list[Row]:
    """Return a row for each device."""
    return [(device, "T", "a", datetime(2026, 1, 2, tzinfo=UTC), 1.0, None, None, None) for device in devices]


class Store:
    """Keeps the writes that it got; one at a time waits at ``gate``, ``failures`` are raised in turn."""

    def __init__(self) -> None:
        self.writes: list[list[str]] = []
        self.gate = asyncio.Event()
        self.failures: list[BaseException] = []

    async def write(self, given: Sequence[Row]) -> list[BadRow]:
        self.writes.append([row[0] for row in given])
        await self.gate.wait()
        if self.failures:
            raise self.failures.pop(0)
        return [BadRow(row, Poison("bad")) for row in given if row[0] == "bad"]


async def test_what_comes_while_the_store_is_busy_is_one_write() -> None:
    """The first goes at once; the others wait for it and go together, up to the bound on rows."""
    store = Store()
    write = GatheredWrites(store.write, limit_rows=3)
    calls = [asyncio.ensure_future(write(rows(name, name))) for name in "ab"]
    calls += [asyncio.ensure_future(write(rows(name))) for name in "cde"]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert store.writes == [["a", "a"]]
    store.gate.set()
    assert await asyncio.gather(*calls) == [[]] * 5
    assert store.writes == [["a", "a"], ["b", "b", "c"], ["d", "e"]]


async def test_everybody_hears_of_his_own_rows() -> None:
    """A refused row is told to the caller whose it is, and to nobody else."""
    store = Store()
    write = GatheredWrites(store.write, limit_rows=100)
    first, mine, others = (asyncio.ensure_future(write(rows(*names))) for names in (["x"], ["bad", "b"], ["c"]))
    await asyncio.sleep(0)
    store.gate.set()
    (refused,) = await mine
    assert refused.row[0] == "bad"
    assert (await first, await others) == ([], [])
    assert store.writes[-1][-3:] == ["bad", "b", "c"]


async def test_a_failed_write_fails_all_of_its_callers_and_nothing_after_it() -> None:
    """What the store raises, each caller of that write gets; the next write is made all the same."""
    store = Store()
    write = GatheredWrites(store.write, limit_rows=2)
    store.failures = [OSError("away")]
    calls = [asyncio.ensure_future(write(rows(name))) for name in "abcd"]
    await asyncio.sleep(0)
    store.gate.set()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(result) for result in results] == [OSError, OSError, list, list]


async def test_a_caller_that_gave_up_does_not_disturb_the_others() -> None:
    """A cancelled caller's rows may be written or not; its neighbours hear of theirs."""
    store = Store()
    write = GatheredWrites(store.write, limit_rows=100)
    first, gone, other = (asyncio.ensure_future(write(rows(name))) for name in "abc")
    await asyncio.sleep(0)
    gone.cancel()
    store.gate.set()
    assert (await first, await other) == ([], [])
    with pytest.raises(asyncio.CancelledError):
        await gone


async def test_who_calls_when_a_writer_has_just_ended_is_served() -> None:
    """A call in the very turn of the loop in which the last write ends waits for nobody."""
    store = Store()
    store.gate.set()
    write = GatheredWrites(store.write, limit_rows=100)
    for turns in range(12):
        first = asyncio.ensure_future(write(rows("a")))
        for _ in range(turns):
            await asyncio.sleep(0)
        async with asyncio.timeout(10):
            assert await write(rows("b")) == []
            await first
