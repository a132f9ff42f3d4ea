"""The simulated devices: what they measure, and the bytes that they send.

A device is a generator of messages: `next(at)` gives the message after the last one, sampled at `at`. All that is
random in it comes from a generator of its own, seeded by the fleet's seed and the device's number: the same seed gives
the same values, message by message, whatever the clock says.
"""

import abc
import dataclasses
import json
import math
import random
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar

from google.protobuf.message import DecodeError

from devices.efento.messages import CONFIG, MEASUREMENTS
from devices.fluxor import frame
from tools.simulator.message import MAX_SEQ, Message, Outcome, run_tag, set_points

__all__ = ["Device", "Efento", "Fluxor", "HotFluxor", "Json", "Meter", "Tank", "Weather", "Yard"]


class Device(abc.ABC):
    """One device of a run; `device_id` is the same in every run of a seed."""

    family: ClassVar[str]
    # Whether a message says when it was sampled: only then is a second delivery the same row.
    own_time: ClassVar[bool]

    def __init__(self, run: str, seed: int, number: int) -> None:
        self.run = run
        self.number = number
        self.rng = random.Random(f"{seed}/{self.family}/{number}")
        self.phase = self.rng.uniform(0, math.tau)
        self.device_id = self._device_id(seed, number)
        self._seq = -1

    @abc.abstractmethod
    def _device_id(self, seed: int, number: int) -> str: ...

    @property
    @abc.abstractmethod
    def route(self) -> str:
        """The MQTT topic of its messages."""

    @abc.abstractmethod
    def next(self, at: datetime) -> Message:
        """Return the next message, sampled at `at` or, where two would coincide, a moment later."""

    def answered(self, payload: bytes) -> None:
        """Take what an answer over CoAP holds, on the network's thread; most devices make nothing of it."""
        del payload

    def take_seq(self) -> int:
        """Return the next sequence number, from 0."""
        if self._seq >= MAX_SEQ:
            raise ValueError(f"device {self.device_id} has sent {MAX_SEQ + 1} messages in this run; begin another run")
        self._seq += 1
        return self._seq

    def wave(self, at: datetime, mean: float, swing: float, noise: float) -> float:
        """Return a value that goes up and down over ten minutes, with noise."""
        turn = math.sin(at.timestamp() * math.tau / 600 + self.phase)
        return mean + swing * turn + self.rng.gauss(0, noise)


def _leaves(value: Any) -> int:
    """Return how many rows a JSON object's fields give; nulls and lists give none."""
    if isinstance(value, dict):
        return sum(_leaves(item) for item in value.values())
    return 0 if value is None or isinstance(value, list) else 1


