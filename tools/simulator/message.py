"""What a simulated device sends, and how each message is known again in the store: by (run, device, seq).

Plain JSON carries `run`, `seq` and the sample's time, and each of its values is a row. A Fluxor frame has room for
neither, so both are in fields that look plausible and are stored with index `P`:

==============  ================  ==============================================================
field           wire (hundredths  holds
                or byte)
==============  ================  ==============================================================
`U_consigne`    5000 + low bits   bits 0–9 of seq: 50.00 to 60.23 %, a slow ramp
`T_consigne`    1800 + high bits  bits 10–19 of seq: 18.00 to 28.23 °C, a step each 1024 messages
`U_hysteresys`  128 + low bits    bits 0–5 of the run's tag: 0.1 to 6.4
`T_hysteresys`  128 + high bits   bits 6–11 of the run's tag: 0.1 to 6.4
==============  ================  ==============================================================

A tag is 12 bits of the run's id; two runs of one tag (1 in 4096) are told apart by the time of arrival.
"""

import enum
import hashlib
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

MAX_SEQ = 2**20 - 1
_LOW = 1024
_U_BASE = 5000
_T_BASE = 1800
_HYSTERESIS_BASE = 1


class Outcome(enum.StrEnum):
    """What has to become of an acknowledged message."""

    STORED = "stored"
    DEAD = "dead"
    DROPPED = "dropped"


@dataclass(frozen=True, slots=True)
class Message:
    """One message of one device, ready to be sent.

    `route` is the MQTT topic or the CoAP path, as `protocol` says. `sampled_at` is the time that the device says
    itself, None where its format has none. `rows` is how many rows of `readings` it gives, in `samples` samples. `late`
    says that it is sent after a younger one; `poison` names what is wrong with it.
    """

    device_id: str
    seq: int
    route: str
    payload: bytes
    expect: Outcome = Outcome.STORED
    sampled_at: datetime | None = None
    rows: int = 0
    samples: int = 1
    late: bool = False
    poison: str = ""
    protocol: str = "mqtt"

    @property
    def digest(self) -> str:
        """The payload's fingerprint, by which a dead letter is known whatever its bytes."""
        return digest(self.payload)


def digest(payload: bytes) -> str:
    """Return the first 16 hexadecimal digits of the payload's SHA-256."""
    return hashlib.sha256(payload).hexdigest()[:16]


def run_tag(run: str) -> int:
    """Return the 12 bits of a run's id that a Fluxor frame carries."""
    return int.from_bytes(hashlib.sha256(run.encode()).digest()[:2], "big") & 0xFFF


class SetPoints(NamedTuple):
    """The set points of a Fluxor frame: %, %, °C, °C."""

    humidity: float
    humidity_hysteresis: float
    temperature: float
    temperature_hysteresis: float


def set_points(run: str, seq: int) -> SetPoints:
    """Return the set points that carry the run's tag and `seq`; ValueError above `MAX_SEQ`."""
    if not 0 <= seq <= MAX_SEQ:
        raise ValueError(f"seq {seq} does not fit in a Fluxor frame: allowed 0 to {MAX_SEQ}; begin another run")
    tag = run_tag(run)
    return SetPoints(
        humidity=(_U_BASE + seq % _LOW) / 100,
        humidity_hysteresis=(_HYSTERESIS_BASE + (tag & 63)) / 10,
        temperature=(_T_BASE + seq // _LOW) / 100,
        temperature_hysteresis=(_HYSTERESIS_BASE + (tag >> 6)) / 10,
    )


def tag_and_seq(points: SetPoints) -> tuple[int, int] | None:
    """Return the run's tag and seq that stored set points carry, None where they are not the simulator's."""
    low = round(points.humidity * 100) - _U_BASE
    high = round(points.temperature * 100) - _T_BASE
    tag_low = round(points.humidity_hysteresis * 10) - _HYSTERESIS_BASE
    tag_high = round(points.temperature_hysteresis * 10) - _HYSTERESIS_BASE
    if not (0 <= low < _LOW and 0 <= high < _LOW and 0 <= tag_low < 64 and 0 <= tag_high < 64):
        return None
    return tag_high << 6 | tag_low, high * _LOW + low
