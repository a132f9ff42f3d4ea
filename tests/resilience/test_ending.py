"""The end of a worker: in order at the first signal, at once at the second or when its bound is over."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: A worker whose one service hangs at its end for as long as it is told.
WORKER = """
import asyncio, sys
from streams.resilience import ending
from streams.resilience.application import App
from streams.resilience.options import ResilienceOptions

options = ResilienceOptions(stage="small", dead_letter_topic="errors", shutdown_seconds=float(sys.argv[2]))
app = App("small", resilience=options, store="memory://")
ending.CLOSING_SECONDS = 0.0


class Told(ending.Worker):
    async def start(self):
        # the signals are heard, nothing is connected
        self.install_signal_handlers()
        print("heard", flush=True)
        if len(sys.argv) > 3:
            raise LookupError("cannot go on")
        await asyncio.sleep(60)

    async def stop(self):
        print("ending", flush=True)
        await asyncio.sleep(float(sys.argv[1]))


Told(app, loop=asyncio.new_event_loop()).execute_from_commandline()
"""


async def run(
    hangs_seconds: float, bound_seconds: float, *numbers: signal.Signals, fails: bool = False
) -> tuple[int, str]:
    """Start the worker, send it the signals in turn, and return exit code and what it has said."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        WORKER,
        str(hangs_seconds),
        str(bound_seconds),
        *["fails"] * fails,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdout is not None
    said = ""
    for number, expected in zip(numbers, ["heard", "ending", "ending"], strict=False):
        while expected not in said:
            line = await asyncio.wait_for(process.stdout.readline(), 60)
            assert line, said
            said += line.decode()
        process.send_signal(number)
    rest, _ = await asyncio.wait_for(process.communicate(), 60)
    return await process.wait(), said + rest.decode()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
async def test_the_first_signal_ends_in_order(number: signal.Signals) -> None:
    """TERM, INT and HUP: what has to be done at the end is done, and the exit code is 0."""
    code, said = await run(0.0, 30.0, number)
    assert code == 0, said
    assert "ending" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
async def test_the_second_signal_ends_at_once(number: signal.Signals) -> None:
    """An end that hangs: the second signal is the end, with its number in the exit code."""
    code, said = await run(3600.0, 3600.0, signal.SIGTERM, number)
    assert code == 128 + number, said
    assert f"{number.name} after SIGTERM" in said


async def test_the_end_has_a_bound() -> None:
    """An end that hangs and no second signal: it is over when the bound is, and the log says what was under way."""
    code, said = await run(3600.0, 0.5, signal.SIGTERM)
    assert code == 128 + signal.SIGTERM, said
    assert "SHUTDOWN_SECONDS" in said and "Under way" in said


async def test_the_end_after_a_failure_has_a_bound() -> None:
    """What it cannot go on from ends a worker, non-zero, also where its end hangs and no signal comes."""
    code, said = await run(3600.0, 0.5, fails=True)
    assert code == 1, said
    assert "SHUTDOWN_SECONDS" in said and "Under way" in said
