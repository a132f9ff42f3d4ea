"""The Efento driver against the vectors: samples at their own times, errors told, answers and commands byte for
byte."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from devices import testing
from devices.efento import commands, messages, samples
from devices.efento.driver import EfentoDriver
from devices.model import DecodeError
from devices.pipeline import Refused
from devices.protobuf import fill
from devices.testing import readme_shows, uplink

VECTORS = json.loads(Path(__file__).with_name("vectors.json").read_text())
NOW = datetime.fromtimestamp(VECTORS["commands"]["current_time"], UTC)
SERIAL = "282c02424eed"
DRIVER = EfentoDriver()


def message(kind: Any, **fields: Any) -> Any:
    built = kind()
    fill(built, fields)
    return built.SerializeToString()


def measurements(*channels: Any, **fields: Any) -> Any:
    base = {"serial_num": SERIAL, "measurement_period_base": 60, "measurement_period_factor": 1, "battery_status": True}
    return message(messages.MEASUREMENTS, **(base | fields), channels=list(channels))


def channel(kind: Any, offsets: Any, at: Any = 1_750_000_000, start: Any = 0) -> Any:
    return {"type": kind, "timestamp": at, "start_point": start, "sample_offsets": offsets}


def coap(data: Any, path: Any = "m", device_id: Any = SERIAL) -> Any:
    return uplink(data, path, protocol="coap", device_id=device_id, received_at=NOW)


def read(data: Any, path: Any = "m", device_id: Any = SERIAL) -> Any:
    return testing.read(coap(data, path, device_id))


def values(data: Any) -> Any:
    return [(r.index, r.labels[0], r.values[0]) for r in read(data).readings]


@pytest.mark.parametrize("vector", VECTORS["measurements"], ids=lambda v: v["hex"][-12:])
def test_measurement_vector(vector: Any) -> None:
    """Each sample of a captured message is a reading at its own time; an error code is a missing value that says so."""
    outcome = read(bytes.fromhex(vector["hex"]), device_id=vector["device_id"])
    assert not outcome.rejections
    found = []
    for reading in outcome.readings:
        value = reading.values[0]
        if value is None:
            value = {"error_code": reading.metadata["error_code"]}
        found.append([reading.index, reading.labels, int(reading.timestamp.timestamp()), value])
    names = {"TEMPERATURE": "T", "HUMIDITY": "U"}
    assert found == [[names.get(kind, kind), [f"CH{n}"], at, value] for kind, n, at, value in vector["samples"]]
    metadata = outcome.readings[0].metadata
    for name in ("battery_ok", "period_s", "hash", "next_transmission_at"):
        if name in vector:
            assert metadata[name] == vector[name]
    assert {r.device_id for r in outcome.readings} == {vector["device_id"]}


@pytest.mark.parametrize("vector", VECTORS["device_info"], ids=lambda v: v["device_id"])
def test_device_info_vector(vector: Any) -> None:
    """Device information is one reading of named fields, at arrival, in a category of its own."""
    (reading,) = read(bytes.fromhex(vector["hex"]), "i", vector["device_id"]).readings
    found = dict(zip(reading.labels, reading.values, strict=True))
    for name in ("sw_version", "commit_id", "up_time", "mcu_temperature", "min_battery_voltage", "iccid"):
        assert found[name] == vector[name]
    assert reading.index == "DEVICE_INFO"
    assert reading.metadata["category"] == "device_info"
    assert reading.metadata["sw_version_text"] == "06.13"
    assert reading.timestamp == NOW


def test_the_message_names_its_device() -> None:
    """The serial number is the device's id, whichever path it comes by; a time request names nobody."""
    registry = testing.registry()
    for vector in VECTORS["measurements"]:
        assert registry.device_id("coap", "m", bytes.fromhex(vector["hex"])) == vector["device_id"]
    info = VECTORS["device_info"][0]
    assert registry.device_id("coap", "i", bytes.fromhex(info["hex"])) == info["device_id"]
    config = message(messages.CONFIG, serial_number=SERIAL)
    assert registry.device_id("coap", "c", config) == SERIAL
    assert registry.device_id("coap", "t") is None
    assert registry.device_id("coap", "m", b"\xff") is None


