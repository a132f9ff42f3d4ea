"""A storm of dead letters stops a stage; one noisy device does not; no message gets a second letter or none."""

from __future__ import annotations

import json
import time
import urllib.request
from collections import Counter
from pathlib import Path

import pytest

from tests.faults.support import wait_for
from tests.faults.topics import raw_message, read, write
from tests.faults.worker import realm
from tools.stack import Stack

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

_WINDOW = 200


def test_a_storm_of_poison_stops_the_stage(breakable: Stack, tmp_path: Path) -> None:
    """Three quarters of what twenty devices send is unreadable: the stage stops, says so in health, log and metrics,
    is not freed by those that are well, and goes on when told; one letter each.
    """
    count = _WINDOW + _WINDOW // 2
    values = [
        (
            f"dev-{number % 20}".encode(),
            raw_message(f"dev-{number % 20}", number, "{" if number % 4 else '{"ts": 1700000000, "t": 1}'),
        )
        for number in range(count)
    ]
    storm = [value for number, (_, value) in enumerate(values) if number % 4]
    with realm(breakable, tmp_path, STAGES="normalizer", DLQ_GUARD_MESSAGES=str(_WINDOW)) as own:
        worker = own.worker().start()
        write(own, "iot_raw_data", values)
        wait_for("the guard", lambda: worker.metric("headrace_guard_tripped", stage="normalizer"))
        time.sleep(3)
        assert worker.metric("headrace_guard_tripped", stage="normalizer"), "the good ones have freed it"
        assert len(read(own, "iot_errors")) < _WINDOW
        assert "Stage normalizer has stopped taking" in worker.output()
        wait_for("health says so", lambda: "normalizer.guard" in worker.failing())
        assert worker.get("/health/live")[0] == 200
        request = urllib.request.Request(f"{worker.url}/api/v1/guard/normalizer/release", method="POST")  # noqa: S310
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
            assert answer.status == 200
        wait_for("the rest", lambda: len(read(own, "iot_errors")) >= len(storm))
        worker.wait(lambda: worker.metric("headrace_in_flight") == 0, "idle")
        assert Counter(letter.value for letter in read(own, "iot_errors")) == Counter(storm)
        assert len(read(own, "iot_validated_data")) == count - len(storm)
        worker.wait_ready()


def test_a_noisy_device_stops_nobody(breakable: Stack, tmp_path: Path) -> None:
    """One device sends nothing but poison among others that are well: its letters, their readings, no stop."""
    values = []
    for number in range(3 * _WINDOW):
        values.append((b"noisy", raw_message("noisy", number, "{")))
        if number % 4 == 0:
            name = f"dev-{number % 20}"
            values.append(
                (name.encode(), raw_message(name, number, json.dumps({"ts": 1_700_000_000 + number, "t": 1})))
            )
    with realm(breakable, tmp_path, STAGES="normalizer", DLQ_GUARD_MESSAGES=str(_WINDOW)) as own:
        worker = own.worker().start()
        write(own, "iot_raw_data", values)
        worker.wait(lambda: worker.metric("headrace_received_total") == len(values), "done", 120)
        worker.wait(lambda: worker.metric("headrace_in_flight") == 0, "idle", 120)
        assert worker.metric("headrace_guard_tripped") == 0
        assert len(read(own, "iot_errors")) == 3 * _WINDOW
        assert len(read(own, "iot_validated_data")) == len(values) - 3 * _WINDOW
