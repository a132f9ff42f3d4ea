"""``ResilientKafkaConsumer``, for services made of threads: a paho-mqtt loop, a Flask or Django process, a script.

Guarantees: those of ``AsyncResilientKafkaConsumer``, which it drives in an event loop of its own; a plain handler runs
in a worker thread, so what it blocks on never costs the group membership. Every method may be called from any thread,
also from within a handler. Start it after a server has forked its workers: threads don't survive a fork.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from streams.resilience.consumer_options import ErrorCallback, Handler, Topic, inside_handler
from streams.resilience.consumers import AsyncResilientKafkaConsumer

#: How long a question to the loop may take before its answer is "not well".
ANSWER_SECONDS = 5.0


class ResilientKafkaConsumer:
    """Consume topics with at-least-once delivery, from threads.

    Takes the arguments of ``AsyncResilientKafkaConsumer``; raises as it does, and connects to nothing.
    """

    def __init__(  # noqa: PLR0917 - the order is the contract's
        self,
        topic: Topic,
        group_id: str,
        bootstrap_servers: str | Sequence[str],
        auto_offset_reset: str = "earliest",
        max_retries: int | None = None,
        base_delay: float = 1,
        on_error_callback: ErrorCallback | None = None,
        *,
        raw: bool = False,
        dead_letter_topic: str | None = None,
        concurrency: int = 1,
        **options: Any,
    ) -> None:
        self._consumer = AsyncResilientKafkaConsumer(
            topic,
            group_id,
            bootstrap_servers,
            auto_offset_reset,
            max_retries,
            base_delay,
            on_error_callback,
            raw=raw,
            dead_letter_topic=dead_letter_topic,
            concurrency=concurrency,
            **options,
        )
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stopped = False
        self._busy = False
        self._idle = threading.Event()
        self._idle.set()
        self._failure: BaseException | None = None

    def consume_messages(self, handler: Handler, commit_offset: bool = True, batch_processing: bool = False) -> None:
        """Give every message to ``handler`` until :meth:`stop`; blocks. See the async class for what a handler may do.

        Raises what ``AsyncResilientKafkaConsumer.consume_messages`` raises; RuntimeError while it is running already,
        or from within an event loop's thread.
        """
        with self._lock:
            if self._busy:
                raise RuntimeError(f"consume_messages of group {self._consumer.options.group_id} is running already")
            if self._stopped:
                return
            self._busy = True
            self._idle.clear()
        try:
            asyncio.run(self._consume(handler, commit_offset, batch_processing))
        finally:
            with self._lock:
                self._busy = False
                self._loop = None
            self._idle.set()

    async def _consume(self, handler: Handler, commit_offset: bool, batch_processing: bool) -> None:
        with self._lock:
            self._loop = asyncio.get_running_loop()
            if self._stopped:
                return
        await self._consumer.consume_messages(handler, commit_offset, batch_processing)

    def start(self, handler: Handler, commit_offset: bool = True, batch_processing: bool = False) -> Self:
        """Run :meth:`consume_messages` in a thread of its own; :meth:`join` tells how it ended.

        Raises RuntimeError when it was started before.
        """
        with self._lock:
            if self._thread is not None or self._busy:
                raise RuntimeError(f"the consumer of group {self._consumer.options.group_id} was started before")
            # A daemon: a service that ends without stop() is not held up; what was uncommitted comes again.
            self._thread = threading.Thread(
                target=self._run,
                args=(handler, commit_offset, batch_processing),
                name=f"kafka-{self._consumer.options.label}",
                daemon=True,
            )
            self._thread.start()
        return self

    def _run(self, handler: Handler, commit_offset: bool, batch_processing: bool) -> None:
        try:
            self.consume_messages(handler, commit_offset, batch_processing)
        except BaseException as exc:
            self._failure = exc

    def stop(self, timeout: float | None = None) -> bool:
        """End it: running handlers may finish (``drain_timeout``), what is done is committed, the group is left.

        Waits up to ``timeout`` seconds (None: until it has ended); returns whether it has ended. Final. From within a
        handler it does not wait, and returns False.
        """
        with self._lock:
            self._stopped = True
            loop = self._loop
        session = self._consumer._session
        if session is not None:
            session.refuse()
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(self._begin_stop, loop)
        if inside_handler.get() is self._consumer:
            return False
        if not self._idle.wait(timeout):
            return False
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)
            return not thread.is_alive()
        return True

    def _begin_stop(self, loop: asyncio.AbstractEventLoop) -> None:
        task = loop.create_task(self._consumer.stop())
        task.add_done_callback(lambda _done: None)
        self._stop_task = task

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the thread of :meth:`start`; returns whether it has ended, raises what ended it early."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout)
            if thread.is_alive():
                return False
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        return True

    def is_healthy(self) -> bool:
        """Tell whether a consumer is in its group, reaches a broker and gets on. Never raises, from any thread."""
        return bool(self._ask(self._consumer.is_healthy, False))

    def why_unhealthy(self) -> str:
        """Return in words what is wrong, empty when nothing is."""
        return str(
            self._ask(self._consumer.why_unhealthy, "the consumer does not run, or its event loop does not answer")
        )

    def accounts(self) -> dict[str, object]:
        """Return the counts since :meth:`consume_messages` began."""
        return dict(self._ask(self._consumer.accounts, {}))

    def commit(self) -> bool:
        """Commit what is complete now; True when the broker has it."""
        with self._lock:
            loop = self._loop
        if loop is None:
            return False
        try:
            future = asyncio.run_coroutine_threadsafe(self._consumer.commit(), loop)
            return future.result(self._consumer.options.resilience.commit_timeout_seconds)
        except (RuntimeError, TimeoutError, concurrent.futures.CancelledError):
            return False

    @property
    def recreations(self) -> int:
        """How often a consumer was created anew."""
        return self._consumer.recreations

    def _ask(self, question: Any, otherwise: Any) -> Any:
        """Return the answer that ``question`` gives in the loop's thread."""
        with self._lock:
            loop = self._loop
        if loop is None:
            return otherwise
        answer: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def ask() -> None:
            try:
                answer.set_result(question())
            except Exception as exc:
                answer.set_exception(exc)

        try:
            if threading.get_ident() == getattr(loop, "_thread_id", None):
                return question()
            loop.call_soon_threadsafe(ask)
            return answer.result(ANSWER_SECONDS)
        except Exception:
            return otherwise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
