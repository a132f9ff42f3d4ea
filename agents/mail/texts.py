"""The words of alarm mails in English and French, and how each language writes numbers, times and durations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final, Literal
from zoneinfo import ZoneInfo

from devices.alarms.alerts import text_of

Language = Literal["en", "fr"]

_MONTHS: Final[Mapping[str, tuple[str, ...]]] = {
    "en": (
        *("January", "February", "March", "April", "May", "June"),
        *("July", "August", "September", "October", "November", "December"),
    ),
    "fr": (
        *("janvier", "février", "mars", "avril", "mai", "juin"),
        *("juillet", "août", "septembre", "octobre", "novembre", "décembre"),
    ),
}

_TEXTS: Final[Mapping[str, Mapping[str, str]]] = {
    "en": {
        "CRITICAL": "CRITICAL",
        "WARNING": "WARNING",
        "INFO": "INFO",
        "RESOLVED": "RESOLVED",
        "opened": "Alarm",
        "reminded": "Reminder: the alarm is still open",
        "quiet_time_over": "Alarm, held back until now",
        "resolved": "All is well again",
        "acknowledged": "Acknowledged",
        "reminder": "reminder {number}",
        "no_data": "no data for {seconds}",
        "changed": "changed to {value}",
        "device": "Device",
        "field": "Value",
        "value": "Measured",
        "condition": "Alarm when",
        "silence": "silent for {seconds}",
        "start": "Since",
        "end": "Until",
        "lasted": "Lasted",
        "rule": "Rule",
        "level": "Level",
        "request": "Request",
        "dashboard": "Open the device",
        "acknowledge": "Acknowledge",
        "why": "Why",
        "data_is_back": "The device is heard again.",
        "rule_changed": "The rule was changed; this alarm belongs to its former version.",
        "rule_removed": "The rule was removed.",
        "rule_switched_off": "The rule was switched off.",
        "not_applicable": "The rule no longer names this device.",
        "chart": "Chart of {field} of {device} from {start} to {end}: "
        "{count} values between {low} and {high}, last {last}.",
        "chart_threshold": " Threshold {threshold}.",
        "footer": "Sent by Headrace because the rule {rule} names this address.",
        "unsubscribe": "To get no more of these, ask whoever keeps the rules.",
        "digest_subject": "{count} alarm messages held back",
        "digest_title": "{count} alarm messages",
        "digest_intro": "More came than the rate limit lets through one by one. In the order in which they came:",
        "digest_more": "and {count} more: {rules}",
        "in": "within {low} to {high}",
        "in_set": "one of {values}",
        "outside": "outside {low} to {high}",
        "outside_set": "none of {values}",
        "changes": "it changes",
        "and": " and ",
        "colon": ": ",
    },
    "fr": {
        "CRITICAL": "CRITIQUE",
        "WARNING": "AVERTISSEMENT",
        "INFO": "INFO",
        "RESOLVED": "RÉSOLU",
        "opened": "Alarme",
        "reminded": "Rappel\N{NO-BREAK SPACE}: l’alarme est toujours ouverte",
        "quiet_time_over": "Alarme retenue jusqu’à présent",
        "resolved": "Tout est rentré dans l’ordre",
        "acknowledged": "Acquittée",
        "reminder": "rappel {number}",
        "no_data": "aucune donnée depuis {seconds}",
        "changed": "passé à {value}",
        "device": "Appareil",
        "field": "Grandeur",
        "value": "Mesuré",
        "condition": "Alarme si",
        "silence": "silencieux pendant {seconds}",
        "start": "Depuis",
        "end": "Jusqu’à",
        "lasted": "Durée",
        "rule": "Règle",
        "level": "Niveau",
        "request": "Requête",
        "dashboard": "Ouvrir l’appareil",
        "acknowledge": "Acquitter",
        "why": "Raison",
        "data_is_back": "L’appareil est de nouveau entendu.",
        "rule_changed": "La règle a été modifiée\N{NO-BREAK SPACE}; cette alarme relève de sa version précédente.",
        "rule_removed": "La règle a été supprimée.",
        "rule_switched_off": "La règle a été désactivée.",
        "not_applicable": "La règle ne vise plus cet appareil.",
        "chart": "Courbe de {field} de {device} du {start} au {end}\N{NO-BREAK SPACE}: "
        "{count} valeurs entre {low} et {high}, dernière {last}.",
        "chart_threshold": " Seuil {threshold}.",
        "footer": "Envoyé par Headrace parce que la règle {rule} désigne cette adresse.",
        "unsubscribe": "Pour ne plus rien recevoir, adressez-vous à qui tient les règles.",
        "digest_subject": "{count} messages d’alarme retenus",
        "digest_title": "{count} messages d’alarme",
        "digest_intro": "Il en est venu plus que la limite de débit n’en laisse passer. "
        "Dans l’ordre d’arrivée\N{NO-BREAK SPACE}:",
        "digest_more": "et {count} autres\N{NO-BREAK SPACE}: {rules}",
        "in": "entre {low} et {high}",
        "in_set": "l’un de {values}",
        "outside": "hors de {low} à {high}",
        "outside_set": "aucun de {values}",
        "changes": "changement",
        "and": " et ",
        "colon": "\N{NO-BREAK SPACE}: ",
    },
}


class Words:
    """One language and one time zone. Raises ``KeyError`` for a language that is not here."""

    def __init__(self, language: str, time_zone: str = "UTC") -> None:
        self.language = language
        self.zone = ZoneInfo(time_zone)
        self._texts = _TEXTS[language]
        self._months = _MONTHS[language]

    def __call__(self, key: str, **values: object) -> str:
        """Return the text of ``key`` with ``values`` filled in."""
        return self._texts[key].format(**values) if values else self._texts[key]

    def has(self, key: str) -> bool:
        """Tell whether there is such a text."""
        return key in self._texts

    def number(self, value: Any) -> str:
        """Return a value as this language writes it: decimals after a point or a comma."""
        text = text_of(value)
        plain = isinstance(value, float) and math.isfinite(value)
        return text.replace(".", ",") if plain and self.language == "fr" else text

    def quantity(self, value: Any, unit: str) -> str:
        """Return a value with its unit, which does not leave its number at the end of a line."""
        return f"{self.number(value)}\N{NO-BREAK SPACE}{unit}" if unit else self.number(value)

    def time(self, moment: datetime) -> str:
        """Return day, time and zone in words."""
        local = moment.astimezone(self.zone)
        day = f"{local.day} {self._months[local.month - 1]} {local.year}"
        between = ", " if self.language == "en" else " à "
        return f"{day}{between}{local:%H:%M:%S} {local.tzname()}"

    def duration(self, seconds: float) -> str:
        """Return a duration in its two largest units."""
        whole = max(0, round(seconds))
        units = (("d" if self.language == "en" else "j", 86400), ("h", 3600), ("min", 60), ("s", 1))
        parts = []
        for unit, size in units:
            count, whole = divmod(whole, size)
            if count:
                parts.append(f"{count}\N{NO-BREAK SPACE}{unit}")
        return " ".join(parts[:2]) or "0\N{NO-BREAK SPACE}s"

    def condition(self, operator: str, threshold: Any, unit: str) -> str:
        """Return what a rule waits for, in words."""
        if operator == "no_data":
            return self("silence", seconds=self.duration(float(threshold or 0)))
        if operator == "changed":
            return self("changes")
        if operator in ("in", "outside") and isinstance(threshold, list | tuple):
            if len(threshold) == 2 and all(isinstance(end, int | float) for end in threshold):
                low, high = self.number(threshold[0]), self.quantity(threshold[1], unit)
                return self(operator, low=low, high=high)
            return self(f"{operator}_set", values=", ".join(map(text_of, threshold)))
        return (
            f"{ {'>=': '≥', '<=': '≤', '!=': '≠', '==': '='}.get(operator, operator) } {self.quantity(threshold, unit)}"
        )