def test_samples_of_two_hours_ago_stay_there() -> None:
    """A sample's time is the device's, not that of arrival."""
    at = int((NOW - timedelta(hours=2)).timestamp())
    readings = read(measurements(channel("TEMPERATURE", [1, 2, 3], at))).readings
    assert [r.timestamp for r in readings] == [NOW - timedelta(hours=2) + timedelta(minutes=n) for n in range(3)]


def test_samples_of_the_day_after_tomorrow_are_refused() -> None:
    """A device whose clock is far ahead is refused with that reason."""
    at = int((NOW + timedelta(hours=25)).timestamp())
    with pytest.raises(Refused, match="in_future"):
        read(measurements(channel("TEMPERATURE", [1], at)))


@pytest.mark.parametrize(
    ("kinds", "factor", "period"),
    [
        (["TEMPERATURE"], 0, 60),
        (["TEMPERATURE"], 1, 60),
        (["TEMPERATURE"], 5, 300),
        (["TEMPERATURE", "OK_ALARM"], 0, 840),
        (["TEMPERATURE", "OK_ALARM"], 1, 60),
    ],
)
def test_period(kinds: Any, factor: Any, period: Any) -> None:
    """Samples are base × factor apart; a factor of 0 is 1, or 14 where a channel is binary."""
    data = measurements(*(channel(kind, [1, 2]) for kind in kinds), measurement_period_factor=factor)
    first, second, *_ = read(data).readings
    assert (second.timestamp - first.timestamp).total_seconds() == period


@pytest.mark.parametrize(
    "kind", [k for k in messages.TYPES.values() if k.kind == "continuous" and k.divided_by == 1], ids=lambda k: k.name
)
def test_every_continuous_type(kind: Any) -> None:
    """A raw number is so many steps of the type's resolution, in its unit; zero needs no starting point on the wire."""
    (first, second) = EfentoDriver().decode(
        coap(measurements(channel(kind.name, [0, 7]))), testing.shipped_profile("efento")
    )
    assert first.values == [0]
    assert second.values == [7 / kind.divisor]
    assert second.metadata["units"] == [kind.unit]
    assert second.index == {"TEMPERATURE": "T", "HUMIDITY": "U", "HUMIDITY_ACCURATE": "U"}.get(kind.name, kind.name)


@pytest.mark.parametrize("kind", ["OK_ALARM", "FLOODING", "OUTPUT_CONTROL"])
def test_binary_types(kind: Any) -> None:
    """A change of state is at timestamp + |offset| - 1; the sign is the state."""
    readings = read(measurements(channel(kind, [1, -61]))).readings
    assert [r.values[0] for r in readings] == [1, 0]
    assert [int(r.timestamp.timestamp()) for r in readings] == [1_750_000_000, 1_750_000_060]


@pytest.mark.parametrize("kind", ["IAQ", "STATIC_IAQ", "CO2_EQUIVALENT", "BREATH_VOC"])
def test_calibrated_types(kind: Any) -> None:
    """A third of the raw number is the value, the remainder the state of calibration."""
    readings = read(measurements(channel(kind, [300, 301, 302]))).readings
    assert [r.values[0] for r in readings] == [100, 100, 100]
    assert [r.metadata["calibration"] for r in readings] == ["required", "on-going", "done"]


@pytest.mark.parametrize(
    ("name", "unit", "weight"),
    [
        ("WATER_METER_ACC", "l", 100),
        ("PULSE_CNT_ACC", "NB", 1000),
        ("ELEC_METER_ACC", "Wh", 1000),
        ("PULSE_CNT_ACC_WIDE", "NB", 10**6),
    ],
)
def test_accumulating_pairs(name: Any, unit: Any, weight: Any) -> None:
    """Major and minor of one meter are one counter in the smaller unit, under the minor's channel."""
    data = measurements(channel(f"{name}_MAJOR", [12 * 4 + 3, 13 * 4]), channel(f"{name}_MINOR", [34 * 6 + 5, 1 * 6]))
    first, second = read(data).readings
    assert (first.index, first.labels, first.values) == (name, ["CH2"], [12 * weight + 34])
    assert second.values == [13 * weight + 1]
    assert first.metadata["units"] == [unit]
    assert (first.metadata["minor_state"], first.metadata["major_state"]) == (5, 3)


