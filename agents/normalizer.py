"""Device messages become readings.

Consumes ``iot_raw_data`` (RawMessage), produces ``iot_validated_data`` (Reading), key: device id, order kept per
device; a device's word on a command goes to the stage commands, and so does what a device tells of itself that commands
need. Guarantee: each message gives all its valid readings, or one dead letter.
Retried: nothing of its own (it is a pure function). Dead-lettered: ``poison`` what a driver cannot decode; ``rejected``
what no profile matches and what has no valid value left. Dropped: messages that hold no reading (``no_readings``);
single values that validation refuses are counted and logged, their neighbours go on.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any, Final

from devices.driver import Driver
from devices.model import Uplink
from devices.pipeline import Outcome, Refused, read
from devices.registry import Registry
from streams import topics
from streams.events import EVENTS
from streams.messages import CommandReport, DeviceState, RawMessage, encode, uplink_of
from streams.resilience.chunks import Out
from streams.resilience.failures import Rejected
from streams.stage import Stage

normalizer = Stage("normalizer")

#: Devices whose state is remembered, so that it is told when it changes; it is told again after a while all the same,
#: so that one which Kafka did not take is not missed for long.
REMEMBERED_STATES: Final = 50_000
STATE_AGAIN: Final = timedelta(minutes=10)


class Normalizer:
    """The stage's pure function over a registry of devices and profiles."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self._output = topics.validated_data.name
        self._states: dict[tuple[str, str], tuple[datetime, dict[str, Any]]] = {}

    def to_readings(self, message: RawMessage, out: Out) -> None:
        """Send the readings that ``message`` gives; raises DecodeError (poison) or Rejected."""
        try:
            uplink = uplink_of(message)
            outcome = read(uplink, self.registry)
        except Refused as exc:
            for refused in exc.rejections:
                EVENTS.rejected_value(refused.device_id, refused.index, refused.label, refused.value, refused.reason)
            raise Rejected(f"{exc.reason}: {exc}") from exc
        for refused in outcome.rejections:
            EVENTS.rejected_value(refused.device_id, refused.index, refused.label, refused.value, refused.reason)
        told = self._tell(uplink, outcome, out)
        if not outcome.readings:
            if not told:
                out.drop("no_readings")
            return
        output, add = self._output, out.add
        device_id, key = "", b""
        for reading in outcome.readings:
            if reading.device_id is not device_id:
                device_id = reading.device_id
                key = device_id.encode()
            add((output, key, encode(reading), None))

    def _tell(self, uplink: Uplink, outcome: Outcome, out: Out) -> bool:
        """Send what the stage commands is to know; False where there is nothing."""
        word = outcome.feedback
        if word is not None:
            report = CommandReport(
                request_id=word.request_id,
                kind="SUCCESSFUL" if word.success else "FAILED",
                by_device=True,
                detail=word.detail,
                timestamp=uplink.received_at,
            )
            out.send(topics.command_feedback, report, word.request_id)
            return True
        driver = self.registry.driver(outcome.profile)
        if type(driver).state_of is Driver.state_of or not outcome.readings:
            return False
        state = driver.state_of(uplink)
        key = (uplink.device_id, outcome.profile.name)
        known = self._states.get(key)
        if not state or (
            known is not None and (known[1] is state or known[1] == state) and uplink.received_at < known[0]
        ):
            return False
        if len(self._states) >= REMEMBERED_STATES:
            self._states.clear()
        self._states[key] = (uplink.received_at + STATE_AGAIN, state)
        told = DeviceState(
            device_id=uplink.device_id, profile=outcome.profile.name, state=state, timestamp=uplink.received_at
        )
        out.send(topics.device_state, told, uplink.device_id)
        return True


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
