"""Alerts to a URL, signed.

The request is a POST whose body is the alert as it is on ``iot_alerts``. Guarantees: the signature covers body and
time, so a receiver can tell forgeries and replays (:func:`verify` is what it does); ``X-Headrace-Delivery`` is the
transition's id, the same for a repetition; redirects are not followed, so the alert goes nowhere else than the rule
says. 2xx is delivered; 408, 425, 429 and 5xx, and no answer at all, are later; anything else is refused for good.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Callable
from typing import Final

import aiohttp
import msgspec

from agents.mail.render import transition_of
from agents.mail.send import Fate, Outcome
from devices.alarms.model import Alert

SIGNATURE: Final = "X-Headrace-Signature"
TIMESTAMP: Final = "X-Headrace-Timestamp"
DELIVERY: Final = "X-Headrace-Delivery"
_LATER: Final = frozenset({408, 425, 429})
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9._-]")
# What a log or a dead letter keeps of an answer.
_REPLY_BYTES: Final = 200


def sign(secret: str, timestamp: int, body: bytes) -> str:
    """Return ``sha256=`` and the HMAC-SHA256, in hexadecimal, of ``{timestamp}.{body}`` (timestamp: epoch seconds)."""
    mac = hmac.new(secret.encode(), f"{timestamp}.".encode() + body, hashlib.sha256)
    return f"sha256={mac.hexdigest()}"


def verify(
    secret: str, timestamp: str, body: bytes, signature: str, *, now: float, tolerance_seconds: float = 300
) -> bool:
    """Tell whether a request is from whoever has the secret, and no older than ``tolerance_seconds``."""
    try:
        sent = int(timestamp)
    except ValueError:
        return False
    fresh = abs(now - sent) <= tolerance_seconds
    return hmac.compare_digest(sign(secret, sent, body).encode(), signature.encode("utf-8", "replace")) and fresh


class WebhookSender:
    """Posts alerts; ``clock`` gives epoch seconds. Without a secret requests are not signed."""

    def __init__(self, secret: str, *, timeout_seconds: float, clock: Callable[[], float]) -> None:
        self._secret = secret
        self._timeout = aiohttp.ClientTimeout(total=timeout_seconds)
        self._clock = clock
        self._session: aiohttp.ClientSession | None = None

    async def stop(self) -> None:
        """Close the connections."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def send(self, url: str, alert: Alert) -> Outcome:
        """Post one alert. Raises only ``asyncio.CancelledError``."""
        body = msgspec.json.encode(alert)
        timestamp = int(self._clock())
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "Headrace",
            TIMESTAMP: str(timestamp),
            DELIVERY: _UNSAFE.sub("?", transition_of(alert))[:160],
        }
        if self._secret:
            headers[SIGNATURE] = sign(self._secret, timestamp, body)
        if self._session is None:
            # The environment's proxies are not ours: settings.py reads the environment, nothing else does.
            self._session = aiohttp.ClientSession(timeout=self._timeout, trust_env=False)
        try:
            async with self._session.post(url, data=body, headers=headers, allow_redirects=False) as response:
                reply = (await response.content.read(_REPLY_BYTES)).decode("utf-8", "replace")
                return Outcome(_fate(response.status), response.status, reply)
        except aiohttp.InvalidURL as exc:
            return Outcome(Fate.REFUSED, 0, f"not a URL: {exc}")
        except (aiohttp.ClientError, OSError, TimeoutError) as exc:
            return Outcome(Fate.LATER, 0, f"{type(exc).__name__}: {exc}")


def _fate(status: int) -> Fate:
    if 200 <= status < 300:
        return Fate.SENT
    return Fate.LATER if status in _LATER or status >= 500 else Fate.REFUSED
