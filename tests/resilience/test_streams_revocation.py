"""Revocations, generations and commits, without Kafka."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.errors import RequestTimedOutError
from faust.types import TP

from streams.resilience.failures import Retryable
from tests.resilience.harness import Rig, numbered


async def test_a_revocation_waits_commits_and_forgets() -> None:
    """What is done in time is committed; what is not is given back, counted, and comes anew in the next generation."""
    gate = asyncio.Event()
    seen: list[bytes] = []
    async with Rig() as rig:

        @rig.app.agent(rig.topic("in"))
        async def work(stream: Any) -> None:
            async for value in stream:
                seen.append(value)
                if value == b"v1":
                    await gate.wait()

        await rig.begin("in")
        await rig.feed("in", 0, *numbered(4))
        await rig.until(lambda: rig.mark("in") == 1)
        await rig.revoke()
        assert rig.thread.commits == [{TP("in", 0): 1}]
        assert rig.app.accounts.returned == 3
        assert rig.balanced()
        await rig.assign({TP("in", 0)})
        rig._next[TP("in", 0)] = 1
        await rig.feed("in", 0, b"v1", b"v2", b"v3")
        gate.set()
        await rig.until(lambda: rig.mark("in") == 4)
        assert rig.balanced()
    assert seen == [b"v0", b"v1", b"v1", b"v2", b"v3"]


async def test_what_is_done_within_the_drain_is_committed() -> None:
    """A body that is done while the revocation waits for it: its event is committed before the partition goes."""
    began, gate = asyncio.Event(), asyncio.Event()
    async with Rig(drain_seconds=60.0) as rig:

        @rig.app.agent(rig.topic("in"))
        async def work(stream: Any) -> None:
            async for _ in stream:
                began.set()
                await gate.wait()

        await rig.begin("in")
        await rig.feed("in", 0, b"v0")
        await began.wait()
        revoking = asyncio.create_task(rig.revoke())
        await rig.settle()
        assert not revoking.done()
        gate.set()
        await revoking
        assert rig.thread.commits == [{TP("in", 0): 1}]
        assert rig.app.accounts.returned == 0
        assert rig.balanced()


async def test_a_failure_after_the_revocation_holds_nothing_back() -> None:
    """A body that raises for an event of an earlier generation leaves the partition free, which may be ours again."""
    gate = asyncio.Event()
    first = True
    async with Rig(retry_base_seconds=3600, retry_cap_seconds=3600) as rig:

        @rig.app.agent(rig.topic("in"))
        async def work(stream: Any) -> None:
            nonlocal first
            async for _ in stream:
                if first:
                    first = False
                    await gate.wait()
                    raise Retryable("away")

        await rig.begin("in")
        await rig.feed("in", 0, b"v0")
        await rig.settle()
        await rig.revoke()
        await rig.assign({TP("in", 0)})
        gate.set()
        await rig.feed("in", 0, b"v0", b"v1")
        await rig.until(lambda: rig.mark("in") == 2)
        assert not rig.consumer.held


async def test_an_output_that_fails_after_the_revocation_is_nobodys_business() -> None:
    """The acknowledgement of an earlier generation's output, good or bad, moves no mark of this one."""
    async with Rig() as rig:
        target = rig.topic("out")

        @rig.app.agent(rig.topic("in"))
        async def work(stream: Any) -> None:
            async for value in stream:
                await target.send(key=b"k", value=value)

        await rig.begin("in")
        rig.producer.automatic = False
        await rig.feed("in", 0, *numbered(2))
        await rig.until(lambda: len(rig.producer.pending) == 2)
        await rig.revoke()
        await rig.assign({TP("in", 0)})
        rig.producer.acknowledge(1)
        rig.producer.fail(RequestTimedOutError())
        await rig.settle()
        assert rig.mark("in") is None
        assert not rig.consumer.held
        assert rig.app.accounts.in_flight == 0
        assert rig.balanced()


