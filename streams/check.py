"""What ``faust -A streams check`` finds: everything that is wrong with settings and YAML, all at once.

Guarantees: nothing is connected unless asked for; one wrong thing never hides another (only a setting that cannot be
read hides what is derived from it); no finding holds a secret. :func:`collect` returns the findings; an empty list is a
set-up that a worker starts with.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from devices.alarms import rules
from devices.configfile import ConfigError
from devices.registry import Registry
from settings import Settings, SettingsError, tls_context
from streams.probes import Probe, probe_all

ENVIRONMENT = "environment"


class Finding(NamedTuple):
    """One thing that is wrong: in which file (or ``environment``) and line (0: none), what was found, what is allowed.

    ``what`` names the variable, the key or the service.
    """

    file: str
    line: int
    what: str
    found: str = ""
    allowed: str = ""

    def __str__(self) -> str:
        text = f"{self.file}:{self.line}: {self.what}" if self.line else f"{self.file}: {self.what}"
        text += f"; found {self.found}" if self.found else ""
        return text + (f"; allowed: {self.allowed}" if self.allowed else "")


def read_settings(env: Mapping[str, str]) -> tuple[Settings | None, list[Finding]]:
    """Return the settings of ``env``, None where they cannot be used, and what is wrong with them."""
    try:
        settings = Settings.from_env(env)
    except SettingsError as exc:
        return None, [Finding(ENVIRONMENT, 0, p.variable, p.found, p.allowed) for p in exc.problems]
    return settings, [*_tls(settings), *_folders(settings)]


def _tls(settings: Settings) -> Iterator[Finding]:
    groups = (
        ("KAFKA_SSL_CAFILE", settings.kafka_ssl_cafile, settings.kafka_ssl_certfile, settings.kafka_ssl_keyfile),
        ("MQTT_TLS_CAFILE", settings.mqtt_tls_cafile, settings.mqtt_tls_certfile, settings.mqtt_tls_keyfile),
        ("SMTP_TLS_CAFILE", settings.smtp_tls_cafile, None, None),
    )
    for variable, cafile, certfile, keyfile in groups:
        steps: list[tuple[str, Path | None, Path | None, Path | None]] = [(variable, cafile, None, None)]
        if certfile is not None:
            steps.append((variable.replace("CAFILE", "CERTFILE"), None, certfile, keyfile))
        for name, authority, certificate, key in steps:
            try:
                tls_context(authority, certificate, key)
            except (ssl.SSLError, OSError) as exc:
                wanted = "a certificate and its key, PEM" if certificate else "certificates of authorities, PEM"
                yield Finding(ENVIRONMENT, 0, name, f"{certificate or authority} ({exc})", wanted)


def _folders(settings: Settings) -> Iterator[Finding]:
    folder = settings.data_dir.absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        yield Finding(ENVIRONMENT, 0, "DATA_DIR", str(folder), f"a folder that can be written; {there} cannot")


def check_config(folder: Path) -> list[Finding]:
    """Return what is wrong with the YAML under ``folder``: profiles, devices, alarm rules."""
    registry, errors = Registry.read(folder)
    alarms = folder / "alarms.yaml"
    if alarms.exists():
        # Profiles that could not be read are not "unknown" to a rule that names them.
        known = None if errors else {profile.name: None for profile in registry.profiles}
        errors = [*errors, *(replace(error, file=str(alarms)) for error in rules.read(alarms, profiles=known)[1])]
    return [_of_config(error) for error in errors]


def _of_config(error: ConfigError) -> Finding:
    what = f"{error.pointer}: {error.message}" if error.pointer else error.message
    return Finding(error.file, error.line, what, error.found, error.allowed)


def of_probe(probe: Probe) -> Finding:
    """Return the finding of a service that didn't answer."""
    return Finding(ENVIRONMENT, 0, f"{probe.variable}={probe.address}", probe.problem or "", probe.advice)


class Examination(NamedTuple):
    """All that a check found; ``settings`` is None where they cannot be used, ``probes`` is empty unless asked for."""

    settings: Settings | None
    config_path: Path
    findings: list[Finding]
    probes: list[Probe]


def examine(settings_env: Mapping[str, str], connect: bool) -> Examination:
    """Check the settings of ``settings_env``, the YAML that they name and, with ``connect``, every service.

    Services are tried only with settings that can be used. Not to be called from a running event loop.
    """
    settings, findings = read_settings(settings_env)
    folder = settings.config_path if settings else Path(settings_env.get("CONFIG_PATH", "").strip() or "config/")
    findings += check_config(folder)
    probes = asyncio.run(probe_all(settings)) if connect and settings is not None else []
    findings += [of_probe(probe) for probe in probes if probe.problem]
    return Examination(settings, folder, findings, probes)


def collect(settings_env: Mapping[str, str], connect: bool) -> list[Finding]:
    """Return the findings of :func:`examine`."""
    return examine(settings_env, connect).findings
