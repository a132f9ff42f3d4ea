"""Writes sample mails as HTML files that a browser shows, for those who change the templates.

    python -m tools.mail_preview FOLDER

Each file is the HTML part of a mail as it is sent, its chart put into the page. The pictures in docs/images were taken
of them: ``chromium --headless --hide-scrollbars --window-size=660,900 --screenshot=mail-en.png opened-en.html``.
"""

from __future__ import annotations

import base64
import email
import email.policy
import math
import sys
from datetime import UTC, datetime, timedelta
from email.message import EmailMessage
from pathlib import Path
from typing import Any

from agents.mail.render import Mail, Renderer
from devices.alarms.model import Alert

_START = datetime(2026, 6, 16, 14, 5, 9, tzinfo=UTC)
_WORDS = {
    "en": {"name": "Machine runs hot", "device": "Press 4, hall B", "value": "Oil temperature", "zone": "UTC"},
    "fr": {
        "name": "Machine en surchauffe",
        "device": "Presse 4, hall B",
        "value": "Température d’huile",
        "zone": "Europe/Paris",
    },
}


def sample(language: str, **fields: Any) -> Alert:
    """Return an alert as the engine makes it."""
    words = _WORDS[language]
    about = {
        "transition": "opened",
        "index": "oil",
        "unit": "°C",
        "display_name": words["value"],
        **fields.pop("metadata", {}),
    }
    identity = "3f1c0a9be7d24c6f8a51b0c2d3e4f506"
    about["transition_id"] = f"{identity}-{about['transition']}"
    known: dict[str, Any] = {
        "id": identity,
        "alarm_id": "machine-hot",
        "name": words["name"],
        "message": "",
        "level": "CRITICAL",
        "alarm_type": "Measure",
        "device_id": "press-4",
        "sensor_name": words["device"],
        "field_name": "oil.temperature",
        "error_value": 95.25,
        "threshold": 90,
        "math_operator": ">",
        "start_date": _START,
        "end_date": None,
        "is_resolved": False,
        "recipients": "operators@example.org",
        "request_id": "",
        "timestamp": _START,
        "metadata": about,
    }
    return Alert(**{**known, **fields})


def page(mail: Mail) -> str:
    """Return the HTML part of a mail with its chart inside."""
    message = email.message_from_bytes(mail.bytes_to(["operators@example.org"]), policy=email.policy.default)
    assert isinstance(message, EmailMessage)
    body = message.get_body(("html",))
    assert body is not None
    html = str(body.get_content())
    for part in message.walk():
        if part.get_content_type() == "image/png":
            data = base64.b64encode(part.get_payload(decode=True) or b"").decode()  # type: ignore[arg-type]
            html = html.replace(f"cid:{str(part['Content-ID'])[1:-1]}", f"data:image/png;base64,{data}")
    return html


def main(folder: Path) -> None:
    """Write an opening, a resolution and a digest in each language."""
    folder.mkdir(parents=True, exist_ok=True)
    heat = [
        (_START - timedelta(minutes=120 - n), 78 + 17.25 * (n / 120) ** 4 + 1.2 * math.sin(n / 4))
        for n in range(0, 121, 2)
    ]
    later = _START + timedelta(minutes=47)
    cool = heat + [(_START + timedelta(minutes=n), 95.2 - 12 * n / 47 + 0.8 * math.sin(n / 3)) for n in range(2, 48, 2)]
    for language, words in _WORDS.items():
        renderer = Renderer("Headrace <alerts@example.org>", "https://headrace.example.org", language, words["zone"])
        closed = sample(
            language,
            error_value=83.4,
            is_resolved=True,
            end_date=later,
            timestamp=later,
            metadata={"transition": "resolved"},
        )
        mails = {
            "opened": renderer.alert(sample(language), _START, heat),
            "resolved": renderer.alert(closed, later, cool),
            "digest": renderer.digest([sample(language), closed], later),
        }
        for name, mail in mails.items():
            file = folder / f"{name}-{language}.html"
            file.write_text(page(mail), encoding="utf-8")
            print(file)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m tools.mail_preview FOLDER")
    main(Path(sys.argv[1]))
