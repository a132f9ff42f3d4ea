"""The Fluxor frame: layout, labels, and both directions of its arithmetic.

Layout (little endian): id u32, hw_type u8, reg_typ u16, sen_typ 4 × u8, U set point u16, U hysteresis u8, T set point
u16, T hysteresis u8, four offsets u8, four channels u32; then, with hw_type bit 0 clear, control u16 and status u32
(43 bytes), else a memory address of 8 bytes, control u16 and status u8 (48 bytes). Set points are hundredths, a
hysteresis byte is ``10 × value + 127``, a channel word holds ``100 × °C + 10000`` below and ``100 × %`` above.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

FRAME: Final = struct.Struct("<IBHBBBBHBHB4sIIIIHI")
MEMORY_FRAME: Final = struct.Struct("<IBHBBBBHBHB4sIIII8sHB")
#: hw_type to the T hysteresis: what seldom changes, the same in both; and where it stands in the hexadecimal text.
STATE: Final = struct.Struct("<BHIHBHB")
STATE_DIGITS: Final = slice(8, 8 + 2 * STATE.size)
FRAME_BYTES: Final = FRAME.size
MEMORY_FRAME_BYTES: Final = MEMORY_FRAME.size

HW_MEMORY: Final = 1 << 0
REG_TEMPERATURE: Final = 1 << 2
REG_LIGHT: Final = 1 << 3
REG_STATE: Final = 1 << 14
REG_COMMAND: Final = 1 << 15
SENSOR_TYPE_MASK: Final = 0x1F
SENSOR_REGULATES_T: Final = 1 << 5
SENSOR_REGULATES_U: Final = 1 << 6
SENSOR_EXTERNAL: Final = 1 << 7
# Types that measure temperature and humidity; 0 is no sensor, nothing is known of the others.
CLIMATE_SENSOR_TYPES: Final = frozenset({2, 3})

CONTROL_LABELS: Final = (
    "BIT_REG_U_D",
    "BIT_REG_U_H",
    "BIT_REG_TEC_COOL",
    "BIT_REG_TEC_HEAT",
    "BIT_REG_LIGHT_CTRL1",
    "BIT_REG_LIGHT_PRES1",
    "BIT_REG_LIGHT_CTRL2",
    "BIT_REG_LIGHT_PRES2",
)
CONTROL_REBOOT: Final = 1 << 13
LIGHT_LABELS: Final = (
    "LIGHT_ON_CH1",
    "LIGHT_ON_CH2",
    "LIGHT_OFF_CH1",
    "LIGHT_OFF_CH2",
    "LIGHT_FORCED_CH1",
    "LIGHT_FORCED_CH2",
    "LIGHT_ERR_CH1",
    "LIGHT_ERR_CH2",
)
STATE_LABELS: Final = ("IS_TEC", "IS_LIGHT")
STATUS_LABELS: Final = (
    *(f"BIT_ERROR_I2C_CH{n}_{what}" for n in (1, 2, 3, 4) for what in ("NO_SENSOR", "MES")),
    *(f"BIT_ERROR_CH{n}_{what}" for n in (1, 2, 3, 4) for what in ("CTRL", "FAN")),
    *(f"BIT_ERROR_BASE_BIT_{n}" for n in (0, 1, 2, 3)),
    "BIT_ERROR_BASE",
    "BIT_ERROR_BASE_FAN",
    "BIT_ERROR_FRONTAL",
    "BIT_ERROR_PIOLTE",
    "BIT_ERROR_EXTERNAL_OLED",
    "BIT_ERROR_RTC",
    "BIT_ERROR_SD_CARD",
    "BIT_ERROR_ISM",
    "BIT_ERROR_MODBUS",
    "BIT_ERROR_INTERNAL_FAN",
    "BIT_ERROR_TIME_SYNC",
    "BIT_ERROR_CONSIGNE",
)


def bits(value: int, count: int) -> list[bool]:
    """Return the lowest ``count`` bits of ``value``, bit 0 first."""
    return [bool(value >> n & 1) for n in range(count)]


def lights(control: int) -> list[bool]:
    """Return the values of ``LIGHT_LABELS``: of (ctrl, pres) 1 1 is on, 0 0 off, 0 1 forced, 1 0 an error."""
    channels = [(bool(control >> bit & 1), bool(control >> bit + 1 & 1)) for bit in (4, 6)]
    return [
        pair == state for state in ((True, True), (False, False), (False, True), (True, False)) for pair in channels
    ]


def channel_labels(sen_typ: Sequence[int]) -> tuple[list[int], list[str], list[str], list[str], list[str]]:
    """Return positions, T labels, U labels, T names and U names of the channels that have a climate sensor.

    A label that an earlier channel has already is numbered: the second ``T_ext`` is ``T_ext_2``.
    """
    positions: list[int] = []
    labels: dict[str, list[str]] = {"T": [], "U": []}
    names: dict[str, list[str]] = {"T": [], "U": []}
    counts: dict[str, int] = {}
    for position, kind in enumerate(sen_typ):
        if kind & SENSOR_TYPE_MASK not in CLIMATE_SENSOR_TYPES:
            continue
        positions.append(position)
        for index, regulates in (("T", SENSOR_REGULATES_T), ("U", SENSOR_REGULATES_U)):
            role = "ext" if kind & SENSOR_EXTERNAL else "reg" if kind & regulates else "int"
            label = f"{index}_{role}"
            counts[label] = counts.get(label, 0) + 1
            labels[index].append(label if counts[label] == 1 else f"{label}_{counts[label]}")
            names[index].append(f"CH{position + 1} %name% {role}")
    return positions, labels["T"], labels["U"], names["T"], names["U"]


def hysteresis_byte(value: float) -> int:
    """Return ``10 × value + 127``, rounded; raises ValueError beyond what a byte holds (-12.7 to 12.8)."""
    found = round(value * 10 + 127)
    if not 0 <= found <= 255:
        raise ValueError(f"a hysteresis of {value} does not fit: allowed -12.7 to 12.8")
    return found


def channel_word(temperature: float, humidity: float) -> int:
    """Return the word of a channel that measures °C and %."""
    return (round(temperature * 100) + 10_000 & 0xFFFF) | (round(humidity * 100) & 0xFFFF) << 16


def build_frame(
    device_id: int,
    channels: Sequence[tuple[float, float] | None],
    *,
    sen_typ: Sequence[int] = (0x43, 0x83, 0, 0),
    reg_typ: int = 0x4440,
    humidity_set_point: float = 50.0,
    humidity_hysteresis: float = -0.1,
    temperature_set_point: float = 20.0,
    temperature_hysteresis: float = -0.1,
    control: int = 0,
    status: int = 0,
    memory_address: bytes | None = None,
) -> bytes:
    """Build the frame of a controller as it is sent: hexadecimal digits in ASCII (86, or 96 with a memory address).

    ``channels``: (°C, %) of up to four channels, None for one that measures nothing (its word is 0).
    """
    words = [0 if pair is None else channel_word(*pair) for pair in channels]
    words += [0] * (4 - len(words))
    head = (
        device_id,
        0 if memory_address is None else HW_MEMORY,
        reg_typ,
        *sen_typ,
        round(humidity_set_point * 100),
        hysteresis_byte(humidity_hysteresis),
        round(temperature_set_point * 100),
        hysteresis_byte(temperature_hysteresis),
        b"\x7f\x7f\x7f\x7f",
        *words,
    )
    if memory_address is None:
        return FRAME.pack(*head, control, status).hex().encode()
    return MEMORY_FRAME.pack(*head, memory_address, control, status & 0xFF).hex().encode()
