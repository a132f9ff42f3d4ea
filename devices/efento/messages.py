"""The messages of Efento devices as field tables, and what each measurement type measures.

``MEASUREMENTS``, ``DEVICE_INFO`` and ``CONFIG`` are the message classes of the paths ``/m``, ``/i`` and ``/c``.
``TYPES`` maps a type's number to its :class:`MeasurementType`; ``PAIRS`` the number of a minor accumulating type to
its major and how many of the smaller unit make one of the larger.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from devices import protobuf

Kind = Literal["continuous", "binary", "calibrated"]


@dataclass(frozen=True, slots=True)
class MeasurementType:
    """``divisor``: raw numbers are so many to one unit (resolution 0.1 is 10). ``calibrated``: a third is the value,
    the remainder the state of calibration. ``divided_by``: of accumulating types, what takes the state off the raw
    number."""

    number: int
    name: str
    unit: str
    divisor: int
    kind: Kind = "continuous"
    divided_by: int = 1

    @property
    def index(self) -> str:
        """The index of its readings."""
        return _INDEXES.get(self.name, self.name)


_INDEXES: Final = {"TEMPERATURE": "T", "HUMIDITY": "U", "HUMIDITY_ACCURATE": "U"}


def _types(*rows: MeasurementType) -> dict[int, MeasurementType]:
    return {row.number: row for row in rows}


_M = MeasurementType
NO_SENSOR: Final = 0
TYPES: Final[Mapping[int, MeasurementType]] = _types(
    _M(1, "TEMPERATURE", "°C", 10),
    _M(2, "HUMIDITY", "% RH", 1),
    _M(3, "ATMOSPHERIC_PRESSURE", "hPa", 10),
    _M(4, "DIFFERENTIAL_PRESSURE", "Pa", 1),
    _M(5, "OK_ALARM", "", 1, "binary"),
    _M(6, "IAQ", "IAQ", 1, "calibrated"),
    _M(7, "FLOODING", "", 1, "binary"),
    _M(8, "PULSE_CNT", "NB", 1),
    _M(9, "ELECTRICITY_METER", "Wh", 1),
    _M(10, "WATER_METER", "l", 1),
    _M(11, "SOIL_MOISTURE", "kPa", 1),
    _M(12, "CO_GAS", "ppm", 1),
    _M(13, "NO2_GAS", "ppm", 1),
    _M(14, "H2S_GAS", "ppm", 100),
    _M(15, "AMBIENT_LIGHT", "lx", 10),
    _M(16, "PM_1_0", "µg/m^3", 1),
    _M(17, "PM_2_5", "µg/m^3", 1),
    _M(18, "PM_10_0", "µg/m^3", 1),
    _M(19, "NOISE_LEVEL", "dB", 10),
    _M(20, "NH3_GAS", "ppm", 1),
    _M(21, "CH4_GAS", "ppm", 1),
    _M(22, "HIGH_PRESSURE", "kPa", 1),
    _M(23, "DISTANCE_MM", "mm", 1),
    _M(24, "WATER_METER_ACC_MINOR", "l", 1, divided_by=6),
    _M(25, "WATER_METER_ACC_MAJOR", "hl", 1, divided_by=4),
    _M(26, "CO2_GAS", "ppm", 1),
    _M(27, "HUMIDITY_ACCURATE", "% RH", 10),
    _M(28, "STATIC_IAQ", "sIAQ", 1, "calibrated"),
    _M(29, "CO2_EQUIVALENT", "ppm", 1, "calibrated"),
    _M(30, "BREATH_VOC", "ppm", 1, "calibrated"),
    _M(31, "CELLULAR_GATEWAY", "", 1),
    _M(32, "PERCENTAGE", "%", 100),
    _M(33, "VOLTAGE", "mV", 10),
    _M(34, "CURRENT", "mA", 100),
    _M(35, "PULSE_CNT_ACC_MINOR", "NB", 1, divided_by=6),
    _M(36, "PULSE_CNT_ACC_MAJOR", "kNB", 1, divided_by=4),
    _M(37, "ELEC_METER_ACC_MINOR", "Wh", 1, divided_by=6),
    _M(38, "ELEC_METER_ACC_MAJOR", "kWh", 1, divided_by=4),
    _M(39, "PULSE_CNT_ACC_WIDE_MINOR", "NB", 1, divided_by=6),
    _M(40, "PULSE_CNT_ACC_WIDE_MAJOR", "MNB", 1, divided_by=4),
    _M(41, "CURRENT_PRECISE", "mA", 1000),
    _M(42, "OUTPUT_CONTROL", "", 1, "binary"),
    _M(43, "RESISTANCE", "Ohm", 1),
)
BY_NAME: Final[Mapping[str, MeasurementType]] = {kind.name: kind for kind in TYPES.values()}


@dataclass(frozen=True, slots=True)
class Pair:
    """A counter that is sent in two channels. ``weight``: so many of the minor's unit make one of the major's."""

    index: str
    unit: str
    major: int
    weight: int


PAIRS: Final[Mapping[int, Pair]] = {
    24: Pair("WATER_METER_ACC", "l", 25, 100),
    35: Pair("PULSE_CNT_ACC", "NB", 36, 1_000),
    37: Pair("ELEC_METER_ACC", "Wh", 38, 1_000),
    39: Pair("PULSE_CNT_ACC_WIDE", "NB", 40, 1_000_000),
}

_ENUMS: Final = {
    "MeasurementType": "NO_SENSOR = 0;" + "".join(f"{kind.name} = {kind.number};" for kind in TYPES.values()),
    "ModemType": "MODEM_TYPE_UNSPECIFIED = 0; MODEM_TYPE_BC66 = 1; MODEM_TYPE_BC66NA = 2; MODEM_TYPE_BC660 = 4",
    "ModemFirmwareVersion": """
        MODEM_FIRMWARE_VERSION_UNSPECIFIED = 0; MODEM_FIRMWARE_VERSION_READING_ERROR = 1;
        MODEM_FIRMWARE_VERSION_UNKNOWN = 2; MODEM_FIRMWARE_VERSION_BC660_V1 = 3; MODEM_FIRMWARE_VERSION_BC660_V2 = 4;
        MODEM_FIRMWARE_VERSION_BC660_V3 = 5; MODEM_FIRMWARE_VERSION_BC660_V4 = 6; MODEM_FIRMWARE_VERSION_BC660_V5 = 7;
        MODEM_FIRMWARE_VERSION_BC660_V6 = 8""",
    "BleAdvertisingPeriodMode": """
        BLE_ADVERTISING_PERIOD_MODE_UNSPECIFIED = 0; BLE_ADVERTISING_PERIOD_MODE_DEFAULT = 1;
        BLE_ADVERTISING_PERIOD_MODE_NORMAL = 2; BLE_ADVERTISING_PERIOD_MODE_FAST = 3""",
    "Condition": """
        CONDITION_UNSPECIFIED = 0; CONDITION_DISABLED = 1; CONDITION_HIGH_THRESHOLD = 2; CONDITION_LOW_THRESHOLD = 3;
        CONDITION_DIFF_THRESHOLD = 4; CONDITION_BINARY_CHANGE_STATE = 5; CONDITION_LOGIC_OPERATOR = 6;
        CONDITION_ON_MEASUREMENT = 7; CONDITION_HIGH_THRESHOLD_DUAL_CHANNEL = 8;
        CONDITION_LOW_THRESHOLD_DUAL_CHANNEL = 9; CONDITION_DIFF_THRESHOLD_DUAL_CHANNEL = 10""",
    "Action": """
        ACTION_UNSPECIFIED = 0; ACTION_TRIGGER_TRANSMISSION = 1; ACTION_NO_ACTION = 2;
        ACTION_TRIGGER_TRANSMISSION_WITH_ACK = 3; ACTION_FAST_ADVERTISING_MODE = 4""",
    "CalendarType": "CALENDAR_TYPE_UNSPECIFIED = 0; CALENDAR_TYPE_DISABLED = 1; CALENDAR_TYPE_WEEK = 2",
}

_MESSAGES: Final = {
    "Channel": """
        MeasurementType type = 1; int32 timestamp = 2; sint32 start_point = 4; repeated sint32 sample_offsets = 5""",
    "Measurements": """
        bytes serial_num = 1; bool battery_status = 2; uint32 measurement_period_base = 3; repeated Channel channels =
        4; uint32 next_transmission_at = 5; uint32 transfer_reason = 6; uint32 measurement_period_factor = 8;
        uint32 hash = 9; string cloud_token = 16""",
    "Runtime": """
        uint32 up_time = 1; repeated uint32 message_counters = 2; sint32 mcu_temperature = 3;
        uint32 min_battery_voltage = 4; sint32 min_battery_mcu_temperature = 5; uint32 battery_reset_timestamp = 6;
        sint32 max_mcu_temperature = 7; sint32 min_mcu_temperature = 8; repeated uint32 runtime_errors = 9;
        uint32 reset_counter = 10""",
    "Modem": """
        ModemType type = 1; repeated sint32 parameters = 2; string sim_card_identification = 3;
        ModemFirmwareVersion firmware_version = 4""",
    "UpdateInfo": "uint32 timestamp = 1; uint32 status = 2",
    "DeviceInfo": """
        bytes serial_num = 1; uint32 sw_version = 3; Runtime runtime_info = 13; Modem modem = 14; string commit_id = 15;
        string cloud_token = 16; repeated uint32 memory_statistics = 17; UpdateInfo last_update_info = 18""",
    "OutputControlState": "uint32 channel_index = 1; uint32 channel_state = 2",
    "CalibrationParameters": """
        uint32 calibration_request = 1; uint32 channel_assignment = 2; repeated int32 parameters = 3""",
    "NetworkSearch": """
        repeated uint32 time_schema_last_registration_ok = 1; repeated uint32 time_schema_last_registration_not_ok = 2;
        uint32 disable_period_base = 3; uint32 counter_max = 4""",
    "BleAdvertisingPeriod": "BleAdvertisingPeriodMode mode = 1; uint32 normal = 2; uint32 fast = 3",
    "Calendar": "uint32 rule_mask = 1; repeated sint32 parameters = 2; CalendarType type = 3",
    "Rule": "uint32 channel_mask = 1; Condition condition = 2; repeated sint32 parameters = 3; Action action = 4",
    "Config": """
        uint32 measurement_period_base = 2; uint32 transmission_interval = 3; uint32 ble_turnoff_time = 4;
        uint32 ack_interval = 5; bool request_device_info = 6; bool request_fw_update = 7; uint32 current_time = 8;
        uint32 transfer_limit = 9; uint32 transfer_limit_timer = 10; string data_server_ip = 11;
        uint32 data_server_port = 12; string update_server_ip = 13; uint32 update_server_port_udp = 14;
        uint32 update_server_port_coap = 15; string apn = 16; uint32 plmn_selection = 17;
        uint32 disable_modem_request = 18; bool request_configuration = 19; repeated uint32 errors = 20;
        uint32 hash = 21; bool accept_without_testing = 22; uint32 cloud_token_config = 23; string cloud_token = 24;
        bytes serial_number = 25; uint32 measurement_period_factor = 26; repeated MeasurementType channel_types = 27;
        repeated Rule rules = 28; uint32 supervision_period = 29; bool memory_reset_request = 30;
        uint32 modem_bands_mask = 31; string data_endpoint = 32; string configuration_endpoint = 33;
        string device_info_endpoint = 34; string time_endpoint = 35; uint32 ble_tx_power_level = 36;
        bool request_runtime_errors_clear = 37; uint32 error_timestamp = 38; uint32 hash_timestamp = 39;
        uint32 cloud_token_coap_option = 40; uint32 payload_signature_coap_option = 41; repeated uint32 dns_server_ip
        = 42; uint32 dns_ttl_config = 43; sint32 payload_split_info = 44; string modem_update_request = 45;
        repeated uint32 cellular_config_params = 46; repeated Calendar calendars = 47;
        CalibrationParameters calibration_parameters_request = 49; repeated uint32 led_config = 50;
        uint32 network_troubleshooting = 51; bytes encryption_key = 54; string apn_user_name = 55;
        string apn_password = 56; NetworkSearch network_search = 57;
        repeated OutputControlState output_control_state_request = 58; BleAdvertisingPeriod ble_advertising_period =
        59""",
}

_classes = protobuf.build("headrace.efento", _MESSAGES, _ENUMS)
MEASUREMENTS: Final = _classes["Measurements"]
DEVICE_INFO: Final = _classes["DeviceInfo"]
CONFIG: Final = _classes["Config"]

# A text or bytes field with this one character says "not set".
NOT_SET: Final = "\x7f"
# What a device or an operator keeps to himself; it never becomes a reading.
SECRETS: Final = frozenset({"cloud_token", "encryption_key", "apn_user_name", "apn_password"})

TRANSFER_REASONS: Final[Mapping[int, str]] = {
    0: "reset",
    1: "button",
    2: "ble",
    **{bit: f"retry_{bit - 2}" for bit in range(3, 8)},
    **{bit: f"rule_{bit - 7}" for bit in range(8, 20)},
    20: "limit_end",
}


def transfer_reasons(bits: int) -> list[str]:
    """Return the names of the reasons for which a device sent."""
    return [name for bit, name in TRANSFER_REASONS.items() if bits >> bit & 1]


def version_text(sw_version: int) -> str:
    """Return the version as the maker writes it: 1546 is 06.10."""
    return f"{sw_version >> 8:02d}.{sw_version & 0xFF:02d}"
