"""Waits that end: when their time is over, and when they are cancelled.

``asyncio.wait_for`` of Python 3.11 promises neither, so nothing here uses it (a rule of the linter). A cancellation
that reaches it in one of the turns in which what it waits for gets done is swallowed: a loop around it goes on, and
whoever has cancelled that loop waits for ever. When its own time is over it cancels, and then waits without a bound for
an end that code with such a wait of its own (each request of aiokafka) may not come to. Python 3.12 has mended the
first.

A wait for an event or a future of ours needs ``asyncio.timeout`` and nothing more; :func:`within` is for the code of
others, :func:`end` for tasks.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from typing import Any, TypeVar

T = TypeVar("T")

log = logging.getLogger(__name__)

#: A task that is still there this many seconds after its cancellation is cancelled again.
CANCEL_AGAIN_SECONDS = 1.0
#: How long a task may take to end once it is cancelled; then it is left to itself, and the log names it.
END_SECONDS = 10.0


async def within(awaitable: Awaitable[T], seconds: float) -> T:
    """Return the result of ``awaitable``, or raise TimeoutError when it has none after ``seconds``.

    It is cancelled then, and when the caller is; either way this returns, ``END_SECONDS`` later at the most. What it
    comes to when it is cancelled for its time, a result or an exception, counts.
    """
    task = asyncio.ensure_future(awaitable)
    try:
        await asyncio.wait((task,), timeout=seconds)
    finally:
        if not task.done():
            await end(task)
    if task.done() and not task.cancelled():
        return task.result()
    raise TimeoutError(f"{_name(task)} was not done within {seconds:g} s")


async def end(
    *tasks: asyncio.Future[Any], seconds: float = END_SECONDS, again_seconds: float = CANCEL_AGAIN_SECONDS
) -> None:
    """Cancel ``tasks`` until they are done, each again every ``again_seconds``, for ``seconds`` at the most.

    ``again_seconds``: longer than what they do at their end takes. How they end is of no interest to anybody.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds
    pending = {task for task in tasks if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=min(again_seconds, max(0.0, until - loop.time())))
        if pending and loop.time() >= until:
            log.warning("Cancelled, and not at its end after %g s: %s", seconds, ", ".join(map(_name, pending)))
            break
    for task in tasks:
        if task.done() and not task.cancelled():
            task.exception()  # seen; asyncio need not report it


def _name(task: Any) -> str:
    coroutine = task.get_coro() if isinstance(task, asyncio.Task) else task
    return str(getattr(coroutine, "__qualname__", None) or repr(task))
