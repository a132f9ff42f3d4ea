"""Efento driver: what a message is, its path says (``m`` measurements, ``i`` device information, ``c`` configuration,
``t`` time).

Measurements are one reading a sample and channel, at the sample's own time, never that of arrival. A sensor error
code is a missing value (None) with ``error_code`` and ``error`` in its metadata. An accumulating pair of channels is
one counter, in the smaller unit; a minor or major without its other half is read by itself. Device information and
configuration are one reading each, at arrival; secrets (tokens, keys, passwords) never become part of one. Every
reading's metadata tell what the message said of the device: ``battery_ok``, ``period_s``, ``transfer_reasons``,
``hash``, ``next_transmission_at``.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, ClassVar, Final

from devices import protobuf
from devices.driver import MAX_READINGS, CommandTraits, Downlink, Driver, JsonSchema, Reply
from devices.efento import commands, samples
from devices.efento import messages as m
from devices.efento.samples import Sample
from devices.jsontext import EPOCH
from devices.model import AnotherDevice, DecodeError, Reading, Uplink, Value
from devices.profiles import Profile

OCTET_STREAM: Final = 42
MAX_FIELDS: Final = 512
MAX_SERIAL_BYTES: Final = 16


def _endpoint(route: str) -> str:
    return route.rsplit("/", 1)[-1]


def _serial(raw: bytes) -> str:
    if not raw or raw == m.NOT_SET.encode():
        raise DecodeError("the message has no serial number")
    if len(raw) > MAX_SERIAL_BYTES:
        raise DecodeError(f"the serial number has {len(raw)} bytes, devices have 6")
    return raw.hex()


def _parse(uplink: Uplink) -> tuple[Any, str]:
    """Return the message and its device; raises DecodeError where it is none, or of another device than the uplink
    says."""
    endpoint = _endpoint(uplink.route)
    if endpoint == "m":
        message = protobuf.parse(m.MEASUREMENTS, uplink.data, "measurements message")
        device_id = _serial(message.serial_num)
    elif endpoint == "i":
        message = protobuf.parse(m.DEVICE_INFO, uplink.data, "device information")
        device_id = _serial(message.serial_num)
    elif endpoint == "c":
        message = protobuf.parse(m.CONFIG, uplink.data, "configuration")
        device_id = _serial(message.serial_number)
    else:
        raise DecodeError(f"the path {uplink.route!r:.80} is none of an Efento device's: m, i, c, t")
    if uplink.device_id and device_id != uplink.device_id:
        raise AnotherDevice(f"the message is of device {device_id}, it came as {uplink.device_id!r:.80}")
    return message, device_id


class EfentoDriver(Driver):
    """Reads Efento messages, writes their configuration, answers their requests."""

    name = "efento"
    exclusive = True
    commands: ClassVar[Mapping[str, JsonSchema]] = commands.SCHEMAS
    traits: ClassVar[Mapping[str, CommandTraits]] = {
        "config": CommandTraits(repeatable=True, supersedes=True, confirmed=False),
        "refresh_config": CommandTraits(repeatable=True, supersedes=True, confirmed=False),
        "device_info_request": CommandTraits(repeatable=True, supersedes=True, confirmed=False),
        "alarm": CommandTraits(repeatable=True, confirmed=False),
    }

    def device_id(self, uplink: Uplink) -> str | None:
        """Return the serial number in hexadecimal; None for a time request, which names nobody."""
        return None if _endpoint(uplink.route) == "t" else _parse(uplink)[1]

    def decode(self, uplink: Uplink, profile: Profile) -> list[Reading]:
        """Return the samples of a measurements message, or the one reading of device information or configuration."""
        message, device_id = _parse(uplink)
        endpoint = _endpoint(uplink.route)
        if endpoint == "m":
            return _measurements(message, device_id, uplink, profile)
        if endpoint == "i":
            return _device_info(message, device_id, uplink, profile)
        return _configuration(message, device_id, uplink, profile)

    def state_of(self, uplink: Uplink) -> dict[str, Any]:
        """Return the hash of the configuration that the device runs with, where the message tells it."""
        if _endpoint(uplink.route) not in ("m", "c"):
            return {}
        return {"hash": _parse(uplink)[0].hash}

    def applied(self, command_type: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
        """Return that the hash is another one, where the command changes the configuration; 0 is no hash."""
        old, new = before.get("hash"), after.get("hash")
        if command_type not in commands.CHANGING or not old or not new or old == new:
            return ""
        return f"the device came back with another configuration hash: {old} before, {new} now"

    def encode(
        self,
        command_type: str,
        payload: Mapping[str, Any],
        *,
        request_id: str,  # noqa: ARG002 - these devices confirm by acknowledging the answer
        device_id: str,  # noqa: ARG002
        state: Mapping[str, Any],  # noqa: ARG002
        now: datetime,
    ) -> Downlink:
        """Build the configuration message that goes into the answer to the device's next message; raises
        CommandError."""
        self.check(command_type, payload)
        return Downlink(route="", data=commands.encode(command_type, payload, now))

    def reply(self, uplink: Uplink, now: datetime, pending: bytes | None = None) -> Reply | None:
        """Return the answer to a request: the time; else what is pending, with the time of now; else what the path
        asks for.

        Measurements are answered with the time and a request for device information, device information and
        configuration with an empty 2.05: asking again there would never end.
        """
        endpoint = _endpoint(uplink.route)
        if endpoint == "t":
            seconds = int(now.timestamp()).to_bytes(4, "big")
            return Reply(code="2.05", data=seconds, content_format=OCTET_STREAM)
        if pending is not None:
            data = commands.stamped(pending, now)
            return Reply(code="2.01", data=data, content_format=OCTET_STREAM, carries=pending)
        if endpoint == "m":
            return Reply(code="2.01", data=commands.greeting(now), content_format=OCTET_STREAM)
        return Reply(code="2.05")


class _Writer:
    """Makes readings of one message."""

    def __init__(self, uplink: Uplink, device_id: str, profile: Profile, about: dict[str, Any]) -> None:
        self.readings: list[Reading] = []
        self._uplink, self._device_id, self._profile, self._about = uplink, device_id, profile, about

    def samples(self, index: str, unit: str, number: int, found: list[Sample]) -> None:
        """Add a reading for each sample of channel ``number`` (from 1)."""
        shape = self._profile.shape(index, (f"CH{number}",), units=(unit,), trusted=True)
        metadata = {**shape.metadata, **self._about}
        for at, value, extra in found:
            try:
                sampled_at = EPOCH + timedelta(seconds=at)
            except OverflowError:
                raise DecodeError(f"channel {number} has a sample at {at} s, which no calendar holds") from None
            self.readings.append(
                Reading(
                    request_id=self._uplink.request_id,
                    timestamp=sampled_at,
                    device_id=self._device_id,
                    index=index,
                    values=[value],
                    labels=shape.labels,
                    display_names=shape.display_names,
                    metadata=metadata if extra is None else {**metadata, **extra},
                )
            )

    def fields(self, index: str, category: str, found: dict[str, Value], units: Mapping[str, str]) -> None:
        """Add one reading of named fields, at arrival."""
        if not found:
            return
        shape = self._profile.shape(
            index, tuple(found), units=[units.get(name, "") for name in found], category=category, persist=False
        )
        self.readings.append(
            Reading(
                request_id=self._uplink.request_id,
                timestamp=self._uplink.received_at,
                device_id=self._device_id,
                index=index,
                values=list(found.values()),
                labels=shape.labels,
                display_names=shape.display_names,
                metadata={**shape.metadata, **self._about},
            )
        )


def _measurements(message: Any, device_id: str, uplink: Uplink, profile: Profile) -> list[Reading]:
    channels = list(message.channels)
    if sum(len(channel.sample_offsets) for channel in channels) > MAX_READINGS:
        raise DecodeError(f"the message has more than {MAX_READINGS} samples")
    kinds = [m.TYPES.get(channel.type) for channel in channels]
    period = samples.period_seconds(message, kinds)
    writer = _Writer(
        uplink,
        device_id,
        profile,
        {
            "battery_ok": message.battery_status,
            "period_s": period,
            "transfer_reasons": m.transfer_reasons(message.transfer_reason),
            "hash": message.hash,
            "next_transmission_at": message.next_transmission_at,
        },
    )
    counters = samples.pairs(channels)
    majors = set(counters.values())
    for position, (channel, kind) in enumerate(zip(channels, kinds, strict=True)):
        if channel.type == m.NO_SENSOR or position in majors:
            continue
        if kind is not None and kind.kind == "binary":
            writer.samples(kind.index, "", position + 1, samples.binary(channel))
            continue
        if not period and len(channel.sample_offsets) > 1:
            raise DecodeError("the message has several samples and no measurement period")
        found = samples.continuous(channel, kind, period)
        if position in counters:
            pair, major = m.PAIRS[channel.type], counters[position]
            other = samples.continuous(channels[major], kinds[major], period)
            writer.samples(pair.index, pair.unit, position + 1, samples.counter(found, other, pair.weight))
        elif kind is not None:
            writer.samples(kind.index, kind.unit, position + 1, found)
        else:
            writer.samples(f"TYPE_{channel.type}", "", position + 1, found)
    return writer.readings


_INFO_UNITS: Final = {
    "up_time": "s",
    "mcu_temperature": "°C",
    "max_mcu_temperature": "°C",
    "min_mcu_temperature": "°C",
    "min_battery_mcu_temperature": "°C",
    "min_battery_voltage": "mV",
}


def _device_info(message: Any, device_id: str, uplink: Uplink, profile: Profile) -> list[Reading]:
    found: dict[str, Value] = {}
    if message.sw_version:
        found["sw_version"] = message.sw_version
    # A runtime that is there is there with its zeros: 0 °C is a temperature.
    if message.HasField("runtime_info"):
        runtime = message.runtime_info
        for field in runtime.DESCRIPTOR.fields:
            if not protobuf.repeated(field):
                found[field.name] = getattr(runtime, field.name)
        found.update(protobuf.flatten(runtime))
    if message.HasField("modem"):
        iccid = message.modem.sim_card_identification
        if iccid:
            found["iccid"] = iccid
        found.update(protobuf.flatten(message.modem, "modem_", skip=frozenset({"sim_card_identification"})))
    rest = protobuf.flatten(message, skip=_ELSEWHERE)
    found.update(rest)
    writer = _Writer(uplink, device_id, profile, {"sw_version_text": m.version_text(message.sw_version)})
    writer.fields("DEVICE_INFO", "device_info", _told(found), _INFO_UNITS)
    return writer.readings


_ELSEWHERE: Final = m.SECRETS | {"serial_num", "serial_number", "sw_version", "runtime_info", "modem"}


def _configuration(message: Any, device_id: str, uplink: Uplink, profile: Profile) -> list[Reading]:
    found = dict(protobuf.flatten(message, skip=_ELSEWHERE))
    writer = _Writer(uplink, device_id, profile, {"hash": message.hash})
    writer.fields("CONFIG", "config", _told(found), {"transmission_interval": "s"})
    return writer.readings


def _told(found: dict[str, Value]) -> dict[str, Value]:
    """Leave out what the device says is not set, and more fields than any device has."""
    if len(found) > MAX_FIELDS:
        raise DecodeError(f"the message has more than {MAX_FIELDS} fields")
    return {name: value for name, value in found.items() if value not in (m.NOT_SET, m.NOT_SET.encode().hex())}