class Json(Device):
    """A device of plain JSON; `fields` says what it measures."""

    own_time = True
    # Milliseconds are what the coarsest of the ways to write a time has.
    step: ClassVar[timedelta] = timedelta(milliseconds=1)
    time_field: ClassVar[str] = "timestamp"

    def __init__(self, run: str, seed: int, number: int) -> None:
        super().__init__(run, seed, number)
        self._last = datetime.fromtimestamp(0, UTC)

    def _device_id(self, seed: int, number: int) -> str:
        return f"{self.family}-{seed}-{number:04d}"

    @property
    def route(self) -> str:
        """`devices/{device_id}/telemetry`."""
        return f"devices/{self.device_id}/telemetry"

    def sample_time(self, at: datetime) -> datetime:
        """Return `at` on whole milliseconds, and later than every sample before it."""
        self._last = max(self._last + self.step, at.replace(microsecond=at.microsecond // 1000 * 1000))
        return self._last

    @abc.abstractmethod
    def fields(self, at: datetime) -> dict[str, Any]:
        """Return what it measures."""

    def sample(self, seq: int, at: datetime) -> dict[str, Any]:
        """Return the object of one sample, identity included."""
        return {"run": self.run, "seq": seq, self.time_field: self.write_time(at), **self.fields(at)}

    def write_time(self, at: datetime) -> str | float:
        """Return the sample's time as the device writes it: RFC 3339."""
        return at.astimezone(UTC).isoformat().replace("+00:00", "Z")

    def next(self, at: datetime) -> Message:
        """Return the next message: one object."""
        seq, at = self.take_seq(), self.sample_time(at)
        data = self.sample(seq, at)
        return Message(
            device_id=self.device_id,
            seq=seq,
            route=self.route,
            payload=json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode(),
            sampled_at=at,
            rows=_leaves(data) - 1,
        )


class Weather(Json):
    """A weather station: numbers, nested, RFC 3339, text beyond ASCII, now and then a null."""

    family = "weather"

    def fields(self, at: datetime) -> dict[str, Any]:
        """Return temperature, humidity, pressure, wind and a word for the sky."""
        return {
            "temperature": round(self.wave(at, 16, 9, 0.2), 2),
            "humidity": None if self.rng.random() < 0.02 else round(min(100, max(0, self.wave(at, 62, 20, 1))), 1),
            "pressure": round(self.wave(at, 1013, 8, 0.1), 1),
            "wind": {"speed": round(abs(self.wave(at, 4, 3, 0.5)), 1), "direction": self.rng.randrange(360)},
            "sky": self.rng.choice(["clear", "nuageux", "brume légère", "雨"]),
        }


class Meter(Json):
    """A power meter: deep paths, large counters, epoch milliseconds, and every fourth message has two samples."""

    family = "meter"
    time_field = "ts"

    def __init__(self, run: str, seed: int, number: int) -> None:
        super().__init__(run, seed, number)
        self.energy_wh = self.rng.randrange(10**9)

    def write_time(self, at: datetime) -> str | float:
        """Return epoch milliseconds."""
        return round(at.timestamp() * 1000)

    def fields(self, at: datetime) -> dict[str, Any]:
        """Return three phases, the counter, and whether the relay is closed."""
        self.energy_wh += self.rng.randrange(20)
        phases = {
            f"l{n}": {"voltage": round(self.wave(at, 230, 3, 0.4), 1), "current": round(self.rng.uniform(0, 16), 3)}
            for n in (1, 2, 3)
        }
        return {"phases": phases, "energy_wh": self.energy_wh, "relay": self.rng.random() < 0.9, "tags": ["grid"]}

    def next(self, at: datetime) -> Message:
        """Return the next message: one object, or an array of two of one sequence number."""
        seq = self.take_seq()
        times = [self.sample_time(at) for _ in range(2 if seq % 4 == 3 else 1)]
        samples = [self.sample(seq, time) for time in times]
        return Message(
            device_id=self.device_id,
            seq=seq,
            route=self.route,
            payload=json.dumps(samples if len(samples) > 1 else samples[0]).encode(),
            sampled_at=times[0],
            rows=sum(_leaves(sample) - 1 for sample in samples),
            samples=len(samples),
        )


class Tank(Json):
    """A tank: few values, epoch seconds, booleans and text."""

    family = "tank"

    def write_time(self, at: datetime) -> str | float:
        """Return epoch seconds with decimals."""
        return round(at.timestamp() * 1000) / 1000

    def fields(self, at: datetime) -> dict[str, Any]:
        """Return level, valve and state."""
        level = round(min(100, max(0, self.wave(at, 50, 45, 0.5))), 1)
        state = "low" if level < 10 else "high" if level > 90 else "normal"
        return {"level": level, "valve": level > 50, "state": state}


# Sensors of the four channels, by how the controllers are fitted out; 0x0A is a type that measures no climate.
_FITTINGS = (
    (0x43, 0x83, 0, 0),
    (0x23, 0x43, 0x83, 0),
    (0x63, 0, 0, 0),
    (0x62, 0x02, 0x02, 0x82),
    (0x43, 0x0A, 0, 0x83),
)


class Fluxor(Device):
    """A climate controller; one in five is of the memory variant, and a channel fails now and then."""

    family = "fluxor"
    own_time = False

    def __init__(self, run: str, seed: int, number: int) -> None:
        super().__init__(run, seed, number)
        self.tag = run_tag(run)
        self.sen_typ = _FITTINGS[number % len(_FITTINGS)]
        self.channels = [
            position
            for position, kind in enumerate(self.sen_typ)
            if kind & frame.SENSOR_TYPE_MASK in frame.CLIMATE_SENSOR_TYPES
        ]
        self.reg_typ = frame.REG_TEMPERATURE | (frame.REG_LIGHT if number % 3 == 0 else 0) | (1 << 10)
        self.memory = number % 5 == 4

    def _device_id(self, seed: int, number: int) -> str:
        return str(1_000_000 + seed % 4000 * 1_000_000 + number)

    @property
    def route(self) -> str:
        """`broker_data/{broker_id}/{device_id}/data`; eight brokers share the fleet."""
        return f"broker_data/{self.number % 8 + 1}/{self.device_id}/data"

    def climate(self, channel: int, at: datetime) -> tuple[float, float] | None:
        """Return °C and % of a channel, None for a fault."""
        if self.rng.random() < 0.01:
            return None
        outside = bool(self.sen_typ[channel] & frame.SENSOR_EXTERNAL)
        temperature = self.wave(at, 4 if outside else 21, 8 if outside else 2, 0.1)
        humidity = self.wave(at, 70 if outside else 52, 15 if outside else 5, 0.4)
        return round(temperature, 2), round(min(99.0, max(1.0, humidity)), 2)

    def frame(self, seq: int, at: datetime) -> tuple[bytes, int]:
        """Return the frame of `seq` and the rows that it gives."""
        measured = [self.climate(n, at) if n in self.channels else None for n in range(4)]
        points = set_points(self.run, seq)
        regulating = frame.REG_STATE if self.rng.random() < 0.8 else 0
        payload = frame.build_frame(
            int(self.device_id),
            measured,
            sen_typ=self.sen_typ,
            reg_typ=self.reg_typ | regulating,
            humidity_set_point=points.humidity,
            humidity_hysteresis=points.humidity_hysteresis,
            temperature_set_point=points.temperature,
            temperature_hysteresis=points.temperature_hysteresis,
            control=self.rng.randrange(256),
            status=1 << self.rng.randrange(32) if self.rng.random() < 0.05 else 0,
            memory_address=self.rng.randbytes(8) if self.memory else None,
        )
        return payload, 5 + 2 * sum(1 for channel in measured if channel is not None)

    def next(self, at: datetime) -> Message:
        """Return the next frame."""
        seq = self.take_seq()
        payload, rows = self.frame(seq, at)
        return Message(
            device_id=self.device_id,
            seq=seq,
            route=self.route,
            payload=payload,
            expect=Outcome.STORED,
            rows=rows,
        )


class HotFluxor(Fluxor):
    """The controller that runs hot for a while: its first channel climbs to 48 °C and comes back."""

    family = "hot-fluxor"
    PEAK_CELSIUS: ClassVar[float] = 48.0

    def __init__(self, run: str, seed: int, number: int, *, hot_from: datetime, hot_until: datetime) -> None:
        super().__init__(run, seed, number)
        self.hot_from, self.hot_until = hot_from, hot_until

    def climate(self, channel: int, at: datetime) -> tuple[float, float] | None:
        """Return the usual climate, except of the first channel while it is hot; that one never fails."""
        if channel != self.channels[0]:
            return super().climate(channel, at)
        hot = self.hot_from <= at < self.hot_until
        mean = self.PEAK_CELSIUS if hot else 22.0
        return round(mean + self.rng.gauss(0, 0.1), 2), round(self.wave(at, 50, 3, 0.3), 2)


class Yard(Weather):
    """A weather station that speaks CoAP: `POST /telemetry/{device_id}`."""

    family = "yard"

    @property
    def route(self) -> str:
        """`telemetry/{device_id}`."""
        return f"telemetry/{self.device_id}"

    def next(self, at: datetime) -> Message:
        """Return the next message."""
        return dataclasses.replace(super().next(at), protocol="coap")


class Efento(Device):
    """A battery sensor over CoAP: temperature, humidity and an alarm contact, one sample a message.

    Its clock has whole seconds, which is what a message is known by in the store.
    """

    family = "efento"
    own_time = True
    route = "m"

    def __init__(self, run: str, seed: int, number: int) -> None:
        super().__init__(run, seed, number)
        self._last = 0
        #: of its configuration; a new one has another
        self.hash = 1

    def _device_id(self, seed: int, number: int) -> str:
        return f"282c{seed % 256:02x}{number:06x}"

    def answered(self, payload: bytes) -> None:
        """Take a configuration: whatever is in it but the time and a request."""
        found: Any = CONFIG()
        try:
            found.ParseFromString(payload)
        except DecodeError:
            return
        if {field.name for field, _ in found.ListFields()} - {"current_time", "request_device_info"}:
            self.hash += 1

    def next(self, at: datetime) -> Message:
        """Return the next message; a device that is asked more than once a second lets its clock run ahead."""
        seq = self.take_seq()
        self._last = max(self._last + 1, int(at.timestamp()))
        message: Any = MEASUREMENTS(
            serial_num=bytes.fromhex(self.device_id),
            battery_status=self.rng.random() < 0.95,
            measurement_period_base=60,
            measurement_period_factor=1,
            transfer_reason=1 << 4,
            hash=self.hash,
            cloud_token=f"{self.run}/{seq}",
        )
        samples = (
            (1, 10 * self.wave(at, 6, 2, 0.1)),
            (2, min(99, max(1, self.wave(at, 60, 20, 1)))),
        )
        for kind, value in samples:
            message.channels.add(type=kind, timestamp=self._last, start_point=round(value), sample_offsets=[0])
        alarm = 1 if self.rng.random() < 0.1 else -1
        message.channels.add(type=5, timestamp=self._last, sample_offsets=[alarm])
        return Message(
            device_id=self.device_id,
            seq=seq,
            route=self.route,
            payload=message.SerializeToString(),
            sampled_at=datetime.fromtimestamp(self._last, UTC),
            rows=len(samples) + 1,
            protocol="coap",
        )
