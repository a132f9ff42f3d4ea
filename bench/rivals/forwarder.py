"""One small Faust app, raw topic to output topic, on Faust's own transport or on Headrace's: they differ by one line.

``python -m bench.rivals.forwarder '{JSON}'`` with the fields of :class:`Job`. Messages are JSON objects; their ``n``
decides, by the remainders in ``handle``, what happens to one. It fails or is slow the first time only, whatever process
has it, except for those that can never be handled; first times are noted as files in ``folder``.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faust


@dataclass(frozen=True)
class Job:
    """What one run of the app does; each ``*_every`` is 0 (never) or every how many messages."""

    transport: str
    bootstrap: str
    source: str
    target: str
    dead_letters: str
    group: str
    folder: str
    concurrency: int = 1
    never_every: int = 0
    once_every: int = 0
    slow_every: int = 0
    slow_seconds: float = 8.0


def first_time(folder: Path, name: str) -> bool:
    """Note ``name`` and tell whether nobody has before."""
    try:
        (folder / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


async def handle(job: Job, message: dict[str, Any]) -> None:
    """Do the work of one message: fail, wait, or nothing at all."""
    number = message["n"]
    folder = Path(job.folder)
    if job.never_every and number % job.never_every == 1:
        raise ValueError(f"message {number} can never be handled")
    if job.once_every and number % job.once_every == 2 and first_time(folder, f"once-{number}"):
        raise ConnectionError(f"message {number}: what it needs is away for a moment")
    if job.slow_every and number % job.slow_every == 3 and first_time(folder, f"slow-{number}"):
        await asyncio.sleep(job.slow_seconds)


def make(job: Job) -> Any:
    """Return the app with its agent."""
    app = faust.App(
        job.group,
        broker=f"kafka://{job.bootstrap}",
        datadir=f"{job.folder}/data-{os.getpid()}",
        topic_disable_leader=True,
        topic_allow_declare=False,
        topic_replication_factor=1,
        table_standby_replicas=0,
        key_serializer="raw",
        value_serializer="raw",
        producer_acks=-1,
        broker_session_timeout=10.0,
        broker_heartbeat_interval=3.0,
        broker_rebalance_timeout=30.0,
        web_enabled=False,
        worker_redirect_stdouts=False,
    )
    if job.transport == "headrace":
        from streams.resilience import ResilientTransport

        app.transport = ResilientTransport(app, dead_letters=job.dead_letters)

    source = app.topic(job.source, key_type=bytes, value_type=bytes)
    target = app.topic(job.target, key_type=bytes, value_type=bytes)
    mark = Path(job.folder) / f"begun-{os.getpid()}"

    @app.agent(source, concurrency=job.concurrency)
    async def forward(stream: Any) -> None:
        async for event in stream.events():
            if not mark.exists():
                mark.touch()
            await handle(job, json.loads(event.value))
            await target.send(key=event.key, value=event.value)

    return app


def main(description: str) -> None:
    """Run until SIGTERM."""
    job = Job(**json.loads(description))
    sys.argv[1:] = ["worker", "--without-web", "-l", "info"]
    make(job).main()


if __name__ == "__main__":
    main(sys.argv[1])
