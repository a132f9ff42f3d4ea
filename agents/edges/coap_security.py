"""Keys of CoAP devices: the files of ``COAP_OSCORE_KEYS`` and ``COAP_DTLS_KEYS``.

Guarantee: a file that cannot be used as it is ends the start (:class:`KeysError` says where and why), and no message
ever has a key in it. A device with a key is believed with that key alone, over whatever transport.

OSCORE, one security context a device (RFC 8613; ids and secrets are hexadecimal digits, the first two are needed)::

    devices:
      - device_id: 282c02424eed
        recipient_id: "01"            # the sender id that the device writes with
        master_secret: 0102030405060708090a0b0c0d0e0f10
        sender_id: ""                 # what the server writes with; the default is empty
        master_salt: 9e7ca92223786340
        id_context: ""
        algorithm: AES-CCM-16-64-128

DTLS, one pre-shared key a device (``identity`` is the device's id unless said otherwise)::

    devices:
      - device_id: dev-7
        identity: dev-7
        key: 73757065722d736563726574
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from agents.edges.coap_exchanges import Received
from devices.profiles import usable_device_id

if TYPE_CHECKING:
    from agents.edges.coap_arrivals import Shield
    from agents.edges.coap_dtls import DtlsListener


class KeysError(Exception):
    """A key file cannot be used; the message names the setting, the file, and what is wrong in it."""


class OscoreKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One device's OSCORE context, as the file has it: hexadecimal digits."""

    device_id: str
    recipient_id: str
    master_secret: str
    sender_id: str = ""
    master_salt: str = ""
    id_context: str | None = None
    algorithm: str = "AES-CCM-16-64-128"


class DtlsKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One device's pre-shared key: hexadecimal digits."""

    device_id: str
    key: str
    identity: str | None = None


class _OscoreFile(msgspec.Struct, forbid_unknown_fields=True):
    devices: list[OscoreKey]


class _DtlsFile(msgspec.Struct, forbid_unknown_fields=True):
    devices: list[DtlsKey]


@dataclass(frozen=True)
class Security:
    """What secures CoAP: OSCORE's ``shield``, DTLS's identities (device and key), the devices that have a key."""

    shield: Shield | None = None
    identities: dict[bytes, tuple[str, bytes]] = field(default_factory=dict)
    devices: frozenset[str] = frozenset()

    def listener(self, host: str, port: int, received: Received) -> DtlsListener | None:
        """Return what serves ``coaps``, None where no device has a pre-shared key."""
        if not self.identities:
            return None
        from agents.edges.coap_dtls import DtlsListener

        return DtlsListener(host, port, self.identities, received)


def load_security(oscore_keys: Path | None, dtls_keys: Path | None, folder: Path) -> Security:
    """Read the key files; ``folder`` is where OSCORE's sequence numbers are kept. Raises KeysError."""
    shield = None
    identities: dict[bytes, tuple[str, bytes]] = {}
    devices: set[str] = set()
    if oscore_keys is not None:
        from agents.edges.coap_oscore import OscoreShield

        found = _read("COAP_OSCORE_KEYS", oscore_keys, _OscoreFile).devices
        _check("COAP_OSCORE_KEYS", oscore_keys, found)
        try:
            shield = OscoreShield(found, folder)
        except ValueError as exc:
            raise KeysError(f"COAP_OSCORE_KEYS={oscore_keys}: {exc}") from exc
        devices |= {key.device_id for key in found}
    if dtls_keys is not None:
        try:
            import DTLSSocket  # noqa: F401
        except ImportError as exc:
            raise KeysError(
                f"COAP_DTLS_KEYS={dtls_keys} is set, and DTLSSocket is not installed: pip install '.[dtls]' builds it "
                "with gcc, make, autoconf and libtool (apt-get install them)"
            ) from exc
        keys = _read("COAP_DTLS_KEYS", dtls_keys, _DtlsFile).devices
        _check("COAP_DTLS_KEYS", dtls_keys, keys)
        for number, key in enumerate(keys):
            where = f"COAP_DTLS_KEYS={dtls_keys}: devices[{number}]"
            identity = (key.identity or key.device_id).encode()
            if identity in identities:
                raise KeysError(f"{where}: identity {identity.decode()!r} is there twice")
            identities[identity] = (key.device_id, _bytes(key.key, f"{where}.key", 4, 32))
            devices.add(key.device_id)
    return Security(shield, identities, frozenset(devices))


def _read(variable: str, path: Path, kind: type[Any]) -> Any:
    try:
        return msgspec.yaml.decode(path.read_bytes(), type=kind)
    except OSError as exc:
        raise KeysError(f"{variable}={path}: {exc.strerror}") from exc
    except msgspec.ValidationError as exc:
        raise KeysError(f"{variable}={path}: {exc} (write digits in quotes); docs/coap.md has an example") from exc
    except msgspec.DecodeError as exc:
        # The parser's own words would show a line of the file, and with it a key.
        raise KeysError(f"{variable}={path}: not YAML") from exc


def _check(variable: str, path: Path, keys: list[Any]) -> None:
    seen: set[str] = set()
    for number, key in enumerate(keys):
        if not usable_device_id(key.device_id):
            raise KeysError(f"{variable}={path}: devices[{number}]: {key.device_id!r:.80} is no device id")
        if key.device_id in seen:
            raise KeysError(f"{variable}={path}: devices[{number}]: device {key.device_id} is there twice")
        seen.add(key.device_id)


def _bytes(digits: str, where: str, least: int, most: int) -> bytes:
    try:
        found = bytes.fromhex(digits)
    except ValueError:
        raise KeysError(f"{where}: not hexadecimal digits, two for each byte") from None
    if not least <= len(found) <= most:
        raise KeysError(f"{where}: {len(found)} bytes; allowed are {least} to {most}")
    return found
