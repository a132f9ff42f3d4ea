"""From an alert to the bytes of a mail.

Guarantees: what a device, a rule or a label is called can neither add a header nor a recipient nor markup: every header
goes through :func:`one_line`, HTML is escaped by the template engine, addresses are taken only if they are one. The
Message-ID is made of the transition alone, so the same transition is the same message however often it is sent. Both
parts say the same; the chart has an alternative text and no mail depends on it.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from email.header import Header
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import EmailPolicy
from email.utils import format_datetime, parseaddr
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from agents.mail.chart import draw, usable
from agents.mail.texts import Words
from devices.alarms.alerts import text_of
from devices.alarms.model import Alert


class _Policy(EmailPolicy):
    """The standard policy, but for texts: folding, it loses spaces between two encoded words, and what is already one
    it leaves as it is. ``email.header`` encodes a text as a whole.
    """

    def fold_binary(self, name: str, value: Any) -> bytes:
        """Return the header's lines."""
        plain = str(value).isascii() and "=?" not in str(value)
        if plain or name.lower() not in ("subject", "from"):
            return super().fold_binary(name, value)
        sender = value.addresses[0] if name.lower() == "from" else None
        text = sender.display_name if sender else str(value)
        encoded = Header(text, "utf-8", header_name=name).encode(linesep="\r\n")
        return f"{name}: {encoded}{f' <{sender.addr_spec}>' if sender else ''}\r\n".encode()


# 7bit: servers without 8BITMIME take it as it is.
_POLICY: Final = _Policy(linesep="\r\n", cte_type="7bit")
_TEMPLATES: Final = Path(__file__).resolve().parent / "templates"
_SUBJECT_CHARS: Final = 180
# A digest lists so many; of the rest it says how many there were of each rule.
DIGEST_LINES: Final = 500
# RFC 5322 atom characters that every server and client takes inside a Message-ID.
_ID_UNSAFE: Final = re.compile(r"[^A-Za-z0-9._-]")
_SPACES: Final = re.compile(" +")
_EMPTY_FIRST_LINE: Final = re.compile(rb"(?m)^([A-Za-z-]+): ?\r\n[ \t]+")
_COLOURS: Final = {"CRITICAL": "#b3261e", "WARNING": "#b26a00", "INFO": "#0b5cad"}
_RESOLVED_COLOUR: Final = "#1b7a3d"

History = Sequence[tuple[datetime, Any]]


class Mail(NamedTuple):
    """One message, without its recipients: ``bytes_to`` makes the bytes for some of them."""

    message_id: str
    message: EmailMessage

    def bytes_to(self, recipients: Sequence[str]) -> bytes:
        """Return the message, CRLF and 7 bit, addressed to ``recipients`` (bare addresses).

        An address that is not ASCII before its ``@`` needs a server with SMTPUTF8, and header lines in UTF-8. Raises
        ``ValueError`` for what is no address.
        """
        message = self.message
        del message["To"]
        addresses = [wire_address(recipient) for recipient in recipients]
        message["To"] = [Address("", *address.rsplit("@", 1)) for address in addresses]
        international = not all(address.isascii() for address in addresses)
        wire = message.as_bytes(policy=_POLICY.clone(utf8=True) if international else _POLICY)
        head, separator, body = wire.partition(b"\r\n\r\n")
        # Folding puts a word that is too long on a line of its own; some readers take the empty first line for all.
        return _EMPTY_FIRST_LINE.sub(rb"\1: ", head) + separator + body


