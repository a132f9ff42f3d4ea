"""What tests of drivers need, one's own included: an uplink from bytes, the shipped registry, the README's promise.

``uplink`` builds what a driver is handed; ``read`` runs the whole way from bytes to validated readings over the shipped
profiles, inactive ones too; ``table`` makes readings easy to compare.
"""

from __future__ import annotations

from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import yaml

from devices.configfile import ConfigErrors
from devices.model import Reading, Uplink
from devices.pipeline import Outcome
from devices.pipeline import read as pipeline_read
from devices.profiles import Profile, compile_profile
from devices.registry import SCHEMAS, Registry

NOW: Final = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
FAMILIES: Final = Path(__file__).resolve().parent


def uplink(
    data: bytes | str,
    route: str,
    *,
    protocol: str = "mqtt",
    device_id: str = "d1",
    received_at: datetime = NOW,
    request_id: str = "r1",
) -> Uplink:
    """Build the uplink of one message; text is sent as UTF-8."""
    raw = data.encode() if isinstance(data, str) else data
    try:
        text: str | None = raw.decode()
    except UnicodeDecodeError:
        text = None
    return Uplink(
        request_id=request_id,
        received_at=received_at,
        device_id=device_id,
        protocol=protocol,
        route=route,
        text=text,
        data=raw,
        metadata={},
    )


def shipped_profile(name: str) -> Profile:
    """Compile a profile of ``config/profiles``, made active."""
    text = (SCHEMAS / "profiles" / f"{name}.yaml").read_text(encoding="utf-8")
    return compile_profile({**yaml.safe_load(text), "active": True})


@lru_cache(maxsize=1)
def registry() -> Registry:
    """Return a registry of all shipped profiles, the inactive ones made active; shared, so of drivers without state
    only."""
    return fresh_registry()


def fresh_registry() -> Registry:
    """Return a new registry of all shipped profiles, the inactive ones made active, as they match."""
    found, errors = Registry.read(SCHEMAS, with_inactive=True)
    if errors:
        raise ConfigErrors(errors)
    return found


def read(message: Uplink, using: Registry | None = None) -> Outcome:
    """Match, decode and validate one message."""
    return pipeline_read(message, using or registry())


def table(readings: list[Reading]) -> dict[str, dict[str, Any]]:
    """Return {index: {label: value}} of readings of one time."""
    return {r.index: dict(zip(r.labels, r.values, strict=True)) for r in readings}


def readme_shows(family: str, profile: str) -> bool:
    """Tell whether the family's README shows its profile as the file is, in a YAML block."""
    readme = (FAMILIES / family / "README.md").read_text(encoding="utf-8")
    sample = (SCHEMAS / "profiles" / f"{profile}.yaml").read_text(encoding="utf-8")
    return f"```yaml\n{sample}```" in readme
