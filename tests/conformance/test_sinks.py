"""Every sink: at least once is once, in any order, by several writers, through its server's death, bad rows apart."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Sequence

import pytest

from devices.model import Reading
from streams.resilience.failures import FailureClass, classify
from tests.conformance.sinks import Sink, reading
from tools.stack import Stack


def samples(devices: int = 20, seconds: int = 10) -> list[Reading]:
    """Return readings of two indexes of each device, in order of time."""
    return [reading(d, s, index) for s in range(seconds) for d in range(devices) for index in ("1", "2")]


async def write_until_stored(sink: Sink, chunk: Sequence[Reading], pause_seconds: float = 0.05) -> int:
    """Write ``chunk`` as a stage does, again after every retryable failure; return the number of failures."""
    failures = 0
    while True:
        try:
            assert await sink.write(chunk) == []
        except Exception as exc:
            if classify(exc) is not FailureClass.RETRY:
                raise
            failures += 1
            await asyncio.sleep(pause_seconds)
        else:
            return failures


async def test_all_that_was_written_is_stored(sink: Sink) -> None:
    """A chunk that was accepted can be read, whole and unchanged."""
    readings = samples()
    assert await sink.write(readings) == []
    assert await sink.stored() == sink.expected(readings)


async def test_nothing_to_write_is_no_work(sink: Sink) -> None:
    """An empty chunk is accepted."""
    assert await sink.write([]) == []


async def test_written_twice_is_written_once(sink: Sink) -> None:
    """A chunk that is delivered again changes nothing, whole or in part, nor does one that is twice in itself."""
    readings = samples()
    await sink.write(readings + readings)
    before = await sink.stored()
    await sink.write(readings)
    await sink.write(readings[7:31])
    assert await sink.stored() == before == sink.expected(readings)


async def test_chunks_may_come_in_any_order(sink: Sink) -> None:
    """Whatever order chunks and their readings come in, the end is the same."""
    readings = samples()
    shuffled = readings.copy()
    random.Random(3).shuffle(shuffled)
    for start in range(0, len(shuffled), 37):
        await sink.write(shuffled[start : start + 37])
    assert await sink.stored() == sink.expected(readings)


async def test_writers_in_parallel_do_not_disturb_each_other(sink: Sink) -> None:
    """Chunks that overlap, written by two sinks at the same time, give what one writer would have given."""
    readings = samples()
    other = type(sink)(sink.url)
    await other.open()
    rng = random.Random(5)
    chunks = [rng.sample(readings, 200) for _ in range(12)] + [readings]
    writers = [write_until_stored(rng.choice((sink, other)), chunk) for chunk in chunks]
    await asyncio.gather(*writers)
    await other.close()
    assert await sink.stored() == sink.expected(readings)


@pytest.mark.parametrize("position", [0, 111, 400])
async def test_one_bad_reading_is_the_only_one_refused(sink: Sink, position: int) -> None:
    """Whichever kind of bad reading a chunk has, at its start, middle or end, the rest is stored."""
    for bad in sink.unstorable():
        readings = samples()
        readings.insert(position, bad)
        assert await sink.write(readings) == [bad]
        stored = await sink.stored()
        expected = sink.expected(samples())
        assert {key: stored[key] for key in expected} == expected


async def test_several_bad_readings_are_all_refused(sink: Sink) -> None:
    """Bad readings of different kinds in one chunk are found in one call."""
    bad = sink.unstorable()
    readings = samples()
    for n, one in enumerate(bad):
        readings.insert(100 * n, one)
    refused = await sink.write(readings)
    assert sorted(one.device_id for one in refused) == sorted(one.device_id for one in bad)


async def test_a_chunk_of_nothing_but_bad_readings_ends(sink: Sink) -> None:
    """When no reading can be stored, all are refused, and the sink goes on."""
    bad = sink.unstorable()
    refused = await sink.write(bad)
    assert sorted(one.device_id for one in refused) == sorted(one.device_id for one in bad)
    assert await sink.write(samples()) == []


async def test_what_was_accepted_survives_the_death_of_the_server(sink: Sink, stack_session: Stack) -> None:
    """After kill -9 and a restart all that was accepted is there, and the same sink goes on by itself."""
    readings = samples()
    await sink.write(readings[:200])
    part = stack_session.part(sink.part)
    await asyncio.to_thread(part.kill)
    with pytest.raises(Exception) as caught:
        await sink.write(readings[200:])
    assert classify(caught.value) is FailureClass.RETRY
    await asyncio.to_thread(part.start)
    assert await sink.stored() == sink.expected(readings[:200])
    await write_until_stored(sink, readings[200:])
    assert await sink.stored() == sink.expected(readings)


async def test_a_restart_that_nobody_saw_costs_nothing(sink: Sink, stack_session: Stack) -> None:
    """Connections that a restart has made stale are replaced without an error."""
    readings = samples()
    await asyncio.gather(*(sink.write(readings[n::4]) for n in range(4)))
    part = stack_session.part(sink.part)
    await asyncio.to_thread(part.stop)
    await asyncio.to_thread(part.start)
    for n in range(4):
        assert await sink.write(readings[n::4]) == []


async def test_a_server_killed_again_and_again_loses_nothing(sink: Sink, stack_session: Stack) -> None:
    """A writer that only tries again what failed has everything stored once, whenever the server is killed."""
    readings = samples(seconds=200)
    part = stack_session.part(sink.part)
    written = 0
    done = asyncio.Event()

    async def write_all() -> None:
        nonlocal written
        # Whatever pace the machine has, the writer is at work during all three deaths.
        for start in range(0, len(readings), 100):
            await write_until_stored(sink, readings[start : start + 100])
            written = start
            await asyncio.sleep(0 if deaths == 3 else 0.03)
        done.set()

    deaths = 0
    writer = asyncio.create_task(write_all())
    rng = random.Random(11)
    for death in range(3):
        mark = written + rng.randrange(100, 400)
        while written < mark and not done.is_set():
            await asyncio.sleep(0.001)
        await asyncio.to_thread(part.kill)
        await asyncio.to_thread(part.start)
        deaths = death + 1
    await writer
    assert await sink.stored() == sink.expected(readings)


async def test_a_frozen_server_is_an_error_within_a_bound(sink: Sink, stack_session: Stack) -> None:
    """A server that holds its connections and does not answer is a retryable error; once it wakes, work goes on."""
    readings = samples()
    impatient = type(sink)(sink.url, timeout_seconds=1)
    await impatient.open()
    await write_until_stored(impatient, readings[:10])
    part = stack_session.part(sink.part)
    part.pause()
    with pytest.raises(Exception) as caught:
        await impatient.write(readings[10:])
    assert classify(caught.value) is FailureClass.RETRY
    part.resume()
    await write_until_stored(impatient, readings[10:])
    await impatient.close()
    assert await sink.stored() == sink.expected(readings)


async def test_work_that_is_cancelled_leaves_the_sink_usable(sink: Sink) -> None:
    """Cancelled at any moment, a write leaves no broken connection behind for the next one."""
    readings = samples(seconds=50)
    for delay in (0.0, 0.001, 0.002, 0.004, 0.008, 0.016):
        task = asyncio.create_task(sink.write(readings))
        await asyncio.sleep(delay)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    await sink.ping()
    await write_until_stored(sink, readings)
    assert await sink.stored() == sink.expected(readings)


async def test_starting_needs_no_server(sink: Sink, stack_session: Stack) -> None:
    """A sink starts while its server is away, answers each call with a retryable error, and works once it is there."""
    part = stack_session.part(sink.part)
    await asyncio.to_thread(part.kill)
    late = type(sink)(sink.url)
    await late.open()
    with pytest.raises(Exception) as caught:
        await late.ping()
    assert classify(caught.value) is FailureClass.RETRY
    await asyncio.to_thread(part.start)
    await late.ping()
    await write_until_stored(late, samples())
    await late.close()
    assert await sink.stored() == sink.expected(samples())


async def test_stopping_is_safe_at_any_time(sink: Sink) -> None:
    """A sink can be stopped twice, and what is asked of it afterwards is an error that can be retried."""
    await sink.write(samples())
    await sink.close()
    await sink.close()
    with pytest.raises(Exception) as caught:
        await sink.write(samples())
    assert classify(caught.value) is FailureClass.RETRY
