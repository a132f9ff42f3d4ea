"""A driver never returns from one message: the worker ends for its supervisor, then goes on without that message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.faults.support import LIVENESS_SECONDS, wait_for
from tests.faults.topics import LETTER_HEADERS, raw_message, read, write
from tests.faults.worker import realm
from tools.stack import Stack

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]


def test_a_driver_in_an_endless_loop(breakable: Stack, tmp_path: Path) -> None:
    """Twice the worker ends, non-zero, naming record and driver; then it is one dead letter, all else is handled."""
    messages, guilty = 60, 30
    values: list[tuple[bytes | None, bytes | None]] = []
    for number in range(messages):
        payload = {"ts": 1_700_000_000 + number, "t": number} | ({"endless": True} if number == guilty else {})
        values.append((b"dev", raw_message("dev", number, json.dumps(payload))))
    with realm(breakable, tmp_path, STAGES="normalizer", STUCK_SECONDS="5", TOPIC_PARTITIONS="1") as own:
        worker = own.worker(app="tests.faults.endless").start()
        write(own, "iot_raw_data", values, 0)
        for _ in range(2):
            worker.start(wait=False)
            assert worker.wait_exit(LIVENESS_SECONDS) > 0
            assert "tests/faults/endless.py" in worker.output(), worker.tail()
            assert f"{own.places.topic('iot_raw_data')}:0:{guilty}" in worker.output(), worker.tail()
        worker.start()
        wait_for("the dead letter", lambda: read(own, "iot_errors"))
        worker.wait(lambda: worker.metric("headrace_in_flight") == 0, "idle")
        letters = read(own, "iot_errors")
        assert [letter.value for letter in letters] == [values[guilty][1]]
        assert {name for name, _ in letters[0].headers} >= LETTER_HEADERS
        handled = {json.loads(record.value)["request_id"] for record in read(own, "iot_validated_data")}
        assert handled == {f"r-dev-{number}" for number in range(messages) if number != guilty}
