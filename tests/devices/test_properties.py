"""No bytes crash, hang or blow up a driver: DecodeError is all that ever comes out, and what comes out else is
sound."""

import json
import math
from datetime import UTC, timedelta
from pathlib import Path
from typing import Any

import cbor2
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from devices import testing
from devices.driver import MAX_READINGS
from devices.efento import messages
from devices.efento.driver import EfentoDriver
from devices.fluxor import frame
from devices.fluxor.driver import FluxorDriver
from devices.light_controller import schedule
from devices.light_controller.driver import LightControllerDriver
from devices.model import DecodeError, Reading
from devices.registry import DRIVERS, driver_class
from devices.testing import table, uplink
from devices.validation import MAX_AHEAD, validate

ROUTES = {
    "cbor_map": ["cbor/d1"],
    "efento": ["m", "i", "c", "t", "x/m"],
    "fluxor": ["broker_data/7/2261001/data", "broker_data/7/feedback", "", "data"],
    "light_controller": ["broker_data/7/2121004/scheduler_data", "broker_data/7/feedback"],
    "plain_json": ["devices/d1/telemetry"],
    "senml": ["senml/d1"],
    "sparkplug": ["spBv1.0/G/NBIRTH/N", "spBv1.0/G/DDATA/N/D", "spBv1.0/G/NDEATH/N", "spBv1.0/G/X/N", ""],
    "tts": ["v3/a/devices/d1/up", "v3/a/devices/d1/down/ack"],
    "zigbee2mqtt": ["zigbee2mqtt/d1", "zigbee2mqtt/d1/availability"],
}
DEVICES = {"fluxor": "2261001", "light_controller": "2121004", "efento": "", "sparkplug": "G/N"}


def samples(family: Any) -> Any:
    """Messages that a family's vectors hold, whatever form they are in there."""
    found = []

    def walk(node: Any) -> Any:
        if isinstance(node, dict):
            for key, value in node.items():
                if key in ("hex", "format_response", "refresh_config") and isinstance(value, str):
                    found.append(value.encode() if family == "light_controller" else bytes.fromhex(value))
                elif key == "mqtt_payload_ascii_hex":
                    found.append(value.encode())
                elif key in ("payload", "json", "uplink"):
                    found.append(value.encode() if isinstance(value, str) else json.dumps(value).encode())
                walk(value)
        elif isinstance(node, list):
            for item in node:
                walk(item)

    walk(json.loads((Path("devices") / family / "vectors.json").read_text(encoding="utf-8")))
    return found


SAMPLES = {family: samples(family) for family in DRIVERS}

edits = st.lists(st.tuples(st.integers(0, 400), st.sampled_from("rid"), st.binary(max_size=4)), max_size=6)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["ts", "timestamp", "n", "v", "bn", "t", "u", "vs", "bver", "x", "last_seen", "state"]),
            inner,
        )
    ),
    max_leaves=12,
)


@st.composite
def payloads(draw: Any, family: Any) -> Any:
    """Random bytes, damaged real messages, and structures of the family's format with the wrong things in them."""
    kind = draw(st.integers(0, 3))
    if kind == 0:
        return draw(st.binary(max_size=120))
    if kind == 1:
        value = draw(json_values)
        if draw(st.booleans()):
            return cbor2.dumps(value)
        return json.dumps(value, default=lambda raw: raw.hex()).encode()
    data = bytearray(draw(st.sampled_from(SAMPLES[family])))
    for position, what, new in draw(edits):
        at = position % (len(data) + 1)
        if what == "r":
            data[at : at + len(new)] = new
        elif what == "i":
            data[at:at] = new
        else:
            del data[at : at + len(new)]
    return bytes(data)


def sound(readings: Any, family: Any) -> Any:
    assert len(readings) <= MAX_READINGS
    for reading in readings:
        assert len(reading.values) == len(reading.labels) == len(reading.display_names)
        assert len(reading.metadata["units"]) == len(reading.metadata["persist"]) == len(reading.values)
        assert len(set(reading.labels)) == len(reading.labels)
        assert reading.timestamp.tzinfo is not None
        assert reading.timestamp.astimezone(UTC).tzinfo is UTC
        assert reading.metadata["profile"] == family
        for value in reading.values:
            assert value is None or type(value) in (int, float, bool, str)


