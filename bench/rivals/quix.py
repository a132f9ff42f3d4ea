"""Quix Streams as its manual teaches it: topic, apply(expand), to_topic, at least once."""

from __future__ import annotations

import sys

from quixstreams import Application

from bench.work import make_expand


def main(bootstrap: str, source: str, target: str, group: str, compression: str) -> None:
    """Run until SIGTERM."""
    expand = make_expand()
    app = Application(
        broker_address=bootstrap,
        consumer_group=group,
        auto_offset_reset="earliest",
        processing_guarantee="at-least-once",
        auto_create_topics=False,
        use_changelog_topics=False,
        commit_interval=1.0,
        loglevel="WARNING",
        consumer_extra_config={"fetch.wait.max.ms": 100},
        producer_extra_config={
            "acks": "all",
            "enable.idempotence": True,
            "compression.type": compression,
            "linger.ms": 5,
            "queue.buffering.max.messages": 1_000_000,
        },
    )
    raw = app.topic(source, value_deserializer="bytes", key_deserializer="bytes")
    readings = app.topic(target, value_serializer="bytes", key_serializer="bytes")
    # The key of a reading is the device's, as is the key of the message that it came in.
    frames = app.dataframe(raw).apply(lambda value: [reading for _, reading in expand(value)], expand=True)
    frames.to_topic(readings)
    app.run()


if __name__ == "__main__":
    main(*sys.argv[1:6])
