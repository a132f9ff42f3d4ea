"""Device messages become readings.

Consumes ``iot_raw_data`` (RawMessage), produces ``iot_validated_data`` (Reading), key: device id, order kept per
device; a device's word on a command goes to the stage commands, and so does what a device tells of itself that commands
need. Guarantee: each message gives all its valid readings, or one dead letter.
Retried: nothing of its own (it is a pure function). Dead-lettered: ``poison`` what a driver cannot decode; ``rejected``
what no profile matches, what claims to be another device's or is an unknown one's (``UNKNOWN_DEVICES=reject``), what a
driver would have read that is set aside for being slow, and what has no valid value left. Dropped: messages that hold
no reading (``no_readings``); single values that validation refuses are counted and logged, their neighbours go on.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any, Final

from mode import Service

from agents.drivers import driver_times
from agents.registered import Registered
from devices.driver import Driver
from devices.model import Uplink
from devices.pipeline import Outcome, Refused, read
from devices.registry import Registry
from devices.timing import DriverAside, DriverTimes
from devices.validation import MAX_AHEAD
from streams import topics
from streams.events import EVENTS
from streams.messages import CommandReport, DeviceChange, DeviceState, RawMessage, encode, uplink_of
from streams.resilience.chunks import Out
from streams.resilience.failures import Rejected, Retryable, SetAside
from streams.stage import Stage

normalizer = Stage("normalizer")

#: Devices whose state is remembered, so that it is told when it changes; it is told again after a while all the same,
#: so that one which Kafka did not take is not missed for long.
REMEMBERED_STATES: Final = 50_000
STATE_AGAIN: Final = timedelta(minutes=10)


class Normalizer:
    """The stage's pure function over a registry of devices and profiles."""

    def __init__(
        self,
        registry: Registry,
        *,
        times: DriverTimes | None = None,
        reject_unknown: bool = False,
        max_ahead: timedelta = MAX_AHEAD,
    ) -> None:
        self.registry = registry
        self.registered = Registered(registry)
        self.times = times or DriverTimes(float("inf"), 0)
        self._known = self.registered.known if reject_unknown else None
        self._max_ahead = max_ahead
        self._output = topics.validated_data.name
        self._states: dict[tuple[str, str], tuple[datetime, dict[str, Any]]] = {}

    def to_readings(self, message: RawMessage, out: Out) -> None:
        """Send the readings that ``message`` gives; raises DecodeError (poison) or Rejected."""
        try:
            uplink = uplink_of(message)
            # CoAP devices were judged, and answered, where they came in.
            known = self._known if uplink.protocol == "mqtt" else None
            outcome = read(uplink, self.registry, known=known, max_ahead=self._max_ahead, call=self.times.call)
        except Refused as exc:
            EVENTS.refused(exc.reason, message.device_id, str(exc))
            if exc.reason == "driver_aside":
                raise SetAside(f"{exc.reason}: {exc}") from exc
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
        if not outcome.readings:
            return False
        driver = self.registry.driver(outcome.profile)
        kind = type(driver)
        told = kind.change_of is not Driver.change_of and self._tell_change(driver, uplink, outcome, out)
        return (kind.state_of is not Driver.state_of and self._tell_state(driver, uplink, outcome, out)) or told

    @staticmethod
    def _tell_change(driver: Driver, uplink: Uplink, outcome: Outcome, out: Out) -> bool:
        change = driver.change_of(uplink)
        if not change:
            return False
        told = DeviceChange(
            request_id=uplink.request_id,
            device_id=uplink.device_id,
            profile=outcome.profile.name,
            change=change,
            timestamp=uplink.received_at,
        )
        out.send(topics.device_changes, told, uplink.device_id)
        return True

    def _tell_state(self, driver: Driver, uplink: Uplink, outcome: Outcome, out: Out) -> bool:
        try:
            state = self.times.call(driver.name, driver.state_of, uplink)
        except DriverAside:
            return False
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
        settings = normalizer.settings
        _normalizer = Normalizer(
            Registry.load(settings.config_path),
            times=driver_times(settings),
            reject_unknown=settings.unknown_devices == "reject",
            max_ahead=timedelta(seconds=settings.reading_future_limit_seconds),
        )
    return _normalizer


class Devices(Service):
    """Follows ``iot_devices`` for the normalizer."""

    async def on_start(self) -> None:
        """Say what becomes of unknown devices, and follow the topic."""
        settings = normalizer.settings
        self.log.info("messages of unknown devices over MQTT: %s (UNKNOWN_DEVICES)", settings.unknown_devices)
        await current().registered.follow(self, settings)


normalizer.service(Devices)


@normalizer.check("devices")
async def devices_known() -> None:
    """Raise while the topic of devices has not been read to its end."""
    if not current().registered.complete:
        raise Retryable(f"{topics.devices.name} has not been read to its end yet")


@normalizer.agent(topics.raw_data, chunks=True, name="normalizer")
async def normalize(stream: Any) -> None:
    """Turn the device messages of each chunk into readings."""
    to_readings = current().to_readings
    if not normalizer.app.testing:
        await current().registered.ready()
    async for chunk in stream:
        await chunk.each(to_readings)
