"""The offset oracle: committed offsets, as the broker tells them, never go back and never pass the end of the log."""

from __future__ import annotations

import asyncio
import threading
from typing import Any, Self

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError


class Oracle:
    """Samples the committed offsets of all groups whose names begin with ``prefix``, from a thread, until closed."""

    def __init__(self, bootstrap: str, prefix: str, *, every_seconds: float = 0.5) -> None:
        self.violations: list[str] = []
        self.samples = 0
        #: what has ended the sampling before its time
        self.failure: Exception | None = None
        self.last: dict[tuple[str, Any], int] = {}
        self._bootstrap = bootstrap
        self._prefix = prefix
        self._every = every_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def groups(self) -> set[str]:
        """The groups that have committed something."""
        return {group for group, _ in self.last}

    def forget(self) -> None:
        """Begin anew: the broker has lost what was committed, and the test meant it to."""
        self.last = {}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)

    def _watch(self) -> None:
        try:
            asyncio.run(self._run())
        except Exception as exc:
            self.failure = exc

    async def _run(self) -> None:
        while not self._stop.is_set():
            admin = AIOKafkaAdminClient(bootstrap_servers=self._bootstrap, request_timeout_ms=5000)
            try:
                await admin.start()
                while not self._stop.is_set():
                    last = self.last
                    for group in sorted({found[0] for found in await admin.list_consumer_groups()}):
                        if group.startswith(self._prefix):
                            self._take(last, group, await admin.list_consumer_group_offsets(group))
                    self.samples += 1
                    await asyncio.sleep(self._every)
            except (KafkaError, OSError, TimeoutError):
                # the broker is what is being broken
                await asyncio.sleep(self._every)
            finally:
                await admin.close()

    def _take(self, last: dict[tuple[str, Any], int], group: str, offsets: Any) -> None:
        for partition, found in offsets.items():
            before = last.get((group, partition), -1)
            if found.offset < before:
                self.violations.append(f"{group} {partition}: committed offset went from {before} to {found.offset}")
            last[(group, partition)] = found.offset