@pytest.mark.parametrize("family", sorted(DRIVERS))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_only_decode_errors_come_out(family: Any, data: Any) -> None:
    """Whatever the bytes: readings that are sound, or DecodeError; and so for all else that a driver does with an
    uplink."""
    driver = driver_class(family)()
    profile = testing.shipped_profile(family) if family not in PROFILES else PROFILES[family]
    PROFILES[family] = profile
    payload = data.draw(payloads(family))
    for route in ROUTES[family]:
        protocol = "coap" if family == "efento" else "mqtt"
        message = uplink(payload, route, protocol=protocol, device_id=DEVICES.get(family, "d1"))
        try:
            readings = driver.decode(message, profile)
        except DecodeError:
            readings = []
        sound(readings, family)
        checked = validate(readings, profile, message.received_at)
        sound(checked.readings, family)
        for reading in checked.readings:
            assert reading.timestamp <= message.received_at + MAX_AHEAD
            assert all(not isinstance(v, float) or math.isfinite(v) for v in reading.values)
            again = msgspec.json.decode(msgspec.json.encode(reading), type=Reading)
            assert (again.values, again.labels, again.index) == (reading.values, reading.labels, reading.index)
        for ask in (driver.device_id, driver.feedback, driver.state_of):
            try:
                told = ask(message)
            except DecodeError:
                continue
            msgspec.json.encode(told)
        reply = driver.reply(message, testing.NOW)
        assert reply is None or reply.code in ("2.01", "2.05")


PROFILES = {}


@pytest.mark.parametrize("family", sorted(DRIVERS))
@pytest.mark.parametrize(
    "payload",
    [
        b"[" * 1_000_000,
        b'{"a":' * 200_000,
        b"\x81" * 1_000_000,
        b"\xa1\x01" * 500_000,
        b"9" * 1_000_000,
        b"f" * 1_000_000,
        b"\xff" * 1_000_000,
        b"\x00" * 1_000_000,
        b"\x0a\x00" * 500_000,
        b"\x22\x02\x08\x01" * 250_000,
        b"\x12\x02\x0a\x00" * 250_000,
        b"[" + b'{"n":"a","v":1},' * 60_000 + b'{"n":"a","v":1}]',
        json.dumps({f"k{n}": n for n in range(60_000)}).encode(),
        json.dumps({"x" * 1_000_000: 1}).encode(),
        cbor2.dumps([{0: "a", 2: n} for n in range(60_000)]),
    ],
    ids=lambda p: repr(p[:12]),
)
def test_a_megabyte_of_malice(family: Any, payload: Any) -> None:
    """The largest message that the edge lets in, made to hurt: DecodeError or a bounded number of readings."""
    driver = driver_class(family)()
    profile = testing.shipped_profile(family)
    for route in ROUTES[family]:
        message = uplink(payload, route, device_id=DEVICES.get(family, "d1"))
        try:
            readings = driver.decode(message, profile)
        except DecodeError:
            continue
        assert len(readings) <= MAX_READINGS
        validate(readings, profile, message.received_at)


set_points = st.decimals(0, 100, places=2).map(float)
hysteresis = st.decimals(-12, 12, places=1).map(float)
STATE = {
    "broker_id": "7",
    "command_topic": "broker_data/7/command",
    "hw_type": 0,
    "reg_typ": 0x4444,
    "sen_typ": 0x43,
    **dict.fromkeys(("U_consigne", "T_consigne"), 0),
    **dict.fromkeys(("U_hysteresys", "T_hysteresys"), 127),
}


@given(set_points, hysteresis, set_points, hysteresis, st.booleans())
def test_fluxor_configuration_round_trip(u: Any, u_hysteresis: Any, t: Any, t_hysteresis: Any, state: Any) -> None:
    """What a configuration sends, a frame with these numbers says."""
    wanted = {"U_consigne": u, "U_hysteresys": u_hysteresis, "T_consigne": t, "T_hysteresys": t_hysteresis}
    driver = FluxorDriver()
    sent = msgspec.json.decode(
        driver.encode(
            "config", {**wanted, "reg_type_state": state}, request_id="r", device_id="9", state=STATE, now=testing.NOW
        ).data
    )
    numbers = [sent[name] for name in ("U_consigne", "U_hysteresys", "T_consigne", "T_hysteresys")]
    raw = frame.FRAME.pack(9, 0, sent["reg_type"], 0, 0, 0, 0, *numbers, bytes(sent["offsets"]), 0, 0, 0, 0, 0, 0)
    message = uplink(raw.hex(), "broker_data/7/9/data", device_id="9")
    found = table(driver.decode(message, testing.shipped_profile("fluxor")))["P"]
    assert found == {**wanted, "reg_type_state": state}


