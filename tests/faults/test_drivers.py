"""A driver that keeps exceeding its time is set aside; the devices of other drivers do not notice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.faults.support import wait_for
from tests.faults.topics import raw_message, read, write
from tests.faults.worker import realm
from tools.stack import Stack

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

_FRAME = json.loads((Path(__file__).parents[2] / "devices" / "fluxor" / "vectors.json").read_text())[0]


def test_a_slow_driver_is_set_aside(breakable: Stack, tmp_path: Path) -> None:
    """Five slow messages are decoded, the driver's next are dead letters, another driver's go on; then it may again."""

    def telemetry(number: int, **fields: int) -> tuple[bytes, bytes]:
        payload = {"ts": 1_700_000_000 + number, "t": number, **fields}
        return (b"dev", raw_message("dev", number, json.dumps(payload)))

    def frame(number: int) -> tuple[bytes, bytes]:
        device = _FRAME["device_id"]
        topic = f"broker_data/b1/{device}/data"
        return (device.encode(), raw_message(device, number, _FRAME["mqtt_payload_ascii_hex"], topic=topic))

    first = [telemetry(number, slow=1) for number in range(5)]
    late = [entry for number in range(5, 15) for entry in (telemetry(number), frame(number))]
    with realm(
        breakable,
        tmp_path,
        STAGES="normalizer",
        TOPIC_PARTITIONS="1",
        DRIVER_LIMIT_SECONDS="0.1",
        DRIVER_ASIDE_SECONDS="5",
    ) as own:
        worker = own.worker(app="tests.faults.slow").start()
        write(own, "iot_raw_data", [*first, *late], 0)
        worker.wait(lambda: worker.metric("headrace_received_total", stage="normalizer") == 25, "done", 120)
        worker.wait(lambda: worker.metric("headrace_in_flight") == 0, "idle", 120)
        assert worker.metric("headrace_driver_asides_total", driver="plain_json") == 1
        assert worker.metric("headrace_dead_letters_total", **{"class": "rejected"}) == 10
        letters = read(own, "iot_errors")
        assert [letter.value for letter in letters] == [value for value, in_it in _values(late) if in_it]
        assert all(b"driver_aside" in dict(letter.headers)["dlq-message"] for letter in letters)
        handled = {json.loads(record.value)["request_id"] for record in read(own, "iot_validated_data")}
        device = _FRAME["device_id"]
        assert handled == {f"r-dev-{number}" for number in range(5)} | {f"r-{device}-{n}" for n in range(5, 15)}

        def decoded_again() -> bool:
            number = next(numbers)
            write(own, "iot_raw_data", [telemetry(number)], 0)
            return any(
                json.loads(record.value)["request_id"] == f"r-dev-{number - 1}"
                for record in read(own, "iot_validated_data")
            )

        numbers = iter(range(100, 10_000))
        wait_for("the driver is tried again", decoded_again)


def _values(entries: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bool]]:
    return [(value, key == b"dev") for key, value in entries]