def one_line(text: str, limit: int = 200) -> str:
    """Return ``text`` fit for a header: no control, format, line or surrogate characters, at most ``limit`` long."""
    clean = "".join(" " if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") else char for char in text)
    clean = _SPACES.sub(" ", clean).strip(" \N{NO-BREAK SPACE}")
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"


def many_lines(text: str, limit: int = 4000) -> str:
    """Return ``text`` fit for a body: line ends stay, other control characters go."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return "\n".join(one_line(line, limit) for line in lines)[:limit].strip()


def wire_address(text: str) -> str:
    """Return an address as the wire takes it, its domain in ASCII. Raises ``ValueError`` for one that cannot be."""
    local, _, domain = text.rpartition("@")
    if (
        not local
        or not domain
        or one_line(text, 320) != text
        or "=?" in text
        or any(char in text for char in ' <>,;:"()\\')
    ):
        raise ValueError(f"{text!r} is not a mail address")
    try:
        return f"{local}@{domain if domain.isascii() else domain.encode('idna').decode()}"
    except UnicodeError as exc:
        raise ValueError(f"{text!r} is not a mail address: {exc}") from exc


class Renderer:
    """Makes mails in one language.

    ``mail_from`` is an address, or a name with one in angle brackets. ``base_url`` has no slash at its end. Raises
    ``ValueError`` for a sender that is no address.
    """

    def __init__(self, mail_from: str, base_url: str, language: str = "en", time_zone: str = "UTC") -> None:
        name, self.sender = parseaddr(mail_from)
        if "@" not in self.sender:
            raise ValueError(f"MAIL_FROM {mail_from!r} is not a mail address")
        local, _, self.domain = self.sender.rpartition("@")
        self._from = Address(display_name=one_line(name), username=local, domain=self.domain)
        self._base = base_url.rstrip("/")
        self.words = Words(language, time_zone)
        self._environment = Environment(
            loader=FileSystemLoader(_TEMPLATES),
            autoescape=select_autoescape(enabled_extensions=("html.j2",), default_for_string=False),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._environment.globals["t"] = self.words

    def message_id(self, identity: str) -> str:
        """Return the Message-ID of a transition: the same for the same."""
        if len(identity) > 120 or _ID_UNSAFE.search(identity) or not identity:
            identity = hashlib.blake2b(identity.encode("utf-8", "replace"), digest_size=16).hexdigest()
        return f"<{identity}@{self.domain}>"

    def alert(self, alert: Alert, now: datetime, history: History = ()) -> Mail:
        """Make the mail of one transition. ``history``: the last readings of its series; drawn where two are numbers.

        Draws on the calling thread; see :mod:`agents.mail.chart`.
        """
        view = self.view(alert)
        points = usable(history)
        chart = b""
        if len(points) >= 2:
            unit = str(view["unit"])
            chart = draw(points, alert.threshold if alert.math_operator != "no_data" else None, unit, self.words.zone)
            view["chart_text"] = self._chart_text(view, points, alert)
        message_id = self.message_id(transition_of(alert))
        view["chart_id"] = f"chart.{message_id[1:-1]}" if chart else ""
        message = self._message(str(view["subject"]), "alert", view, now)
        message["Message-ID"] = message_id
        opened = self.message_id(f"{alert.id}-opened")
        if opened != message_id:
            # Clients show the life of an alarm as one conversation.
            message["In-Reply-To"] = opened
            message["References"] = opened
        message["X-Headrace-Alert"] = _ID_UNSAFE.sub("?", alert.id)[:160]
        message["X-Headrace-Transition"] = _ID_UNSAFE.sub("?", transition_of(alert))[:160]
        if alert.level == "CRITICAL" and not alert.is_resolved:
            message["Importance"] = "high"
        if chart:
            html = list(message.iter_parts())[1]
            assert isinstance(html, EmailMessage)
            name = re.sub(r"[^a-z0-9]+", "-", str(view["field"]).lower()).strip("-") or "chart"
            html.add_related(
                chart, "image", "png", cid=f"<{view['chart_id']}>", disposition="inline", filename=f"{name}.png"
            )
        return Mail(message_id, message)

    def digest(self, alerts: Sequence[Alert], now: datetime) -> Mail:
        """Make one mail of many transitions, in the order given."""
        listed = [self.view(alert) for alert in alerts[:DIGEST_LINES]]
        rest = Counter(alert.name for alert in alerts[DIGEST_LINES:])
        view = {
            "alerts": listed,
            "count": len(alerts),
            "rest": rest.total(),
            "rest_rules": ", ".join(f"{one_line(name)} ({count})" for name, count in rest.most_common()),
            "base": self._base,
            "language": self.words.language,
        }
        message = self._message(self.words("digest_subject", count=len(alerts)), "digest", view, now)
        identity = "-".join(sorted(transition_of(alert) for alert in alerts))
        message_id = self.message_id(
            "digest-" + hashlib.blake2b(identity.encode("utf-8", "replace"), digest_size=16).hexdigest()
        )
        message["Message-ID"] = message_id
        return Mail(message_id, message)

    def view(self, alert: Alert) -> dict[str, Any]:
        """Return what templates and subjects say of a transition, as texts."""
        words = self.words
        about = alert.metadata
        kind = str(about.get("transition", "resolved" if alert.is_resolved else "opened"))
        reason = str(about.get("reason", ""))
        unit = one_line(str(about.get("unit") or ""), 20)
        device = one_line(alert.sensor_name) or one_line(alert.device_id)
        index = one_line(str(about.get("index") or ""))
        label = one_line(alert.field_name)
        shown = one_line(str(about.get("display_name") or "")) or label or index
        silent = alert.math_operator == "no_data"
        level = "RESOLVED" if alert.is_resolved else alert.level
        value = alert.error_value
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        value_text = "" if value is None else words.quantity(value, unit) if is_number else one_line(text_of(value), 80)
        rule = one_line(alert.name) or one_line(alert.alarm_id)
        if silent and not alert.is_resolved:
            what = words("no_data", seconds=words.duration(float(alert.threshold or 0)))
        elif value_text:
            what = f"{label or shown} = {value_text}"
        else:
            what = label or shown or words("resolved" if alert.is_resolved else "opened")
        number = transition_of(alert).rpartition("-reminded-")[2]
        note = words("reminder", number=number) if reason == "still_open" and number.isdigit() else ""
        heading = (
            words("resolved")
            if alert.is_resolved
            else words("quiet_time_over" if reason == "quiet_time_over" else kind)
        )
        condition = words.condition(alert.math_operator, alert.threshold, unit)
        lasted = (alert.end_date - alert.start_date).total_seconds() if alert.end_date else None
        return {
            "subject": one_line(
                f"[{words(level)}] {device}: {what} ({', '.join(filter(None, (rule, note)))})", _SUBJECT_CHARS
            ),
            "language": words.language,
            "heading": heading,
            "level": words(alert.level),
            "badge": words(level),
            "colour": _RESOLVED_COLOUR if alert.is_resolved else _COLOURS[alert.level],
            "resolved": alert.is_resolved,
            "device": device,
            "device_id": one_line(alert.device_id),
            "field": shown,
            "index": index,
            "label": label,
            "value": value_text,
            "unit": unit,
            "what": what,
            "condition": one_line(condition),
            "rule": rule,
            "rule_id": one_line(alert.alarm_id),
            # Of the opening: what it says of the value is no longer so.
            "message": "" if alert.is_resolved else many_lines(alert.message),
            "note": note,
            "why": words(reason) if reason in _EXPLAINED else "",
            "start": words.time(alert.start_date),
            "end": words.time(alert.end_date) if alert.end_date else "",
            "lasted": words.duration(lasted) if lasted is not None else "",
            "at": words.time(alert.timestamp),
            "request_id": one_line(alert.request_id, 80),
            "device_url": f"{self._base}/?device={quote(alert.device_id, safe='', errors='replace')}",
            "alert_url": f"{self._base}/?alert={quote(alert.id, safe='', errors='replace')}",
            "chart_text": "",
            "chart_id": "",
        }

    def _chart_text(self, view: dict[str, Any], points: Sequence[tuple[datetime, float]], alert: Alert) -> str:
        words, unit = self.words, str(view["unit"])
        values = [value for _, value in points]
        text = words(
            "chart",
            field=view["field"],
            device=view["device"],
            start=words.time(points[0][0]),
            end=words.time(points[-1][0]),
            count=len(points),
            low=words.number(min(values)),
            high=words.quantity(max(values), unit),
            last=words.quantity(values[-1], unit),
        )
        if isinstance(alert.threshold, int | float) and alert.math_operator != "no_data":
            text += words("chart_threshold", threshold=words.quantity(alert.threshold, unit))
        return text

    def _message(self, subject: str, template: str, view: dict[str, Any], now: datetime) -> EmailMessage:
        message = EmailMessage(policy=_POLICY)
        message["From"] = self._from
        # Plain spaces: people search and filter by subject.
        text = one_line(subject.replace("\N{NO-BREAK SPACE}", " "), _SUBJECT_CHARS)
        # As it is, a text that looks like an encoded word would be decoded, line ends and all, and so add headers.
        message["Subject"] = Header(text, "utf-8").encode(maxlinelen=0) if "=?" in text else text
        message["Date"] = format_datetime(now)
        # RFC 3834: no vacation notice answers it; RFC 2369: how to get no more of them.
        message["Auto-Submitted"] = "auto-generated"
        message["X-Auto-Response-Suppress"] = "All"
        rule = quote(str(view.get("rule_id", "")), safe="", errors="replace")
        message["List-Unsubscribe"] = f"<mailto:{quote(self.sender, safe='@')}?subject=unsubscribe%20{rule}>"
        message.set_content(
            _wire(self._environment.get_template(f"{template}.txt.j2").render(view)), cte="quoted-printable"
        )
        html = self._environment.get_template(f"{template}.html.j2").render(view)
        message.add_alternative(_wire(html), subtype="html", cte="quoted-printable")
        # Last: what begins with Content- moves into the first part when a second one comes.
        message["Content-Language"] = self.words.language
        return message


_EXPLAINED: Final = frozenset({"data_is_back", "rule_changed", "rule_removed", "rule_switched_off", "not_applicable"})


def _wire(text: str) -> str:
    """Return text that UTF-8 can hold; a lone surrogate from a device's JSON becomes a question mark."""
    return text.encode("utf-8", "replace").decode()


def transition_of(alert: Alert) -> str:
    """Return the transition's id; for an alert that some other program wrote, one made of what it is."""
    found = alert.metadata.get("transition_id")
    if isinstance(found, str) and found:
        return found
    return f"{alert.id}-{'resolved' if alert.is_resolved else 'opened'}"
