"""Device messages become readings.

Consumes ``iot_raw_data`` (RawMessage), produces ``iot_validated_data`` (Reading), key: device id, order kept per
device. Guarantee: each message gives all its valid readings, or one dead letter.
Retried: nothing of its own (it is a pure function). Dead-lettered: ``poison`` what a driver cannot decode; ``rejected``
what no profile matches and what has no valid value left. Dropped: messages that hold no reading (``no_readings``),
feedback to commands (``feedback``); single values that validation refuses are counted and logged, their neighbours go
on.
"""

from __future__ import annotations

from typing import Any

from devices.pipeline import Refused, read
from devices.registry import Registry
from streams import topics
from streams.events import EVENTS
from streams.messages import RawMessage, encode, uplink_of
from streams.resilience.chunks import Out
from streams.resilience.failures import Rejected
from streams.stage import Stage

normalizer = Stage("normalizer")


class Normalizer:
    """The stage's pure function over a registry of devices and profiles."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self._output = topics.validated_data.name

    def to_readings(self, message: RawMessage, out: Out) -> None:
        """Send the readings that ``message`` gives; raises DecodeError (poison) or Rejected."""
        try:
            outcome = read(uplink_of(message), self.registry)
        except Refused as exc:
            for refused in exc.rejections:
                EVENTS.rejected_value(refused.device_id, refused.index, refused.label, refused.value, refused.reason)
            raise Rejected(f"{exc.reason}: {exc}") from exc
        for refused in outcome.rejections:
            EVENTS.rejected_value(refused.device_id, refused.index, refused.label, refused.value, refused.reason)
        if not outcome.readings:
            out.drop("feedback" if outcome.feedback is not None else "no_readings")
            return
        for reading in outcome.readings:
            out.send(self._output, encode(reading), reading.device_id)


_normalizer: Normalizer | None = None


@normalizer.prepare
def current() -> Normalizer:
    """Return the normalizer over the configured registry, loaded when it is first needed."""
    global _normalizer
    if _normalizer is None:
        _normalizer = Normalizer(Registry.load(normalizer.settings.config_path))
    return _normalizer


@normalizer.agent(topics.raw_data, chunks=True, name="normalizer")
async def normalize(stream: Any) -> None:
    """Turn the device messages of each chunk into readings."""
    to_readings = current().to_readings
    async for chunk in stream:
        await chunk.each(to_readings)
