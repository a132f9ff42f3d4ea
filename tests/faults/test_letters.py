"""The topic of dead letters is away: the stage waits for it, and skips nothing."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from pathlib import Path

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from tests.faults.support import wait_for
from tests.faults.topics import committed, raw_message, read, write
from tests.faults.worker import Realm, realm
from tools.stack import Stack

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]


def change(own: Realm, *, there: bool) -> None:
    """Create or delete the topic of dead letters."""
    topic = own.places.topic("iot_errors")

    async def run() -> None:
        admin = AIOKafkaAdminClient(bootstrap_servers=own.env["KAFKA_BOOTSTRAP_SERVERS"])
        await admin.start()
        try:
            if there:
                await admin.create_topics([NewTopic(topic, 1, 1)])
            else:
                await admin.delete_topics([topic])
        finally:
            await admin.close()

    asyncio.run(run())


def test_the_dead_letter_topic_is_deleted(breakable: Stack, tmp_path: Path, short: bool) -> None:
    """Poison comes while `iot_errors` is gone: nothing is committed past it; when it is back, one letter each."""
    values: list[tuple[bytes | None, bytes | None]] = []
    for number in range(60):
        good = json.dumps({"ts": 1_700_000_000 + number, "t": number})
        values.append((b"dev", raw_message("dev", number, good if number % 10 else "{")))
    poison = Counter(value for number, (_, value) in enumerate(values) if number % 10 == 0)
    # the worker itself would declare the topic again with its next look at the health of its stages
    with realm(breakable, tmp_path, STAGES="normalizer", TOPIC_PARTITIONS="1", HEALTH_INTERVAL_SECONDS="300") as own:
        worker = own.worker().start()
        group = f"{own.name}-normalizer"
        change(own, there=False)
        write(own, "iot_raw_data", values, 0)
        wait_for("poison waits", lambda: worker.metric("headrace_in_flight", stage="normalizer"))
        # KAFKA_REQUEST_TIMEOUT_SECONDS later: until then the letters wait in the client
        wait_for("letters refused", lambda: worker.metric("headrace_retries_total", stage="normalizer"))
        time.sleep(5 if short else 60)
        assert worker.metric("headrace_in_flight", stage="normalizer"), "nothing is skipped"
        assert max(committed(own, group).values(), default=0) == 0
        assert worker.get("/health/live")[0] == 200
        change(own, there=True)
        wait_for("every letter", lambda: len(read(own, "iot_errors")) >= len(poison))
        worker.wait(lambda: worker.metric("headrace_in_flight") == 0, "idle", 120)
        assert Counter(letter.value for letter in read(own, "iot_errors")) == poison
        assert worker.starts == 1