def test_two_meters_of_a_kind() -> None:
    """The first minor goes with the first major, the second with the second, whatever the order of channels."""
    data = measurements(
        channel("WATER_METER_ACC_MINOR", [6]),
        channel("WATER_METER_ACC_MINOR", [12]),
        channel("WATER_METER_ACC_MAJOR", [4]),
        channel("WATER_METER_ACC_MAJOR", [8]),
    )
    assert values(data) == [("WATER_METER_ACC", "CH1", 101), ("WATER_METER_ACC", "CH2", 202)]


def test_half_a_pair_is_read_by_itself() -> None:
    """A minor without its major, and a major without its minor, keep their own names."""
    assert values(measurements(channel("WATER_METER_ACC_MINOR", [13]))) == [("WATER_METER_ACC_MINOR", "CH1", 2)]
    assert values(measurements(channel("WATER_METER_ACC_MAJOR", [9]))) == [("WATER_METER_ACC_MAJOR", "CH1", 2)]


def test_a_counter_with_an_error_is_missing() -> None:
    """Where one half of a counter is an error, the counter is missing and the error is told; sparse majors hold on."""
    data = measurements(
        channel("PULSE_CNT_ACC_MINOR", [6, samples.ERROR_CODES[0], 18, 24]), channel("PULSE_CNT_ACC_MAJOR", [4])
    )
    readings = read(data).readings
    assert [r.values[0] for r in readings] == [1001, None, 1003, 1004]
    assert readings[1].metadata["error_code"] == samples.ERROR_CODES[0]
    late = measurements(channel("PULSE_CNT_ACC_MINOR", [6]), channel("PULSE_CNT_ACC_MAJOR", [4], at=1_750_000_060))
    assert read(late).readings[0].values == [None]


@pytest.mark.parametrize(
    ("offset", "is_error"), [(8_355_839, False), (8_355_840, True), (8_388_607, True), (8_388_608, False)]
)
def test_error_codes(offset: Any, is_error: Any) -> None:
    """Offsets from 8355840 to 8388607 are sensor errors."""
    (reading,) = EfentoDriver().decode(
        coap(measurements(channel("DISTANCE_MM", [offset]))), testing.shipped_profile("efento")
    )
    assert (reading.values == [None]) is is_error
    assert ("error" in reading.metadata) is is_error


def test_no_sensor_and_unknown_types() -> None:
    """A channel without sensor gives nothing; a type that nobody knows is kept as the raw number."""
    built: Any = messages.MEASUREMENTS.FromString(measurements(channel("NO_SENSOR", [1]), channel("TEMPERATURE", [5])))
    built.channels[1].type = 99
    assert values(built.SerializeToString()) == [("TYPE_99", "CH2", 5)]


def test_what_is_out_of_range_is_rejected_alone() -> None:
    """The maker's range is the profile's: 150 % humidity is refused, the temperature beside it goes on."""
    outcome = read(measurements(channel("TEMPERATURE", [215]), channel("HUMIDITY", [150])))
    assert [(r.index, r.values) for r in outcome.readings] == [("T", [21.5])]
    assert [r.reason for r in outcome.rejections] == ["above_max"]


def test_transfer_reasons_and_version() -> None:
    """Reasons are named by bit; a version is two numbers."""
    data = measurements(channel("TEMPERATURE", [1]), transfer_reason=1 << 0 | 1 << 3 | 1 << 8 | 1 << 19 | 1 << 20)
    assert read(data).readings[0].metadata["transfer_reasons"] == ["reset", "retry_1", "rule_1", "rule_12", "limit_end"]
    assert messages.version_text(1546) == "06.10"


def test_configuration_tells_no_secrets() -> None:
    """A configuration is one reading of what is set; what is not set, and what is secret, is not in it."""
    data = message(
        messages.CONFIG,
        serial_number=SERIAL,
        measurement_period_base=60,
        apn="\x7f",
        encryption_key="00ff",
        **dict.fromkeys(("apn_password", "apn_user_name", "cloud_token"), "hidden"),
        channel_types=["TEMPERATURE", "HUMIDITY"],
        rules=[{"channel_mask": 1, "condition": "CONDITION_HIGH_THRESHOLD", "parameters": [250, 10]}],
        hash=77,
    )
    (reading,) = read(data, "c").readings
    found = dict(zip(reading.labels, reading.values, strict=True))
    assert found["measurement_period_base"] == 60
    assert found["channel_types_2"] == "HUMIDITY"
    assert found["rules_1_parameters_2"] == 10
    assert not {name for name in found if "token" in name or "password" in name or "key" in name or name == "apn"}
    assert (reading.index, reading.metadata["category"], set(reading.metadata["persist"])) == (
        "CONFIG",
        "config",
        {False},
    )
    assert DRIVER.state_of(coap(data, "c")) == {"hash": 77}


