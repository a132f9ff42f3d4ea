"""Commands of Efento devices: configuration messages byte for byte, alarms as rules, mistakes pointed at."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from devices.efento import messages
from devices.efento.driver import EfentoDriver
from devices.model import CommandError

VECTORS = json.loads(Path(__file__).with_name("vectors.json").read_text())
NOW = datetime.fromtimestamp(VECTORS["commands"]["current_time"], UTC)
DRIVER = EfentoDriver()


def encode(kind: Any, payload: Any) -> Any:
    sent = DRIVER.encode(kind, payload, request_id="r", device_id="282c02424eed", state={}, now=NOW)
    return sent.data, messages.CONFIG.FromString(sent.data)


def test_refresh_config_is_the_vector() -> None:
    """A refresh asks for the configuration, byte for byte as the vector."""
    assert encode("refresh_config", {})[0].hex() == VECTORS["commands"]["refresh_config"]
    assert encode("device_info_request", {})[0].hex() == VECTORS["commands"]["format_response"]


def test_config_takes_any_field_by_name() -> None:
    """Fields go out as they are named: numbers, texts, bytes as hexadecimal, enums by name, inner messages, lists."""
    _, sent = encode(
        "config",
        {
            "transmission_interval": 3600,
            "apn": "iot",
            "encryption_key": "00ff",
            "payload_split_info": -5,
            "dns_server_ip": [8, 8, 8, 0],
            "rules": [{"channel_mask": 3, "condition": "CONDITION_ON_MEASUREMENT", "parameters": [0, -1]}],
            "ble_advertising_period": {"mode": "BLE_ADVERTISING_PERIOD_MODE_FAST", "fast": 160},
        },
    )
    assert (sent.transmission_interval, sent.apn, sent.encryption_key) == (3600, "iot", b"\x00\xff")
    assert (sent.payload_split_info, list(sent.dns_server_ip)) == (-5, [8, 8, 8, 0])
    assert (sent.rules[0].condition, list(sent.rules[0].parameters)) == (7, [0, -1])
    assert (sent.ble_advertising_period.mode, sent.ble_advertising_period.fast) == (3, 160)
    assert (sent.current_time, sent.request_device_info) == (int(NOW.timestamp()), True)


@pytest.mark.parametrize("seconds", [1, 60, 600, 900, 65_535, 65_536, 86_400, 131_070])
def test_measurement_period_is_split(seconds: Any) -> None:
    """Base × factor is the period, and both fit."""
    _, sent = encode("config", {"measurement_period": seconds})
    assert sent.measurement_period_base * sent.measurement_period_factor == seconds
    assert sent.measurement_period_base <= 65_535


@pytest.mark.parametrize(
    ("kind", "payload", "pointer"),
    [
        ("config", {}, "/payload"),
        ("config", {"colour": 1}, "/payload"),
        ("config", {"transmission_interval": -1}, "/payload/transmission_interval"),
        ("config", {"transmission_interval": 0}, "/payload/transmission_interval"),
        ("config", {"encryption_key": "xyz"}, "/payload/encryption_key"),
        ("config", {"current_time": 5}, "/payload"),
        ("config", {"rules": [{"condition": "NEVER"}]}, "/payload/rules/0/condition"),
        ("config", {"measurement_period": 6_553_499}, "/payload/measurement_period"),
        ("alarm", {"channel": 1}, "/payload"),
        (
            "alarm",
            {"channel": 0, "field_label": "TEMPERATURE", "math_operator": ">", "level": "info"},
            "/payload/channel",
        ),
        (
            "alarm",
            {"channel": 1, "field_label": "TEMPERATURE", "math_operator": ">", "level": "info"},
            "/payload/threshold",
        ),
        (
            "alarm",
            {"channel": 1, "field_label": "OK_ALARM", "math_operator": ">", "threshold": 1, "level": "info"},
            "/payload/math_operator",
        ),
        ("reboot", {}, "/command_type"),
    ],
)
def test_wrong_command_is_pointed_at(kind: Any, payload: Any, pointer: Any) -> None:
    """What a command has wrong is named by a JSON pointer."""
    with pytest.raises(CommandError) as caught:
        encode(kind, payload)
    assert caught.value.pointer == pointer


@pytest.mark.parametrize(
    ("fields", "condition", "parameters"),
    [
        ({"field_label": "TEMPERATURE", "math_operator": ">", "threshold": 25.5}, 2, [255, 10, 1, 1, 1]),
        (
            {"field_label": "TEMPERATURE", "math_operator": ">=", "threshold": 25.5, "hysteresis": 0.5},
            2,
            [255, 5, 1, 1, 1],
        ),
        ({"field_label": "HUMIDITY", "math_operator": "<", "threshold": 30}, 3, [30, 2, 1, 1, 2]),
        ({"field_label": "HUMIDITY_ACCURATE", "math_operator": "<=", "threshold": 30}, 3, [300, 20, 1, 1, 27]),
        ({"field_label": "ATMOSPHERIC_PRESSURE", "math_operator": "<", "threshold": 990}, 3, [9900, 50, 1, 1, 3]),
        ({"field_label": "CO2_GAS", "math_operator": ">", "threshold": 1000}, 2, [1000, 50, 1, 1, 26]),
        ({"field_label": "CO_GAS", "math_operator": ">", "threshold": 5}, 2, [5, 1, 1, 1, 12]),
        ({"field_label": "TEMPERATURE", "math_operator": "<", "threshold": -20}, 3, [-200, 10, 1, 1, 1]),
        (
            {
                "field_label": "TEMPERATURE",
                "math_operator": "diff",
                "threshold": 2,
                "triggering_mode": 2,
                "num_measurements": 3,
            },
            4,
            [20, 2, 3, 1],
        ),
        ({"field_label": "OK_ALARM", "math_operator": "change"}, 5, []),
        ({"field_label": "FLOODING", "math_operator": "==", "threshold": 1}, 5, []),
        ({"field_label": "TEMPERATURE", "math_operator": "!=", "threshold": 1}, 5, []),
        ({"field_label": "TEMPERATURE", "math_operator": ">", "threshold": 1, "active": False}, 1, []),
    ],
)
def test_alarm(fields: Any, condition: Any, parameters: Any) -> None:
    """An alarm is one rule, its threshold and hysteresis in steps of the type's resolution."""
    _, sent = encode("alarm", {"channel": 3, "level": "warning", **fields})
    (rule,) = sent.rules
    assert (rule.channel_mask, rule.condition, list(rule.parameters)) == (0b100, condition, parameters)
    assert sent.ack_interval == 0xFFFFFFFF
    assert (sent.current_time, sent.request_device_info) == (int(NOW.timestamp()), True)


@pytest.mark.parametrize(("level", "action"), [("critical", 3), ("CRITICAL", 3), ("warning", 1), ("info", 4)])
def test_alarm_level_is_an_action(level: Any, action: Any) -> None:
    """How urgent an alarm is decides how the device sends it."""
    _, sent = encode("alarm", {"channel": 1, "field_label": "OK_ALARM", "math_operator": "change", "level": level})
    assert sent.rules[0].action == action


@pytest.mark.parametrize(
    ("kind", "before", "after", "known"),
    [
        ("config", {"hash": 7}, {"hash": 8}, True),
        ("alarm", {"hash": 7}, {"hash": 8}, True),
        ("config", {"hash": 7}, {"hash": 7}, False),
        ("config", {}, {"hash": 8}, False),
        ("config", {"hash": 0}, {"hash": 8}, False),
        ("config", {"hash": 7}, {"hash": 0}, False),
        ("device_info_request", {"hash": 7}, {"hash": 8}, False),
    ],
)
def test_another_hash_is_another_configuration(kind: Any, before: Any, after: Any, known: Any) -> None:
    """A hash that has changed tells that a command which changes the configuration has arrived; 0 is no hash."""
    assert bool(EfentoDriver().applied(kind, before, after)) is known
