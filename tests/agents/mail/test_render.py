"""agents.mail.render: both languages, both parts, the chart, and nothing that a device's name could smuggle in."""

from __future__ import annotations

import email
import email.policy
import io
import math
from datetime import timedelta
from email.message import EmailMessage
from html.parser import HTMLParser
from string import Formatter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from agents.mail.render import Mail, Renderer, many_lines, one_line, wire_address
from agents.mail.texts import _TEXTS, Words
from tests.agents.mail.conftest import START, make_alert

ENGLISH = Renderer("Headrace <alerts@example.org>", "https://headrace.example.org/", "en", "UTC")
FRENCH = Renderer("alerts@example.org", "https://headrace.example.org", "fr", "Europe/Paris")
HISTORY = [(START - timedelta(minutes=60 - n), 70 + n * 0.4) for n in range(61)]


def parsed(mail: Mail, *recipients: str) -> EmailMessage:
    message = email.message_from_bytes(mail.bytes_to(recipients or ["ann@example.org"]), policy=email.policy.default)
    assert isinstance(message, EmailMessage)
    assert not message.defects
    return message


def part(message: EmailMessage, kind: str) -> str:
    found = message.get_body((kind,))
    assert found is not None
    return str(found.get_content())


class Texts(HTMLParser):
    """The text of an HTML part, its links, its pictures and the elements that it has."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text: list[str] = []
        self.links: list[str] = []
        self.pictures: list[dict[str, str | None]] = []
        self.elements: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        known = dict(attrs)
        assert not any(name.startswith("on") for name in known)
        if tag == "a":
            self.links.append(str(known["href"]))
        elif tag == "img":
            self.pictures.append(known)

    def handle_data(self, data: str) -> None:
        self.text += [data.strip()] if data.strip() else []


def test_an_opening_in_english() -> None:
    """Subject with level, device, value and unit; both parts say all of it; links to the device and to acknowledge."""
    message = parsed(ENGLISH.alert(make_alert(), START), "ann@example.org", "bob@example.org")
    assert message["Subject"] == "[CRITICAL] Press 4: oil = 95.25 °C (Machine runs hot)"
    assert message["From"] == "Headrace <alerts@example.org>"
    assert message["To"] == "ann@example.org, bob@example.org"
    assert message["Auto-Submitted"] == "auto-generated"
    assert message["List-Unsubscribe"] == "<mailto:alerts@example.org?subject=unsubscribe%20machine-hot>"
    assert message["Message-ID"] == f"<{0:032x}-opened@example.org>"
    assert message["In-Reply-To"] is None
    assert message["Date"].datetime == START
    html = Texts(part(message, "html"))
    for said in (part(message, "plain"), "\n".join(html.text)):
        for wanted in ("CRITICAL", "Press 4", "95.25\N{NO-BREAK SPACE}°C", "> 90\N{NO-BREAK SPACE}°C", "machine-hot"):
            assert wanted in said
        assert "16 June 2026, 14:05:09 UTC" in said
        assert "Press 4 is at 95.25 °C" in said
    assert html.links == [
        "https://headrace.example.org/?device=press-4",
        f"https://headrace.example.org/?alert={0:032x}",
    ]
    assert all(link in part(message, "plain") for link in html.links)


def test_a_resolution_in_french() -> None:
    """Decimal comma, local time, how long it lasted; in the conversation of its opening; nothing to acknowledge."""
    alert = make_alert(
        transition="resolved",
        is_resolved=True,
        end_date=START + timedelta(hours=2, seconds=5),
        error_value=79.5,
        metadata={"reason": "rule_changed"},
    )
    message = parsed(FRENCH.alert(alert, START))
    assert message["Subject"] == "[RÉSOLU] Press 4: oil = 79,5 °C (Machine runs hot)"
    assert message["In-Reply-To"] == message["References"] == f"<{0:032x}-opened@example.org>"
    assert message["Content-Language"] == "fr"
    text = part(message, "plain")
    for wanted in (
        "Tout est rentré dans l’ordre",
        "16 juin 2026 à 16:05:09 CEST",
        "2\N{NO-BREAK SPACE}h",
        "La règle a été modifiée",
    ):
        assert wanted in text
    assert "95.25" not in text
    assert "Acquitter" not in text + part(message, "html")


@pytest.mark.parametrize(
    ("fields", "subject"),
    [
        (
            {"math_operator": "no_data", "threshold": 300, "error_value": None, "field_name": ""},
            "[CRITICAL] Press 4: no data for 5 min (Machine runs hot)",
        ),
        (
            {
                "transition": "reminded",
                "metadata": {"reason": "still_open", "transition_id": f"{0:032x}-reminded-2"},
                "level": "WARNING",
            },
            "[WARNING] Press 4: oil = 95.25 °C (Machine runs hot, reminder 2)",
        ),
        (
            {
                "alarm_type": "Status",
                "math_operator": "==",
                "error_value": "LEAK",
                "threshold": "LEAK",
                "level": "INFO",
            },
            "[INFO] Press 4: oil = LEAK (Machine runs hot)",
        ),
        (
            {"error_value": True, "math_operator": "==", "threshold": True, "metadata": {"unit": ""}},
            "[CRITICAL] Press 4: oil = true (Machine runs hot)",
        ),
        (
            {"math_operator": "outside", "threshold": [2, 8.5], "sensor_name": "", "name": ""},
            "[CRITICAL] press-4: oil = 95.25 °C (machine-hot)",
        ),
    ],
)
def test_subjects(fields: dict[str, Any], subject: str) -> None:
    """Silence, reminders, statuses and ranges have a subject that says it all."""
    assert parsed(ENGLISH.alert(make_alert(**fields), START))["Subject"] == subject


def test_the_chart() -> None:
    """An inline PNG that the HTML shows by its id, small, twice the pixels, with a text that says the same."""
    message = parsed(ENGLISH.alert(make_alert(), START, [*HISTORY, (START, None), (START, math.nan), (START, "x")]))
    (picture,) = [one for one in message.walk() if one.get_content_type() == "image/png"]
    assert picture.get_content_disposition() == "inline"
    (shown,) = Texts(part(message, "html")).pictures
    assert picture["Content-ID"] == f"<{str(shown['src']).removeprefix('cid:')}>"
    assert "61 values between 70 and 94\N{NO-BREAK SPACE}°C" in str(shown["alt"])
    assert str(shown["alt"]) in part(message, "plain")
    data = picture.get_content()
    assert len(data) < 20_000
    assert Image.open(io.BytesIO(data)).size == (1120, 360)


@pytest.mark.parametrize("unit", ["$\\frac{", "°C", "µg/m³", "$x$", ""])
@pytest.mark.parametrize("values", [[1.0, 1.0], [0, 1, 0, 1], [1e300, -1e300], [5e-324, 1e-300]])
def test_charts_of_odd_things(unit: str, values: list[float]) -> None:
    """No unit and no values keep a chart from being drawn."""
    history = [(START + timedelta(seconds=n), value) for n, value in enumerate(values)]
    mail = ENGLISH.alert(make_alert(metadata={"unit": unit}, threshold=[0, 1]), START, history)
    assert any(one.get_content_type() == "image/png" for one in parsed(mail).walk())


@pytest.mark.parametrize("history", [[], [(START, 5)], [(START, "a"), (START, True), (START, None)]])
def test_without_a_chart(history: list[Any]) -> None:
    """Fewer than two numbers are no chart, and the HTML shows no picture."""
    message = parsed(ENGLISH.alert(make_alert(), START, history))
    assert message.get_content_type() == "multipart/alternative"
    assert Texts(part(message, "html")).pictures == []


def test_a_digest() -> None:
    """All that was held back, in order, with levels and links; the same again is the same message."""
    alerts = [make_alert(n, sensor_name=f"Device {n}") for n in range(3)]
    mail = FRENCH.digest(alerts, START)
    message = parsed(mail)
    assert message["Subject"] == "3 messages d’alarme retenus"
    text = part(message, "plain")
    assert [text.index(f"Device {n}") for n in range(3)] == sorted(text.index(f"Device {n}") for n in range(3))
    assert [link.rpartition("=")[2] for link in Texts(part(message, "html")).links[:3]] == [
        alert.id for alert in alerts
    ]
    assert FRENCH.digest(alerts, START + timedelta(hours=1)).message_id == mail.message_id
    assert FRENCH.digest(alerts[:2], START).message_id != mail.message_id


def test_a_digest_of_very_many() -> None:
    """Beyond 500 the digest counts by rule, and stays a mail that a server takes."""
    message = parsed(ENGLISH.digest([make_alert(n, name=f"Rule {n % 2}") for n in range(3000)], START))
    assert "and 2500 more: Rule 0 (1250), Rule 1 (1250)" in part(message, "plain")
    assert len(bytes(message)) < 2_000_000


anything = st.text(max_size=60) | st.sampled_from(
    [
        "x\r\nBcc: eve@example.org\r\n\r\nhello",
        "a\nb",
        "</title><script>alert(1)</script>",
        '"><img src=x onerror=alert(1)>',
        "{{ 7*7 }}{% raw %}",
        "\ud800",
        "\u202e gnp.exe",
        "=?utf-8?q?x=0d=0aBcc:_eve@x?=",
        "é" * 60,
        "\x00\x85\u2028",
    ]
)


@settings(deadline=None, max_examples=150)
@given(st.tuples(anything, anything, anything, anything, anything), st.sampled_from([ENGLISH, FRENCH]))
def test_names_add_no_header_and_no_markup(names: tuple[str, ...], renderer: Renderer) -> None:
    """Whatever devices, labels, rules and units are called, headers and elements are those of any other mail."""
    device, label, name, message_text, unit = names
    plain = make_alert(metadata={"reason": "data_is_back"})
    odd = make_alert(
        sensor_name=device,
        device_id=device or "d",
        field_name=label,
        name=name,
        alarm_id=name or "r",
        message=message_text,
        error_value=message_text,
        id=device or "i",
        request_id=label,
        metadata={
            "unit": unit,
            "index": label,
            "display_name": unit,
            "transition_id": device or "t",
            "reason": "data_is_back",
        },
    )
    ours = parsed(renderer.alert(odd, START))
    usual = parsed(renderer.alert(plain, START))
    assert set(ours.keys()) <= {*usual.keys(), "In-Reply-To", "References"}
    assert ours["To"] == usual["To"]
    assert ours["Subject"] == one_line(str(ours["Subject"]), 200)
    shown = one_line(name, 30).rstrip("…").replace("\N{NO-BREAK SPACE}", " ").strip()
    assert shown in str(ours["Subject"]) or len(str(ours["Subject"])) >= 150
    assert Texts(part(ours, "html")).elements <= {*Texts(part(usual, "html")).elements, "p"}
    history = [(START, 1), (START + timedelta(seconds=1), 2)] if device.startswith("=?") else []
    wire = renderer.alert(odd, START, history).bytes_to(["ann@example.org"])
    assert b"\r\nbcc" not in wire.partition(b"\r\n\r\n")[0].lower()
    assert wire.isascii()
    assert max(map(len, wire.split(b"\r\n"))) <= 998
    assert b"\n" not in wire.replace(b"\r\n", b"")
    assert parsed(renderer.digest([odd, plain], START))["Subject"] == renderer.words("digest_subject", count=2)


@settings(deadline=None)
@given(st.text(max_size=300))
def test_subjects_come_through_as_they_are(text: str) -> None:
    """A subject of any characters is read at the other end as it was written."""
    message = parsed(ENGLISH.alert(make_alert(sensor_name=text, error_value=1, field_name="f"), START))
    device = one_line(text).replace("\N{NO-BREAK SPACE}", " ").strip() or "press-4"
    assert message["Subject"] == one_line(f"[CRITICAL] {device}: f = 1 °C (Machine runs hot)", 180)


def test_cleaning() -> None:
    """Headers have one line and a limit, bodies keep their lines."""
    assert one_line("  a\r\n\tb\x00c  ") == "a b c"
    assert one_line("x" * 300) == "x" * 199 + "…"
    assert many_lines("a\r\nb\rc\x07\n\n") == "a\nb\nc"


@pytest.mark.parametrize(
    "text", ["", "a", "@b", "a@", "a b@c", "a@b\r\n", "a,c@d", "<a@b>", "=?x?q?=0D?=@b", "a@" + "é" * 300, "a\u2028@b"]
)
def test_addresses_that_are_none(text: str) -> None:
    """What is no address is never made one."""
    with pytest.raises(ValueError):
        wire_address(text)


def test_the_sender_must_be_an_address() -> None:
    """A sender that is none is refused when the mailer is made."""
    with pytest.raises(ValueError, match="MAIL_FROM"):
        Renderer("nobody", "http://x")


def test_both_languages_say_the_same_things() -> None:
    """Each language has every text, with the same blanks to fill in."""
    english, french = _TEXTS["en"], _TEXTS["fr"]
    assert english.keys() == french.keys()
    for key, text in english.items():
        blanks, theirs = ({name for _, name, _, _ in Formatter().parse(one) if name} for one in (text, french[key]))
        assert blanks == theirs, key


def test_words() -> None:
    """Durations in their two largest units, conditions in words, numbers as the language writes them."""
    english, french = Words("en"), Words("fr", "Europe/Paris")
    assert english.duration(93784).replace("\N{NO-BREAK SPACE}", "") == "1d 2h"
    assert french.duration(0).replace("\N{NO-BREAK SPACE}", "") == "0s"
    assert english.condition("in", [2, 8.5], "°C").replace("\N{NO-BREAK SPACE}", " ") == "within 2 to 8.5 °C"
    assert french.condition("outside", [2.5, 8], "").replace("\N{NO-BREAK SPACE}", " ") == "hors de 2,5 à 8"
    assert english.condition("outside", ["A", "B"], "") == "none of A, B"
    assert english.condition(">=", 5, "") == "≥ 5"
    assert french.condition("changed", None, "") == "changement"