def test_zero_degrees_in_device_information() -> None:
    """proto3 sends no zero: a controller at 0 °C says 0, not nothing."""
    data = message(messages.DEVICE_INFO, serial_num=SERIAL, runtime_info={"up_time": 5})
    (reading,) = read(data, "i").readings
    assert dict(zip(reading.labels, reading.values, strict=True))["mcu_temperature"] == 0


@pytest.mark.parametrize(
    ("data", "path"),
    [
        (b"", "m"),
        (b"\xff\xff", "m"),
        (b"{}", "m"),
        (b"", "i"),
        (b"", "c"),
        (measurements(channel("TEMPERATURE", [1]), serial_num=""), "m"),
        (measurements(channel("TEMPERATURE", [1]), serial_num="7f"), "m"),
        (measurements(channel("TEMPERATURE", [1, 2]), measurement_period_base=0), "m"),
        (measurements(channel("TEMPERATURE", [1] * 20_001)), "m"),
        (
            measurements(
                channel("TEMPERATURE", [1] * 100),
                measurement_period_base=2**32 - 1,
                measurement_period_factor=2**32 - 1,
            ),
            "m",
        ),
    ],
)
def test_what_is_no_message_is_poison(data: Any, path: Any) -> None:
    """No serial, no protobuf, no period, samples beyond any calendar: DecodeError."""
    with pytest.raises(DecodeError):
        read(data, path)


def test_message_of_another_device_is_refused() -> None:
    """A message whose serial number is not the device that it came as is no dead letter of class poison."""
    with pytest.raises(Refused, match="it came as 'other'") as caught:
        read(measurements(channel("TEMPERATURE", [1])), device_id="other")
    assert caught.value.reason == "another_device"


# Answers


def test_answer_to_measurements() -> None:
    """With nothing pending, the answer is the time and a request for device information, as the vector has it."""
    reply: Any = DRIVER.reply(coap(measurements()), NOW)
    assert (reply.code, reply.data.hex()) == ("2.01", VECTORS["commands"]["format_response"])
    assert reply.carries is None


@pytest.mark.parametrize("path", ["i", "c"])
def test_answer_to_information_does_not_ask_again(path: Any) -> None:
    """Device information and configuration are answered with an empty 2.05."""
    reply: Any = DRIVER.reply(coap(b"", path), NOW)
    assert (reply.code, reply.data) == ("2.05", b"")


def test_answer_to_time() -> None:
    """A time request is answered with 4 bytes, big endian, and gives no reading."""
    reply: Any = DRIVER.reply(coap(b"", "t"), NOW)
    assert int.from_bytes(reply.data, "big") == int(NOW.timestamp())
    assert len(reply.data) == 4
    assert testing.read(coap(b"", "t", "")).readings == []


@pytest.mark.parametrize("path", ["m", "i", "c"])
def test_pending_configuration_goes_into_the_answer(path: Any) -> None:
    """What is pending goes into the next answer, with the time of that answer, and the answer says what it carries."""
    pending = commands.encode("config", {"transmission_interval": 3600}, NOW)
    later = NOW + timedelta(hours=1)
    reply: Any = DRIVER.reply(coap(b"", path), later, pending)
    sent: Any = messages.CONFIG.FromString(reply.data)
    assert (sent.current_time, sent.transmission_interval) == (int(later.timestamp()), 3600)
    assert (reply.code, reply.carries) == ("2.01", pending)


def test_hash_of_measurements() -> None:
    """The hash of the running configuration is kept from measurements; device information has none."""
    assert DRIVER.state_of(coap(measurements(hash=9))) == {"hash": 9}
    assert DRIVER.state_of(coap(bytes.fromhex(VECTORS["device_info"][0]["hex"]), "i", "282c0242526f")) == {}


def test_readme_shows_the_profile() -> None:
    """The sample configuration in the README is the file."""
    assert readme_shows("efento", "efento")
