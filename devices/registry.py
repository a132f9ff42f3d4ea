"""The families that Headrace knows, and the configured fleet: which profile reads a message, which device sent it.

A family is one line in ``DRIVERS``. :class:`Registry` is what the stages ask: it is built from
``config/profiles/*.yaml`` and ``config/devices.yaml``, or not at all (:class:`~devices.configfile.ConfigErrors` with
everything that is wrong). Looking a message up costs about a dictionary look-up: routes are compiled, and what a
route matches is remembered, bounded.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
from jsonschema import Draft202012Validator

from devices.configfile import ConfigError, ConfigErrors, Document, load, schema_errors
from devices.driver import Driver
from devices.model import DecodeError, Uplink
from devices.profiles import Match, Profile, compile_profile, usable_device_id

DRIVERS: Final[Mapping[str, str]] = {
    "cbor_map": "devices.cbor_map.driver:CborMapDriver",
    "efento": "devices.efento.driver:EfentoDriver",
    "fluxor": "devices.fluxor.driver:FluxorDriver",
    "light_controller": "devices.light_controller.driver:LightControllerDriver",
    "plain_json": "devices.plain_json.driver:PlainJsonDriver",
    "senml": "devices.senml.driver:SenmlDriver",
    "sparkplug": "devices.sparkplug.driver:SparkplugDriver",
    "tts": "devices.tts.driver:TtsDriver",
    "zigbee2mqtt": "devices.zigbee2mqtt.driver:Zigbee2MqttDriver",
}

SCHEMAS: Final = Path(__file__).resolve().parent.parent / "config"

# Routes hold device ids; a fleet of this size costs about 30 MB, a larger one is matched anew after a clean-out.
MAX_ROUTES: Final = 65_536

_NAMED: Final = re.compile(r"\{[A-Za-z_]\w*\}")


class DeviceEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A device that the configuration names. ``config`` overrides its profile (``category``, ``values``,
    ``options``)."""

    device_id: str
    profile: str | None = None
    name: str = ""
    tags: tuple[str, ...] = ()
    active: bool = True
    config: dict[str, Any] = {}


class Candidate(NamedTuple):
    match: Match
    profile: Profile
    device_id: str | None


@lru_cache(maxsize=64)
def driver_class(name: str) -> type[Driver]:
    """Import the driver class of a family; raises KeyError for one that is not registered."""
    module, _, attribute = DRIVERS[name].partition(":")
    found: type[Driver] = getattr(importlib.import_module(module), attribute)
    return found


@lru_cache(maxsize=8)
def schema(name: str) -> dict[str, Any]:
    """Read one of the JSON schemas beside the configuration."""
    found: dict[str, Any] = json.loads((SCHEMAS / f"{name}.schema.json").read_text(encoding="utf-8"))
    return found


def _device_id(match: Match, params: Mapping[str, str]) -> str | None:
    try:
        found = match.device_id.format_map(params)
    except KeyError:
        return None
    return found if usable_device_id(found) else None