async def test_held_back_events_of_a_revoked_partition_are_forgotten() -> None:
    """A retry that was pending when the partition went does not come twice when the partition is back."""
    fail = True
    done: list[bytes] = []
    async with Rig(retry_base_seconds=0.05, retry_cap_seconds=0.05) as rig:

        @rig.app.agent(rig.topic("in"))
        async def work(stream: Any) -> None:
            async for value in stream:
                if fail:
                    raise Retryable("away")
                done.append(value)

        await rig.begin("in")
        await rig.feed("in", 0, *numbered(3))
        await rig.until(lambda: rig.consumer.held)
        await rig.revoke()
        assert not rig.consumer.held
        fail = False
        await rig.assign({TP("in", 0)})
        await rig.feed("in", 0, *numbered(3))
        await rig.until(lambda: rig.mark("in") == 3)
        await asyncio.sleep(0.1)
    assert done == list(numbered(3))


async def test_the_rest_of_a_fetch_is_not_delivered_into_the_next_generation() -> None:
    """A revocation in the middle of handing a fetch over: what was left is not the next generation."""
    async with Rig() as rig:
        seen: list[bytes] = []

        @rig.app.agent(rig.topic("in"))
        async def work(stream: Any) -> None:
            async for value in stream:
                seen.append(value)  # noqa: PERF401

        await rig.begin("in")
        old = rig.app.consumer_generation_id
        records = rig.records("in", 0, *numbered(10))
        await rig.consumer._deliver_all({TP("in", 0): records[:3]}, old)
        await rig.until(lambda: rig.mark("in") == 3)
        await rig.revoke()
        await rig.consumer._deliver_all({TP("in", 0): records[3:5]}, old)
        await rig.assign({TP("in", 0)})
        await rig.consumer._deliver_all({TP("in", 0): records[5:]}, old)
        assert TP("in", 0) not in rig.consumer.ledgers
        await rig.deliver({TP("in", 0): records[3:]})
        await rig.until(lambda: rig.mark("in") == 10)
    assert seen == list(numbered(10))


async def test_a_log_that_was_reset_is_read_from_its_new_beginning() -> None:
    """Offsets that go back (a topic made anew) are new records, not records that were seen before."""
    seen: list[bytes] = []
    async with Rig() as rig:

        @rig.app.agent(rig.topic("in"))
        async def work(stream: Any) -> None:
            async for value in stream:
                seen.append(value)  # noqa: PERF401

        await rig.begin("in")
        await rig.feed("in", 0, *numbered(5))
        await rig.until(lambda: rig.mark("in") == 5)
        rig._next.clear()
        await rig.feed("in", 0, b"new0", b"new1")
        await rig.until(lambda: rig.mark("in") == 2)
        await rig.consumer.commit()
        assert rig.thread.commits[-1] == {TP("in", 0): 2}
    assert seen[-2:] == [b"new0", b"new1"]
    assert rig.balanced()


async def test_a_commit_that_failed_is_made_again_without_new_work() -> None:
    """Nothing has to arrive for the mark of a failed commit to be committed later."""
    async with Rig() as rig:

        @rig.app.agent(rig.topic("in"))
        async def work(stream: Any) -> None:
            async for _ in stream:
                pass

        await rig.begin("in")
        await rig.feed("in", 0, *numbered(3))
        await rig.until(lambda: rig.mark("in") == 3)
        rig.thread.commit_works = False
        assert not await rig.consumer.commit()
        rig.thread.commit_works = True
        assert await rig.consumer.commit()
        assert rig.thread.commits == [{TP("in", 0): 3}]
        assert not await rig.consumer.commit()


async def test_what_is_not_assigned_is_not_committed() -> None:
    """A partition that the group has taken away meanwhile is left out of the commit."""
    async with Rig() as rig:

        @rig.app.agent(rig.topic("in"))
        async def work(stream: Any) -> None:
            async for _ in stream:
                pass

        await rig.begin("in")
        await rig.feed("in", 0, b"a")
        await rig.feed("in", 1, b"b")
        await rig.until(lambda: rig.mark("in", 0) == rig.mark("in", 1) == 1)
        rig.thread.assigned = {TP("in", 1)}
        assert await rig.consumer.commit()
        assert rig.thread.commits == [{TP("in", 1): 1}]


async def test_an_end_within_a_rebalance_is_no_failure() -> None:
    """A reader that waits while partitions are assigned ends quietly with its app; else its cancellation is told."""
    async with Rig() as rig:
        rig.consumer.stop_flow()
        fetcher = SimpleNamespace(should_stop=False)
        first, second = (asyncio.ensure_future(rig.consumer._drain_messages(fetcher)) for _ in range(2))
        await rig.settle()
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        rig.app._stopped.set()
        second.cancel()
        assert await second is None
        rig.app._stopped.clear()
