"""OSCORE (RFC 8613) of single messages, with aiocoap's cryptography.

Guarantees: what a device's key does not open is refused and is no arrival; a message that comes a second time as a new
request is refused as a replay; a nonce is never used twice, also across restarts: numbers are taken from ``folder`` in
chunks that are on disk before they are used. After a start the first message of each device is asked for once more,
with Echo (RFC 8613 appendix B.1.2), since the replay window is in memory only.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

from aiocoap import oscore
from aiocoap.message import Message
from aiocoap.numbers import codes

from agents.edges.coap_arrivals import Answered
from agents.edges.coap_requests import Refusal
from agents.edges.coap_security import OscoreKey

SEQUENCE_CHUNK: Final = 256
WINDOW: Final = 32
MIN_SECRET_BYTES: Final = 8


def _hex(digits: str, name: str, device_id: str) -> bytes:
    try:
        return bytes.fromhex(digits)
    except ValueError:
        raise ValueError(f"device {device_id}: {name} is not hexadecimal digits, two for each byte") from None


class DeviceContext(oscore.CanProtect, oscore.CanUnprotect, oscore.SecurityContextUtils):
    """One device's security context; ``path`` keeps its next sequence number. Raises ValueError for what is no key."""

    def __init__(self, key: OscoreKey, path: Path | None) -> None:
        self.device_id = key.device_id
        if key.algorithm not in oscore.algorithms:
            names = ", ".join(oscore.algorithms)
            raise ValueError(f"device {key.device_id}: algorithm {key.algorithm!r}; allowed are {names}")
        self.alg_aead = oscore.algorithms[key.algorithm]
        self.hashfun = oscore.hashfunctions[oscore.DEFAULT_HASHFUNCTION]
        self.sender_id = _hex(key.sender_id, "sender_id", key.device_id)
        self.recipient_id = _hex(key.recipient_id, "recipient_id", key.device_id)
        self.id_context = None if key.id_context is None else _hex(key.id_context, "id_context", key.device_id)
        longest = self.alg_aead.iv_bytes - 6
        if max(len(self.sender_id), len(self.recipient_id)) > longest:
            raise ValueError(f"device {key.device_id}: sender_id and recipient_id have at most {longest} bytes")
        if self.sender_id == self.recipient_id:
            raise ValueError(f"device {key.device_id}: sender_id and recipient_id are the same")
        secret = _hex(key.master_secret, "master_secret", key.device_id)
        if len(secret) < MIN_SECRET_BYTES:
            raise ValueError(f"device {key.device_id}: master_secret has less than {MIN_SECRET_BYTES} bytes")
        self.derive_keys(_hex(key.master_salt, "master_salt", key.device_id), secret)
        self.recipient_replay_window = oscore.ReplayWindow(WINDOW, lambda: None)
        self.echo_recovery = secrets.token_bytes(8)
        self._path = path
        self.sender_sequence_number = self._reserved = 0 if path is None else _next_number(path)

    @property
    def id(self) -> tuple[bytes, bytes | None]:
        """What a message names the context by."""
        return self.recipient_id, self.id_context

    def post_seqnoincrease(self) -> None:
        """Have the number that was just taken on disk before it is used."""
        if self._path is None or self.sender_sequence_number <= self._reserved:
            return
        reserved = self.sender_sequence_number + SEQUENCE_CHUNK
        self._path.parent.mkdir(parents=True, exist_ok=True)
        draft = self._path.with_suffix(".new")
        with draft.open("w", encoding="utf-8") as file:
            json.dump({"device_id": self.device_id, "next": reserved}, file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self._path)
        # Not before: a number that is not on disk would be used again after a restart, and its nonce with it.
        self._reserved = reserved


def _next_number(path: Path) -> int:
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["next"])
    except FileNotFoundError:
        return 0
    except (ValueError, KeyError, TypeError) as exc:
        raise ValueError(f"{path} is damaged ({exc}); give its device a new master_secret and remove the file") from exc


def sequence_file(folder: Path, key: OscoreKey) -> Path:
    """Return where the numbers of a key are kept: of the key, so that a new one of the same device begins anew."""
    material = "/".join((key.master_secret, key.master_salt, key.sender_id, key.recipient_id, key.id_context or ""))
    return folder / f"{hashlib.sha256(material.lower().encode()).hexdigest()[:32]}.json"


class OscoreShield:
    """All devices' contexts. Raises ValueError for keys that cannot be used."""

    def __init__(self, keys: Iterable[OscoreKey], folder: Path) -> None:
        self._contexts: dict[tuple[bytes, bytes | None], DeviceContext] = {}
        self._by_kid: dict[bytes, list[DeviceContext]] = {}
        for key in keys:
            context = DeviceContext(key, sequence_file(folder, key))
            if context.id in self._contexts:
                other = self._contexts[context.id].device_id
                raise ValueError(f"devices {other} and {key.device_id} have the same recipient_id and id_context")
            self._contexts[context.id] = context
            self._by_kid.setdefault(context.recipient_id, []).append(context)

    def open(self, message: Message) -> tuple[Message, str, Callable[[Message], Message]]:
        """Return the request in a message, its device, and what protects the answer; raises Refusal or Answered."""
        if message.code not in (codes.POST, codes.FETCH):
            raise Refusal(codes.METHOD_NOT_ALLOWED, "OSCORE goes with POST or FETCH", "bad_key")
        try:
            context = self._context(oscore.verify_start(message))
            opened, request_id = context.unprotect(message)
        except oscore.ReplayErrorWithEcho as exc:
            raise Answered(exc.to_message(), "echo") from exc
        except oscore.ReplayError as exc:
            raise Refusal(codes.UNAUTHORIZED, "Replay detected", "replay") from exc
        except oscore.DecodeError as exc:
            raise Refusal(codes.BAD_OPTION, "Failed to decode COSE", "bad_key") from exc
        except oscore.ProtectionInvalid as exc:
            raise Refusal(codes.BAD_REQUEST, "Decryption failed", "bad_key") from exc
        except (ValueError, IndexError, UnicodeDecodeError) as exc:
            raise Refusal(codes.BAD_OPTION, "Failed to decode COSE", "bad_key") from exc

        def protect(answer: Message) -> Message:
            protected: Message = context.protect(answer, request_id)[0]
            return protected

        return opened, context.device_id, protect

    def _context(self, unprotected: dict[Any, Any]) -> DeviceContext:
        kid = unprotected.get(oscore.COSE_KID)
        named = unprotected.get(oscore.COSE_KID_CONTEXT)
        found = self._contexts.get((kid, named)) if kid is not None else None
        if found is None and named is None and kid is not None:
            # A device may leave its id context out where its id alone tells who it is.
            candidates = self._by_kid.get(kid, [])
            found = candidates[0] if len(candidates) == 1 else None
        if found is None:
            raise Refusal(codes.UNAUTHORIZED, "Security context not found", "bad_key")
        return found