class Registry:
    """The configured fleet. ``profiles`` holds the active ones in the order in which they match."""

    def __init__(self, profiles: Iterable[Profile], devices: Iterable[DeviceEntry] = ()) -> None:
        self.profiles: tuple[Profile, ...] = tuple(profile for profile in profiles if profile.active)
        self._by_name = {profile.name: profile for profile in self.profiles}
        self._drivers: dict[str, Driver] = {}
        self._devices: dict[str, DeviceEntry] = {}
        self._overridden: dict[str, dict[str, Profile]] = {}
        self._routes: dict[str, dict[str, tuple[Candidate, ...]]] = {"mqtt": {}, "coap": {}}
        for entry in devices:
            self.set_device(entry)

    @classmethod
    def load(cls, config_path: str | Path) -> Registry:
        """Read the configuration folder; raises ConfigErrors with all that is wrong in it."""
        registry, errors = cls.read(config_path)
        if errors:
            raise ConfigErrors(errors)
        return registry

    @classmethod
    def read(cls, config_path: str | Path, *, with_inactive: bool = False) -> tuple[Registry, list[ConfigError]]:
        """Read the configuration folder; returns what could be read and all errors.

        ``with_inactive`` takes profiles that are not active for active ones: to try them, never to run.
        """
        folder = Path(config_path)
        errors: list[ConfigError] = []
        profiles = _read_profiles(folder, errors)
        devices = _read_devices(folder, profiles, errors)
        if with_inactive:
            for profile in profiles.values():
                profile.active = True
        return cls(profiles.values(), devices), errors

    # Devices

    def set_device(self, entry: DeviceEntry) -> None:
        """Add or replace what is configured of a device."""
        self._devices[entry.device_id] = entry
        self._overridden.pop(entry.device_id, None)

    def remove_device(self, device_id: str) -> None:
        """Forget what was configured of a device."""
        self._devices.pop(device_id, None)
        self._overridden.pop(device_id, None)

    def device(self, device_id: str) -> DeviceEntry | None:
        """Return what is configured of a device, None for one that is only known by its messages."""
        return self._devices.get(device_id)

    @property
    def devices(self) -> tuple[DeviceEntry, ...]:
        return tuple(self._devices.values())

    # Profiles and drivers

    def profile(self, name: str) -> Profile | None:
        """Return the active profile of that name."""
        return self._by_name.get(name)

    def profile_for(self, device_id: str, profile: Profile) -> Profile:
        """Return ``profile`` with what is configured of a device over it; raises what a wrong ``config`` does."""
        entry = self._devices.get(device_id)
        return profile if entry is None else self._override(entry, profile)

    def driver(self, profile: Profile | str) -> Driver:
        """Return the driver of a profile (or of a family's name); one instance a registry."""
        name = profile if isinstance(profile, str) else profile.driver
        found = self._drivers.get(name)
        if found is None:
            found = self._drivers[name] = driver_class(name)()
        return found

    def driver_for(self, command_type: str, profile: str | None) -> Driver | None:
        """Return the driver that encodes a command for a device last heard of under ``profile`` (None: never).

        Where that profile's family does not know the command, it is the first active one that does: a controller can
        speak two families (climate and light schedules) under one id.
        """
        own = self._by_name.get(profile) if profile else None
        for candidate in (*((own,) if own else ()), *self.profiles):
            driver = self.driver(candidate)
            if command_type in driver.commands:
                return driver
        return None

    def mqtt_filters(self) -> list[str]:
        """Return the subscription filters that cover what the active profiles match, none of them covered by
        another."""
        filters = {m.filter for p in self.profiles for m in p.match if m.protocol == "mqtt"}
        return sorted(f for f in filters if not any(other != f and _covers(other, f) for other in filters))

    def coap_paths(self) -> dict[str, tuple[str, ...]]:
        """Return the CoAP paths (no leading slash, ``{name}`` for a variable segment) of the active profiles, with
        their methods."""
        paths: dict[str, tuple[str, ...]] = {}
        for profile in self.profiles:
            for match in profile.match:
                if match.protocol == "coap":
                    paths[match.route] = tuple(dict.fromkeys((*paths.get(match.route, ()), *match.methods)))
        return paths

    # Messages

    def candidates(self, protocol: str, route: str) -> tuple[Candidate, ...]:
        """Return what matches a route, in order, before any test of the payload."""
        table = self._routes.get(protocol)
        if table is None:
            return ()
        found = table.get(route)
        if found is None:
            segments = route.split("/")
            found = tuple(
                Candidate(match, profile, _device_id(match, params))
                for profile in self.profiles
                for match in profile.match
                if match.protocol == protocol and (params := match.params(segments)) is not None
            )
            if len(table) >= MAX_ROUTES:
                table.clear()
            table[route] = found
        return found

    def find(self, uplink: Uplink) -> tuple[Profile, Match] | None:
        """Return the profile, with the device's overrides, and the match that ``uplink`` belongs to; the first one
        wins.

        A device that the configuration gives a profile gets that one where several match.
        """
        device_id = uplink.device_id
        entry = self._devices.get(device_id)
        first: Candidate | None = None
        for candidate in self.candidates(uplink.protocol, uplink.route):
            match = candidate.match
            if match.payload is not None and not match.payload.accepts(uplink.data):
                continue
            if match.devices and not match.allows(device_id):
                continue
            if entry is None:
                return candidate.profile, match
            if candidate.profile.name == entry.profile:
                first = candidate
                break
            first = first or candidate
        if first is None or entry is None:
            return None
        return self._override(entry, first.profile), first.match

    def excluded(self, uplink: Uplink) -> Profile | None:
        """Return the first profile that matches ``uplink`` but for the devices that it allows."""
        return next(
            (c.profile for c in self.candidates(uplink.protocol, uplink.route) if not c.match.allows(uplink.device_id)),
            None,
        )

    def match(self, uplink: Uplink) -> Profile | None:
        """Return the profile of ``uplink``, None where nothing matches."""
        found = self.find(uplink)
        return None if found is None else found[0]

    def device_id(self, protocol: str, route: str, data: bytes = b"") -> str | None:
        """Return the device that a message is from: as its route says, else as its payload does; None where neither
        can tell."""
        for candidate in self.candidates(protocol, route):
            if candidate.match.payload is not None and not candidate.match.payload.accepts(data):
                continue
            if candidate.device_id is not None:
                return candidate.device_id
            if not data:
                return None
            try:
                found = self.driver(candidate.profile).device_id(_probe(protocol, route, data))
            except DecodeError:
                return None
            return found if found is not None and usable_device_id(found) else None
        return None

    def _override(self, entry: DeviceEntry, profile: Profile) -> Profile:
        if not entry.config:
            return profile
        mine = self._overridden.setdefault(entry.device_id, {})
        found = mine.get(profile.name)
        if found is None:
            found = mine[profile.name] = profile.overridden(entry.config)
        return found


def _probe(protocol: str, route: str, data: bytes) -> Uplink:
    return Uplink(
        request_id="",
        received_at=datetime.fromtimestamp(0, UTC),
        device_id="",
        protocol=protocol,
        route=route,
        text=None,
        data=data,
        metadata={},
    )


