"""Agents as Faust knows them, whose body is run again after it raised.

Guarantees: what the body had in hand is settled before it runs again, on the same stream, from its first line; a body
that raises before it has anything in hand (it cannot set itself up) is run again after a backoff while that may help,
and ends the worker, non-zero, when it does not.
"""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import faust
from faust.agents import agent as faust_agent

from streams.resilience.failures import FailureClass, Fatal, Retryable, classify


class Agent(faust.Agent):
    """A Faust agent that survives what its body raises."""

    app: Any

    def test_context(self, *args: Any, **kwargs: Any) -> Any:
        """Return Faust's wrapper for unit tests.

        ``put`` returns when the body has done the value (Faust's own returns when it was received). An agent of a chunk
        topic takes single values (bytes or messages) as well as a Chunk. What it sends is in ``app.captured``.
        """
        self.app.testing = True
        context: Any = super().test_context(*args, **kwargs)
        names = self.get_topic_names()
        decode = next((self.app.chunk_topics[name] for name in names if name in self.app.chunk_topics), None)
        context._stream.wrap_values = decode
        if not inspect.isasyncgenfunction(self.fun):
            context._stream.on_done = context._on_value_processed
            context._install_value_recorder = _leave_to_on_done
        return context

    async def _execute_actor(self, coro: Any, aref: Any) -> None:
        faust_agent._current_agent.set(self)
        aref.stream.remember_processors()
        idle_failures = 0
        backoff = self.app.resilience.infrastructure_backoff()
        while True:
            try:
                await coro
            except asyncio.CancelledError as exc:
                task = asyncio.current_task()
                if self.should_stop or (task is not None and task.cancelling()):
                    if not self.should_stop:
                        aref.stream.get_active_stream().recover(Retryable("the agent was cancelled"))
                        self.log.info("Restarting on rebalance")
                        await aref.crash(exc)
                        self.supervisor.wakeup()
                        return
                    raise
                # Nobody has cancelled this agent: its body awaited something that was.
                failure: Exception = Retryable(f"what the body of {self.name} waited for was cancelled")
            except Exception as exc:
                failure = exc
            else:
                return
            stream = aref.stream.get_active_stream()
            try:
                settled = stream.recover(failure)
            except Exception as exc:
                # Nothing is left in a state that nobody knows: what is not committed comes again after the restart.
                self.log.exception("The failure of agent %s cannot be settled", self.name)
                self.app.fatal(
                    Fatal(f"the failure of agent {self.name} cannot be settled: {type(exc).__name__}: {exc}")
                )
                return
            self.app.on_agent_failure(self, failure)
            stream.rewind()
            idle_failures = 0 if settled else idle_failures + 1
            if not settled:
                kind = classify(failure)
                if kind is FailureClass.FATAL or (
                    kind is not FailureClass.RETRY and idle_failures >= self.app.resilience.max_attempts
                ):
                    self.app.fatal(Fatal(f"agent {self.name} cannot run: {type(failure).__name__}: {failure}"))
                    return
                await self.sleep(backoff.next())
            body = self.fun(stream)
            coro = self._slurp(aref, body.__aiter__()) if hasattr(body, "__aiter__") else body


def _leave_to_on_done(_actor: Any) -> None:
    """Stand in for the recorder that tells a test of a value when it comes in."""
