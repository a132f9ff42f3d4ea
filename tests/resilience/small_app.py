"""A small Faust app, run as ``python -m tests.resilience.small_app``: on Faust's own transport or on ours.

Nothing else differs. Its agents write a line to a file when they begin with a message and when they are done with it.
Topics are named by ``--topic``; an agent for each of them, chosen by what comes after ``=``:

- ``raise``: raises, once, at ``v3``;
- ``head``: two bodies; the one that gets ``v0`` never ends while ``--hang`` is set;
- ``table``: counts every value in a table on RocksDB, and hangs at ``v3`` while ``--hang`` is set;
- ``retry``: raises ConnectionRefusedError at ``v2``, always.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import Any

import faust

from streams.resilience.application import App
from streams.resilience.options import ResilienceOptions

SESSION_SECONDS = 3.0


def options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what both apps have in common."""
    return {
        "broker": f"kafka://{arguments.servers}",
        "datadir": arguments.data,
        "store": "rocksdb://",
        "env_prefix": "SMALL_APP_",
        "topic_disable_leader": True,
        "topic_allow_declare": True,
        "topic_partitions": 1,
        "table_standby_replicas": 0,
        "recovery_consistency_check": False,
        "key_serializer": "raw",
        "value_serializer": "raw",
        "broker_session_timeout": SESSION_SECONDS,
        "broker_heartbeat_interval": 0.5,
        "broker_rebalance_timeout": 8,
        "broker_request_timeout": 20,
        "broker_commit_interval": 0.2,
        "producer_request_timeout": 20,
        "web_enabled": False,
        "worker_redirect_stdouts": False,
    }


def make(arguments: argparse.Namespace) -> Any:
    """Return the app."""
    if arguments.transport == "faust":
        return faust.App(arguments.group, **options(arguments))
    resilience = ResilienceOptions(
        stage="small",
        dead_letter_topic=f"{arguments.group}-errors",
        consumer={"fetch_max_wait_ms": 50},
        retry_base_seconds=arguments.retry_seconds,
        retry_cap_seconds=arguments.retry_seconds,
        attempt_base_seconds=0.05,
        drain_seconds=3.0,
        commit_timeout_seconds=10.0,
    )
    return App(arguments.group, resilience=resilience, **options(arguments))


def add_agent(app: Any, name: str, kind: str, arguments: argparse.Namespace) -> None:
    """Add the agent of one topic."""
    log = Path(arguments.log)
    topic = app.topic(name, value_type=bytes, value_serializer="raw", key_serializer="raw")

    def note(what: str, value: bytes) -> None:
        with log.open("a") as file:
            file.write(f"{what} {name} {value.decode()}\n")

    async def hang() -> None:
        if arguments.hang:
            await asyncio.sleep(3600)

    if kind == "raise":
        raised = False

        @app.agent(topic, name=f"{name}-agent")
        async def at_v3(stream: Any) -> None:
            nonlocal raised
            async for value in stream:
                note("begin", value)
                if value == b"v3" and not raised:
                    raised = True
                    raise RuntimeError("the third one")
                note("done", value)

    elif kind == "head":

        @app.agent(topic, name=f"{name}-agent", concurrency=2)
        async def slow_head(stream: Any) -> None:
            async for value in stream:
                note("begin", value)
                if value == b"v0":
                    await hang()
                note("done", value)

    elif kind == "table":
        counts = app.Table("counts", default=int, partitions=1)

        @app.agent(topic, name=f"{name}-agent")
        async def count(stream: Any) -> None:
            async for value in stream:
                note("begin", value)
                if value == b"v3":
                    await hang()
                counts["all"] += 1
                note("done", value)
                note(f"count={counts['all']}", value)

    else:

        @app.agent(topic, name=f"{name}-agent")
        async def away(stream: Any) -> None:
            async for value in stream:
                note("begin", value)
                if value == b"v2":
                    raise ConnectionRefusedError
                note("done", value)


def main() -> None:
    """Run the worker until it is told to stop."""
    parser = argparse.ArgumentParser()
    for name in ("transport", "servers", "group", "log", "data"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--topic", action="append", required=True)
    parser.add_argument("--hang", action="store_true")
    parser.add_argument("--retry-seconds", type=float, default=0.2)
    arguments = parser.parse_args()
    app = make(arguments)
    for entry in arguments.topic:
        name, kind = entry.split("=")
        add_agent(app, name, kind, arguments)
    app.finalize()
    app.Worker(loglevel="info", redirect_stdouts=False).execute_from_commandline()


if __name__ == "__main__":
    main()