def _covers(general: str, special: str) -> bool:
    ours, theirs = general.split("/"), special.split("/")
    for position, mine in enumerate(ours):
        if mine == "#":
            return True
        if position >= len(theirs) or (mine != theirs[position] and (mine != "+" or theirs[position] == "#")):
            return False
    return len(ours) == len(theirs)


def _read_profiles(folder: Path, errors: list[ConfigError]) -> dict[str, Profile]:
    files = sorted((folder / "profiles").glob("*.yaml"))
    if not files:
        problem = "no profile (*.yaml) here; does CONFIG_PATH name the right folder?"
        errors.append(ConfigError(f"{folder}/profiles", 0, "", problem))
    found: list[tuple[int, str, Profile]] = []
    where: dict[str, str] = {}
    for path in files:
        document = load(path, str(path), errors)
        if document is None:
            continue
        wrong = schema_errors(document, schema("profile")) or _profile_errors(document)
        name = "" if wrong else document.data["profile"]
        if name in where:
            wrong = [document.error(("profile",), f"the name is taken by {where[name]}", found=name)]
        errors.extend(wrong)
        if not wrong:
            where[name] = str(path)
            found.append((document.data.get("order", 100), path.name, compile_profile(document.data)))
    return {profile.name: profile for _, _, profile in sorted(found, key=lambda entry: entry[:2])}


def _profile_errors(document: Document) -> list[ConfigError]:
    """What a schema cannot say: the driver exists and takes these options, ranges are not empty, topics are topics."""
    data, errors = document.data, []
    if data["driver"] not in DRIVERS:
        known = ", ".join(sorted(DRIVERS))
        errors.append(document.error(("driver",), "no such driver", found=data["driver"], allowed=known))
    else:
        options = Document(document.file, data.get("options") or {})
        options.lines = {path[1:]: line for path, line in document.lines.items() if path[:1] == ("options",)}
        errors.extend(schema_errors(options, driver_class(data["driver"]).options))
    many = isinstance(data["match"], list)
    for number, match in enumerate(data["match"] if many else [data["match"]]):
        field = "topic" if match["protocol"] == "mqtt" else "path"
        at = ("match", number, field) if many else ("match", field)
        segments = match[field].split("/")
        wild = [segment for segment in segments if segment in ("+", "#") or _NAMED.fullmatch(segment)]
        if "#" in segments[:-1] or len(wild) == len(segments):
            allowed = "+ or {name} for one segment, # for the rest at the end, at least one segment that is neither"
            errors.append(document.error(at, "this would match too much", found=match[field], allowed=allowed))
        for segment in segments:
            if segment not in wild and set(segment) & set("+#{}"):
                problem = "a wildcard stands for a whole segment"
                errors.append(document.error(at, problem, found=segment, allowed="+, # or {name} alone"))
    errors.extend(_range_errors(document, (), data.get("values") or {}))
    return errors


def _range_errors(document: Document, at: tuple[str | int, ...], values: Mapping[str, Any]) -> list[ConfigError]:
    errors = []
    for index, entry in values.items():
        rules = [((*at, "values", index), entry)]
        labels = entry.get("labels") or {}
        rules += [((*at, "values", index, "labels", label), rule) for label, rule in labels.items()]
        for path, rule in rules:
            low, high = rule.get("min"), rule.get("max")
            if low is not None and high is not None and low > high:
                errors.append(document.error((*path, "min"), "min is above max", found=low, allowed=f"at most {high}"))
    return errors


def _read_devices(folder: Path, profiles: Mapping[str, Profile], errors: list[ConfigError]) -> list[DeviceEntry]:
    path = folder / "devices.yaml"
    if not path.exists():
        return []
    document = load(path, str(path), errors)
    if document is None or document.data is None:
        return []
    wrong = schema_errors(document, schema("devices"))
    if wrong:
        errors.extend(wrong)
        return []
    entries: dict[str, DeviceEntry] = {}
    for number, raw in enumerate(document.data.get("devices") or []):
        at = ("devices", number)
        entry = DeviceEntry(**{**raw, "tags": tuple(raw.get("tags") or ()), "config": raw.get("config") or {}})
        profile = profiles.get(entry.profile) if entry.profile else None
        if entry.profile and (profile is None or not profile.active):
            active = ", ".join(name for name, found in profiles.items() if found.active)
            problem = "no such profile" if profile is None else "the profile is not active"
            errors.append(document.error((*at, "profile"), problem, found=entry.profile, allowed=active))
        if entry.device_id in entries:
            errors.append(document.error((*at, "device_id"), "the device is configured twice", found=entry.device_id))
        if not usable_device_id(entry.device_id):
            allowed = "1 to 255 printable characters"
            errors.append(document.error((*at, "device_id"), "not a device id", allowed=allowed))
        errors.extend(_range_errors(document, (*at, "config"), entry.config.get("values") or {}))
        if profile is not None and entry.config.get("options"):
            check = Draft202012Validator(driver_class(profile.driver).options)
            errors.extend(
                document.error((*at, "config", "options", *error.absolute_path), error.message)
                for error in check.iter_errors({**profile.options, **entry.config["options"]})
            )
        entries[entry.device_id] = entry
    return list(entries.values())