@given(
    st.fixed_dictionaries(
        {
            "task_id": st.integers(0, 15),
            "time_beg": st.integers(0, 1439),
            "duration": st.integers(0, 1440),
            "day": st.integers(0, 7),
            "channel": st.integers(0, 1),
            "active": st.booleans(),
            "run_once": st.booleans(),
        }
    )
)
def test_light_task_round_trip(payload: Any) -> None:
    """The task that a command sends is the task that a message with these words carries."""
    driver = LightControllerDriver()
    sent = msgspec.json.decode(
        driver.encode("light_config_task", payload, request_id="r", device_id="9", state=STATE, now=testing.NOW).data
    )
    raw = schedule.FRAME.pack(9, sent["epoch"], sent["sync_header"], sent["sync_alarm"])
    message = uplink(raw.hex(), "broker_data/7/9/scheduler_data", device_id="9")
    (reading,) = driver.decode(message, testing.shipped_profile("light_controller"))
    found = table([reading])[f"TASK_{payload['task_id']}"]
    assert found == {"operation": "create", **{k: v for k, v in payload.items() if k != "task_id"}}
    assert reading.timestamp == testing.NOW


scalars = st.fixed_dictionaries(
    {},
    optional={
        "transmission_interval": st.integers(1, 2**32 - 1),
        "payload_split_info": st.integers(-(2**31), 2**31 - 1).filter(bool),
        "apn": st.text(min_size=1, max_size=20),
        "request_fw_update": st.just(True),
        "dns_server_ip": st.lists(st.integers(0, 255), min_size=4, max_size=4),
        "measurement_period": st.integers(1, 65_535),
        "channel_types": st.lists(st.sampled_from(sorted(messages.BY_NAME)), min_size=1, max_size=6),
        "network_search": st.just({"counter_max": 5}),
    },
).filter(bool)


@given(scalars)
def test_efento_configuration_round_trip(payload: Any) -> None:
    """Every field of a configuration arrives as it was named, with the time and nothing else."""
    data = EfentoDriver().encode("config", payload, request_id="r", device_id="aa", state={}, now=testing.NOW).data
    sent = messages.CONFIG.FromString(data)
    for name, value in payload.items():
        if name == "measurement_period":
            assert sent.measurement_period_base * sent.measurement_period_factor == value
        elif name == "channel_types":
            assert [messages.TYPES[number].name for number in sent.channel_types] == value
        elif name == "network_search":
            assert sent.network_search.counter_max == 5
        elif isinstance(value, list):
            assert list(getattr(sent, name)) == value
        else:
            assert getattr(sent, name) == value
    extra = 2 + ("measurement_period" in payload)
    assert len(sent.ListFields()) == len(payload) + extra


@given(st.integers(1, 2**31 - 1), st.lists(st.integers(-1000, 30_000), min_size=1, max_size=60), st.integers(1, 3600))
def test_efento_samples_round_trip(at: Any, offsets: Any, period: Any) -> None:
    """Samples come back at their times, in their steps, for any start."""
    built = messages.MEASUREMENTS()
    built.serial_num, built.measurement_period_base, built.measurement_period_factor = b"\xaa", period, 1
    channel = built.channels.add()
    channel.type, channel.timestamp, channel.start_point = 1, at, 5
    channel.sample_offsets.extend(offsets)
    message = uplink(built.SerializeToString(), "m", protocol="coap", device_id="aa")
    readings = EfentoDriver().decode(message, testing.shipped_profile("efento"))
    assert [r.values[0] for r in readings] == [(5 + offset) / 10 for offset in offsets]
    first = readings[0].timestamp
    assert [r.timestamp - first for r in readings] == [timedelta(seconds=n * period) for n in range(len(offsets))]
    assert int(first.timestamp()) == at
