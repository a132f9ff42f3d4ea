"""What the tests of the stack share."""

import json
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("kafka", "postgresql", "valkey", "mqtt", "smtp")
CONNECTIONS = {
    "KAFKA_BOOTSTRAP_SERVERS",
    "DATABASE_URL",
    "REDIS_URL",
    "MQTT_URL",
    "SMTP_URL",
    "INBOX_URL",
    "COAP_BIND",
    "WEB_BIND",
    "DATA_DIR",
    "BROKER_PROFILE",
}


def until(holds: Callable[[], object], what: str, seconds: float = 60) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"still not so after {seconds} s: {what}"
        time.sleep(0.02)


def mails(env: dict[str, str]) -> list[dict[str, object]]:
    """Return what the inbox lists."""
    with urllib.request.urlopen(f"{env['INBOX_URL']}/messages.json") as answer:  # noqa: S310 - our own page
        return json.loads(answer.read())
