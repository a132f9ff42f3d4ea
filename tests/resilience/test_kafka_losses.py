"""What plain Faust loses and Headrace keeps: the same small app on Faust's transport and on ours, on Apache Kafka."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.resilience.conftest import Log, SmallApp

pytestmark = pytest.mark.stack
VALUES = [f"v{number}".encode() for number in range(8)]
NAMES = [value.decode() for value in VALUES]


@pytest.mark.parametrize("transport", ["faust", "ours"])
async def test_the_two_losses_of_plain_faust(transport: str, log: Log, small_app: Callable[..., SmallApp]) -> None:
    """An exception acknowledges its event, and an event in flight at the head of its partition is committed past.

    Eight messages; one agent raises at the fourth, once; another, with two bodies, never ends with the first. Faust's
    transport commits both without their having been done: they are gone after a kill. On ours they are done.
    """
    raising, heading = await log.topic("raise"), await log.topic("head")
    group = f"{log.prefix}{transport}"
    await log.topic(f"{transport}-errors")
    app = small_app(group, transport)
    await log.write(raising, *VALUES)
    await log.write(heading, *VALUES)
    app.start(f"{raising}=raise", f"{heading}=head", hang=True)
    await log.until_committed(group, raising, 8)
    await log.until(lambda: len(app.noted("done", heading)) == 7, "all but the head are done")
    if transport == "faust":
        await log.until_committed(group, heading, 8)
    app.kill()
    after_kill = await log.committed(group)
    app.start(f"{raising}=raise", f"{heading}=head")
    if transport == "faust":
        await log.write(raising, b"last")
        await log.write(heading, b"last")
    await log.until(lambda: app.noted("done", heading)[-1] == ("last" if transport == "faust" else "v7"), "it goes on")
    await log.until_committed(group, heading, 9 if transport == "faust" else 8)
    if transport == "faust":
        await log.until_committed(group, raising, 9)
        assert "v3" in app.noted("begin", raising)
        assert "v3" not in app.noted("done", raising), "plain Faust has lost the event that its agent raised for"
        assert after_kill[(heading, 0)] == 8
        assert "v0" in app.noted("begin", heading)
        assert "v0" not in app.noted("done", heading), "plain Faust has lost the event that was in flight"
    else:
        assert app.noted("done", raising) == NAMES, "done once each, in order, the one that raised included"
        assert (heading, 0) not in after_kill, "nothing is committed while the head is in flight"
        assert set(app.noted("done", heading)) == set(NAMES)


async def test_an_ordinary_agent_with_a_table_survives_a_kill(log: Log, small_app: Callable[..., SmallApp]) -> None:
    """Killed with one event in flight: that event comes again, and the table goes on from what was committed."""
    topic, group = await log.topic("in"), f"{log.prefix}table"
    app = small_app(group)
    await log.write(topic, *VALUES)
    app.start(f"{topic}=table", hang=True)
    await log.until_committed(group, topic, 3)
    await log.until(lambda: "v3" in app.noted("begin", topic), "the fourth is in flight")
    app.kill()
    assert app.noted("done", topic) == NAMES[:3]
    app.start(f"{topic}=table")
    await log.until_committed(group, topic, 8)
    assert app.noted("done", topic) == NAMES
    assert app.noted("count=8", topic) == ["v7"], (
        "three from before the kill, out of the changelog or RocksDB, and five"
    )
    assert await app.terminate() == 0


async def test_a_table_is_restored_from_its_changelog(log: Log, small_app: Callable[..., SmallApp]) -> None:
    """Without its folder, after a kill: nothing is handled again that was committed, and the count goes on."""
    topic, group = await log.topic("in"), f"{log.prefix}changelog"
    app = small_app(group)
    await log.write(topic, *VALUES[:4])
    app.start(f"{topic}=table")
    await log.until_committed(group, topic, 4)
    app.kill()
    app.data = app.data.with_suffix(".elsewhere")
    app.start(f"{topic}=table")
    await log.write(topic, *VALUES[4:])
    await log.until_committed(group, topic, 8)
    assert app.noted("done", topic) == NAMES
    assert app.noted("count=8", topic) == ["v7"]
    assert await app.terminate() == 0


async def test_sigterm_in_the_middle_of_a_backoff_ends_the_worker(log: Log, small_app: Callable[..., SmallApp]) -> None:
    """A retry that is due in ten minutes holds up nobody: what is done is committed, the rest comes again, exit 0."""
    topic, group = await log.topic("in"), f"{log.prefix}term"
    app = small_app(group)
    await log.write(topic, *VALUES)
    app.start(f"{topic}=retry", retry_seconds=600.0)
    await log.until(lambda: "v2" in app.noted("begin", topic), "the retry is under way")
    assert await app.terminate() == 0
    assert (await log.committed(group))[(topic, 0)] == 2
    assert app.noted("done", topic) == NAMES[:2]
