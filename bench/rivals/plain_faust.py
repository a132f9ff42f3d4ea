"""Faust on its own transport, as its manual teaches it: an agent, an event at a time, topic.send."""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import faust

from bench.work import PARTITIONS, make_expand


def main(bootstrap: str, source: str, target: str, group: str, compression: str) -> None:
    """Run until SIGTERM."""
    expand = make_expand()
    app = faust.App(
        group,
        broker=f"kafka://{bootstrap}",
        datadir=tempfile.mkdtemp(prefix="bench-faust-"),
        topic_partitions=PARTITIONS,
        topic_replication_factor=1,
        topic_disable_leader=True,
        topic_allow_declare=False,
        web_enabled=False,
        producer_acks=-1,
        producer_compression_type=compression,
        producer_linger=0.005,
        producer_max_batch_size=1_048_576,
        broker_session_timeout=10.0,
        broker_heartbeat_interval=3.0,
        broker_rebalance_timeout=10.0,
    )
    raw = app.topic(source, key_type=bytes, value_type=bytes, value_serializer="raw", key_serializer="raw")
    readings = app.topic(target, key_type=bytes, value_type=bytes, value_serializer="raw", key_serializer="raw")

    @app.agent(raw)
    async def normalize(stream: Any) -> None:
        async for value in stream:
            for key, reading in expand(value):
                await readings.send(key=key, value=reading)

    sys.argv[1:] = ["worker", "--without-web", "-l", "info"]
    app.main()


if __name__ == "__main__":
    main(*sys.argv[1:6])
