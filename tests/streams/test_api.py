"""What the API makes of an acknowledgement."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

import streams.core  # noqa: F401  (the pages hang on the host app)
from streams.api import Ack, Refusal, action_of

NOW = datetime(2026, 1, 1, tzinfo=UTC)
OPEN: dict[str, Any] = {"id": "a1", "device_id": "d1", "is_resolved": False, "end_date": None}


def test_an_open_alert_is_acknowledged() -> None:
    """Who and why are kept, keyed by the alert's device."""
    made = action_of(OPEN, Ack(user="anna", comment="fan repaired"), NOW)
    assert (made.alert_id, made.device_id, made.user, made.comment) == ("a1", "d1", "anna", "fan repaired")


@pytest.mark.parametrize(
    ("alert", "user", "status", "pointer"),
    [(OPEN, "  ", 400, "/user"), ({**OPEN, "is_resolved": True, "end_date": NOW}, "anna", 409, None)],
)
def test_what_cannot_be_acknowledged_is_refused(
    alert: dict[str, Any], user: str, status: int, pointer: str | None
) -> None:
    """Nobody's word, and a word on an alert that is over, are answered with what is wrong."""
    with pytest.raises(Refusal) as raised:
        action_of(alert, Ack(user=user), NOW)
    assert (raised.value.status, raised.value.pointer or None) == (status, pointer)
