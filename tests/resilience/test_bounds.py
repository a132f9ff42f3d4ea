"""Waits that end, whatever they wait for does with its cancellation."""

from __future__ import annotations

import asyncio
import logging

import pytest

from streams.resilience.bounds import end, within


class Stubborn:
    """Something that swallows its first ``times`` cancellations, as a wait of Python 3.11 may."""

    def __init__(self, times: int) -> None:
        self.times = times
        self.cancelled = 0
        self.never = asyncio.Event()

    async def wait(self) -> str:
        """Wait for ever, but for more cancellations than are swallowed."""
        while True:
            try:
                await self.never.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                if self.cancelled > self.times:
                    raise


async def test_what_is_in_time() -> None:
    """A result or an exception within the bound is passed on."""

    async def fail() -> None:
        raise LookupError("its own")

    assert await within(asyncio.sleep(0, "done"), 5) == "done"
    with pytest.raises(LookupError, match="its own"):
        await within(fail(), 5)


async def test_what_swallows_its_cancellation_holds_nobody_up() -> None:
    """It is cancelled again, and TimeoutError names it."""
    stubborn = Stubborn(1)
    with pytest.raises(TimeoutError, match=r"Stubborn.wait was not done within 0.01 s"):
        await within(stubborn.wait(), 0.01)
    assert stubborn.cancelled == 2


async def test_a_result_that_comes_of_the_cancellation_counts() -> None:
    """What was done all the same, was done: whoever waited hears of it, of a failure too."""

    async def done_all_the_same(failure: Exception | None) -> str:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if failure is not None:
                raise failure from None
        return "done"

    assert await within(done_all_the_same(None), 0.01) == "done"
    with pytest.raises(OSError, match="gone"):
        await within(done_all_the_same(OSError("gone")), 0.01)


@pytest.mark.parametrize("turns", range(6))
async def test_a_cancellation_beside_the_result_is_not_lost(turns: int) -> None:
    """Whoever is cancelled while the result arrives, in whatever turn, ends."""
    event = asyncio.Event()
    rounds = 0

    async def loop() -> None:
        nonlocal rounds
        while True:
            await within(event.wait(), 60)
            event.clear()
            rounds += 1

    task = asyncio.create_task(loop())
    await asyncio.sleep(0.01)
    event.set()
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait((task,), timeout=10)
    assert task.cancelled()
    assert rounds <= 1


async def test_a_cancelled_wait_takes_what_it_waits_for_with_it() -> None:
    """Nothing is left running behind it."""
    stubborn = Stubborn(1)
    inner = asyncio.create_task(stubborn.wait())
    waiting = asyncio.create_task(within(inner, 60))
    await asyncio.sleep(0.01)
    waiting.cancel()
    await asyncio.wait((waiting,), timeout=10)
    assert waiting.cancelled()
    assert inner.cancelled()


async def test_what_never_ends_is_named_and_left(caplog: pytest.LogCaptureFixture) -> None:
    """The bound holds; the log says what is still there, and what did end is not mentioned."""
    stubborn = Stubborn(1000)
    task, other = asyncio.create_task(stubborn.wait()), asyncio.create_task(asyncio.sleep(60))
    await asyncio.sleep(0)
    with caplog.at_level(logging.WARNING):
        await end(task, other, seconds=0.05, again_seconds=0.01)
    assert other.cancelled()
    assert not task.done()
    assert "not at its end after 0.05 s: Stubborn.wait" in caplog.text
    assert "sleep" not in caplog.text
    stubborn.times = 0
    await end(task)
