"""The normalizer's work as one pure function, the same code for every competitor, and the traffic that it works on.

``expand`` is what :mod:`agents.normalizer` does with a message, without Faust: decode the RawMessage, find its profile,
decode the Fluxor frame, validate, encode the readings. It needs devices/, streams/messages.py and nothing of Kafka, so
that a rival's process holds the rival and this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from devices.fluxor.frame import build_frame
from devices.pipeline import read
from devices.registry import Registry
from streams.messages import RawMessage, decoder, encode, uplink_of

ROOT = Path(__file__).resolve().parent.parent
DEVICES = 200
PARTITIONS = 4
#: A frame of a controller with two climate channels gives T, U, P, CTRL, S, E and ST.
READINGS_PER_MESSAGE = 7
FIRST_DEVICE = 2_261_001
START = datetime(2025, 1, 1, tzinfo=UTC)

Expand = Callable[[bytes], list[tuple[bytes, bytes]]]


def make_expand() -> Expand:
    """Return the function from a raw message to keys and values of its readings, over the shipped profiles."""
    registry = Registry.load(ROOT / "config")
    decode = decoder(RawMessage).decode

    def expand(value: bytes) -> list[tuple[bytes, bytes]]:
        readings = read(uplink_of(decode(value)), registry).readings
        return [(reading.device_id.encode(), encode(reading)) for reading in readings]

    return expand


def raw_messages(count: int, devices: list[str], start: datetime = START) -> Iterator[tuple[bytes, bytes]]:
    """Yield key and value of ``count`` raw messages, the devices in turn, values and times all different."""
    for number in range(count):
        turn, position = divmod(number, len(devices))
        device = devices[position]
        frame = build_frame(
            int(device),
            [(18 + number % 97 / 10, 40 + number % 199 / 10), (5 + number % 301 / 20, 60 + number % 53 / 10)],
            reg_typ=17_731,
            control=number % 256,
            status=number % 64,
        )
        message = RawMessage(
            request_id=f"{number:032x}",
            timestamp=start + timedelta(seconds=turn, microseconds=position),
            device_id=device,
            protocol="mqtt",
            payload=frame.decode(),
            metadata={"mqtt_topic": f"broker_data/b1/{device}/data", "mqtt_qos": 1, "mqtt_retain": False},
        )
        yield device.encode(), encode(message)


def balanced_devices(partition_of: Callable[[bytes], int], count: int = DEVICES) -> list[str]:
    """Return ids of devices, as many on each of the partitions that ``partition_of`` knows."""
    share = count // PARTITIONS
    chosen: dict[int, list[str]] = {number: [] for number in range(PARTITIONS)}
    device = FIRST_DEVICE
    while any(len(found) < share for found in chosen.values()):
        mine = chosen[partition_of(str(device).encode())]
        if len(mine) < share:
            mine.append(str(device))
        device += 1
    return [device for group in zip(*chosen.values(), strict=True) for device in group]
