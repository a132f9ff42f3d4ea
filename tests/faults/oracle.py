"""The offset oracle: committed offsets, as the broker tells them, never go back and never pass the end."""

from __future__ import annotations

import asyncio
import threading
from typing import Any, Self

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError


class Oracle:
    """Samples the committed offsets of groups from a thread of its own until it is closed."""

    def __init__(self, bootstrap: str, groups: list[str], *, every_seconds: float = 0.5) -> None:
        self.groups = groups
        self.violations: list[str] = []
        self.samples = 0
        self.last: dict[tuple[str, Any], int] = {}
        self._bootstrap = bootstrap
        self._every = every_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)

    async def _run(self) -> None:
        while not self._stop.is_set():
            admin = AIOKafkaAdminClient(bootstrap_servers=self._bootstrap, request_timeout_ms=5000)
            try:
                await admin.start()
                while not self._stop.is_set():
                    for group in self.groups:
                        self._take(group, await admin.list_consumer_group_offsets(group))
                    self.samples += 1
                    await asyncio.sleep(self._every)
            except (KafkaError, OSError, TimeoutError):
                # the broker is what is being broken
                await asyncio.sleep(self._every)
            finally:
                await admin.close()

    def _take(self, group: str, offsets: Any) -> None:
        for partition, found in offsets.items():
            before = self.last.get((group, partition), -1)
            if found.offset < before:
                self.violations.append(f"{group} {partition}: committed offset went from {before} to {found.offset}")
            self.last[(group, partition)] = found.offset
